"""What a run keeps of its checkpoints: by policies, by references, in second places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastictrain.faults import kill
from elastictrain_checkpoint import Store, list_steps, load
from tests.support.plants import both, pins, storage_is_fast
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
    run = run_job(job, [kill(2, 6, "vote")], patch=both(storage_is_fast, pins(2)))
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
