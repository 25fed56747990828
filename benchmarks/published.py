"""Of `planner.py`: what the published runs themselves say about how well they can be foreseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np

import common
from elastictrain.planner.memory import MemoryConstants
from tests.support.planner_cases import A100, Run, fit_times, groups, need_bytes, predicted_s, rank_correlation


def all_of_it(results: common.Results, timed: list[Run], found: dict[str, float]) -> None:
    """`found`: the seconds of each run, foreseen without its group."""
    contradictions(results, timed, found)
    own_constants(results, timed)
    noise(results, timed)
    nearly_full(results, timed, found)
    left_out_otherwise(results, timed)


def own_constants(results: common.Results, timed: list[Run]) -> None:
    """How well the model could rank a group if its six constants were fitted to that group itself; and how near each
    other its runs are.
    """
    found = []
    for group, members in groups(timed).items():
        constants = fit_times(members)
        truth = [run.seconds or 0.0 for run in members]
        found.append(rank_correlation(truth, [predicted_s(run, constants) for run in members]))
        apart = [max(a, b) / min(a, b) - 1 for a, b in combinations(truth, 2)]
        near = [sum(share <= limit for share in apart) / len(apart) for limit in (0.01, 0.05)]
        value = f"rank correlation {found[-1]:.3f}; {near[0]:.0%} of the pairs within 1%, {near[1]:.0%} within 5%"
        results.row(what=f"fitted to itself: {' '.join(map(str, group))}", cases=len(members), value=value)
    results.figure("... rank correlation, mean of the groups, with constants fitted to each group itself",
                   float(np.mean(found)), "none", "printed")  # fmt: skip


OTHERWISE: dict[str, Callable[[Run], object]] = {
    "model": lambda run: run.group[0],
    "sequence length": lambda run: run.group[1],
    "number of devices": lambda run: run.group[2],
    "tensor parallelism": lambda run: run.cut.tensor,
    "stages": lambda run: run.cut.pipeline,
    "attention": lambda run: run.model.attention,
}


def left_out_otherwise(results: common.Results, timed: list[Run]) -> None:
    """All runs of a model, a length, a number of devices, ... foreseen from the others."""
    truth = np.array([run.seconds for run in timed])
    for name, key in OTHERWISE.items():
        seconds: dict[str, float] = {}
        for value in {key(run) for run in timed}:
            constants = fit_times([run for run in timed if key(run) != value])
            seconds |= {run.name: predicted_s(run, constants) for run in timed if key(run) == value}
        apart = np.abs(np.array([seconds[run.name] for run in timed]) / truth - 1)
        ranked = [rank_correlation([run.seconds or 0.0 for run in members], [seconds[run.name] for run in members])
                  for members in groups(timed).values()]  # fmt: skip
        results.row(what=f"left out by {name}", cases=len(timed),
                    value=f"error {float(apart.mean()):.1%}, at most {float(apart.max()):.0%}, "
                    f"rank correlation, mean of the groups, {float(np.mean(ranked)):.3f}")  # fmt: skip


NOISES = (0.01, 0.02, 0.04)
DRAWS = 200


def noise(results: common.Results, timed: list[Run]) -> None:
    """How well even the truth would rank runs that were measured with noise, and how much noise there is: with one
    device to a tensor group, sequence parallelism does nothing, so such twins measure the same thing twice.
    """
    twin = {(run.group, run.model, replace(run.cut, sequence_parallel=False)): run for run in timed
            if run.cut.tensor == 1 and run.cut.sequence_parallel}  # fmt: skip
    apart = [
        abs((other.seconds or 0.0) / (run.seconds or 1.0) - 1)
        for run in timed
        if run.cut.tensor == 1 and not run.cut.sequence_parallel
        and (other := twin.get((run.group, run.model, run.cut))) is not None
    ]  # fmt: skip
    worst = max(apart, default=0.0)
    results.row(what="published: twins that do the same", cases=len(apart),
                value=f"{float(np.median(apart or [0.0])):.1%} apart in the median, {worst:.1%} at most")  # fmt: skip
    random = np.random.default_rng(3)
    for share in NOISES:
        means = {}
        for group, members in groups(timed).items():
            truth = np.array([run.seconds for run in members])
            drawn = [rank_correlation(truth, truth * np.exp(share * random.standard_normal(len(truth))))
                     for _ in range(DRAWS)]  # fmt: skip
            means[group] = float(np.mean(drawn))
        worst_group = min(means, key=lambda group: means[group])
        results.row(what=f"noise of {share:.0%}: the truth against itself", cases=DRAWS,
                    value=f"least in {' '.join(map(str, worst_group))}: {means[worst_group]:.3f}")  # fmt: skip
        results.figure(f"... rank correlation, mean of the groups, that noise of {share:.0%} allows",
                       float(np.mean(list(means.values()))), "none", "printed")  # fmt: skip


def nearly_full(results: common.Results, timed: list[Run], found: dict[str, float]) -> None:
    """What the model lacks, as the residuals show it: how far predictions are below the published time where a device
    is nearly full, and many workers wait for each other.
    """
    for least, most in ((0, 64), (64, 10_000)):
        for full in (False, True):
            errors = [
                found[run.name] / (run.seconds or 1.0) - 1
                for run in timed
                if least <= run.cut.workers < most
                and (need_bytes(run, MemoryConstants()) > 0.8 * A100.device.memory_bytes) == full
            ]
            which = f"{'64 workers or more' if least else 'fewer than 64 workers'}, {'over' if full else 'under'} 0.8"
            results.row(what=f"error by memory: {which} of the memory", cases=len(errors),
                        value=f"mean {float(np.mean(errors)):+.1%}")  # fmt: skip


ODD = ("LLaMA-13B", 2048, 64)
"""The group whose published runs contradict each other (`contradictions`)."""


def contradictions(results: common.Results, timed: list[Run], found: dict[str, float]) -> None:
    """What no cost model can follow. FlashAttention 2 does the work of the first with fewer operations: of two runs
    that differ in nothing else, it should not take longer. In one group it does, on two stages alone, by up to 1.6
    times.
    """
    for group, members in groups(timed).items():
        twin = {(run.model, run.cut): run for run in members}
        pairs = [
            (run, twin[older])
            for run in members
            if run.model.attention == "flash2" and (older := (replace(run.model, attention="flash1"), run.cut)) in twin
        ]
        slower = [
            (run.seconds or 0.0) / (old.seconds or 1.0)
            for run, old in pairs
            if (run.seconds or 0.0) > 1.02 * (old.seconds or 1.0)
        ]
        value = f"{len(slower)} of {len(pairs)} pairs, up to {max(slower, default=1.0):.2f} x"
        results.row(
            what=f"published: FlashAttention 2 slower than 1, {' '.join(map(str, group))}",
            cases=len(pairs),
            value=value,
        )
    odd = [
        run for run in groups(timed)[ODD] if not (run.model.attention == "flash2" and run.cut.pipeline == 2)
    ]  # fmt: skip
    rest = rank_correlation([run.seconds or 0.0 for run in odd], [found[run.name] for run in odd])
    results.figure(f"... rank correlation, {' '.join(map(str, ODD))} without FlashAttention 2 on two stages", rest,
                   "none", "printed")  # fmt: skip
