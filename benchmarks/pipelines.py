"""Slow places of virtual pipelines: who is named and how soon, what moving layers and swapping roles wins.

Every figure comes from the detector, decision and planner of stages; pipelines and time are virtual, since the engine
runs none. A step is the schedule replayed with what every stage really takes: layers differ from the planner's model by
3 %. Seeds from 0 on were looked at while it was built; the figures are of seeds that were held back (from
`stragglers.HELD_BACK` on).
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from random import Random

import common
from elastictrain.planner.model import parse_model
from elastictrain.planner.pipelines import pipelines_of
from elastictrain.sim import draws
from elastictrain.sim.pipelines import PipelineOutcome, PipelineScenario, run_pipelines
from elastictrain.sim.speeds import Slowness
from elastictrain.stragglers.stage_ways import ACTIONS, Price, StageAction, changes_of, ways_of
from stragglers import LATE, arguments_with_seeds

MODEL = parse_model({"layers": 32, "hidden": 4096, "heads": 32, "sequence": 4096, "vocab": 32000, "gated": True})
STEPS = 400
WAYS: dict[str, tuple[StageAction, ...]] = {
    "layers": ("move_layers",), "layers and roles": ("move_layers", "swap_roles"), "all": ACTIONS,
}  # fmt: skip


def scenario_of(seed: int, ways: str, *, factor: float | None = None, healthy: bool = False) -> PipelineScenario:
    """One to three pipelines of two to eight stages; about one in seven is healthy, one in four has devices of two
    kinds, one in three a spare.
    """
    rng = Random(f"{seed}/pipelines")
    stages, pipelines, batches = rng.choice((2, 4, 4, 8)), rng.choice((1, 1, 2, 3)), rng.choice((8, 16))
    spares, mixed, noise = rng.choice((0, 0, 1)), rng.random() < 0.25, rng.choice((0.01, 0.02, 0.03))
    each = ["a100-80" if mixed and stage % 2 else "h100" for stage in range(stages)]
    workers = stages * pipelines
    work = pipelines_of(
        MODEL, each * pipelines + ["h100"] * spares, stages=stages, pipelines=pipelines, micro_batches=batches
    )
    found = [work.best(range(first, first + stages), work.healthy()) for first in range(0, workers, stages)]
    placements = tuple(one for one in found if one is not None)
    assert len(placements) == pipelines
    step_s, slowness = work.step_s(placements[0], work.healthy()), list[Slowness]()
    for _ in range(0 if healthy else 1 if factor is not None else rng.choice((0, 1, 1, 1, 1, 2, 2))):
        begin, long = rng.randrange(30, STEPS - 60), 20 + int(draws.lasts_s(rng, workers) / step_s)
        worker, drawn = rng.randrange(workers), draws.factor(rng)
        if all(other.worker != worker for other in slowness):
            slowness.append(Slowness(worker, "compute", factor or drawn, begin, begin + long))
    return PipelineScenario(
        work, placements, tuple(range(workers, workers + spares)), STEPS, seed, noise, slowness=tuple(slowness),
        allowed=WAYS[ways],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class One:
    """What came of a run: alarms, of them right, slow places found and asked for, delays in steps; seconds that could
    be won for the price of changes, without a price, and were won; changes, reversals, false and taken back.
    """

    seed: int
    alarms: int
    right: int
    found: int
    asked: int
    delays: list[int]
    could_s: float
    free_s: float
    won_s: float
    changes: int
    reversals: int
    false: int
    taken_back: int


def one_run(seed: int, ways: str, factor: float | None) -> One:
    scenario = scenario_of(seed, ways, factor=factor)
    out = run_pipelines(scenario)
    right, delays = matched(scenario, out)
    asked = sum(slow.begin + 10 <= STEPS for slow in scenario.slowness)
    return One(
        seed, len(out.findings), right, len(delays), asked, delays, max(0.0, out.none_s - out.oracle_s),
        max(0.0, out.none_s - out.free_s), out.none_s - out.ours_s, len(out.decisions), out.reversals,
        out.false_actions, out.outcomes.count("taken back"),
    )  # fmt: skip


def matched(scenario: PipelineScenario, out: PipelineOutcome) -> tuple[int, list[int]]:
    """(alarms that are right, delays in steps of the slow places that were found). Right: that worker, and it had just
    become slow, or fast again.
    """
    right, found = 0, dict[int, int]()
    for alarm in out.findings:
        mine = [(n, slow) for n, slow in enumerate(scenario.slowness) if slow.worker == alarm.worker]
        for number, slow in mine:
            if alarm.kind == "slow" and slow.begin - LATE <= alarm.since <= alarm.step < slow.end:
                right += 1
                found.setdefault(number, alarm.step - slow.begin + 1)
            elif alarm.kind != "slow" and slow.end - LATE <= alarm.since:
                right += 1
    return right, list(found.values())


def detection(
    results: common.Results, seeds: range, ways: str, processes: int, factor: float | None = None
) -> dict[str, float]:
    with ProcessPoolExecutor(processes) as pool:
        runs = list(pool.map(one_run, seeds, repeat(ways), repeat(factor), chunksize=5))
    alarms, wanted = sum(run.alarms for run in runs), sum(run.asked for run in runs)
    delays = [late for run in runs for late in run.delays]
    won_s, could_s, free_s = (sum(getattr(run, name) for run in runs) for name in ("won_s", "could_s", "free_s"))
    figures = {
        "precision": sum(run.right for run in runs) / max(1, alarms),
        "recall": sum(run.found for run in runs) / max(1, wanted),
        "delay p50": common.median(delays),
        "delay p95": common.quantile(delays, 0.95),
        "share of the oracle's gain": won_s / could_s if could_s else float("nan"),
        "… of one who pays nothing": won_s / free_s if free_s else float("nan"),
        "runs that swing": sum(run.reversals >= 2 for run in runs),
        "reversals": sum(run.reversals for run in runs),
        "false changes": sum(run.false for run in runs),
    }
    what = f"{ways}{'' if factor is None else f', all slow by {factor:g}'}"
    changes, taken_back = sum(run.changes for run in runs), sum(run.taken_back for run in runs)
    results.row(what=what, seeds=len(seeds), slow=wanted, alarms=alarms, **figures,
                changes=changes, **{"taken back": taken_back})  # fmt: skip
    return figures


def healthy(results: common.Results, first: int, steps: int) -> None:
    """Nothing is wrong: noise, hiccups, collections, checkpoints, layers that are not as the planner thinks."""
    done = alarms = changes = 0
    for seed in range(first, first + 1_000_000):
        out = run_pipelines(replace(scenario_of(seed, "all", healthy=True), steps=1000))
        done, alarms, changes = done + 1000, alarms + len(out.findings), changes + len(out.decisions)
        if done >= steps:
            break
    results.row(what="healthy", steps=done, alarms=alarms, changes=changes)
    per = 100_000 / done
    results.figure(f"false changes in 100,000 healthy steps of pipelines (of {done:,})", changes * per, "1 or fewer",
                   common.verdict(changes * per, 1, at_most=True))  # fmt: skip


def thinking(results: common.Results) -> None:
    """Processor time of working out every way for one slow place, all kinds of changes, one spare."""
    for stages, batches in ((4, 16), (8, 32), (16, 64)):
        work = pipelines_of(MODEL, ["h100"] * (stages + 1), stages=stages, pipelines=1, micro_batches=batches)
        placement = work.best(range(stages), work.healthy())
        assert placement is not None
        factors = [2.0 if worker == stages // 2 else 1.0 for worker in range(stages + 1)]
        begun = time.process_time()
        ways = ways_of(work, placement, factors, slow=[stages // 2], spares=[stages])
        changes = changes_of([ways], Price())
        taken = time.process_time() - begun
        results.row(what="every way for a slow place", **{"stages": stages, "micro-batches": batches, "ways": len(ways),
                    "worth a look": len(changes), "processor ms": 1e3 * taken})  # fmt: skip


def main() -> None:
    options = arguments_with_seeds(__doc__, "runs of the main kind (default 300)")
    results = common.Results("pipelines", "Slow places of virtual pipelines: named, and what is done", options)
    first, seeds = options.first_seed, options.seeds or (12 if options.quick else 300)
    side = options.processes
    both = detection(results, range(first, first + seeds), "layers and roles", side)
    weak = detection(results, range(first, first + seeds // 3), "layers and roles", side, factor=1.15)
    rest = [detection(results, range(first, first + seeds // 3), ways, side) for ways in ("layers", "all")]
    swings = sum(one["runs that swing"] for one in (both, weak, *rest))
    verdicts = (
        ("pipelines: precision of the named stage", min(both["precision"], weak["precision"]), 0.99, False),
        ("pipelines: recall of the named stage", both["recall"], 0.98, False),
        ("pipelines: recall at 15 %", weak["recall"], 0.98, False),
        ("pipelines: delay in steps, median", max(both["delay p50"], weak["delay p50"]), 5, True),
        ("pipelines: share of the gain of an oracle that pays, too", both["share of the oracle's gain"], 0.95, False),
        ("pipelines: runs with two reversals or more for which no speed has changed", swings, 0, True),
    )  # fmt: skip
    for name, value, target, at_most in verdicts:
        results.judge(name, value, target, at_most=at_most)
    healthy(results, first, 2_000 if options.quick else 20_000)
    thinking(results)
    results.notes += [
        (
            "The engine runs no pipelines: steps are replayed, by what the planner's model says of 32 layers of 4,096 "
            "on H100 (and A100), each layer 3 % off, with noise of 1 to 3 %, hiccups, garbage collection, checkpoints."
        ),
        (
            "The oracle knows every slowness from its first step to its last, pays as much (5 s, and the state over "
            "InfiniBand HDR), and chooses among the placement at the start and what is best for each stretch of time "
            "by the planner's model; where layers differ from that, ours may win more than it."
        ),
        "A slow place is asked for where the run goes on for ten steps after its onset.",
    ]
    results.write()


if __name__ == "__main__":
    main()
