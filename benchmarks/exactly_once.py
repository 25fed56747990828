"""Exactly once, counted: worlds of 1 to 13 real processes with SIGKILLs, joins and drains, and simulated kills by the
thousand, against the hash of the sample ids of every step of an undisturbed run.

Real: the controller and the engine on processes, a small model on packed text. A worker sends itself SIGKILL in the
phase of the step that is said. Simulated: readers in one process that die in the middle of their lanes, come, go and
read ahead (tests/support/storm.py). Exit code 1 when anything differs.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import common
from elastictrain.data.audit import Auditor, Verdict
from elastictrain.data.stages import first_stage, open_stage
from elastictrain.faults import PHASES, add, drain, kill
from elastictrain.job import Job
from tests.support.process_cluster import MemoryRecord, byte_job, run_job
from tests.support.storm import FIRST, audit, storm, table_job

WORLDS = (1, 2, 3, 5, 7, 8, 13)
LANES, STEPS = 14, 12
KILL_STEPS = (2, 4, 6, 8, 10)
REAL, SIMULATED = 20, 1000
"""Kills, at least."""


def faults_for(world: int) -> list[Any]:
    """A kill in another phase every two steps, of workers that are there from the beginning (of small worlds: of those
    too that replace them), one worker more after step 3 and one that leaves after step 5.
    """
    workers = range(min(max(2, world), len(KILL_STEPS)))
    phases = islice(cycle(PHASES), world % len(PHASES), None)
    kills = [kill(worker, step, phase) for worker, step, phase in zip(workers, KILL_STEPS, phases, strict=False)]
    return [*kills, add(3), *([drain(world - 1, 5)] if world > len(kills) else [])]


def happened(record: MemoryRecord) -> dict[int, dict[str, Any]]:
    """Rows by step; those of a run that went back to a checkpoint are those that it took since."""
    return {row["step"]: row for row in record.rows}


def audited(job: Job, rows: dict[int, dict[str, Any]]) -> Verdict:
    verdict = Verdict()
    auditor = Auditor((first_stage(job),), lambda stage: open_stage(job, stage))
    for step in auditor.audit([(step, row["samples_hash"]) for step, row in sorted(rows.items())]):
        verdict.add(step)
    auditor.close()
    return verdict


@dataclass(frozen=True)
class Real:
    """What one run on processes says; `hashes`: of the ids of each step's samples."""

    hashes: dict[int, str]
    digest: str | None
    verdict: Verdict
    kills: int
    wanted: int
    resizes: int
    worlds: list[int]


def real(folder: Path, world: int, faults: Sequence[Any]) -> Real:
    job = byte_job(folder, lanes=LANES, steps=STEPS,
                   workers={"max": world + bool(faults), "start": world, "min": 1, "replace": True})  # fmt: skip
    run = run_job(job, faults)
    rows = happened(run.record)
    return Real(
        {step: row["samples_hash"] for step, row in rows.items()}, run.outcome.digest, audited(job, rows),
        len(run.record.of("worker_lost")), sum(fault.do == "kill" for fault in faults),
        sum(a["world"] != b["world"] for a, b in pairwise(run.record.rows)),
        sorted({row["world"] for row in run.record.rows}),
    )  # fmt: skip


def main() -> int:
    options = common.arguments(__doc__)
    results = common.Results("exactly_once", "Sample ids under kills and resizes", options)
    wrong: list[str] = []
    kills = simulated = resizes = 0
    calm: Real | None = None
    with common.scratch("exactly-once") as folder:
        for world in WORLDS[:3] if options.quick else WORLDS:
            for name, faults in (("nothing happens", []), ("kills, a join, a drain", faults_for(world))):
                found = real(folder, world, faults)
                calm = calm or found
                equal = (found.hashes == calm.hashes and found.verdict.agrees and found.verdict.steps == STEPS
                         and found.verdict.running == calm.verdict.running)  # fmt: skip
                results.row(what=f"{world} processes: {name}", kills=found.kills, resizes=found.resizes,
                            worlds=found.worlds, steps=found.verdict.steps, hash=found.verdict.running,
                            samples="equal" if equal else "DIFFER",
                            weights="equal" if found.digest == calm.digest else "DIFFER")  # fmt: skip
                wrong += [f"{world} processes, {name}"] * (not equal or found.digest != calm.digest)
                wrong += [f"{world} processes: {found.kills} of {found.wanted} kills"] * (found.kills < found.wanted)
                kills, resizes = kills + found.kills, resizes + found.resizes
        job, hashes = table_job(folder / "table"), set()
        for worlds in [*([world] for world in WORLDS), list(WORLDS)]:
            found_kills = found_resizes = 0
            for seed in range(1 if options.quick else 2):
                wind = storm(job, FIRST, worlds, 1, 61, random.Random(f"{worlds} {seed}"))
                verdict = audit(job, (FIRST,), wind.rows)
                hashes.add(verdict.running)
                wrong += [f"a storm of {worlds}"] * (not verdict.agrees or verdict.steps != 60)
                found_kills, found_resizes = found_kills + wind.kills, found_resizes + wind.resizes
            results.row(what=f"{', '.join(map(str, worlds))} readers in one process", kills=found_kills,
                        resizes=found_resizes, worlds=worlds, steps=60 * (1 if options.quick else 2),
                        hash=verdict.running, samples="equal" if len(hashes) == 1 else "DIFFER")  # fmt: skip
            simulated, resizes = simulated + found_kills, resizes + found_resizes
        wrong += ["the storms"] * (len(hashes) != 1)
    results.figure("sample-id hash over 1, 2, 3, 5, 7, 8, 13 workers, kills and resizes",
                   "DIFFERS" if wrong else "equal", "equal", "missed" if wrong else "reached")  # fmt: skip
    results.judge("real kills of processes", kills, REAL, at_most=False)
    results.judge("simulated kills", simulated, SIMULATED, at_most=False)
    results.figure("resizes", resizes, "none", "beside it")
    results.notes += [f"wrong: {what}" for what in wrong]
    results.notes.append("Real kills: a worker sends itself SIGKILL in a phase of a step that is said beforehand.")
    results.write()
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
