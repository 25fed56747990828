"""Workers that die, come, go and read ahead, in one process: whatever happens, each committed step has used the samples
of the order, and says so by a hash that the audit computes again.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data.audit import Auditor, Verdict
from elastictrain.data.ids import lane_hash, show_hash, split_ids, step_hash
from elastictrain.data.reader import LaneReader
from elastictrain.data.stages import Skip, open_stage, with_skips
from elastictrain.job import Job, parse_job
from elastictrain.protocol import Stage

GROUP = 24
LANES, SIZE = 13, 2
FIRST = Stage(0, 0, LANES, SIZE)


def table_job(folder: Path, rows: int = 620) -> Job:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"n": np.arange(rows)}), folder / "a.parquet", row_group_size=GROUP)
    data = {"kind": "parquet", "path": str(folder), "columns": ["n"]}
    return parse_job({"recipe": "a:B", "data": data, "lanes": LANES, "lane_batch_size": SIZE, "steps": 10**6})


class Worker:
    """Reads its lanes and a little ahead of them; the next step may ask for others."""

    def __init__(self, job: Job, stage: Stage, chance: random.Random) -> None:
        self.reader, self.stage, self.chance = LaneReader(open_stage(job, stage)), stage, chance

    def hashes(self, step: int, lanes: list[int]) -> list[int]:
        found = []
        for lane in lanes:
            batch = self.reader.batch(self.stage.position(step), lane)
            blocks, rows = split_ids(batch.ids)
            assert (blocks * GROUP + rows).tolist() == batch["n"].tolist(), "an id names the row that came with it"
            found.append(lane_hash(lane, batch.ids))
            if self.chance.random() < 0.3:  # ahead, perhaps into the next window or epoch, and perhaps for nothing
                self.reader.batch(self.stage.position(step) + self.chance.randint(1, 30), lane)
        return found


def storm(job: Job, stage: Stage, worlds: list[int], first: int, end: int, chance: random.Random) -> dict[int, str]:
    """Run steps with a world that changes; a step whose worker dies is redone by the others. Returns what committed."""
    rows: dict[int, str] = {}
    world = [Worker(job, stage, chance) for _ in range(chance.choice(worlds))]
    step = first
    while step < end:
        dealt: list[list[int]] = [[] for _ in world]
        for lane in range(LANES):
            dealt[chance.randrange(len(world)) if chance.random() < 0.2 else lane % len(world)].append(lane)
        dies = chance.randrange(len(world)) if chance.random() < 0.4 else None
        parts = [step_hash(worker.hashes(step, lanes)) for worker, lanes in zip(world, dealt, strict=True)]
        if dies is not None:  # in this step: it does not count, and is computed again
            world.pop(dies).reader.close()
        while len(world) < (wanted := chance.choice(worlds)):
            world.append(Worker(job, stage, chance))
        for gone in world[wanted:]:
            gone.reader.close()
        del world[wanted:]
        if dies is None:
            rows[step] = show_hash(step_hash(parts))
            step += 1
    for worker in world:
        worker.reader.close()
    return rows


def audit(job: Job, stages: tuple[Stage, ...], rows: dict[int, str]) -> Verdict:
    verdict = Verdict()
    auditor = Auditor(stages, lambda stage: open_stage(job, stage))
    for found in auditor.audit(sorted(rows.items())):
        verdict.add(found)
    auditor.close()
    return verdict


@pytest.mark.parametrize("worlds", [[1], [2], [3], [5], [7], [8], [13], [1, 2, 3, 5, 7, 8, 13]], ids=str)
def test_a_storm_of_kills_resizes_and_drains_changes_no_sample(tmp_path: Path, worlds: list[int]) -> None:
    job = table_job(tmp_path / "data")
    rows = storm(job, FIRST, worlds, 1, 61, random.Random(sum(worlds)))
    verdict = audit(job, (FIRST,), rows)
    assert verdict.agrees
    assert verdict.running == verdict.running_recorded == QUIET
    assert (verdict.steps, verdict.samples) == (60, 60 * LANES * SIZE)


QUIET = (
    "bcb53833f9969a5e"  # the running hash of 60 steps with one worker that never dies: the order must stay what it is
)


def test_a_storm_over_a_skip_changes_no_sample_either(tmp_path: Path) -> None:
    job, chance = table_job(tmp_path / "data"), random.Random(4)
    skips = [Skip("a row group", 0, GROUP, block=3), Skip("a stretch", 27, 33, order=0), Skip("one", 5, 6, block=9)]
    stages = with_skips((FIRST,), skips, 20)
    rows = storm(job, FIRST, [3, 5], 1, 21, chance) | storm(job, stages[-1], [2, 7], 21, 81, chance)
    verdict = audit(job, stages, rows)
    assert verdict.agrees
    assert verdict.steps == 80
    used = Auditor(stages, lambda stage: open_stage(job, stage))
    later = [split_ids(used.ids(step, lane)) for step in range(21, 81) for lane in range(LANES)]
    assert not any(((blocks == 3) | ((blocks == 9) & (rows == 5))).any() for blocks, rows in later)


@pytest.mark.parametrize("bug", ["swap", "repeat", "shift"])
def test_the_audit_sees_a_wrong_sample(tmp_path: Path, bug: str) -> None:
    job = table_job(tmp_path / "data")
    rows = storm(job, FIRST, [2], 1, 12, random.Random(0))
    auditor = Auditor((FIRST,), lambda stage: open_stage(job, stage))
    ids = [auditor.ids(7, lane) for lane in range(LANES)]
    if bug == "swap":
        ids[0], ids[1] = ids[1], ids[0]
    elif bug == "repeat":
        ids[0] = ids[1]
    else:
        ids = [auditor.ids(8, lane) for lane in range(LANES)]
    rows[7] = show_hash(step_hash(lane_hash(lane, one) for lane, one in enumerate(ids)))
    verdict = audit(job, (FIRST,), rows)
    assert (verdict.differing, verdict.agrees) == ([7], False)
    assert verdict.running != verdict.running_recorded


def test_the_audit_sees_a_sample_that_comes_twice_in_an_epoch(tmp_path: Path) -> None:
    """Stages that overlap, as nothing of ours makes them: the order goes on two steps too early."""
    job = table_job(tmp_path / "data")
    stages = (FIRST, Stage(1, 10, LANES, SIZE, continues=True, begun=0, at=8))
    auditor = Auditor(stages, lambda stage: open_stage(job, stage))
    found = list(auditor.audit([(step, None) for step in range(1, 15)]))
    assert [step.step for step in found if step.repeated] == [11, 12]
    assert [step.repeated for step in found if step.repeated] == [LANES * SIZE] * 2
    assert [step.agrees for step in found] == [True] * 10 + [False] * 2 + [True] * 2
