"""Silent errors on real workers: found at the next vote, the right worker named, and the bits stay. With the checks
off the same errors spoil the result, so these tests can fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastictrain.faults import Fault, flip, kill, miscompute
from elastictrain_checkpoint import Store, list_steps, load
from tests.support.plants import accuses_another, both, last_rows_are_lost, wait_for_company
from tests.support.plants_storing import (
    all_is_known_before,
    commits_are_fast,
    manifest_hangs_until_the_next_seal,
    storage_is_fast,
)
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

OFF = {"state": False, "recompute_every": None}
WITNESS = {"witness": True}
SEED = 7
"""Its first wrong lane that is checked is in step 25; five others were wrong before."""


def named(run: Run) -> list[int]:
    """Who was ended as corrupt, in order."""
    return [d["worker"] for d in run.record.of("doomed") if d["reason"].startswith("corrupt")]


def same(run: Run, reference: Run) -> None:
    assert run.digest == reference.digest, run.record.events[-10:]
    assert run.losses == reference.losses


def found_at(run: Run, step: int) -> bool:
    """Nothing newer than `step` had been published when the error was found."""
    (recovery, *_) = run.record.of("recovery")
    return bool(recovery["step"] == step)


BETWEEN = {
    "master of an owner": (flip(1, 4, "master"), 1, 3),
    "master of a mirror": (flip(1, 4, "master", of="mirrored"), 1, 3),
    "optimizer state of an owner": (flip(0, 4, "optimizer"), 0, 3),
    "optimizer state of a mirror": (flip(2, 4, "optimizer", of="mirrored", bit=30), 2, 3),
    "published copy of a third": (flip(2, 4, "parameter", of="other"), 2, 3),
    "reduced gradient of an owner": (flip(1, 4, "gradient"), 1, 3),
    "reduced gradient of a mirror": (flip(1, 4, "gradient", of="mirrored"), 1, 3),
    "published copy of a third as it came": (flip(2, 4, "parameter", of="other", when="gathered"), 2, 4),
    "an owner's after it was sent": (flip(0, 4, "parameter", when="gathered"), 0, 4),
    "in the last step": (flip(1, 8, "optimizer", when="gathered"), None, 0),
}


@pytest.mark.parametrize("case", [name for name in BETWEEN if BETWEEN[name][1] is not None])
def test_a_flipped_bit_is_found_at_the_next_vote(folder: Path, reference: Run, case: str) -> None:
    fault, culprit, good = BETWEEN[case]
    run = run_job(byte_job(folder, integrity=WITNESS), [fault])
    same(run, reference)
    assert named(run) == [culprit]
    assert found_at(run, good)
    assert not run.record.of("went_back"), "the other copies are right: no storage is read"
    assert [row["step"] for row in run.record.rows] == list(range(1, 9))


@pytest.mark.parametrize(
    ("case", "workers"),
    [
        (name, workers)
        for name, (fault, culprit, _) in BETWEEN.items()
        for workers in (2, 3)
        if culprit is not None and culprit < workers and (fault.of != "other" or workers == 3)
    ],
)
def test_without_a_witness_it_is_found_as_soon_and_named_by_the_redo(
    folder: Path, tmp_path: Path, reference: Run, case: str, workers: int
) -> None:
    fault, culprit, good = BETWEEN[case]
    job = byte_job(folder, workers=workers, checkpoint={"path": str(tmp_path / "c"), "every_steps": 2})
    run = run_job(job, [fault], patch=commits_are_fast)
    same(run, reference)
    assert named(run) == [culprit]
    back = run.record.of("went_back")
    assert found_at(run, good) or [(b["from_step"], b["to_step"]) for b in back] == [(good, 2)]
    assert not back or "there is no third computation" in back[0]["reason"]


@pytest.mark.parametrize("case", BETWEEN)
def test_with_the_sums_off_it_spoils_the_result(folder: Path, reference: Run, case: str) -> None:
    # What a mirror keeps is used only when its owner dies: here it does.
    owner_dies = [kill(1, 6)] if case == "optimizer state of a mirror" else []
    run = run_job(byte_job(folder, integrity=OFF), [BETWEEN[case][0], *owner_dies])
    assert run.outcome.digest != reference.digest or run.losses != reference.losses
    assert named(run) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"numerics": {"compute_dtype": "bf16"}},
        {"ownership": "whole"},
        {"gradients": "hand_over", "lane_batch_size": 4, "micro_batches": 2},
    ],
    ids=["bf16", "whole parameters", "handed over in micro-batches"],
)
def test_the_same_under_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    alone = run_job(byte_job(folder, workers=1, **settings))
    faults = [flip(3, 2, "master"), flip(2, 4, "optimizer", of="mirrored"), flip(1, 6, "parameter")]
    run = run_job(byte_job(folder, workers=4, integrity=WITNESS, **settings), faults)
    same(run, alone)
    assert named(run) == [3, 2, 1]
    assert not run.record.of("went_back")


def test_in_bf16_a_master_that_was_published_otherwise_names_its_holder(folder: Path) -> None:
    """Owner and mirror agree, the copy that the owner's forward reads does not follow from its master."""
    settings = {"numerics": {"compute_dtype": "bf16"}}
    alone = run_job(byte_job(folder, workers=1, **settings))
    run = run_job(byte_job(folder, **settings), [flip(1, 4, "parameter", when="gathered", bit=9)])
    same(run, alone)
    assert named(run) == [1]
    assert "does not follow from its own master" in run.record.of("doomed")[0]["reason"]


# --- inside apply: nobody can know at once; the redo is the third computation ---


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "initial state"])
@pytest.mark.parametrize(
    "fault",
    [
        flip(1, 6, "master", when="apply"),
        flip(1, 6, "optimizer", of="mirrored", when="apply"),
    ],
    ids=["master of an owner", "optimizer state of a mirror"],
)
def test_a_wrong_apply_goes_back_and_the_redo_names_who_it_was(
    folder: Path, tmp_path: Path, reference: Run, fault: Fault, checkpoint: bool
) -> None:
    settings = {"checkpoint": {"path": str(tmp_path / "c"), "every_steps": 3}} if checkpoint else {}
    patch = both(commits_are_fast, all_is_known_before(5))  # else both times are one recovery
    run = run_job(byte_job(folder, **settings), [fault], patch=patch)
    same(run, reference)
    (back,) = run.record.of("went_back")
    assert (back["from_step"], back["to_step"]) == (6, 3 if checkpoint else 0)
    assert "there is no third computation" in back["reason"]
    assert named(run) == [1]
    assert "computed again, it is another" in run.record.of("doomed")[0]["reason"]
    assert run.record.of("recovery")[-1]["steps_redone"] == 0, "at the commit itself, which is right this time"
    spoilt = run_job(byte_job(folder, integrity=OFF), [fault])
    assert spoilt.digest != reference.digest


def test_two_workers_find_a_wrong_apply_too(folder: Path, reference: Run) -> None:
    run = run_job(byte_job(folder, workers=2), [flip(0, 5, "optimizer", when="apply")])
    same(run, reference)
    assert named(run) == [0]


def test_a_flip_in_the_last_apply_is_found_by_the_closing_sums(folder: Path, tmp_path: Path, reference: Run) -> None:
    path = str(tmp_path / "c")
    job = byte_job(folder, checkpoint={"path": path, "every_steps": 4})
    run = run_job(job, [flip(1, 8, "master", when="apply")], patch=commits_are_fast)
    same(run, reference)
    (back,) = run.record.of("went_back")
    assert (back["from_step"], back["to_step"]) == (8, 4), "step 8 was written, and never committed"
    assert list_steps(Store(path)) == [4, 8]


def test_a_flip_after_the_last_apply_is_found_by_the_closing_sums(folder: Path, reference: Run) -> None:
    run = run_job(byte_job(folder), [flip(0, 8, "parameter", of="other", when="gathered")])
    same(run, reference)
    assert named(run) == [0]


def test_one_worker_alone_sees_its_own_memory_change(folder: Path, tmp_path: Path, reference: Run) -> None:
    job = byte_job(
        folder, checkpoint={"path": str(tmp_path / "c"), "every_steps": 3}, workers={"max": 1, "replace": True}
    )
    run = run_job(job, [flip(0, 6, "optimizer")], patch=commits_are_fast)
    same(run, reference)
    assert named(run) == [0]
    assert run.record.of("went_back")[0]["to_step"] == 3


def test_flips_among_other_faults(folder: Path) -> None:
    job = byte_job(folder, steps=40, workers={"max": 4, "spares": 1, "replace": True})
    alone = run_job(byte_job(folder, steps=40, workers=1))
    faults = [kill(0, 5, "vote"), flip(1, 9, "master"), flip(2, 9, "gradient"), kill(3, 16, "apply")]
    run = run_job(job, [*faults, flip(4, 22, "optimizer")], patch=wait_for_company(4), all_ready_first=True)
    same(run, alone)
    assert {1, 2, 4} == set(named(run))


def test_memory_that_changes_while_parked_is_not_copied_to_others(folder: Path, reference: Run) -> None:
    """Worker 2 flips a bit in the step in which worker 0 dies, and is asked for its copies before any vote."""
    job = byte_job(folder, workers=4, integrity=WITNESS)
    run = run_job(job, [flip(2, 4, "optimizer", of="mirrored"), kill(0, 4, "exchange")])
    same(run, reference)
    assert named(run) == [2]
    assert "while it was parked" in run.record.of("doomed")[0]["reason"]
    assert not run.record.of("went_back")


def test_a_verdict_is_heard_although_the_culprit_says_nothing(folder: Path, reference: Run) -> None:
    run = run_job(byte_job(folder), [flip(1, 4, "master")], patch=last_rows_are_lost(1, generation=1))
    same(run, reference)
    assert named(run) == [1]


def test_one_accuser_does_not_end_another_when_most_judge_otherwise(folder: Path, reference: Run) -> None:
    """Worker 3 says that worker 0 is wrong, from the same sums: a machine that cannot compute."""
    job = byte_job(folder, workers=4, integrity=WITNESS)
    run = run_job(job, [flip(1, 4, "master")], patch=accuses_another(3, culprit=0))
    same(run, reference)
    assert sorted(named(run)) == [1, 3], "the one with the flipped bit, and the one that judges otherwise than the rest"
    assert not run.record.of("went_back")


def test_two_that_accuse_each_other_go_back(folder: Path, reference: Run) -> None:
    """Nobody else has the evidence: neither is ended for what only the other says."""
    job = byte_job(folder, workers=2, integrity=WITNESS)
    run = run_job(job, [flip(1, 4, "master")], patch=accuses_another(1, culprit=0))
    same(run, reference)
    assert named(run) == []
    assert len(run.record.of("went_back")) == 1


# --- lanes ---


def lane_job(folder: Path, tmp_path: Path, workers: int, **integrity: Any) -> Any:
    checkpoint = {"path": str(tmp_path / "c"), "every_steps": 4, "keep": 20}
    return byte_job(folder, workers=workers, steps=40, checkpoint=checkpoint, integrity=integrity)


@pytest.fixture(scope="module")
def longer(folder: Path) -> Run:
    return run_job(byte_job(folder, workers=1, steps=40))


def test_a_worker_that_is_wrong_one_time_in_ten_is_named_and_nothing_of_it_stays(
    folder: Path, tmp_path: Path, longer: Run
) -> None:
    """It has passed checks while other lanes of its were wrong: only what was stored before it joined is certain."""
    job = lane_job(folder, tmp_path, 4, recompute_every=1, distrust="since_it_joined")
    run = run_job(job, [miscompute(1, 6, one_in=10, seed=SEED)])
    same(run, longer)
    assert named(run) == [1]
    (back,) = run.record.of("went_back")
    assert back["to_step"] == 0
    spoilt = run_job(byte_job(folder, steps=40, workers=4, integrity=OFF), [miscompute(1, 6, one_in=10, seed=SEED)])
    assert spoilt.digest != longer.digest


def test_one_that_is_always_wrong_costs_no_more_than_its_last_check(folder: Path, tmp_path: Path, longer: Run) -> None:
    job = lane_job(folder, tmp_path, 4, recompute_every=1)
    run = run_job(job, [miscompute(2, 13, one_in=1)])
    same(run, longer)
    assert named(run) == [2]
    (back,) = run.record.of("went_back")
    assert back["to_step"] in (4, 8, 12), "a checkpoint from before, and no newer than its last check"
    assert back["from_step"] >= 12


@pytest.mark.parametrize("one_in", [1, 3])
def test_of_two_workers_one_that_contradicts_itself_is_named_and_else_the_run_ends(
    folder: Path, tmp_path: Path, longer: Run, one_in: int
) -> None:
    job = lane_job(folder, tmp_path, 2, recompute_every=1, distrust="since_it_joined")
    run = run_job(job, [miscompute(1, 9, one_in=one_in, seed=1)])
    if one_in == 1:
        assert run.outcome.outcome == "failed"
        assert (run.outcome.error or "").startswith("ClusterError: workers [0, 1] compute different gradients of lane")
        assert "no others can outvote them" in (run.outcome.error or "")
    else:
        same(run, longer)
        assert named(run) == [1]


def test_checkpoints_that_are_not_to_be_trusted_are_gone(folder: Path, tmp_path: Path, longer: Run) -> None:
    """Whoever resumes must not find them: the run is ended at once after it went back."""
    job = lane_job(folder, tmp_path, 3, recompute_every=10, distrust="since_it_joined")
    store, seen = Store(job.checkpoint.path), []

    def look(driver: Any, values: Any) -> None:
        if driver.record.of("went_back") and not seen:
            seen.append([step for step in list_steps(store) if load(store, step).generation == 1])

    run = run_job(job, [miscompute(1, 2, one_in=1)], on_row=look)
    same(run, longer)
    assert run.record.of("went_back")[0]["to_step"] == 0
    assert seen == [[]]


def test_a_checkpoint_that_is_not_to_be_trusted_goes_also_if_it_comes_later(
    folder: Path, tmp_path: Path, longer: Run
) -> None:
    """The call that creates its manifest is answered when the others have been removed."""
    job = lane_job(folder, tmp_path, 3, recompute_every=10, distrust="since_it_joined")
    store, seen = Store(job.checkpoint.path), []

    def look(driver: Any, values: Any) -> None:
        if driver.record.of("went_back") and not seen:
            seen.append([step for step in list_steps(store) if load(store, step).generation == 1])

    late = both(storage_is_fast, manifest_hangs_until_the_next_seal(8))
    run = run_job(job, [miscompute(1, 2, one_in=1)], on_row=look, patch=late)
    same(run, longer)
    (back,) = run.record.of("went_back")
    assert back["to_step"] == 0
    assert 8 < back["from_step"] < 12, "while that call was open"
    assert seen == [[]]
    assert {load(store, step).generation for step in list_steps(store)} == {2}
