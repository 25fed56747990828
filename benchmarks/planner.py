"""The planner: against brute force, against published runs (leaving one group out), and its own speed.

Times are processor seconds of one process on one core. The published runs and their sources are in
tests/data/planner_cases.json; the fit has six constants for times and six for memory, and knows nothing of the group
that it is asked about.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import common
import published
from elastictrain.planner.compute import DEFAULTS
from elastictrain.planner.model import Transformer
from elastictrain.planner.plan import Task
from elastictrain.planner.profiles import parse_cluster
from elastictrain.planner.search import search
from elastictrain.planner.split import split_affine, split_tables
from tests.support.planner_cases import (
    A100,
    Run,
    cephalo_tables,
    fit_memory,
    fit_times,
    groups,
    layouts,
    megatron,
    need_bytes,
    predicted_s,
    rank_correlation,
    regret,
)
from tests.support.planner_instances import CHECKS, check

INSTANCES = 10_000
MODEL = Transformer(layers=40, hidden=5120, heads=40, sequence=2048, vocab=32000, ffn=13824, gated=True)
CLUSTERS: dict[int, tuple[list[dict[str, Any]], float]] = {
    128: (
        [
            {"device": "a100-80", "nodes": 8, "per_node": 8},
            {"device": "a100-40", "nodes": 4, "per_node": 8},
            {"device": "l40s", "nodes": 4, "per_node": 8, "intra": "pcie4", "inter": "roce-100", "island": "b"},
        ],
        1.0,
    ),
    1024: (
        [
            {"device": "h100", "nodes": 64, "per_node": 8, "intra": "nvlink4", "inter": "ib-ndr"},
            {"device": "a100-80", "nodes": 48, "per_node": 8},
            {"device": "l40s", "nodes": 16, "per_node": 8, "intra": "pcie4", "inter": "roce-100", "island": "b"},
        ],
        10.0,
    ),
}


PCIE = {"per_node": 8, "intra": "pcie4", "inter": "eth-100", "island": "b"}
MIXES: dict[str, list[dict[str, Any]]] = {
    "h100, a100-40, t4": [
        {"device": "h100", "nodes": 4, "per_node": 8},
        {"device": "a100-40", "nodes": 6, "per_node": 8},
        {"device": "t4", "nodes": 6, "per_node": 8, "intra": "pcie3", "inter": "eth-25", "island": "b"},
    ],
    "h100, a100-80, l4": [
        {"device": "h100", "nodes": 4, "per_node": 8, "intra": "nvlink4", "inter": "ib-ndr"},
        {"device": "a100-80", "nodes": 6, "per_node": 8},
        {"device": "l4", "nodes": 6, **PCIE},
    ],
}
"""Of 128 devices, where memory is scarce for the larger ones of these models: layers, hidden, lanes."""
MIXED_MODELS = ((40, 5120, 512), (64, 8192, 512), (96, 12288, 256))
MORE_MIXES: dict[str, list[dict[str, Any]]] = {
    "h200, h100, a100-80, l40s": [
        {"device": "h200", "nodes": 2, "per_node": 8, "intra": "nvlink4", "inter": "ib-ndr"},
        {"device": "h100", "nodes": 4, "per_node": 8, "intra": "nvlink4", "inter": "ib-ndr"},
        {"device": "a100-80", "nodes": 6, "per_node": 8},
        {"device": "l40s", "nodes": 4, **PCIE},
    ],
    "a100-40, l4, a10g": [
        {"device": "a100-40", "nodes": 4, "per_node": 8},
        {"device": "l4", "nodes": 6, **PCIE},
        {"device": "a10g", "nodes": 6, **PCIE},
    ],
    "nodes of 4 on three islands": [
        {"device": "h100-pcie", "nodes": 8, "per_node": 4, "intra": "pcie5", "inter": "roce-100"},
        {"device": "a6000", "nodes": 12, **PCIE, "per_node": 4},
        {"device": "rtx3090", "nodes": 12, **PCIE, "per_node": 4, "inter": "eth-25", "island": "c"},
    ],
    "a100-80, l4": [{"device": "a100-80", "nodes": 8, "per_node": 8}, {"device": "l4", "nodes": 8, **PCIE}],
    "lower limits, a slow group": [
        {"device": "h100", "nodes": 5, "per_node": 8, "memory_limit_bytes": 40e9},
        {"device": "a100-80", "nodes": 5, "per_node": 8, "memory_limit_bytes": 30e9},
        {"device": "a100-40", "nodes": 6, "per_node": 8, "slowdown": 1.3},
    ],
}
MORE_MODELS: dict[str, tuple[Transformer, int, int]] = {
    "24 x 4096, gated": (
        Transformer(layers=24, hidden=4096, heads=32, sequence=4096, vocab=32000, ffn=11008, gated=True), 1024, 2,
    ),
    "40 x 5120, unfused": (
        Transformer(layers=40, hidden=5120, heads=40, sequence=2048, vocab=51200, ffn=20480, attention="fused",
                    fused_norm=False), 256, 8,
    ),
    "32 x 4096, 32k tokens": (
        Transformer(layers=32, hidden=4096, heads=32, sequence=32768, vocab=128256, ffn=14336, gated=True), 96, 1,
    ),
    "80 x 8192, gated": (
        Transformer(layers=80, hidden=8192, heads=64, sequence=4096, vocab=128256, ffn=28672, gated=True), 300, 4,
    ),
}  # fmt: skip
"""Models, lanes, sequences of a lane."""


def processor_s(work: Callable[[], Any], rounds: int = 1) -> tuple[float, Any]:
    """The median of a few rounds, and the last answer."""
    taken, found = [], None
    for _ in range(rounds):
        begun = time.process_time()
        found = work()
        taken.append(time.process_time() - begun)
    return common.median(taken), found


def at_most(results: common.Results, name: str, value: float, target: float, unit: str = "") -> None:
    results.figure(name, value, f"{target:g}{unit} or less", common.verdict(value, target, at_most=True))


def at_least(results: common.Results, name: str, value: float, target: float) -> None:
    results.figure(name, value, f"{target:g} or more", common.verdict(value, target, at_most=False))


def brute_force(results: common.Results, instances: int) -> None:
    equal = tried = 0
    for kind in CHECKS:
        count = -(-instances // len(CHECKS))
        taken, found = processor_s(lambda kind=kind, count=count: sum(check(kind, seed) for seed in range(count)))  # type: ignore[misc]
        results.row(what=f"brute force: {kind}", cases=count, value=f"{found} equal", processor_s=taken)
        equal, tried = equal + found, tried + count
    at_least(results, f"random instances equal to brute force, of {tried:,}", equal, tried)


def cephalo(results: common.Results) -> None:
    tables = cephalo_tables()
    taken, found = processor_s(lambda: split_tables(64, tables), 9)
    even = max(table[16] for table in tables)
    results.row(what="Cephalo's example", cases=1, value=f"{found.makespan:.1f} against {even:.1f} ms a layer, "
                f"{list(found.parts)}", processor_s=taken)  # fmt: skip
    close = abs(found.makespan - 342.3) < 0.1 and abs(even - 958.8) < 0.1
    results.figure("Cephalo's example, ms a layer", f"{found.makespan:.1f} / {even:.1f}", "342 / 959",
                   "reached" if close else "missed")  # fmt: skip
    at_most(results, "Cephalo's example, ms to plan", 1e3 * taken, 5)


def published_times(results: common.Results, runs: list[Run]) -> None:
    timed = [run for run in runs if run.seconds is not None]
    found: dict[str, float] = {}
    regrets, correlations = [], []
    for group, members in groups(timed).items():
        taken, constants = processor_s(lambda group=group: fit_times([r for r in timed if r.group != group]))  # type: ignore[misc]
        seconds = [predicted_s(run, constants) for run in members]
        found |= {run.name: second for run, second in zip(members, seconds, strict=True)}
        truth = [run.seconds or 0.0 for run in members]
        regrets.append(regret(members, seconds))
        correlations.append(rank_correlation(truth, seconds))
        error = float(np.mean([abs(a / b - 1) for a, b in zip(seconds, truth, strict=True)]))
        value = f"error {error:.1%}, rank correlation {correlations[-1]:.3f}, regret {regrets[-1]:.1%}"
        results.row(what=f"left out: {' '.join(map(str, group))}", cases=len(members), value=value, processor_s=taken)
    truth = [run.seconds or 0.0 for run in timed]
    seconds = [found[run.name] for run in timed]
    at_most(results, "Aleph Alpha runs, one group left out: MAPE, percent",
            100 * float(np.mean([abs(a / b - 1) for a, b in zip(seconds, truth, strict=True)])), 6)  # fmt: skip
    at_least(results, "... rank correlation over all runs", rank_correlation(truth, seconds), 0.95)
    at_least(results, "... rank correlation, mean of the groups", float(np.mean(correlations)), 0.95)
    sizes = [len(members) for members in groups(timed).values()]
    results.figure("... rank correlation, mean of the groups by their sizes",
                   float(np.average(correlations, weights=sizes)), "none", "printed")  # fmt: skip
    at_most(results, "... regret of the best pick, mean of the groups, percent", 100 * float(np.mean(regrets)), 1)
    published.all_of_it(results, timed, found)


def published_memory(results: common.Results, runs: list[Run]) -> None:
    right = false_fits = 0
    for group, members in groups(runs).items():
        taken, constants = processor_s(lambda group=group: fit_memory([r for r in runs if r.group != group]))  # type: ignore[misc]
        fits = [need_bytes(run, constants) < A100.device.memory_bytes for run in members]
        hits = sum(fit == (run.seconds is not None) for fit, run in zip(fits, members, strict=True))
        wrong = sum(fit and run.seconds is None for fit, run in zip(fits, members, strict=True))
        results.row(what=f"memory, left out: {' '.join(map(str, group))}", cases=len(members),
                    value=f"{hits} right, {wrong} false fits", processor_s=taken)  # fmt: skip
        right, false_fits = right + hits, false_fits + wrong
    at_least(results, "Aleph Alpha runs, one group left out: out of memory told, percent", 100 * right / len(runs), 97)
    oom = sum(run.seconds is None for run in runs)
    results.figure(f"... said to fit and did not, of {oom}", false_fits, "few", "printed")


def megatron_table(results: common.Results) -> None:
    runs = megatron()
    taken, constants = processor_s(lambda: fit_times(runs))
    errors = [predicted_s(run, constants) / (run.seconds or 1.0) - 1 for run in runs]
    results.row(
        what="Megatron table 1", cases=len(runs), value=" ".join(f"{e:+.1%}" for e in errors), processor_s=taken
    )
    at_most(results, "Megatron table 1, six constants: largest error, percent", 100 * max(map(abs, errors)), 10)


def speed(results: common.Results, rounds: int) -> None:
    for size, (nodes, target) in CLUSTERS.items():
        cluster = parse_cluster({"groups": nodes, "between": "eth-100"})
        task = Task(model=MODEL, lanes=4 * size, lane_batch=4)
        taken, found = processor_s(lambda task=task, cluster=cluster: search(task, cluster), rounds)  # type: ignore[misc]
        value = f"{found.plans[0].step_s:.3g} s a step, {found.examined} of {found.candidates} candidates worked out"
        results.row(what=f"plan for {size} devices of 3 kinds", cases=1, value=value, processor_s=taken)
        at_most(results, f"plan for {size:,} mixed devices, processor s", taken, target)
        at_most(results, f"... gap to the bound, {size:,} devices, percent", 100 * found.gap, 3)
    mixes(results)
    random = np.random.default_rng(7)
    each = (random.choice([1.0, 2.0, 4.0], 1024) * random.uniform(0.9, 1.1, 1024)).tolist()
    ones, before = [1] * 1024, [8] * 1024
    taken, found = processor_s(lambda: split_affine(8192, [0.0] * 1024, each, least=ones, before=before), 51)
    value = f"makespan {found.makespan:.4g}, bound {found.bound:.4g}"
    results.row(what="lanes over 1,024 workers again", cases=51, value=value, processor_s=taken)
    at_most(results, "lanes over 1,024 workers again, ms", 1e3 * taken, 2)


def mixes(results: common.Results) -> None:
    """How much the search's own time depends on what is asked."""
    asked = []
    for name, nodes in MIXES.items():
        for layers, hidden, lanes in MIXED_MODELS:
            model = Transformer(layers=layers, hidden=hidden, heads=hidden // 128, sequence=4096, vocab=51200,
                                ffn=4 * hidden)  # fmt: skip
            asked.append((f"{name}, {layers} x {hidden}", nodes, Task(model=model, lanes=lanes, lane_batch=4)))
    gaps: list[float] = []
    first = [_planned(results, gaps, *one) for one in asked]
    at_most(results, "six more mixes of 128 devices, processor s, median", common.median(first), 1)
    at_most(results, "... worst", max(first), 1)
    more = [
        _planned(results, gaps, f"{name}; {of}", nodes, Task(model=model, lanes=lanes, lane_batch=batch))
        for name, nodes in MORE_MIXES.items()
        for of, (model, lanes, batch) in MORE_MODELS.items()
    ]
    at_most(results, "twenty others, processor s, median", common.median(more), 1)
    at_most(results, "... worst of the twenty", max(more), 1)
    at_most(results, "... largest gap to the bound of the 26, percent", 100 * max(gaps), 3)
    quick = sum(seconds <= 1 for seconds in first + more)
    results.figure("... of the 26 within a second", quick, "26", "reached" if quick == 26 else "missed")


def _planned(results: common.Results, gaps: list[float], what: str, nodes: list[dict[str, Any]], task: Task) -> float:
    """Processor seconds of one plan, the median of three; its gap goes into `gaps`."""
    cluster = parse_cluster({"groups": nodes, "between": "eth-100"})
    taken, found = processor_s(lambda: search(task, cluster), 3)
    worked = f"{found.examined} of {found.candidates} candidates worked out"
    results.row(what=f"plan for 128: {what}", cases=1, processor_s=taken,
                value=f"{found.plans[0].step_s:.3g} s a step, gap {100 * found.gap:.2g}%, {worked}")  # fmt: skip
    gaps.append(found.gap)
    return taken


def main() -> None:
    options = common.arguments(__doc__)
    results = common.Results("planner", "The planner against brute force and published runs", options)
    brute_force(results, INSTANCES // 20 if options.quick else INSTANCES)
    cephalo(results)
    runs = layouts()
    published_times(results, runs)
    if not options.quick:
        published_memory(results, runs)
    megatron_table(results)
    speed(results, 1 if options.quick else 5)
    results.raw["defaults"] = DEFAULTS
    megatron_note = (
        "Megatron table 1: two chunks per stage are assumed where there is a pipeline, and a network in which nobody "
        "blocks another one (crowd 0; the paper describes a full fat tree); six constants for ten rows show "
        "that the model can express the table, not that it would foresee it."
    )
    crowd_note = (
        "The exponent with which bandwidth falls with the number of nodes (Link.crowd, 0.75) was chosen on the same "
        "published runs, and is not left out with a group."
    )
    results.notes += [
        "Aleph Alpha's runs: Hagemann et al. 2023, groups by model, sequence length and number of devices.",
        megatron_note,
        crowd_note,
    ]
    results.write()


if __name__ == "__main__":
    main()
