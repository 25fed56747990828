"""Checkpoints that are written while training goes on: they hold their step, and are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastictrain.faults import kill
from elastictrain_checkpoint import Store, digest, list_steps, load, verify
from tests.processes.test_stop_and_resume import stored
from tests.support.plants import both, wait_for_pause
from tests.support.plants_storing import (
    commits_are_known,
    commits_are_seen,
    dies_before_it_says_what_was_lost,
    dies_waiting_for_shares,
    manifest_hangs,
    manifest_has_no_room,
    manifest_waits_for_the_end,
    manifest_waits_for_the_next_save,
    peers_wait_for,
    storage_is_fast,
    storage_waits,
)
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def still(folder: Path, tmp_path_factory: pytest.TempPathFactory, reference: Run) -> Store:
    """One worker that stores every step before it goes on: what every checkpoint must equal."""
    path = tmp_path_factory.mktemp("still")
    run = run_job(byte_job(folder, workers=1, checkpoint=stored(path, every_steps=1)), patch=storage_is_fast)
    assert run.digest == reference.digest
    store = Store(path / "ckpt")
    assert list_steps(store) == list(range(1, 9))
    return store


def whole(path: Path, still: Store) -> list[int]:
    """The steps in a folder; every one of them is whole and holds exactly its step."""
    store = Store(path / "ckpt")
    for step in list_steps(store):
        manifest = load(store, step)
        assert verify(store, manifest) == []
        assert digest(store, manifest) == manifest.digest == load(still, step).digest, step
    return list_steps(store)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"numerics": {"compute_dtype": "bf16"}}], ids=["f32", "bf16"])
def test_training_goes_on_while_the_storage_does_nothing(
    folder: Path, tmp_path: Path, workers: int, settings: dict[str, Any]
) -> None:
    undisturbed = run_job(byte_job(folder, workers=1, **settings))
    one = byte_job(folder, workers=1, checkpoint=stored(tmp_path / "one", every_steps=1), **settings)
    run_job(one, patch=storage_is_fast)
    job = byte_job(folder, workers=workers, checkpoint=stored(tmp_path, every_steps=3, at_end=False), **settings)
    run = run_job(job, patch=storage_waits(3, until=5))  # waits for ever if training waited for it
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    assert whole(tmp_path, Store(tmp_path / "one" / "ckpt")) == [3, 6]
    assert [event["step"] for event in run.record.of("checkpoint")] == [3, 6]


def test_the_last_one_is_waited_for(folder: Path, tmp_path: Path, reference: Run, still: Store) -> None:
    run = run_job(byte_job(folder, checkpoint=stored(tmp_path, every_steps=6)), patch=storage_waits(6, until=8))
    assert run.digest == reference.digest
    assert whole(tmp_path, still) == [6, 8]


def test_a_stop_finishes_what_is_being_written(folder: Path, tmp_path: Path, still: Store) -> None:
    from elastictrain.controller import events as ev

    def stop(driver: Any, values: Any) -> None:
        if values["step"] == 4:
            driver.request(ev.StopRequested(0.0, "enough"))

    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4))
    run = run_job(job, patch=both(storage_waits(4, until=6), wait_for_pause(6)), on_row=stop)
    assert (run.outcome.outcome, run.outcome.step) == ("stopped", 6)
    assert whole(tmp_path, still) == [4, 6]


@pytest.mark.parametrize("phase", ["compute", "exchange", "vote", "apply", "gather"])
def test_a_worker_that_dies_while_it_stores_leaves_a_whole_checkpoint_or_none(
    folder: Path, tmp_path: Path, reference: Run, still: Store, phase: Any
) -> None:
    """Step 4 is being written by all when one dies in step 5: it is given up, and the sealed commit stored instead."""
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4, at_end=False))
    run = run_job(job, [kill(1, 5, phase)], patch=storage_waits(4, until=7))
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    assert not run.record.of("went_back")
    found = whole(tmp_path, still)
    assert found in ([4, 8], [5, 8])
    assert [event["step"] for event in run.record.of("checkpoint")] == found


def test_a_checkpoint_that_was_given_up_is_made_up_for_at_the_seal(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4))
    run = run_job(job, [kill(1, 6, "compute")], patch=storage_waits(4, until=7))
    assert run.digest == reference.digest
    assert whole(tmp_path, still) == [5, 8], "nobody had applied step 6: 5 was sealed"


@pytest.mark.parametrize("victims", [(0, 1), (0, 1, 2)])
def test_all_holders_die_while_they_store(
    folder: Path, tmp_path: Path, reference: Run, still: Store, victims: tuple[int, ...]
) -> None:
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=3), workers={"max": 3, "replace": True})
    run = run_job(
        job, [kill(0, 7, "exchange")], die_together=victims, patch=both(commits_are_known, storage_waits(6, until=7))
    )
    assert run.digest == reference.digest
    (back,) = run.record.of("went_back")
    assert back["to_step"] == 3, "6 was not committed"
    assert whole(tmp_path, still) == [3, 6, 8]


# --- a fault in every phase of storing, by its address ---


@pytest.mark.parametrize("worker", [0, 1, 2])
@pytest.mark.parametrize("phase", ["store", "stored"])
def test_a_writer_dies_while_it_stores_and_the_sealed_step_is_stored_instead(
    folder: Path, tmp_path: Path, reference: Run, still: Store, phase: Any, worker: int
) -> None:
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4, at_end=False))
    run = run_job(job, [kill(worker, 4, phase)], patch=peers_wait_for(worker, 4))
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    assert not run.record.of("went_back")
    found = whole(tmp_path, still)
    assert found == [4, 8], "nobody had gone on, so 4 was sealed: it is written anew"
    (lost,) = run.record.of("checkpoint_given_up")
    assert lost["step"] == 4
    assert lost["begun_in"] == 1
    assert lost["why"].endswith("; not all of it was written")
    assert lost["stored_instead"] == found[0], "the dead worker's blocks are in it: its mirror has written them"
    assert [event["step"] for event in run.record.of("checkpoint")] == found
    (incident,) = run.record.of("incident")
    assert any("checkpoint of step 4 was given up" in seen["what"] for seen in incident["seen"])
    assert not orphans(tmp_path)


def test_the_publisher_dies_between_packs_and_manifest(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4, at_end=False))
    run = run_job(job, [kill(0, 4, "manifest")], patch=both(storage_is_fast, commits_are_seen))
    assert run.digest == reference.digest
    found = whole(tmp_path, still)
    assert found[0] in (5, 6)
    assert found[1:] == [8]
    (lost,) = run.record.of("checkpoint_given_up")
    assert (lost["step"], lost["stored_instead"]) == (4, found[0])
    assert lost["why"].endswith("; its shares were durable, its manifest was not there")
    assert not orphans(tmp_path)


def test_the_publisher_dies_right_after_the_manifest_and_its_successor_finds_it(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4, at_end=False))
    run = run_job(job, [kill(0, 4, "committed")], patch=both(storage_is_fast, commits_are_seen))
    assert run.digest == reference.digest
    assert whole(tmp_path, still) == [4, 8], "nothing is stored in its place"
    assert [event["step"] for event in run.record.of("checkpoint")] == [4, 8]
    assert run.record.of("checkpoint_given_up") == []
    assert not orphans(tmp_path)


def test_the_publisher_dies_after_a_manifest_while_the_next_is_written_and_both_are_settled(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=3, at_end=False))
    run = run_job(job, [kill(0, 3, "committed")], patch=both(storage_is_fast, manifest_waits_for_the_next_save(3)))
    assert run.digest == reference.digest
    found, (lost,) = whole(tmp_path, still), run.record.of("checkpoint_given_up")
    assert found[0] == 3
    assert (lost["step"], [lost["stored_instead"]]) == (6, found[1:])
    said = [(kind, data["step"]) for kind, data, _ in run.record.events if kind.startswith("checkpoint")]
    assert said[:2] == [("checkpoint", 3), ("checkpoint_given_up", 6)], "which is still to be made up for"
    assert [step for kind, step in said if kind == "checkpoint"] == found, "the older one has its name"
    assert not orphans(tmp_path)


def test_a_late_manifest_is_named_although_a_newer_save_had_begun(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=3, at_end=False))
    run = run_job(job, [kill(2, 7, "exchange")], patch=both(storage_is_fast, manifest_hangs(3, until=7)))
    assert run.digest == reference.digest
    found = whole(tmp_path, still)
    assert found[0] == 3
    assert [event["step"] for event in run.record.of("checkpoint")] == found
    assert [lost["step"] for lost in run.record.of("checkpoint_given_up")] == [3, 6], "it was not there at the seal"


def test_another_worker_dies_while_the_publisher_commits(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    """The publisher lives, and the commit beside its training ends with its generation."""
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4, at_end=False))
    run = run_job(job, [kill(2, 6, "exchange")], patch=both(storage_is_fast, manifest_waits_for_the_end(4)))
    assert run.digest == reference.digest
    found = whole(tmp_path, still)
    assert found[0] in (5, 6)
    assert found[1:] == [8]
    (lost,) = run.record.of("checkpoint_given_up")
    assert (lost["step"], lost["stored_instead"]) == (4, found[0])


def test_nobody_waits_for_a_storage_that_does_not_answer_when_a_generation_ends(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    """The call that creates the manifest of step 4 is under way when worker 2 dies. The others go on; when the call is
    answered, two steps later, that checkpoint is there, whole, and known.
    """
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4, at_end=False))
    run = run_job(job, [kill(2, 6, "exchange")], patch=both(storage_is_fast, manifest_hangs(4, until=7)))
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    found = whole(tmp_path, still)
    assert found[0] == 4
    assert found[1] in (5, 6)
    assert found[2:] == [8]
    (lost,) = run.record.of("checkpoint_given_up")
    assert (lost["step"], lost["stored_instead"]) == (4, found[1])
    assert [event["step"] for event in run.record.of("checkpoint")] == found
    assert not orphans(tmp_path)


def test_who_waits_for_its_own_share_leaves_when_its_generation_is_over(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    """The storage takes nothing of step 2 before step 6 is applied; at step 4 everybody waits for it, and one dies."""
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=2, at_end=False))
    run = run_job(job, patch=both(storage_waits(2, until=6), dies_waiting_for_shares(2)))
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    (lost,) = run.record.of("checkpoint_given_up")
    assert (lost["step"], lost["begun_in"], lost["stored_instead"]) == (2, 1, 4)
    assert whole(tmp_path, still) == [4, 6, 8]


@pytest.mark.parametrize("every", [{"every_steps": 4}, {"max_loss": "1h"}], ids=["steps", "budget"])
def test_what_was_given_up_is_said_although_whoever_was_to_say_it_dies(
    folder: Path, tmp_path: Path, reference: Run, still: Store, every: dict[str, Any]
) -> None:
    step = every.get("every_steps", 1)
    settings = {"path": str(tmp_path / "ckpt"), "keep": 10, "at_end": False} | every
    patch = both(storage_waits(step, until=step + 3), dies_before_it_says_what_was_lost(0))
    run = run_job(byte_job(folder, checkpoint=settings), [kill(2, step + 1, "exchange")], patch=patch)
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    assert {event["worker"] for event in run.record.of("worker_lost")} == {0, 2}
    lost = run.record.of("checkpoint_given_up")
    assert (lost[0]["step"], lost[0]["begun_in"]) == (step, 1)
    assert {event["begun_in"] for event in lost[1:]} <= {2}, "what generation 2 had begun to store instead"
    assert whole(tmp_path, still)[0] == lost[0]["stored_instead"]


def test_by_a_budget_too_the_sealed_step_is_stored_instead(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    settings = {"path": str(tmp_path / "ckpt"), "max_loss": "1h", "keep": 10, "at_end": False}
    run = run_job(
        byte_job(folder, checkpoint=settings), [kill(0, 1, "manifest")], patch=both(storage_is_fast, commits_are_seen)
    )
    assert run.digest == reference.digest
    (lost,) = run.record.of("checkpoint_given_up")
    assert lost["step"] == 1
    assert whole(tmp_path, still)[0] == lost["stored_instead"]


def test_all_holders_die_and_what_was_under_way_is_stored_when_the_run_comes_there_again(
    folder: Path, tmp_path: Path, reference: Run, still: Store
) -> None:
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=3), workers={"max": 3, "replace": True})
    patch = both(commits_are_known, storage_waits(6, until=7))
    run = run_job(job, [kill(0, 7, "exchange")], die_together=(0, 1), patch=patch)
    assert run.digest == reference.digest
    (lost,) = run.record.of("checkpoint_given_up")
    assert (lost["step"], lost["stored_instead"]) == (6, None)
    assert whole(tmp_path, still) == [3, 6, 8]


def test_a_full_disk_at_the_manifest_ends_the_run_with_its_words(folder: Path, tmp_path: Path) -> None:
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=2))
    run = run_job(job, patch=manifest_has_no_room)
    assert run.outcome.outcome == "failed"
    assert run.outcome.error is not None
    assert run.outcome.error.startswith(
        f"ClusterError: checkpoint step 2 cannot be stored in checkpoint.path={str(tmp_path / 'ckpt')!r}: OSError: "
    )
    assert list_steps(Store(tmp_path / "ckpt")) == []


def orphans(path: Path) -> set[str]:
    """Packs of generations before the last that no manifest refers to."""
    store = Store(path / "ckpt")
    manifests = [load(store, step) for step in list_steps(store)]
    used = {pack for manifest in manifests for pack in manifest.paths}
    there = {pack.relative_to(path / "ckpt").as_posix() for pack in (path / "ckpt").rglob("*.safetensors")}
    return there - used
