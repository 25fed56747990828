"""Published runs as inputs of the cost model, and the fit of its constants to them.

Used by the tests of the calibration and by `benchmarks/planner.py`. The runs and their sources are in
`tests/data/planner_cases.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from elastictrain.planner.compute import Constants
from elastictrain.planner.cost import Place, step_time
from elastictrain.planner.memory import MemoryConstants, memory_of
from elastictrain.planner.model import Cut, Transformer, gated_width
from elastictrain.planner.profiles import DEVICES, LINKS

CASES = Path(__file__).parents[1] / "data" / "planner_cases.json"
A100 = Place(device=DEVICES["a100-80"], per_node=8, inside=LINKS["nvlink3"], across=LINKS["ib-hdr"])
SELENE = replace(A100, across=LINKS["ib-hdr"].model_copy(update={"crowd": 0.0}))
"""Megatron's machine: a fat tree of three levels in which nobody blocks another (section 5 of the paper)."""


GUESS = Constants(gemm=0.75, memory=0.5, attention=0.4, overhead_s=1e-3, inside=0.5, across=0.5)
COUNTED = MemoryConstants(activations=1.0, norm=8.0, plain=2.0, fused=2.0, logits=1.0, reserve_bytes=1e9)
"""Where the fits begin, and what they stay near where the runs say nothing: round numbers, no fit."""


@dataclass(frozen=True, slots=True)
class Run:
    """A published run. `seconds` of a step: None when it ran out of memory."""

    name: str
    group: tuple[str, int, int]
    model: Transformer
    cut: Cut
    seconds: float | None
    place: Place = A100


@cache
def cases() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CASES.read_text(encoding="utf-8"))
    return found


def layouts() -> list[Run]:
    """The runs of Hagemann et al. 2023: timed ones and those that ran out of memory."""
    return [
        Run(
            row["id"],
            (row["model"], row["sequence"], row["gpus"]),
            Transformer(
                layers=row["layers"], hidden=row["hidden"], heads=row["heads"], sequence=row["sequence"],
                vocab=row["vocab"], ffn=gated_width(row["hidden"]), gated=True, attention=row["attention"],
                fused_norm=row["fused_norm"], loss_over_shards=False,
            ),
            Cut(
                tensor=row["tp"], pipeline=row["pp"], workers=row["dp"], micro_batch=row["mbs"],
                micro_batches=row["gbs"] // (row["dp"] * row["mbs"]),
                checkpointing="every_layer" if row["checkpointing"] else "none",
                sequence_parallel=row["sequence_parallel"],
            ),
            row["step_s"],
        )
        for row in cases()["runs"]
        if row["set"] == "layouts"
    ]  # fmt: skip


def megatron() -> list[Run]:
    """Table 1 of Narayanan et al. 2021. Two model chunks per stage where there is a pipeline; the table's FLOP count
    (with the forward that is computed again) turns its TFLOP/s into seconds.
    """
    runs = []
    for row in cases()["runs"]:
        if row["set"] != "megatron":
            continue
        h, s, layers, vocab = row["hidden"], row["sequence"], row["layers"], row["vocab"]
        flops = 96 * row["gbs"] * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
        model = Transformer(
            layers=layers, hidden=h, heads=row["heads"], sequence=s, vocab=vocab, ffn=4 * h, attention="fused",
            fused_norm=True, tied=True,
        )  # fmt: skip
        cut = Cut(
            tensor=row["tp"], pipeline=row["pp"], workers=row["dp"], micro_batch=row["mbs"],
            micro_batches=row["gbs"] // (row["dp"] * row["mbs"]), checkpointing="every_layer", zero_stage=0,
            chunks=2 if row["pp"] > 1 else 1,
        )  # fmt: skip
        seconds = flops / (row["gpus"] * row["tflops_per_gpu"] * 1e12)
        runs.append(Run(row["id"], (row["model"], s, row["gpus"]), model, cut, seconds, SELENE))
    return runs


def predicted_s(run: Run, constants: Constants) -> float:
    return step_time(run.model, run.cut, run.place, constants=constants).total_s


def least_squares(
    residuals: Callable[[np.ndarray], np.ndarray], start: np.ndarray, rounds: int = 25, soft: float | None = 0.05
) -> np.ndarray:
    """Levenberg-Marquardt with weights that count large residuals less (the soft L1 loss), or without (`soft` None)."""
    at, damping = start.copy(), 1e-2

    def loss(r: np.ndarray) -> float:
        return float(np.sum(r**2 if soft is None else np.sqrt(1 + (r / soft) ** 2)))

    r = residuals(at)
    for _ in range(rounds):
        jacobian = np.stack([(residuals(at + 1e-4 * unit) - r) / 1e-4 for unit in np.eye(len(at))], axis=1)
        weights = np.ones_like(r) if soft is None else 1 / np.sqrt(1 + (r / soft) ** 2)
        square = jacobian.T @ (weights[:, None] * jacobian)
        step = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-9), -jacobian.T @ (weights * r))
        there = residuals(at + step)
        if loss(there) < loss(r):
            at, r, damping = at + step, there, damping / 4
            if float(np.max(np.abs(step))) < 1e-4:
                break
        else:
            damping *= 8
    return at


OVERHEAD = 3
"""The one of the constants that is no share, and may be above 1."""


def _free(values: Sequence[float]) -> np.ndarray:
    """Constants as numbers without bounds: a share of a peak lies between 0 and 1, whatever the runs say."""
    return np.array([math.log(v if n == OVERHEAD else v / (1 - v)) for n, v in enumerate(values)])


def _bounded(free: np.ndarray) -> Constants:
    return Constants(*(math.exp(z) if n == OVERHEAD else 1 / (1 + math.exp(-z)) for n, z in enumerate(free.tolist())))


def fit_times(runs: Sequence[Run], start: Constants = GUESS) -> Constants:
    """The six constants that explain the timed runs best."""
    timed = [run for run in runs if run.seconds is not None]
    truth = np.log([run.seconds for run in timed])

    def residuals(free: np.ndarray) -> np.ndarray:
        constants = _bounded(free)
        errors = np.array([math.log(predicted_s(run, constants)) for run in timed]) - truth
        # What the runs say nothing about stays where it began.
        return np.concatenate([errors, PRIOR * (free - _free(astuple(GUESS)))])

    return _bounded(least_squares(residuals, _free(astuple(start))))


def need_bytes(run: Run, constants: MemoryConstants) -> float:
    return memory_of(run.model, run.cut, A100.device, constants=constants).total


PRIOR = 0.02


FITTED_MEMORY = ("activations", "norm", "plain", "fused", "logits", "reserve_bytes")


def fit_memory(runs: Sequence[Run], start: MemoryConstants = COUNTED) -> MemoryConstants:
    """The six constants that tell best which runs fit, by the likelihood of a logistic distribution."""
    fitted = np.array([run.seconds is not None for run in runs])
    sign = np.where(fitted, 1.0, -1.0)
    there = A100.device.memory_bytes

    def made(logs: np.ndarray) -> MemoryConstants:
        return replace(start, **dict(zip(FITTED_MEMORY, np.exp(logs).tolist(), strict=True)))

    # The square root of minus the log likelihood of every run, so that the sum of squares is what is made small.
    def residuals(logs: np.ndarray) -> np.ndarray:
        constants = made(logs)
        z = np.array([(there - need_bytes(run, constants)) / 3e9 for run in runs])
        prior = 0.3 * (logs - np.log([getattr(start, name) for name in FITTED_MEMORY]))
        return np.concatenate([np.sqrt(np.logaddexp(0.0, -sign * z)), prior])

    begin = np.log([getattr(start, name) for name in FITTED_MEMORY])
    return made(least_squares(residuals, begin, rounds=15, soft=None))


def ranks(values: Sequence[float]) -> np.ndarray:
    """What is equal (but for rounding) shares the mean of its ranks."""
    each = np.asarray(values)
    order = np.argsort(each, kind="stable")
    first = np.concatenate([[True], np.diff(each[order]) > 1e-9 * np.abs(each[order][1:])])
    tied = np.cumsum(first) - 1
    places = np.arange(len(order))
    means = np.bincount(tied, places) / np.bincount(tied)
    found = np.empty(len(order))
    found[order] = means[tied]
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def groups(runs: Sequence[Run]) -> dict[tuple[str, int, int], list[Run]]:
    found: dict[tuple[str, int, int], list[Run]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(run)
    return found


def regret(runs: Sequence[Run], seconds: Sequence[float]) -> float:
    """How much longer the run takes that is predicted to be best than the one that is."""
    truth = [run.seconds or math.inf for run in runs]
    return truth[int(np.argmin(seconds))] / min(truth) - 1


def cephalo_tables() -> list[list[float]]:
    """Milliseconds of a layer by samples for the devices of Cephalo's example, forward twice (activations are computed
    again) and backward once; no samples cost nothing.
    """
    found = cases()["cephalo"]

    def table(device: str) -> list[float]:
        times = found["latencies_ms"][device]
        (a, b), (c, d) = times["forward"], times["backward"]
        return [0.0, *(2 * (a * n + b) + c * n + d for n in range(1, found["samples"] + 1))]

    return [table(device) for device in found["devices"]]
