"""`plan: auto` when workers are lost and come: who takes part is chosen by the planner's policy, and no bit changes."""

from __future__ import annotations

from typing import Any

import pytest

from elastictrain.faults import add, kill
from elastictrain.planner.pace import Pace
from tests.support.plants import wait_for_company
from tests.support.process_cluster import byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
STEPS = 12
FREE = Pace(1.0, (0.0,))
"""Eleven lanes: of four and of five workers somebody has three, of six two."""


def planned(folder: Any, **settings: Any) -> Any:
    more = {"plan": "auto", "cluster": "not read here", "steps": STEPS}
    return byte_job(folder, workers={"max": 6, "min": 2, "replace": False}, **more, **settings)


@pytest.fixture(scope="module")
def undisturbed(folder):
    return run_job(byte_job(folder, steps=STEPS, workers=1))


def test_after_going_back_only_as_many_take_part_as_make_it_quicker(folder, undisturbed):
    """Without mirrors all is dealt out afresh. The one that waits stands in for the next that is lost."""
    run = run_job(planned(folder, mirrors=False), [kill(5, 3), kill(0, 6)], pace=FREE)
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    assert [one["world"] for one in run.record.of("running")] == [6, 4, 4]
    (waiting,) = run.record.of("workers_waiting")
    assert (waiting["workers"], waiting["waiting"]) == ([0, 1, 2, 3], [4])
    assert run.machine.core.ledger.plan.layout.workers == (1, 2, 3, 4)


def test_newcomers_wait_until_they_bring_something(folder, undisturbed):
    """The first of two that are added would change nothing, and costs no pause; with the second both join."""
    faults = [kill(5, 2), kill(4, 3), add(3), add(3)]
    run = run_job(planned(folder), faults, pace=FREE, patch=wait_for_company(6, generations=3))
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    assert [one["world"] for one in run.record.of("running")] == [6, 5, 4, 6]
    assert [one["joined"] for one in run.record.of("resized")] == [[6, 7]]
