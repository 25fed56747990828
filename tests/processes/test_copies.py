"""Checkpoints in several places: copied beside training, never torn there, and gone on from when the first is gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from elastictrain.engine.resume import find_start
from elastictrain.faults import kill
from elastictrain_checkpoint import Store, digest, follower, list_steps, load, verify
from tests.support.plants import both
from tests.support.plants_copies import (
    dies_before_the_copys_manifest,
    dies_copying,
    far_hangs,
    far_is_broken,
    waits_for_copies,
)
from tests.support.plants_storing import all_is_known_before, storage_is_fast
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def stored(path: Path, *, far: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    copy = {"path": str(path / "far"), "keep": 10} | (far or {})
    return {"path": str(path / "near"), "every_steps": 2, "keep": 10, "copy_to": [copy]} | settings


@pytest.fixture(scope="module")
def still(folder: Path, tmp_path_factory: pytest.TempPathFactory, reference: Run) -> Store:
    """One worker that stores every step: what every checkpoint must equal."""
    path = tmp_path_factory.mktemp("still")
    checkpoint = {"path": str(path / "ckpt"), "every_steps": 1, "keep": 10}
    run = run_job(byte_job(folder, workers=1, checkpoint=checkpoint), patch=storage_is_fast)
    assert run.digest == reference.digest
    return Store(path / "ckpt")


def whole(path: Path, still: Store) -> list[int]:
    """The steps in a place; every one of them is whole and holds exactly its step."""
    store = Store(path)
    for step in list_steps(store):
        manifest = load(store, step)
        assert verify(store, manifest) == []
        assert digest(store, manifest) == manifest.digest == load(still, step).digest, step
    return list_steps(store)


def resumed(job: Any, **rest: Any) -> Run:
    start = find_start(job, resume=True)
    known = {"restore": start.restore, "checkpoints": start.checkpoints, "base_generation": start.generation}
    return run_job(job, **known, **rest)


def test_what_is_committed_is_copied_and_at_the_end_all_of_it_is_there(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    run = run_job(byte_job(folder, checkpoint=stored(tmp_path)), patch=storage_is_fast)
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    assert whole(tmp_path / "near", still) == whole(tmp_path / "far", still) == [2, 4, 6, 8]
    copied = run.record.of("checkpoint_copied")
    assert (copied[-1]["step"], copied[-1]["waiting"]) == (8, [])
    assert {event["path"] for event in copied} == {str(tmp_path / "far")}
    assert run.record.of("copy_failed") == []


@pytest.mark.parametrize("cut", [0, 2, "manifest"])
def test_the_publisher_dies_in_the_middle_of_a_copy_and_its_successor_takes_it_up(
    folder: Path, tmp_path: Path, reference: Run, still: Store, cut: Any
) -> None:
    victim = 0
    dies = dies_before_the_copys_manifest(victim, 4) if cut == "manifest" else dies_copying(victim, 4, cut)
    run = run_job(byte_job(folder, checkpoint=stored(tmp_path)), patch=both(storage_is_fast, dies))
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    assert [event["worker"] for event in run.record.of("worker_lost")] == [victim]
    near = whole(tmp_path / "near", still)
    assert {4, 8} <= set(near)
    assert whole(tmp_path / "far", still) == near, "what was missing was taken up"
    assert run.record.of("went_back") == []


def test_a_place_that_refuses_is_said_and_tried_again_and_nothing_is_lost_meanwhile(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    """The first place may keep two; it keeps what the other one has not got yet."""
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=1, keep=2))
    run = run_job(job, patch=both(storage_is_fast, far_is_broken(str(tmp_path / "far"), until=8)))
    assert run.digest == reference.digest
    (failed,) = run.record.of("copy_failed")
    assert failed["path"] == str(tmp_path / "far")
    assert "Read-only file system" in failed["error"]
    assert whole(tmp_path / "far", still) == list(range(1, 9)), "at the end it is tried once more"
    assert len(run.record.of("copy_works")) == 1
    assert run.record.last_status["copies"][str(tmp_path / "far")] == {"step": 8, "waiting": [], "error": ""}


def test_the_first_place_is_lost_and_the_run_goes_on_from_the_second(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    first = byte_job(folder, checkpoint=stored(tmp_path), steps=5)
    run_job(first, patch=storage_is_fast)
    assert whole(tmp_path / "far", still) == [2, 4, 5]
    shutil.rmtree(tmp_path / "near")
    run = resumed(byte_job(folder, workers=2, checkpoint=stored(tmp_path)), patch=storage_is_fast)
    assert run.digest == reference.digest
    (restored,) = run.record.of("restored")
    assert (restored["step"], restored["path"]) == (5, f"{tmp_path / 'far'}/step-00000005")
    assert whole(tmp_path / "near", still) == [6, 8]
    assert whole(tmp_path / "far", still) == [2, 4, 5, 6, 8]
    assert sorted(run.machine.core.ledger.checkpoints) == [2, 4, 5, 6, 8]


def test_a_damaged_block_is_read_from_the_other_place_and_written_anew(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    run_job(byte_job(folder, checkpoint=stored(tmp_path), steps=4), patch=storage_is_fast)
    packs = sorted((tmp_path / "near" / "step-00000004").rglob("*.safetensors"))
    for pack in packs[:2]:
        raw = bytearray(pack.read_bytes())
        raw[len(raw) // 2] ^= 1
        pack.write_bytes(raw)
    run = resumed(byte_job(folder, checkpoint=stored(tmp_path)), patch=storage_is_fast)
    assert run.digest == reference.digest
    (restored,) = run.record.of("restored")
    assert (restored["step"], restored["healed_blocks"]) == (4, 2)
    assert run.record.of("checkpoint_dropped") == []
    assert whole(tmp_path / "near", still) == [2, 4, 6, 8], "mended"


def test_a_run_that_goes_back_reads_from_both_places(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    """Both holders die, and a pack of the newest checkpoint has vanished from the first place meanwhile."""

    def vanish(_: Any, values: Any) -> None:
        if values["step"] == 6:  # it was copied by then
            for pack in (tmp_path / "near" / "step-00000004").rglob("w0001*.safetensors"):
                pack.unlink()

    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4), workers={"max": 3, "replace": True})
    patch = both(both(storage_is_fast, waits_for_copies(4, str(tmp_path / "far"))), all_is_known_before(8))
    run = run_job(job, [kill(0, 8, "exchange")], die_together=(0, 1), patch=patch, on_row=vanish)
    assert run.digest == reference.digest
    (back,) = run.record.of("went_back")
    assert back["to_step"] == 4
    assert run.record.of("checkpoint_dropped") == []
    assert whole(tmp_path / "far", still) == [4, 8]


def test_retention_is_each_places_own(folder: Path, tmp_path: Path, reference: Run, still: Store) -> None:
    checkpoint = stored(tmp_path, every_steps=1, keep=2, far={"keep": {"newest": 1, "every_steps": 3}})
    run = run_job(byte_job(folder, checkpoint=checkpoint), patch=storage_is_fast)
    assert run.digest == reference.digest
    assert whole(tmp_path / "far", still) == [3, 6, 8]
    near = whole(tmp_path / "near", still)
    assert near[-2:] == [7, 8]
    assert sorted(run.machine.core.ledger.checkpoints)[-2:] == [7, 8]
    assert {3, 6} <= set(run.machine.core.ledger.checkpoints), "nobody forgets what a further place still has"


def test_a_place_that_hangs_holds_up_nobody(folder: Path, tmp_path: Path, reference: Run, still: Store) -> None:
    patch = both(storage_is_fast, both(far_hangs(str(tmp_path / "far")), silent_soon))
    run = run_job(byte_job(folder, checkpoint=stored(tmp_path)), [kill(0, 5, "exchange")], patch=patch)
    assert run.digest == reference.digest
    assert whole(tmp_path / "far", still) == []
    assert whole(tmp_path / "near", still)[-1] == 8
    assert run.record.of("copy_failed")[-1]["error"] == f"{tmp_path / 'far'} has not answered for 1 s"


def silent_soon(worker: int) -> None:
    del worker
    follower.SILENT_S = 1.0
