"""Workers that read lanes in one process, and die, come, go and read ahead: what the exactly-once tests and their
benchmark disturb the order with.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastictrain.data.audit import Auditor, Verdict
from elastictrain.data.ids import lane_hash, show_hash, split_ids, step_hash
from elastictrain.data.reader import LaneReader
from elastictrain.data.stages import open_stage
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


@dataclass
class Storm:
    """What a storm left: `rows`, the samples' hash of each step that committed; what happened; `worlds` that committed
    a step.
    """

    rows: dict[int, str] = field(default_factory=dict)
    kills: int = 0
    resizes: int = 0
    worlds: set[int] = field(default_factory=set)


def storm(job: Job, stage: Stage, worlds: list[int], first: int, end: int, chance: random.Random) -> Storm:
    """Run steps with a world that changes. In half of all attempts at a step workers die, each with half a chance, in
    the middle of their lanes; such a step does not count, and those who are there then do it again.
    """
    found = Storm()
    world = [Worker(job, stage, chance) for _ in range(chance.choice(worlds))]
    step = first
    while step < end:
        dealt: list[list[int]] = [[] for _ in world]
        for lane in range(LANES):
            dealt[chance.randrange(len(world)) if chance.random() < 0.2 else lane % len(world)].append(lane)
        dying = {worker for worker in world if chance.random() < 0.5} or {world[-1]} if chance.random() < 0.5 else set()
        parts = [
            step_hash(worker.hashes(step, lanes[: chance.randint(0, len(lanes))] if worker in dying else lanes))
            for worker, lanes in zip(world, dealt, strict=True)
        ]
        if not dying:
            found.rows[step] = show_hash(step_hash(parts))
            found.worlds.add(len(world))
            step += 1
        found.kills += len(dying)
        found.resizes += _resize(world, dying, chance.choice(worlds), lambda: Worker(job, stage, chance))
    for worker in world:
        worker.reader.close()
    return found


def _resize(world: list[Worker], dying: set[Worker], wanted: int, start: Callable[[], Worker]) -> bool:
    """The dying go, and others come or go until `wanted` are there; returns whether the world has another size now."""
    before = len(world)
    for worker in dying:
        worker.reader.close()
        world.remove(worker)
    world += [start() for _ in range(wanted - len(world))]
    for worker in world[wanted:]:
        worker.reader.close()
    del world[wanted:]
    return before != wanted


def audit(job: Job, stages: tuple[Stage, ...], rows: dict[int, str]) -> Verdict:
    verdict = Verdict()
    auditor = Auditor(stages, lambda stage: open_stage(job, stage))
    for found in auditor.audit(sorted(rows.items())):
        verdict.add(found)
    auditor.close()
    return verdict
