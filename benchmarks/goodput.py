"""Goodput with a fault every 30 seconds: the same steps with and without, and whether they end with the same bits.

Four workers on Ray. In the disturbed run a seeded choice among the live workers is killed every `--every` seconds until
the end, and replaced.

Goodput: what share of the time between the first and the last kill the committed steps would have needed without any.
A step of four workers that nothing disturbs is measured between the same two kills, from when all four step again on:
a machine that is shared is a third faster or slower ten minutes later, so the undisturbed run, which is there for its
digest, cannot say it. The mean counts, since a run that nothing disturbs has its slower steps too. The plain ratio of
both runs stands beside it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import common
from runs import BenchmarkError, Running, gpt_job

WORLD, LANES = 4, 8


def run(folder: Path, steps: int, every_s: float | None, seed: int) -> tuple[Running, dict[str, Any], list[float]]:
    """The run when it is over, its last line, and when workers were killed (CLOCK_MONOTONIC)."""
    job = gpt_job(folder, workers=WORLD, lanes=LANES, steps=steps)
    job["recipe_args"]["total_steps"] = steps
    job["workers"] = {"min": 1, "max": WORLD, "start": WORLD, "replace": True}
    choice, kills = random.Random(seed), list[float]()
    with Running.elastictrain(folder, job, ray=True) as running:
        running.warm_up(1)
        due_s = time.monotonic()
        while True:
            due_s += every_s or 0.0
            wait_s = None if every_s is None else max(0.0, due_s - time.monotonic())
            try:
                out = running.leaders[0].communicate(timeout=wait_s)[0]
            except subprocess.TimeoutExpired:
                if alive := sorted(running.members()):  # none: it is just ending
                    os.kill(choice.choice(alive), signal.SIGKILL)
                    kills.append(time.monotonic())
                continue
            last = dict(json.loads(out.decode().strip().splitlines()[-1]))
            if last.get("outcome") != "finished":
                raise BenchmarkError(f"{folder.name} ended as {last}")
            return running, last, kills


def earlier(file: Path, steps: int, results: common.Results) -> tuple[float, dict[str, Any]]:
    """Seconds and last line of the undisturbed run of earlier results of as many steps."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    raw = stored["raw"]
    last, machine = raw["undisturbed"]["last"], stored["machine"]
    if last["steps"] != steps:
        raise SystemExit(f"{file} is of {last['steps']} steps, not {steps}; leave --against out")
    results.raw["undisturbed"] = raw["undisturbed"]
    results.notes.append(
        f"The undisturbed run is an earlier one ({machine['date']}, commit {machine['commit']}), "
        f"{raw['undisturbed']['took_s']:.1f} s, digest {last['digest'][:16]}; the disturbed one of that time took "
        f"{raw['disturbed']['took_s']:.1f} s."
    )
    return float(raw["undisturbed"]["took_s"]), dict(last)


def took_s(running: Running) -> float:
    lines = running.lines()
    return max(x["t"] for x in lines if x["k"] == "applied") - min(x["t"] for x in lines if x["k"] == "start")


def goodput_between(lines: list[dict[str, Any]], kills: list[float]) -> float:
    """See above. NaN with fewer than two kills, or where all four never stepped between two."""
    worlds = {x["generation"]: x["world"] for x in lines if x["k"] == "start"}
    commits: dict[int, tuple[float, int]] = {}
    for x in lines:
        if x["k"] == "end":
            commits.setdefault(x["step"], (x["t"], x["generation"]))
    needed_s = 0.0
    for begin, end in itertools.pairwise(kills):
        inside = [step for step, (at, _) in sorted(commits.items()) if begin < at <= end]
        whole = [
            commits[step][0] - commits[step - 1][0]
            for step in inside
            if step - 1 in commits and commits[step][1] == commits[step - 1][1] and worlds[commits[step][1]] == WORLD
        ]
        needed_s += len(inside) * (sum(whole) / len(whole) if whole else float("nan"))
    return needed_s / (kills[-1] - kills[0]) if len(kills) > 1 else float("nan")


def main() -> None:
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--steps", type=int, default=None, help="about half a second each on two cores"),
            parser.add_argument(
                "--every", type=float, default=30.0, help="seconds between two kills; at most 10 if quick"
            ),
            parser.add_argument("--seed", type=int, default=0),
            parser.add_argument("--against", type=Path, help="take the undisturbed run from these earlier results"),
        ),
    )
    common.prepare_data()
    steps = options.steps or (60 if options.quick else 1200)
    each_s = min(10.0, options.every) if options.quick else options.every
    results = common.Results("goodput", f"Goodput with a fault every {each_s:.0f} s", options)
    with common.scratch("goodput") as folder:
        found = {}
        for name, every_s in (("undisturbed", None), ("disturbed", each_s)):
            if every_s is None and options.against is not None:
                found[name] = earlier(options.against, steps, results)
                continue
            running, last, kills = run(folder / name, steps, every_s, options.seed)
            found[name] = took_s(running), last
            results.row(**{
                "run": name,
                "steps": last["steps"],
                "seconds": found[name][0],
                "kills": len(kills),
                "steps computed twice": sum(r["steps_redone"] or 0 for r in last["recoveries"]),
                "recovery p50 s": common.median(r["seconds"] for r in last["recoveries"] if r["seconds"] is not None),
                "digest": str(last["digest"])[:16],
            })  # fmt: skip
            results.raw[name] = {"took_s": found[name][0], "last": last}
        goodput = goodput_between(running.lines(), kills)
    (calm_s, calm), (rough_s, rough) = found["undisturbed"], found["disturbed"]
    reached = common.verdict(goodput, 0.90, at_most=False)
    results.figure(f"goodput, a kill every {each_s:.0f} s, {WORLD} workers", goodput, "0.90 or more", reached)
    apart = "ten minutes" if options.against is None else "hours"
    results.figure("undisturbed over disturbed time", calm_s / rough_s, "none", f"beside it: {apart} lie between")
    same = calm["digest"] == rough["digest"]
    results.figure("the same bits at the end", "yes" if same else "no", "yes", "reached" if same else "missed")
    results.notes += [
        (
            "Every replacement needs some four seconds of processor time for its imports, on the two cores that the "
            "others train on."
        )
    ]
    results.write()
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
