"""How fast state moves to a worker that joins, against gloo moving the same bytes bare between the same processes.

One run on Ray whose model is large enough for the copying to count. Two workers train; a third joins and leaves, again
and again. After every seal, while nothing trains, the same pairs of processes send the same number of bytes through
their gloo group, from and into buffers that lie ready: no packing, no digests, nothing to unpack. Side by side in time,
so what disturbs the machine disturbs both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

import common
from resize import pauses
from runs import BenchmarkError, Running, gpt_job

Line = dict[str, Any]
WORLD, LANES = 2, 4
STAYS_STEPS, GAP_STEPS = 100, 140
"""Long enough for a new process to come up, at a fifth of a second each."""
LARGE = {"vocabulary_size": 320, "sequence_length": 32, "layers": 8, "heads": 8, "width": 512, "dropout": 0.1}
"""25 million parameters: 0.3 GB of master weights and optimizer state."""


@dataclass(frozen=True)
class Join:
    """One newcomer. Seconds are of the last worker: `ours_s` from the first byte asked for to the last one in its place
    and its digest known, `bare_s` of gloo alone.
    """

    bytes: int
    ours_s: float
    bare_s: float

    @property
    def ratio(self) -> float:
        return self.bare_s / self.ours_s


def joins(lines: list[Line]) -> list[Join]:
    found = []
    for generation in sorted({x["generation"] for x in lines if x["k"] == "moved"}):
        mine = [x for x in lines if x["k"] == "moved" and x["generation"] == generation]
        if any(x["joiner"] for x in mine) and any(not x["joiner"] for x in mine):
            moved = sum(x["received_bytes"] for x in mine)
            found.append(Join(moved, max(x["ours_s"] for x in mine), max(x["bare_s"] for x in mine)))
    return found


def main() -> None:
    options = common.arguments(__doc__)
    common.prepare_data()
    results = common.Results("join", "State on its way to a worker that joins, on Ray", options)
    times = 2 if options.quick else 9
    with common.scratch("join") as folder:
        where = folder / "run"
        where.mkdir()
        job = gpt_job(where, workers=WORLD + 1, lanes=LANES, batch=1, model=LARGE)
        job["recipe_args"]["moves"] = True
        job["workers"] = {"min": 1, "max": WORLD + 1, "start": WORLD, "replace": False}
        job["steps"] = job["recipe_args"]["total_steps"] = GAP_STEPS * times + GAP_STEPS
        faults: list[dict[str, Any]] = []
        for number in range(times):
            begin = GAP_STEPS * number + 10
            leave = {"do": "drain", "worker": WORLD + number, "step": begin + STAYS_STEPS}
            faults += [{"do": "add", "step": begin}, leave]
        (where / "faults.yaml").write_text(yaml.safe_dump(faults), encoding="utf-8")
        with Running.elastictrain(where, job, ray=True, more=("--faults", str(where / "faults.yaml"))) as run:
            code = run.leaders[0].wait(timeout=1200)
            if code:
                raise BenchmarkError((where / "error-0.txt").read_text(errors="replace")[-2000:])
            lines = run.lines()
    found = joins(lines)
    stood = [one.seconds for one in pauses(lines) if one.kind == "joined"]
    for one in found:
        results.row(**{
            "moved MB": one.bytes / 1e6, "ours s": one.ours_s, "bare gloo s": one.bare_s,
            "ours MB/s": one.bytes / one.ours_s / 1e6, "bare gloo MB/s": one.bytes / one.bare_s / 1e6,
            "ratio": one.ratio,
        })  # fmt: skip
    ratio = common.median(one.ratio for one in found)
    reached = common.verdict(ratio, 0.8, at_most=False)
    results.figure("state moved at a join, bytes/s over bare gloo", ratio, "0.80 or more", reached)
    results.raw["joins"], results.raw["pauses_s"] = [vars(one) for one in found], stood
    results.notes += [
        (
            f"25 million parameters; {WORLD} workers and one that joins, one machine. Ours: packing, the way, unpacking"
            " and the digests that both ends compare, for blocks and for parameters that are published."
        ),
        f"Pauses of the others, the benchmark's own gloo transfer in them not taken out: {common.spread(stood)} s.",
    ]
    results.write()


if __name__ == "__main__":
    main()
