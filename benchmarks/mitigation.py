"""One slow worker of four, and devices of speeds 1 : 2 : 4: steps a second without help, with moved lanes, with
eviction. And one worker of four with hiccups: with and without lanes that others take over within the step.

Real processes, real gloo, the real controller; the computation of a lane is EMULATED BY WAITING, since four workers on
fewer cores would otherwise slow each other down. `slow` faults stretch the wait. Every run must end with the same
digest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from elastictrain.faults import Drain, slow
from elastictrain.job import Job
from elastictrain.planner.split import split_affine
from tests.support.process_cluster import Run, byte_job, run_job

LANES = 16
RECIPE = f"{Path(__file__).parent / 'paced_recipe.py'}:PacedBytes"
TAIL = 20
"""Steps at the end over which the rate is taken: everything has settled by then."""


WAYS = ("none", "take_over", "first_result", "coded", "drop_slowest")
DROPPING = "hiccups, drop_slowest"
HICCUP_FROM, HICCUP_EVERY, HICCUP_FACTOR = 12, 5, 3.0


def job(folder: Path, steps: int, lane_s: float, action: str, workers: int = 4, shared: str = "none",
        replay: Mapping[int, Sequence[int]] | None = None) -> Job:  # fmt: skip
    return byte_job(
        folder, workers, recipe=RECIPE, recipe_args={"lane_s": lane_s}, lanes=LANES, steps=steps,
        stragglers={"action": action}, redundancy={"lanes": shared, "depth": 3, "drop_at_most": 3, "replay": replay},
    )  # fmt: skip


def rate(run: Run) -> float:
    """Steps a second in the last steps, from what the metrics say of each."""
    return 1.0 / common.median(row["step_s"] for row in run.record.rows[-TAIL:])


def delay(run: Run, worker: int, since: int) -> float:
    """Steps from the first slow one to the alarm, that one included."""
    said = [one for one in run.record.of("straggler") if one["worker"] == worker and one["what"] == "slow"]
    said = [one for one in said if one["step"] >= since]
    return said[0]["step"] - since + 1 if said else float("inf")


def best_lanes(factors: Sequence[float]) -> tuple[int, ...]:
    """The best whole-lane split, exact for the true speeds."""
    return split_affine(LANES, [0.0] * len(factors), list(factors), least=[1] * len(factors)).parts


def final_lanes(run: Run, workers: int) -> list[int]:
    counts = {worker: len(lanes) for worker, lanes in enumerate(_first_lanes(workers))}
    for move in run.record.of("lanes_moved"):
        counts |= {int(worker): new for worker, (_, new) in move["lanes"].items()}
    return [counts[worker] for worker in range(workers)]


def _first_lanes(workers: int) -> tuple[tuple[int, ...], ...]:
    from elastictrain.layout import deal_lanes

    return deal_lanes(LANES, [1.0] * workers, "contiguous")


def one_case(results: common.Results, folder: Path, name: str, factors: Mapping[int, float], workers: int,
             steps: int, lane_s: float, first: int) -> None:  # fmt: skip
    """Without help, with lanes, and with eviction of the slowest; against a run in which nothing is slow."""
    faults = [slow(worker, first, factor=factor) for worker, factor in factors.items()]
    slowest = max(factors, key=lambda worker: factors[worker])
    runs: dict[str, Run] = {
        "nothing slow": run_job(job(folder, steps, lane_s, "watch", workers)),
        "no mitigation": run_job(job(folder, steps, lane_s, "watch", workers), faults),
        "lanes": run_job(job(folder, steps, lane_s, "lanes", workers), faults),
        "eviction": run_job(
            job(folder, steps, lane_s, "watch", workers), [*faults, Drain(worker=slowest, step=first + 5)]
        ),
    }
    parts = best_lanes([factors.get(worker, 1.0) for worker in range(workers)])
    dealt = job(folder, steps, lane_s, "watch", workers)
    shares = dealt.workers.model_copy(update={"lane_shares": dict(enumerate(map(float, parts)))})
    runs["the best split, from the start"] = run_job(
        dealt.model_copy(update={"workers": shares}), [slow(worker, 1, factor=f) for worker, f in factors.items()]
    )
    bound = rate(runs["the best split, from the start"])
    same = {run.digest for run in runs.values()}
    for what, run in runs.items():
        shown: dict[str, Any] = {"steps/s": rate(run), "of the best split": rate(run) / bound}
        if what == "lanes":
            shown |= {"lanes": final_lanes(run, workers), "best": list(parts)}
        results.row(case=name, run=what, **shown)
    results.figure(f"{name}: of the best whole-lane split", rate(runs["lanes"]) / bound, "0.9 or more",
                   common.verdict(rate(runs["lanes"]) / bound, 0.9, at_most=False))  # fmt: skip
    results.figure(f"{name}: same bits in all runs", len(same) == 1, "True", "reached" if len(same) == 1 else "missed")
    if first > 1:
        late = delay(runs["lanes"], slowest, first)
        results.figure(f"{name}: steps to the alarm", late, "8 or fewer", common.verdict(late, 8, at_most=True))


def hiccups(results: common.Results, folder: Path, steps: int, lane_s: float) -> None:
    """Every fifth step one worker takes three times as long, once: too short to be worth a move of lanes. The mean of
    each round of five steps, so that it is seen, and the median of these.
    """
    last = steps - steps % HICCUP_EVERY + HICCUP_FROM % HICCUP_EVERY  # whole rounds
    faults = [slow(2, step, factor=HICCUP_FACTOR, steps=1) for step in range(HICCUP_FROM, last, HICCUP_EVERY)]
    ways = {"no hiccups": ("none", []), "no hiccups, lanes may be taken over": ("take_over", []),
            **{f"hiccups, {way}": (way, faults) for way in WAYS}}  # fmt: skip
    runs = {
        what: run_job(job(folder, steps, lane_s, "watch", shared=way), script) for what, (way, script) in ways.items()
    }
    mean_s = {}
    for what, run in runs.items():
        rows = [row for row in run.record.rows if HICCUP_FROM <= row["step"] < last]
        rounds = [rows[at : at + HICCUP_EVERY] for at in range(0, len(rows), HICCUP_EVERY)]
        mean_s[what] = common.median(sum(row["step_s"] for row in one) / len(one) for one in rounds)
        said = [row["taken_over"] for row in rows if "taken_over" in row]
        told = {"lanes taken over": sum(one["lanes"] for one in said), "in vain": sum(one["in_vain"] for one in said)}
        told = told if said else {}
        if what == DROPPING:
            told = {"dropped": sum(len(row["lanes_dropped"]) for row in rows)}
        results.row(case="one of 4 with hiccups", run=what, **{"s a step": mean_s[what]}, **told)
    lost_s = mean_s["hiccups, none"] - mean_s["no hiccups"]
    for way in ("take_over", "first_result", "drop_slowest"):
        won = (mean_s["hiccups, none"] - mean_s[f"hiccups, {way}"]) / lost_s
        results.figure(f"one of 4 with hiccups: of what they cost, won by {way}", won, "none", "measured")
    cost = mean_s["no hiccups, lanes may be taken over"] / mean_s["no hiccups"] - 1.0
    results.figure("nothing slow: what take_over costs, share of a step", cost, "none", "measured")
    same = len({run.digest for what, run in runs.items() if what != DROPPING}) == 1
    results.figure("one of 4 with hiccups: same bits in all runs", same, "True", "reached" if same else "missed")
    dropped = {row["step"]: tuple(row["lanes_dropped"]) for row in runs[DROPPING].record.rows if row["lanes_dropped"]}
    lost = sum(map(len, dropped.values())) / (LANES * steps)
    results.figure("one of 4 with hiccups: lanes that drop_slowest lost, share of all", lost, "none", "measured")
    again = run_job(job(folder, steps, 0.0, "watch", workers=3, replay=dropped))
    same = again.digest == runs[DROPPING].digest
    results.figure("one of 4 with hiccups: drop_slowest repeated on 3 workers, same bits", same, "True",
                   "reached" if same else "missed")  # fmt: skip


def monitoring(results: common.Results) -> None:
    """What the signals cost in a step: measured, decoded and sent, against a step of 0.1 s."""
    import time

    from elastictrain.engine.signals import StepClock
    from elastictrain.stragglers.signals import RECORD_BYTES

    clock, rounds = StepClock(), 20_000
    seconds, waits = {"compute_s": 0.1, "exchange_s": 0.01, "mirror_s": 0.001}, {"read": 0.001}
    begun = time.process_time()
    for _ in range(rounds):
        clock.begin()
        clock.arrive()
        clock.signal(4, seconds, waits, 4096, 1e6, stores=False, evaluates=False).encode()
        clock.voted()
        clock.end(seconds)
    each_s = (time.process_time() - begun) / rounds
    share = each_s / 0.1
    results.row(case="monitoring", run=f"{RECORD_BYTES} bytes", **{"µs a step": 1e6 * each_s})
    results.figure("monitoring, share of a step of 0.1 s", share, "0.003 or less",
                   common.verdict(share, 0.003, at_most=True))  # fmt: skip
    watching(results)


def watching(results: common.Results) -> None:
    """What the controller does with them, beside the steps and never in their path."""
    import time
    from random import Random

    from elastictrain.stragglers.signals import table
    from elastictrain.stragglers.watch import StragglerWatch

    for workers in (4, 64):
        rng, watch, steps = Random(workers), StragglerWatch(10_000), 500
        raws = []
        for _ in range(50):
            own = [0.1 * rng.lognormvariate(0, 0.02) for _ in range(workers)]
            waits = [max(own) - one + 0.01 for one in own]
            raws.append(table(lanes=[4] * workers, compute_s=own, arrive_s=own, exchange_s=waits).tobytes())
        begun = time.process_time()
        for step in range(1, steps + 1):
            watch.feed(1, range(workers), step, raws[step % len(raws)])
        each_s = (time.process_time() - begun) / steps
        results.row(case="the watch, in the controller", run=f"{workers} workers", **{"µs a step": 1e6 * each_s})
        results.figure(f"the watch of {workers} workers, share of a core beside steps of 0.1 s", each_s / 0.1,
                       "none", "beside it: not in a step's path")  # fmt: skip


def main() -> None:
    options = common.arguments(__doc__, lambda parser: parser.add_argument("--only", choices=["hiccups"]))
    name = "mitigation_hiccups" if options.only else "mitigation"
    results = common.Results(name, "Slow workers in real runs (computation emulated by waiting)", options)
    steps, lane_s = (70, 0.03) if options.quick else (70, 0.05)
    about_hiccups = [
        f"{LANES} lanes; a lane takes {lane_s} s: real computation of about 2 ms, then waiting.",
        f"Hiccups: in every {HICCUP_EVERY}th step the lanes of one worker take {HICCUP_FACTOR:g} times as long.",
        f"Rounds of {HICCUP_EVERY} steps from {HICCUP_FROM} on: median of their means.",
        "The last 3 of each worker's 4 lanes have a second holder; drop_slowest: 3 lanes of a step at most.",
    ]
    if options.only:
        with tempfile.TemporaryDirectory(prefix="elastictrain-mitigation-") as folder:
            hiccups(results, Path(folder), 52, lane_s)
        results.notes += about_hiccups
        results.write()
        return
    with tempfile.TemporaryDirectory(prefix="elastictrain-mitigation-") as folder:
        one_case(results, Path(folder), "one of 4 at half speed", {2: 2.0}, 4, steps, lane_s, 20)
        one_case(results, Path(folder), "speeds 1 : 2 : 4", {1: 2.0, 2: 4.0}, 3, steps, lane_s, 1)
        hiccups(results, Path(folder), 52, lane_s)
    monitoring(results)
    results.notes += [
        f"{LANES} lanes; a lane takes {lane_s} s on a device of speed 1: real computation of about 2 ms, then waiting.",
        "Rates: median of the last 20 steps.",
        "The best split: exact, for the true speeds; a run that has it, and the slowness, from its first step.",
        "Eviction: the slowest worker is drained five steps after it has become slow, as a perfect detector would.",
        *about_hiccups[1:],
    ]  # fmt: skip
    results.write()


if __name__ == "__main__":
    main()
