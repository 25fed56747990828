"""How fast state moves to a worker that joins, against gloo moving the same bytes bare between the same processes.

One run on Ray whose model is large enough for the copying to count. Two workers train; a third joins and leaves, again
and again. After every seal, while nothing trains, the same pairs of processes send the same number of bytes through
their gloo group: no headers, no digests, one buffer per pair. Once into memory that is as fresh as a newcomer's (every
page is still to be found by the kernel), once into memory that has been written to, which only a benchmark has. Side by
side in time, so what disturbs the machine disturbs all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import common
from resize import pauses
from runs import Running, gpt_job

Line = dict[str, Any]
WORLD, LANES = 2, 3
STAYS_STEPS, GAP_STEPS = 80, 110
"""Long enough for a new process to come up."""
LARGE = {"vocabulary_size": 320, "sequence_length": 16, "layers": 6, "heads": 6, "width": 384, "dropout": 0.1}
"""11 million parameters: 0.13 GB of master weights and optimizer state."""


@dataclass(frozen=True)
class Join:
    """One newcomer. Seconds are of the last worker: `ours_s` from the first byte asked for to the last one in its place
    and its digest known; `fresh_s` and `bare_s` of gloo alone, into fresh memory and into memory that was touched.
    """

    bytes: int
    ours_s: float
    fresh_s: float
    bare_s: float
    pause_s: float

    @property
    def allowed_s(self) -> float:
        """What the others may stand still: half a second, and the transfer at 80 % of bare gloo."""
        return 0.5 + self.bare_s / 0.8


def joins(lines: list[Line]) -> list[Join]:
    found = []
    stood = {one.generation: one.seconds for one in pauses(lines)}
    for generation in sorted({x["generation"] for x in lines if x["k"] == "moved"}):
        mine = [x for x in lines if x["k"] == "moved" and x["generation"] == generation]
        if any(x["joiner"] for x in mine) and any(not x["joiner"] for x in mine):
            moved = sum(x["received_bytes"] for x in mine)
            ours_s, fresh_s, bare_s = (max(x[k] for x in mine) for k in ("ours_s", "fresh_s", "bare_s"))
            # The benchmark's own transfers lie in the pause.
            found.append(Join(moved, ours_s, fresh_s, bare_s, stood[generation] - max(x["extra_s"] for x in mine)))
    return found


def main() -> None:
    options = common.arguments(__doc__)
    common.prepare_data()
    results = common.Results("join", "State on its way to a worker that joins, on Ray", options)
    times = 2 if options.quick else 9
    with common.scratch("join") as folder:
        where = folder / "run"
        job = gpt_job(where, workers=WORLD + 1, lanes=LANES, batch=1, model=LARGE)
        job["recipe_args"]["moves"] = True
        job["workers"] = {"min": 1, "max": WORLD + 1, "start": WORLD, "replace": False}
        job["steps"] = job["recipe_args"]["total_steps"] = GAP_STEPS * times + GAP_STEPS
        faults: list[dict[str, Any]] = []
        for number in range(times):
            begin = GAP_STEPS * number + 10
            leave = {"do": "drain", "worker": WORLD + number, "step": begin + STAYS_STEPS}
            faults += [{"do": "add", "step": begin}, leave]
        lines = Running.with_faults(where, job, faults)
    found = joins(lines)
    for one in found:
        results.row(**{
            "moved MB": one.bytes / 1e6, "ours MB/s": one.bytes / one.ours_s / 1e6,
            "gloo, fresh memory MB/s": one.bytes / one.fresh_s / 1e6,
            "gloo, touched MB/s": one.bytes / one.bare_s / 1e6,
            "pause s": one.pause_s, "allowed s": one.allowed_s,
        })  # fmt: skip
    fresh = common.median(one.fresh_s / one.ours_s for one in found)
    touched = common.median(one.bare_s / one.ours_s for one in found)
    reached = common.verdict(fresh, 0.8, at_most=False)
    results.figure("state moved at a join, bytes/s over bare gloo into fresh memory", fresh, "0.80 or more", reached)
    results.figure("state moved at a join, bytes/s over bare gloo into touched memory", touched, "none", "beside it")
    pause = common.median(one.pause_s / one.allowed_s for one in found)
    name = "pause at a join over 0.5 s plus the transfer at 80 % of bare gloo (touched memory)"
    results.figure(name, pause, "1.0 or less", common.verdict(pause, 1.0, at_most=True))
    results.raw["joins"] = [vars(one) for one in found]
    results.notes.append(
        f"11 million parameters; {WORLD} workers and one that joins, one machine. Ours: headers, the way, and the "
        "digests that both ends compare, for blocks and for the parameters that are published."
    )
    results.write()


if __name__ == "__main__":
    main()
