"""How soon what does not announce itself is found, on Ray: frozen workers, a silent node, a controller that has died.

- *Frozen*: one of four workers is stopped (SIGSTOP), or blocks for ever inside a step; a spare is waiting. Seconds
  until it is named (`frozen` in events.jsonl), until the others' next step begins, and until four step again.
- *Controller*: it gets SIGKILL while four workers step. Seconds until its successor has adopted them; steps that end
  while nobody is there; steps computed twice.
- *Node*: on five raylets all processes of one node are stopped, and a scripted `lose_node`; seconds to the next commit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
from recovery import calm
from runs import BenchmarkError, Running, gpt_job

WORLD, LANES = 4, 8
Line = dict[str, Any]


class Watched(Running):
    """A run on Ray whose events are read as they come."""

    def events(self, kind: str, since: float) -> list[Line]:
        """Those of a kind after a wall-clock time, seconds since the epoch."""
        from elastictrain.observe import RunDirectory

        found = RunDirectory.open(self.folder / "run").events()
        return [{"t": e.time.timestamp(), **e.data} for e in found if e.kind == kind and e.time.timestamp() > since]

    def event(self, kind: str, since: float) -> Line:
        return dict(self.wait_for(f"event {kind}", lambda _: self.events(kind, since))[0])

    def calm_with_spare(self) -> dict[int, int]:
        """{rank: pid} when four step and a fifth waits."""

        def ready(lines: list[Line]) -> dict[int, int]:
            there = calm(lines, WORLD)
            return there if there and self.spares() else {}

        return dict(self.wait_for("four workers and a spare", ready))

    def spares(self) -> int:
        status = json.loads((self.folder / "run" / "status.json").read_text(encoding="utf-8"))
        return int(status["spares"])


def freeze(run: Watched, pid: int, how: str) -> float:
    """When it froze (CLOCK_MONOTONIC). `how`: "stopped" now, or "blocked" in its next step."""
    if how == "stopped":
        at_s = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        return at_s
    (run.folder / f"block-{pid}").touch()

    def blocked(lines: list[Line]) -> float:
        return next((float(x["t"]) for x in lines if x["k"] == "block" and x["pid"] == pid), 0.0)

    return float(run.wait_for("a worker that blocks", blocked))


def freeze_one(run: Watched, rank: int, how: str) -> dict[str, Any]:
    pid = run.calm_with_spare()[rank]
    began = time.time()
    at_s = freeze(run, pid, how)
    to_wall_s = time.time() - time.monotonic()
    named = run.event("frozen", began)
    generation = max(x["generation"] for x in run.lines() if x["k"] == "start" and x["pid"] == pid)

    def next_starts(lines: list[Line], world: int | None) -> float:
        later = [x for x in lines if x["k"] == "start" and x["generation"] > generation and x["t"] > at_s]
        later = [x for x in later if world in (None, x["world"])]
        return max((x["t"] for x in later if x["step"] == min(y["step"] for y in later)), default=0.0)

    whole = run.wait_for("four workers again", lambda lines: next_starts(lines, WORLD))
    commits = [x["t"] for x in run.lines() if x["k"] == "end" and x["rank"] == 0 and x["t"] < at_s]
    return {
        "how": how,
        "named s": named["t"] - to_wall_s - at_s,
        "next step s": next_starts(run.lines(), None) - at_s,
        "four again s": whole - at_s,
        "median step s": common.median(b - a for a, b in pairwise(commits[-6:])),
    }


def kill_controller(run: Watched) -> dict[str, Any]:
    run.calm_with_spare()
    pid = json.loads((run.folder / "run" / "lock").read_text(encoding="utf-8"))["pid"]
    before, began = run.lines(), time.time()
    at_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    back = run.event("controller_back", began)
    adopted_s = back["t"] - began

    def goes_on(lines: list[Line]) -> bool:
        return sum(x["k"] == "end" and x["rank"] == 0 and x["t"] > at_s + adopted_s for x in lines) >= 3

    run.wait_for("steps under the new controller", goes_on)
    lines = run.lines()
    started = [(x["pid"], x["step"]) for x in lines if x["k"] == "start" and x["t"] > before[-1]["t"]]
    meanwhile = [x for x in lines if x["k"] == "end" and x["rank"] == 0 and at_s < x["t"] < at_s + adopted_s]
    generations = {x["generation"] for x in lines if x["k"] == "start" and x["t"] > before[-1]["t"]}
    return {
        "adopted s": adopted_s,
        "steps meanwhile": len(meanwhile),
        "computed twice": len(started) - len(set(started)),
        "generations since": len(generations),
    }


def frozen_and_orphaned(options: Any, results: common.Results) -> None:
    rounds = 1 if options.quick else 4
    with common.scratch("detection") as folder:
        job = gpt_job(folder / "run", workers=WORLD, lanes=LANES)
        job["workers"] = {"min": 1, "max": WORLD, "start": WORLD, "replace": True, "spares": 1}
        with Watched.elastictrain(folder / "run", job, ray=True) as run:
            run.warm_up()
            for number in range(2 * rounds):
                results.row(**freeze_one(run, number % WORLD, ("stopped", "blocked")[number % 2]))
            for _ in range(rounds):
                results.row(**kill_controller(run))
            last = run.stop()
            if last.get("outcome") not in ("stopped", "finished"):
                raise BenchmarkError(f"the run did not end well: {last}")


def silent_nodes(folder: Path) -> dict[str, Any]:
    environment = {name: value for name, value in common.child_environment().items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.raylets", str(folder)],
        env=environment, capture_output=True, text=True, timeout=400, check=False, cwd=common.ROOT,
    )  # fmt: skip
    if done.returncode:
        raise BenchmarkError(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def say(results: common.Results) -> None:
    """The figures of the rows there are."""
    for how in ("stopped", "blocked"):
        some = [row for row in results.rows if row.get("how") == how]
        of_allowed = max(row["named s"] / max(2.0, 3 * row["median step s"]) for row in some)
        results.figure(f"frozen worker ({how}) named, slowest of {len(some)}, over max(2 s, 3 median steps)",
                       of_allowed, "1", common.verdict(of_allowed, 1.0, at_most=True))  # fmt: skip
        slowest = max(row["four again s"] for row in some)
        results.figure(f"frozen worker ({how}) replaced by a spare, slowest of {len(some)}, s", slowest, "5",
                       common.verdict(slowest, 5.0, at_most=True))  # fmt: skip
    controllers = [row for row in results.rows if "adopted s" in row]
    slowest = max(row["adopted s"] for row in controllers)
    results.figure(f"controller killed to workers adopted, slowest of {len(controllers)}, s", slowest, "5",
                   common.verdict(slowest, 5.0, at_most=True))  # fmt: skip
    twice = max(row["computed twice"] for row in controllers)
    results.figure("controller killed, steps computed twice", twice, "0", common.verdict(twice, 0, at_most=True))
    (silent,) = (row["to next commit s"] for row in results.rows if row.get("how") == "silent node")
    results.figure("silent node to the next commit, s", silent, "4", common.verdict(silent, 4.0, at_most=True))


def main() -> None:
    options = common.arguments(__doc__)
    common.prepare_data()
    results = common.Results("detection", "How soon what does not announce itself is found", options)
    frozen_and_orphaned(options, results)
    with common.scratch("raylets") as folder:
        found = silent_nodes(folder)
    results.row(**{"how": "silent node", "to next commit s": found["to_commit_s"], "worlds": found["worlds"]})
    say(results)
    results.notes += [
        "Named: the line in events.jsonl. Replaced: all four members of the next generation with four have begun.",
        "The silent node is one of five raylets on this machine; all of its processes get SIGSTOP.",
    ]
    results.write()


if __name__ == "__main__":
    main()
