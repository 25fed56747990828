"""How fast a run would have been without each worker's slowness. Pure.

After "Understanding Stragglers in Large Model Training Using What-if Analysis" (OSDI 2025): durations are taken apart
by operation and worker, the timeline is put together again with some of them idealised, and the difference of the two
is what they have cost; once by taking one worker's slowness away (`without_s`), once by leaving only that (`alone_s`).

The model of a data-parallel step: every worker waits for its data, computes its lanes, does what else there is, and
comes to the exchange; who comes last makes the others wait; then follow transfer and vote. So a step takes
`max_i before_i + transfer + vote`. What is idealised:

- *compute*: seconds per unit of work, where they stay above what the peers need for longer than a moment. Work is
  lanes, or lanes and the lengths of their sequences where those differ: a worker with more to do is not slow;
- *hiccup*: a single step that took much longer than the worker's steps around it;
- *collector*: Python's garbage collector; *data*: waiting for batches longer than the peers; *host*: all else before
  the exchange;
- *link* (of all together): a transfer that took longer than the run's usual one.

Steps with a checkpoint, an evaluation or a compilation are left out: they say nothing of speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from elastictrain.errors import ConfigError
from elastictrain.stragglers.signals import dealt

Floats = npt.NDArray[np.float64]
Cause = Literal["compute", "hiccup", "collector", "data", "host"]
CAUSES: tuple[Cause, ...] = ("compute", "hiccup", "collector", "data", "host")
Against = Literal["peers", "itself"]
FLOOR = 1.03
"""A factor below this is no slowness: workers that are alike differ by as much."""
SPIKE = 1.3
"""A step is a hiccup when it takes so many times as long as the steps around it."""
AROUND = 7
"""Steps that a lasting factor is the median of."""
VARIES = 0.01
"""Lengths of sequences count as work when the mean of a worker's differs from that of others by this share."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Steps x workers, seconds; NaN where a worker was not there. `steps`: their numbers; `workers`: theirs.

    `before_s`: from the last vote to the exchange, of which `data_s` waiting for batches, `compute_s` computing and
    `collected_s` of that in Python's garbage collector. `exchange_s`: waiting for others included. `vote_s`.
    `lanes`: that each has computed, `dealt` those that were dealt out to it (not the same where lanes are shared).
    """

    steps: tuple[int, ...]
    workers: tuple[int, ...]
    lanes: Floats
    compute_s: Floats
    data_s: Floats
    before_s: Floats
    exchange_s: Floats
    vote_s: Floats
    collected_s: Floats
    tokens: Floats
    squares: Floats
    dealt: Floats


@dataclass(frozen=True, slots=True)
class Cost:
    """What a worker's slowness has cost the run. `without_s`: seconds saved if only this worker had been healthy.
    `alone_s`: seconds lost if only this one had not been. `causes`: its own seconds too many, the largest first.
    `steps`: of how many.
    """

    worker: int
    without_s: float
    alone_s: float
    causes: tuple[tuple[Cause, float], ...]
    steps: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds of all counted steps: as they were, without anybody's slowness, and if also the work had been even.

    `slowness[s, w]`: how many times as long as when healthy the worker took before the exchange (NaN: not there).
    `step_s`, `healthy_s`: of every step. `left_out`: steps that say nothing of speed.
    """

    steps: tuple[int, ...]
    workers: tuple[int, ...]
    actual_s: float
    healthy_s: float
    even_s: float
    link_s: float
    costs: tuple[Cost, ...]
    slowness: Floats
    step_s: Floats
    healthy_step_s: Floats
    left_out: int

    @property
    def slowdown(self) -> float:
        return self.actual_s / self.healthy_s


def timings_of(steps: Sequence[tuple[int, Sequence[int], Any]], excused: int) -> tuple[Timings, int]:
    """Records by step as matrices, and how many steps were left out.

    `steps`: (number, workers, records) with fields `lanes`, `compute_s`, `data_s`, `arrive_s`, `exchange_s`, `vote_s`,
    `collected_s`, `tokens`, `squares`, `flags`. Left out are steps with a flag of `excused`, and steps of which a
    worker said what cannot be. Raises ConfigError when none is left.
    """
    counted = [(number, workers, records) for number, workers, records in steps if _counts(records, excused)]
    if not counted:
        raise ConfigError(
            f"of {len(steps)} recorded steps none can be counted: all were beside a checkpoint, an evaluation or a "
            "compilation, or their times cannot be true"
        )
    workers = tuple(sorted({worker for _, there, _ in counted for worker in there}))
    column = {worker: n for n, worker in enumerate(workers)}
    names = ("lanes", "compute_s", "data_s", "arrive_s", "exchange_s", "vote_s", "collected_s", "tokens", "squares")
    made = {name: np.full((len(counted), len(workers)), np.nan) for name in (*names, "dealt")}
    for row, (_, there, records) in enumerate(counted):
        places = [column[worker] for worker in there]
        for name in names:
            made[name][row, places] = records[name]
        made["dealt"][row, places] = dealt(records)
    made["before_s"] = made.pop("arrive_s")
    return Timings(tuple(number for number, _, _ in counted), workers, **made), len(steps) - len(counted)


def _counts(records: Any, excused: int) -> bool:
    if np.any(records["flags"] & excused):
        return False
    for name in ("compute_s", "data_s", "arrive_s", "exchange_s", "vote_s", "collected_s", "tokens", "squares"):
        values = np.asarray(records[name], dtype=np.float64)
        if not np.all(np.isfinite(values) & (values >= 0)):
            return False
    return bool(np.all(records["lanes"] > 0) and np.all(records["compute_s"] > 0))


def what_if(timings: Timings, *, left_out: int = 0, against: Against = "peers") -> Answer:
    """The answer. `against`: what is healthy for a worker, what its peers do in the same step, or what it itself does
    in most steps (for devices of several kinds, of which the slow ones are not ill).
    """
    before = np.maximum(timings.before_s, timings.compute_s + timings.data_s)
    work = work_of(timings)
    excess = _excess(timings, before, work, against)
    healthy = before - sum(excess.values())
    transfer = _transfer(timings, before)
    usual = np.minimum(transfer, np.median(transfer))
    vote = np.nanmin(timings.vote_s, axis=1)
    actual_step = np.nanmax(before, axis=1) + transfer + vote
    healthy_step = np.nanmax(healthy, axis=1) + usual + vote
    lightest = np.nanmean(work, axis=1, keepdims=True) / work
    pace = timings.compute_s - timings.collected_s - excess["compute"] - excess["hiccup"]
    even = healthy - np.maximum(pace, 0.0) * np.maximum(1.0 - lightest, 0.0)
    even_step = np.nanmax(even, axis=1) + usual + vote
    return Answer(
        timings.steps, timings.workers, float(actual_step.sum()), float(healthy_step.sum()),
        float(even_step.sum()), float((transfer - usual).sum()), _costs(timings, before, healthy, excess),
        before / healthy, actual_step, healthy_step, left_out,
    )  # fmt: skip


def work_of(timings: Timings) -> Floats:
    """Work of every worker and step, in lanes of usual length; shape [steps, workers].

    Where lengths differ, seconds per worker are explained by lanes, tokens and squares of lengths together: the best of
    all choices of these three with no negative part.
    """
    lanes = timings.lanes
    there = ~np.isnan(lanes)
    tokens, squares = (np.nan_to_num(part) for part in (timings.tokens, timings.squares))
    if not tokens.any():
        return lanes
    per_lane = np.where(there, tokens / np.where(there, lanes, 1.0), np.nan)
    if float(np.nanstd(per_lane) / np.nanmean(per_lane)) < VARIES:
        return lanes
    total = float(np.nansum(lanes))
    columns = [lanes, tokens * (total / tokens.sum())]
    if squares.any():
        columns.append(squares * (total / squares.sum()))
    seconds = timings.compute_s / _own_pace(timings)
    features = np.stack([column[there] for column in columns], axis=1)
    shares = _no_negative(features, seconds[there])
    found = sum(share * column for share, column in zip(shares, columns, strict=True))
    return np.where(there, np.maximum(found / sum(shares), 1e-9), np.nan)


def _own_pace(timings: Timings) -> Floats:
    """Each worker's usual seconds per token: so that a slow one does not bend the fit."""
    return np.asarray(np.nanmedian(timings.compute_s / np.maximum(timings.tokens, 1.0), axis=0, keepdims=True))


def _no_negative(features: Floats, target: Floats) -> list[float]:
    """Least squares with no negative part, by trying every choice of the columns."""
    width = features.shape[1]
    best: tuple[float, list[float]] | None = None
    for size in range(1, width + 1):
        for chosen in combinations(range(width), size):
            found = np.linalg.lstsq(features[:, chosen], target, rcond=None)[0]
            if (found < 0).any() or not found.sum() > 0:
                continue
            loss = float(((features[:, chosen] @ found - target) ** 2).sum())
            if best is None or loss < best[0] * (1 - 1e-9):
                parts = [0.0] * width
                for column, part in zip(chosen, found.tolist(), strict=True):
                    parts[column] = part
                best = loss, parts
    return best[1] if best is not None else [1.0] + [0.0] * (width - 1)


def _excess(timings: Timings, before: Floats, work: Floats, against: Against) -> dict[Cause, Floats]:
    """Seconds too many of every worker and step, by cause."""
    collected = np.minimum(timings.collected_s, timings.compute_s)
    collected = np.where(collected > (FLOOR - 1) * timings.compute_s, collected, 0.0)
    collected = np.where(np.isnan(before), np.nan, collected)
    pace = (timings.compute_s - collected) / work
    usual = _usual(pace, against)
    lasting = np.maximum(_rolling(pace / usual), 1.0)
    lasting = np.where(lasting < FLOOR, 1.0, lasting)
    spike = pace / usual / lasting
    spike = np.where(spike < SPIKE, 1.0, spike)
    seconds = timings.compute_s - collected
    without_spike = seconds / spike
    found: dict[Cause, Floats] = {
        "compute": without_spike * (1 - 1 / lasting), "hiccup": seconds - without_spike, "collector": collected,
    }  # fmt: skip
    least = (FLOOR - 1) * np.nanmedian(before, axis=1, keepdims=True)
    host = np.maximum(before - timings.compute_s - timings.data_s, 0.0)
    for cause, waited in (("data", timings.data_s), ("host", host)):
        more = np.maximum(waited - _usual(waited, against), 0.0)
        found[cause] = np.where(more < least, 0.0, more) + 0.0 * before  # type: ignore[index]
    return found


def _usual(values: Floats, against: Against) -> Floats:
    """What is healthy: the lower median of all workers in the step, or of all steps of the worker."""
    if against == "itself":
        return np.broadcast_to(np.nanmedian(values, axis=0, keepdims=True), values.shape)
    return np.broadcast_to(np.nanquantile(values, 0.5, axis=1, keepdims=True, method="lower"), values.shape)


def _rolling(values: Floats) -> Floats:
    """The median of the steps around each, worker by worker; where a worker was not there, NaN."""
    half = AROUND // 2
    padded = np.pad(values, ((half, half), (0, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, AROUND, axis=0)
    there = ~np.isnan(values)
    found = np.full(values.shape, np.nan)
    found[there] = np.nanmedian(windows[there], axis=-1)
    return found


def _transfer(timings: Timings, before: Floats) -> Floats:
    """Seconds of data in the exchange, by step: what is left of it after waiting for the last one to come."""
    last = np.nanmax(before, axis=1, keepdims=True)
    return np.asarray(np.nanmin(np.maximum(timings.exchange_s - (last - before), 0.0), axis=1))


def _costs(timings: Timings, before: Floats, healthy: Floats, excess: dict[Cause, Floats]) -> tuple[Cost, ...]:
    filled, well = np.nan_to_num(before, nan=-np.inf), np.nan_to_num(healthy, nan=-np.inf)
    actual, ideal = filled.max(axis=1), well.max(axis=1)
    found = []
    for column, worker in enumerate(timings.workers):
        there = ~np.isnan(before[:, column])
        mine = {cause: float(np.nansum(seconds[:, column])) for cause, seconds in excess.items()}
        if not any(mine.values()):
            continue
        without = np.maximum(_largest_but(filled, column), well[:, column])
        alone = np.maximum(_largest_but(well, column), filled[:, column])
        causes = sorted(((c, s) for c, s in mine.items() if s > 0), key=lambda part: -part[1])
        slow = np.sum([np.nan_to_num(seconds[:, column]) for seconds in excess.values()], axis=0)
        found.append(
            Cost(worker, float((actual - without)[there].sum()), float((alone - ideal)[there].sum()), tuple(causes),
                 int((slow > 0).sum()))
        )  # fmt: skip
    return tuple(sorted(found, key=lambda cost: (-max(cost.without_s, cost.alone_s), cost.worker)))


def _largest_but(values: Floats, column: int) -> Floats:
    """The maximum of each row without one column."""
    rest = np.delete(values, column, axis=1)
    return np.asarray(rest.max(axis=1)) if rest.shape[1] else np.full(len(values), -np.inf)
