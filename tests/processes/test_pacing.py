"""Stored by a budget of time: which steps are stored depends on the clock, what comes out of the run does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from elastictrain.engine.pacing import Pacing
from elastictrain.engine.stepping import Stepping
from elastictrain_checkpoint import Store, digest, list_steps, load
from tests.support.process_cluster import byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def due_at(steps: set[int]) -> Callable[[int], None]:
    """Instead of the clock: the vote that makes one of these steps says that it is due."""
    return partial(_due_at, frozenset(steps))


def _due_at(steps: frozenset[int], worker: int) -> None:
    del worker
    expect = Stepping._expect

    def note(self: Any, step: int) -> None:
        expect(self, step)
        self.session.pacing._cadence.due = lambda now_s: step in steps

    Stepping._expect = note  # type: ignore[method-assign]


def test_every_worker_stores_what_one_of_them_finds_due(folder, tmp_path, reference):
    job = byte_job(folder, checkpoint={"path": str(tmp_path / "c"), "max_overhead": 0.5, "keep": 9, "at_end": False})
    run = run_job(job, patch=due_at({3, 4, 6}))
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    assert [event["step"] for event in run.record.of("checkpoint")] == [3, 4, 6]
    store = Store(tmp_path / "c")
    assert list_steps(store) == [3, 4, 6]
    assert all(digest(store, load(store, step)) == load(store, step).digest for step in (3, 4, 6))


def test_by_the_real_clock_the_first_step_is_stored_at_once(folder, tmp_path, reference):
    job = byte_job(folder, checkpoint={"path": str(tmp_path / "c"), "max_loss": "1h"})
    run = run_job(job)
    assert run.digest == reference.digest
    assert [event["step"] for event in run.record.of("checkpoint")] == [1, job.steps]


def test_a_job_without_checkpoints_stores_nothing():
    pacing = Pacing(None)
    assert pacing.flags(is_publisher=True) == 0
    assert not any(pacing.stores(step, 7, last=step == 9) for step in range(10))
