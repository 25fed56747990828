"""The same bits: digests over worlds, uneven lanes and blocks, memory choices, dtypes, and a kill in every phase.

The model has everything that must stay equal (dropout, BatchNorm, tied weights, a frozen parameter, two groups, EMA,
clipping, lanes of different weight). Exit code 1 when any digest differs from that of its reference.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

WORLDS = (1, 2, 3, 4, 7)
PHASES = ("compute", "exchange", "mirror", "vote", "apply", "gather")
KILL_STEP = 4
UNEVEN = {
    "lanes and blocks 1:2:3": {"lane_shares": {1: 2.0, 2: 3.0}, "block_shares": {1: 2.0, 2: 3.0}},
    "lanes 5:1:1, blocks 1:1:6": {"lane_shares": {0: 5.0}, "block_shares": {2: 6.0}},
    "worker 1 owns no block": {"block_shares": {1: 0.0}},
}


@dataclass(frozen=True)
class Case:
    """One run. `dtype` picks the reference: another dtype is another computation."""

    dtype: str
    gradients: str
    world: int
    shares: str = ""
    kill: tuple[int, str] | None = None

    def words(self) -> str:
        found = [f"{self.world} workers", self.shares]
        found.append(f"kill worker {self.kill[0]} in {self.kill[1]}" if self.kill else "")
        return ", ".join(word for word in found if word)


def cases(quick: bool) -> Iterator[Case]:
    choices = list(itertools.product(("f32", "bf16"), ("sum", "hand_over")))
    for dtype, gradients in choices:
        main = (dtype, gradients) == ("f32", "sum")
        for world in WORLDS if main or not quick else (1, 3):
            yield Case(dtype, gradients, world)
        for shares in UNEVEN if main or not quick else ():
            yield Case(dtype, gradients, 3, shares)
        for number, (phase, worker) in enumerate(itertools.product(PHASES, range(3))):
            if not quick or (main and number % 3 == number // 3 % 3):  # quick: every phase once, workers in turn
                yield Case(dtype, gradients, 3, kill=(worker, phase))


def run(case: Case, folder: Path) -> dict[str, Any]:
    from elastictrain.faults import kill
    from tests.support.process_cluster import byte_job, run_job

    workers: dict[str, Any] = {"max": case.world, "replace": False, **UNEVEN.get(case.shares, {})}
    job = byte_job(
        folder,
        workers=workers,
        gradients=case.gradients,
        numerics={"compute_dtype": case.dtype},
    )
    faults = [kill(case.kill[0], KILL_STEP, case.kill[1])] if case.kill else []
    begun = time.monotonic()
    found = run_job(job, faults)
    generations = found.machine.generation
    if case.kill and generations < 2:
        raise SystemExit(f"{case.words()}: the fault did not happen")
    return {"digest": found.digest, "generations": generations, "seconds": time.monotonic() - begun}


def main() -> int:
    options = common.arguments(__doc__)
    os.environ["OMP_NUM_THREADS"] = "1"
    results = common.Results("same_bits", "The same bits", options)
    reference: dict[str, str] = {}
    different = 0
    total: dict[str, int] = {}
    with common.scratch("bits") as folder:
        for case in cases(options.quick):
            found = run(case, folder)
            wanted = reference.setdefault(case.dtype, found["digest"])
            different += found["digest"] != wanted
            total[case.dtype] = total.get(case.dtype, 0) + 1
            results.row(
                dtype=case.dtype,
                gradients=case.gradients,
                case=case.words(),
                generations=found["generations"],
                digest=found["digest"][:16],
                equal=found["digest"] == wanted,
            )
    counts = " and ".join(f"{count} {dtype}" for dtype, count in total.items())
    said = f"all {counts} runs equal" if not different else f"{different} of {counts} runs differ"
    results.figure("digests", said, "all equal", "reached" if not different else "missed")
    results.notes.append("Digests are compared within a dtype; the first run of a dtype (one worker) is its reference.")
    results.raw["reference"] = reference
    results.write()
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
