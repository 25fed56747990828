"""From SIGKILL to the start of the next generation's first step, and to its commit.

One long run of four workers. As soon as four workers step, one of them is told to kill itself in the middle of a named
phase; the survivors go on; a new worker joins; and so on, over all phases and ranks. The stamp of the kill is written
right before SIGKILL by the worker that dies, the others by the survivors; the last survivor counts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from runs import BenchmarkError, Running, gpt_job

PHASES = ("compute", "exchange", "mirror", "vote", "apply", "gather")
CALM_STEPS = 3
Line = dict[str, Any]


@dataclass(frozen=True)
class Recovery:
    """Seconds from the kill, and what became of the steps."""

    phase: str
    rank: int
    step: int
    to_start_s: float
    to_commit_s: float
    step_s: float
    redone: int
    lost: int


def calm(lines: list[Line], world: int) -> dict[int, int]:
    """{rank: pid} when the newest generation has `world` workers that have all ended `CALM_STEPS` steps of it."""
    generation = max((x["generation"] for x in lines if x["k"] == "start"), default=0)
    ended: dict[int, int] = {}
    pids: dict[int, int] = {}
    for line in lines:
        if line["k"] == "end" and line["generation"] == generation:
            ended[line["rank"]] = ended.get(line["rank"], 0) + 1
            pids[line["rank"]] = line["pid"]
    worlds = {x["world"] for x in lines if x["k"] == "start" and x["generation"] == generation}
    return pids if worlds == {world} and len(ended) == world and min(ended.values()) >= CALM_STEPS else {}


def recovered(lines: list[Line], pid: int, world: int) -> Recovery | None:
    """What followed the death of `pid`; None while it is not over."""
    death = next((x for x in lines if x["k"] == "kill" and x["pid"] == pid), None)
    if death is None:
        return None
    of_pid = [x for x in lines if x["pid"] == pid and x["k"] == "start"]
    generation, rank = of_pid[-1]["generation"], of_pid[-1]["rank"]
    later = [x for x in lines if x["t"] > death["t"] and x["k"] == "start" and x["generation"] > generation]
    if not later:
        return None
    next_generation = min(x["generation"] for x in later)
    first_step = min(x["step"] for x in later if x["generation"] == next_generation)
    starts = {x["pid"]: x for x in later if x["generation"] == next_generation and x["step"] == first_step}
    commits = {
        x["pid"]: x
        for x in lines
        if x["k"] == "applied" and x["generation"] == next_generation and x["step"] == first_step
    }
    if len(starts) < world - 1 or set(starts) - set(commits):
        return None
    before = [x for x in lines if x["k"] in ("start", "applied", "end") and x["t"] <= death["t"]]
    survivors = [x for x in lines if x["pid"] != pid and x.get("generation") == generation]
    # A step is done twice when a survivor begins it in both generations; lost when someone applied it and the next
    # generation begins after another one.
    begun = max((x["step"] for x in survivors if x["k"] == "start"), default=0)
    applied = max((x["step"] for x in lines if x["k"] == "applied" and x["generation"] <= generation), default=0)
    durations = [x for x in before if x["k"] == "end" and x["rank"] == 0 and x["generation"] == generation]
    return Recovery(
        phase=death["phase"],
        rank=rank,
        step=death["step"],
        to_start_s=max(x["t"] for x in starts.values()) - death["t"],
        to_commit_s=max(x["t"] for x in commits.values()) - death["t"],
        step_s=common.median(b["t"] - a["t"] for a, b in itertools.pairwise(durations)),
        redone=max(0, begun - first_step + 1),
        lost=max(0, applied - (first_step - 1)),
    )


def kill_one(run: Running, rank: int, phase: str, world: int) -> Recovery:
    pid = run.wait_for(f"{world} calm workers", lambda lines: calm(lines, world).get(rank))
    (run.folder / "order.tmp").write_text(phase, encoding="ascii")
    (run.folder / "order.tmp").rename(run.folder / f"kill-{pid}")
    found: Recovery = run.wait_for(f"recovery from a kill in {phase}", lambda lines: recovered(lines, pid, world))
    return found


def measure(folder: Path, results: common.Results, *, kills: int, world: int, lanes: int, ray: bool) -> list[Recovery]:
    found: list[Recovery] = []
    job = gpt_job(folder, workers=world, lanes=lanes)
    job["workers"] = {"min": 1, "max": world, "start": world, "replace": True}
    with Running.elastictrain(folder, job, ray=ray) as run:
        run.warm_up()
        for number in range(kills):
            phase, rank = PHASES[number % len(PHASES)], (number + number // len(PHASES)) % world
            one = kill_one(run, rank, phase, world)
            found.append(one)
            print(number + 1, one, common.load(), flush=True)
        last = run.stop()
        if last.get("outcome") not in ("stopped", "finished"):
            raise BenchmarkError(f"the run did not end well: {last}")
    where = "Ray" if ray else "processes"
    for phase in PHASES:
        some = [one for one in found if one.phase == phase]
        if some:
            results.row(**{"on": where, "phase": phase, **summary(some)})
    results.row(**{"on": where, "phase": "all", **summary(found)})
    results.raw[where] = [vars_of(one) for one in found]
    return found


def vars_of(one: Recovery) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def summary(found: list[Recovery]) -> dict[str, Any]:
    starts, commits = [one.to_start_s for one in found], [one.to_commit_s for one in found]
    return {
        "kills": len(found),
        "to next step p50 s": common.median(starts),
        "p95 s": common.quantile(starts, 0.95),
        "to its commit p50 s": common.median(commits),
        "p95 s ": common.quantile(commits, 0.95),
        "step s": common.median(one.step_s for one in found),
        "lost": max(one.lost for one in found),
        "computed twice": max(one.redone for one in found),
    }


def main() -> None:
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--ray", action="store_true", help="on Ray instead of plain processes"),
            parser.add_argument("--kills", type=int, default=None),
            parser.add_argument("--workers", type=int, default=4),
            parser.add_argument("--lanes", type=int, default=8, help="of the whole step"),
        ),
    )
    common.prepare_data()
    name, where = ("recovery_ray", "Ray") if options.ray else ("recovery", "processes")
    results = common.Results(name, f"Recovery from SIGKILL, {options.workers} workers, on {where}", options)
    kills = options.kills or (6 if options.quick else 30)
    with common.scratch("recovery") as folder:
        found = measure(
            folder / "run", results, kills=kills, world=options.workers, lanes=options.lanes, ray=options.ray
        )
    p50 = common.median(one.to_start_s for one in found)
    p95 = common.quantile((one.to_start_s for one in found), 0.95)
    lost, twice = max(one.lost for one in found), max(one.redone for one in found)
    label = f"on {where}, {kills} kills"
    results.figure(f"SIGKILL to next step, p50 s, {label}", p50, "0.2", common.verdict(p50, 0.2, at_most=True))
    results.figure(f"SIGKILL to next step, p95 s, {label}", p95, "0.6", common.verdict(p95, 0.6, at_most=True))
    results.figure(f"steps lost, {label}", lost, "0", common.verdict(lost, 0, at_most=True))
    results.figure(f"steps computed twice, {label}", twice, "at most 1", common.verdict(twice, 1, at_most=True))
    results.notes += [
        (
            f"GPT of examples/gpt (2.8 million parameters), {options.lanes} lanes of 2 sequences over "
            f"{options.workers} workers with one thread each. Start and commit are those of the last survivor."
        ),
        "Every lost worker is replaced by a new process, so that each kill meets a full group.",
    ]
    results.write()


if __name__ == "__main__":
    main()
