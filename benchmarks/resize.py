"""How long the others stand still when a worker joins, and when one hands over and leaves, on Ray.

One run: workers are added and drained in turn. A pause is from the last worker's commit under the old layout to the
last one's start of the next step under the new one; what a new worker needs before (process, imports, model, data) does
not count, because the others train meanwhile.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import common
from runs import Running, gpt_job

Line = dict[str, Any]
WORLD, LANES, GAP_STEPS = 3, 8, 40


@dataclass(frozen=True)
class Pause:
    """One change of the layout, by the generation that follows. `kind`: joined or left."""

    generation: int
    kind: str
    seconds: float
    redone: int


def pauses(lines: list[Line]) -> list[Pause]:
    """Between every two generations that stepped one after the other."""
    found = []
    generations = sorted({x["generation"] for x in lines if x["k"] == "start"})
    for old, new in itertools.pairwise(generations):
        before = {x["pid"] for x in lines if x["k"] == "start" and x["generation"] == old}
        after = {x["pid"] for x in lines if x["k"] == "start" and x["generation"] == new}
        stayed = before & after
        first = min(x["step"] for x in lines if x["k"] == "start" and x["generation"] == new)
        ended = [x["t"] for x in lines if x["k"] == "end" and x["generation"] == old and x["pid"] in stayed]
        starts = [
            x["t"] for x in lines if x["k"] == "start" and (x["generation"], x["step"]) == (new, first)
            and x["pid"] in stayed
        ]  # fmt: skip
        begun = max(x["step"] for x in lines if x["k"] == "start" and x["generation"] == old)
        found.append(
            Pause(new, "joined" if after - before else "left", max(starts) - max(ended), max(0, begun - first + 1))
        )
    return found


def main() -> None:
    options = common.arguments(__doc__)
    common.prepare_data()
    results = common.Results("resize", "Pauses of the others when a worker joins or leaves, on Ray", options)
    changes = 4 if options.quick else 12
    with common.scratch("resize") as folder:
        where = folder / "run"
        job = gpt_job(where, workers=WORLD + 1, lanes=LANES)
        job["workers"] = {"min": 1, "max": WORLD + 1, "start": WORLD, "replace": False}
        job["steps"] = GAP_STEPS * (changes + 1)
        faults = [
            {"do": "drain", "worker": n // 2, "step": step} if n % 2 else {"do": "add", "step": step}
            for n, step in enumerate(range(GAP_STEPS, job["steps"], GAP_STEPS))
        ]
        lines = Running.with_faults(where, job, faults)
    found = pauses(lines)
    steps = [b["t"] - a["t"] for a, b in itertools.pairwise(x for x in lines if x["k"] == "end" and x["rank"] == 0)]
    for kind in ("joined", "left"):
        seconds = [one.seconds for one in found if one.kind == kind]
        redone = max((one.redone for one in found if one.kind == kind), default=0)
        results.row(**{
            "a worker has": kind, "times": len(seconds), "pause p50 s": common.median(seconds),
            "p95 s": common.quantile(seconds, 0.95), "steps computed twice": redone, "step s": common.median(steps),
        })  # fmt: skip
        target = 0.5 if kind == "joined" else 0.3
        p50 = common.median(seconds)
        reached = common.verdict(p50, target, at_most=True)
        results.figure(f"pause of the others when a worker has {kind}, p50 s", p50, str(target), reached)
    results.notes.append(f"GPT of examples/gpt, {LANES} lanes, {WORLD} workers and one more that comes and goes.")
    results.raw["pauses"] = [vars(one) for one in found]
    results.write()


if __name__ == "__main__":
    main()
