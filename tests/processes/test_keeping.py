"""What a run keeps of its checkpoints: by policies, by references, in second places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastictrain.engine.resume import find_start
from elastictrain.faults import kill
from elastictrain_checkpoint import Store, digest, list_steps, load, verify
from tests.support.plants import both
from tests.support.plants_storing import base_vanishes, commits_are_fast, commits_are_seen, pins, storage_is_fast
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def stored(path: Path, **settings: Any) -> dict[str, Any]:
    return {"path": str(path / "ckpt"), "every_steps": 1, "keep": 10} | settings


def known(run: Run) -> list[int]:
    """Steps that the controller could go back to at the end."""
    return sorted(run.machine.core.ledger.checkpoints)


def test_policies_and_a_pin_decide_what_stays(folder: Path, tmp_path: Path, reference: Run) -> None:
    store = Store(tmp_path / "ckpt")

    keep = {"newest": 3, "every_steps": 4, "best": {"metric": "loss", "mode": "max"}, "verify": True}
    job = byte_job(folder, checkpoint=stored(tmp_path, keep=keep))
    run = run_job(job, [kill(2, 6, "vote")], patch=both(commits_are_fast, pins(2)))
    assert run.digest == reference.digest
    losses = {step: load(store, step).info["loss"] for step in list_steps(store)}
    assert losses == {step: reference.losses[step] for step in losses}, "manifests say the metrics of their step"
    worst = max(reference.losses, key=lambda step: reference.losses[step] or 0.0)
    assert list_steps(store) == sorted({worst, 2, 4, 6, 7, 8})
    assert known(run) == list_steps(store)


def test_the_best_by_what_is_evaluated(folder: Path, tmp_path: Path) -> None:
    keep = {"newest": 1, "best": {"metric": "evaluation.logit", "mode": "max"}}
    job = byte_job(folder, evaluate_every=2, checkpoint=stored(tmp_path, every_steps=2, keep=keep))
    run = run_job(job, patch=storage_is_fast)
    values = {row["step"]: row["evaluation"]["logit"] for row in run.record.rows if "evaluation" in row}
    assert sorted(values) == [2, 4, 6, 8]
    store = Store(tmp_path / "ckpt")
    assert list_steps(store) == sorted({max(values, key=lambda step: values[step]), 8})
    assert load(store, 8).info["evaluation"] == {"logit": values[8]}


# --- increments ---


def increments(path: Path) -> dict[int, int]:
    store = Store(path / "ckpt")
    return {step: load(store, step).info["increments"] for step in list_steps(store)}


def own_bytes(store: Store, step: int) -> int:
    """What a step has written, without what it refers to."""
    return sum(file.size_bytes for file in load(store, step).files if not file.path.startswith("../"))


@pytest.fixture(scope="module")
def frozen_reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Store]:
    """One worker that stores everything in full, step by step."""
    path = tmp_path_factory.mktemp("frozen")
    run = run_job(byte_job(folder, workers=1, recipe=FROZEN, checkpoint=stored(path)), patch=commits_are_fast)
    return run, Store(path / "ckpt")


FROZEN = f"{Path(__file__).parents[1] / 'support' / 'recipes.py'}:Frozen"


@pytest.mark.parametrize("worlds", [(1, 3), (3, 2), (2, 1)])
def test_frozen_layers_are_written_once_and_any_world_goes_on_from_it(
    folder: Path, tmp_path: Path, frozen_reference: tuple[Run, Store], worlds: tuple[int, int]
) -> None:
    reference, whole = frozen_reference
    checkpoint = stored(tmp_path, every_steps=2, incremental=True)
    first = byte_job(folder, workers=worlds[0], recipe=FROZEN, checkpoint=checkpoint, steps=4)
    run_job(first, patch=commits_are_fast)
    store = Store(tmp_path / "ckpt")
    assert increments(tmp_path) == {2: 0, 4: 1}
    assert own_bytes(store, 4) < own_bytes(store, 2) / 4, "the frozen layer is most of it"
    then = byte_job(folder, workers=worlds[1], recipe=FROZEN, checkpoint=checkpoint)
    start = find_start(then, resume=True)
    run = run_job(then, restore=start.restore, base_generation=start.generation, patch=commits_are_fast)
    assert run.digest == reference.digest
    assert increments(tmp_path) == {2: 0, 4: 1, 6: 2, 8: 3}, "what the other world has written is referred to as well"
    for step in list_steps(store):
        assert verify(store, load(store, step)) == []
        assert digest(store, load(store, step)) == load(whole, step).digest


@pytest.mark.parametrize("victim", [0, 1])
def test_a_world_that_changes_between_two_checkpoints_refers_to_the_one_before(
    folder: Path, tmp_path: Path, frozen_reference: tuple[Run, Store], victim: int
) -> None:
    reference, whole = frozen_reference
    checkpoint = stored(tmp_path, every_steps=2, incremental=True)
    job = byte_job(folder, recipe=FROZEN, checkpoint=checkpoint)
    run = run_job(job, [kill(victim, 4, "exchange")], patch=both(commits_are_fast, commits_are_seen))
    assert run.digest == reference.digest
    store = Store(tmp_path / "ckpt")
    for step in list_steps(store):
        assert verify(store, load(store, step)) == []
        assert digest(store, load(store, step)) == load(whole, step).digest
    full, *others = list_steps(store)
    assert all(own_bytes(store, step) < own_bytes(store, full) / 4 for step in others)


def test_a_full_one_comes_from_time_to_time_and_what_nobody_refers_to_goes(
    folder: Path, tmp_path: Path, frozen_reference: tuple[Run, Store]
) -> None:
    checkpoint = stored(tmp_path, every_steps=2, incremental=True, full_every=3, keep=1)
    run = run_job(byte_job(folder, recipe=FROZEN, checkpoint=checkpoint), patch=commits_are_fast)
    assert run.digest == frozen_reference[0].digest
    store = Store(tmp_path / "ckpt")
    # 2 and 8 are full; 6 stays until whoever may refer to it is committed, and 2 because 6 needs all of it.
    assert increments(tmp_path) == {2: 0, 6: 2, 8: 0}
    assert all(digest(store, load(store, step)) == load(store, step).digest for step in (2, 6, 8))
    packs = {path.parent.parent.name for path in (tmp_path / "ckpt").rglob("*.safetensors")}
    assert packs == {"step-00000002", "step-00000006", "step-00000008"}, "4 has nothing that 6 refers to"


def test_a_base_that_somebody_removes_costs_one_checkpoint(
    folder: Path, tmp_path: Path, frozen_reference: tuple[Run, Store]
) -> None:
    checkpoint = stored(tmp_path, every_steps=2, incremental=True)
    run = run_job(
        byte_job(folder, recipe=FROZEN, checkpoint=checkpoint), patch=both(commits_are_fast, base_vanishes(4))
    )
    assert run.digest == frozen_reference[0].digest
    (lost,) = run.record.of("checkpoint_given_up")
    assert (lost["step"], lost["stored_instead"]) == (4, None)
    assert "step-00000002/" in lost["why"]
    assert "missing" in lost["why"]
    assert increments(tmp_path) == {6: 0, 8: 1}, "6 finds no base and is written in full"
