"""Restoring on processes: any world reads what any other has stored, each byte once, and what goes wrong on the way."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from elastictrain.engine.resume import find_start, older_offer
from elastictrain.faults import kill
from elastictrain.job import Job
from elastictrain.protocol import Restore
from elastictrain_checkpoint import Manifest, Store, load
from tests.support.plants_storing import commits_are_fast, storage_is_fast
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

WORLDS: dict[str, dict[str, Any]] = {
    "1": {"workers": {"max": 1}},
    "2, each holds everything": {"workers": {"max": 2}},
    "3 as it was stored": {"workers": {"max": 3}},
    "4 uneven": {"workers": {"max": 4, "block_shares": {0: 3, 2: 0}}},
    "2 without mirrors": {"workers": {"max": 2}, "mirrors": False},
}


def wide_job(folder: Path, ckpt: Path, **settings: Any) -> Job:
    """A state of 19 MB: many hash blocks, so that what is read twice can be told from what is read once."""
    base = {
        "recipe_args": {"width": 512},
        "block_elements": 16384,
        "lanes": 4,
        "lane_batch_size": 1,
        "steps": 5,
        "checkpoint": {"path": str(ckpt), "every_steps": 2, "keep": 10, "at_end": False},
    }
    return byte_job(folder, **(base | settings))


@dataclass
class Stored:
    """A run of three workers that has stored steps 2 and 4 of 5."""

    folder: Path
    ckpt: Path
    run: Run

    def path(self, step: int) -> str:
        return f"{self.ckpt}/step-{step:08d}"

    def manifest(self, step: int) -> Manifest:
        return load(Store(str(self.ckpt)), step)

    def job(self, ckpt: Path | None = None, **settings: Any) -> Job:
        return wide_job(self.folder, ckpt or self.ckpt, **settings)


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    ckpt = tmp_path_factory.mktemp("stored") / "ckpt"
    run = run_job(wide_job(folder, ckpt, workers={"max": 3}), patch=storage_is_fast)
    assert [event["step"] for event in run.record.of("checkpoint")] == [2, 4]
    return Stored(folder, ckpt, run)


def read_once(run: Run, manifest: Manifest, world: int) -> None:
    """Each stored byte, but for the hash blocks that two shares meet in."""
    said = run.record.of("restored")[-1]
    assert said["step"] == manifest.step
    assert said["stored_bytes"] == manifest.size_bytes
    assert len(said["read_by_worker"]) == world
    assert sum(said["read_by_worker"].values()) == said["read_bytes"]
    assert 0.99 * manifest.size_bytes <= said["read_bytes"]
    assert said["read_bytes"] <= manifest.size_bytes + (world - 1) * manifest.block_bytes
    even = manifest.size_bytes / world
    assert max(said["read_by_worker"].values()) <= even + 3 * manifest.block_bytes, "shares are even"


@pytest.mark.parametrize("name", WORLDS)
def test_any_world_reads_each_stored_byte_once(stored, name):
    job = stored.job(**WORLDS[name])
    run = run_job(job, restore=Restore(4, stored.path(4)), base_generation=stored.manifest(4).generation)
    assert run.digest == stored.run.digest
    read_once(run, stored.manifest(4), job.workers.max)


def test_so_does_a_run_that_goes_back(stored, tmp_path):
    job = stored.job(tmp_path / "ckpt", workers={"max": 4})
    run = run_job(job, [kill(0, 5, "exchange")], die_together=(0, 1), patch=commits_are_fast)
    assert run.digest == stored.run.digest
    assert run.record.of("went_back")[0]["to_step"] == 2, "4 waits for vote 5"
    read_once(run, load(Store(str(tmp_path / "ckpt")), 2), 2)


@pytest.mark.parametrize("worker", [0, 2])
def test_one_dies_while_all_restore(stored, worker):
    """The first has read the manifest for all; the others wait for the share of whoever dies."""
    job = stored.job(workers={"max": 3})
    base = stored.manifest(4).generation
    run = run_job(job, [kill(worker, 5, "restore")], restore=Restore(4, stored.path(4)), base_generation=base)
    assert run.digest == stored.run.digest
    assert [event["worker"] for event in run.record.of("worker_lost")] == [worker]
    assert run.record.of("checkpoint_dropped") == []
    assert [event["step"] for event in run.record.of("restored")] == [4]
    read_once(run, stored.manifest(4), 2)


@pytest.fixture
def damaged(stored: Stored, tmp_path: Path) -> tuple[Path, str]:
    """A copy of what is stored, with a flipped bit in step 4; and the name of the pack."""
    ckpt = tmp_path / "ckpt"
    shutil.copytree(stored.ckpt, ckpt)
    pack = max((ckpt / "step-00000004").rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    raw = bytearray(pack.read_bytes())
    raw[len(raw) // 2] ^= 1
    pack.write_bytes(raw)
    return ckpt, pack.name


def test_damage_that_one_finds_sends_all_to_the_next_older_one(stored, damaged):
    ckpt, pack = damaged
    known = [(step, f"{ckpt}/step-{step:08d}") for step in (2, 4)]
    job = stored.job(ckpt, workers={"max": 3})
    run = run_job(job, restore=Restore(*known[1]), checkpoints=known, base_generation=stored.manifest(4).generation)
    assert run.digest == stored.run.digest
    (dropped,) = run.record.of("checkpoint_dropped")
    assert (dropped["step"], dropped["next_step"]) == (4, 2)
    assert pack in dropped["error"]
    assert [event["step"] for event in run.record.of("restored")] == [2]
    assert run.record.of("worker_lost") == []


def test_damage_of_the_one_that_was_asked_for_ends_the_run(stored, damaged):
    ckpt, pack = damaged
    job = stored.job(ckpt, workers={"max": 3})
    start = find_start(job, resume=True)
    run = run_job(job, restore=start.restore, checkpoints=start.checkpoints, base_generation=start.generation)
    assert run.outcome.outcome == "failed"
    assert (run.outcome.error or "").startswith("CorruptCheckpoint: checkpoint step 4 (")
    assert pack in (run.outcome.error or "")
    assert run.record.of("running") == []
    assert older_offer(job, 4) == "take the older step 2 with --resume-step 2"
