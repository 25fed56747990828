"""What a stop stores, and which rows are published again."""

from __future__ import annotations

from typing import Any

import pytest

from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller import view
from elastictrain.controller.phases import Phase
from tests.unit.controller.scene import Scene, announced, every, only


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_stop_stores_its_commit_where_checkpoints_are_stored(checkpoint: bool) -> None:
    scene = Scene(checkpoint=checkpoint).run()
    ask = only(cm.AskPause, scene.send(ev.StopRequested(1.0, "user")))
    assert ask == cm.AskPause(1, 0, store=checkpoint)
    deadline_s = scene.machine.next_deadline_s()
    assert deadline_s is not None
    again = only(cm.AskPause, scene.send(ev.Tick(deadline_s)))
    assert again == cm.AskPause(1, 1, store=checkpoint), "the next one is asked for the same"


def test_other_pauses_store_nothing() -> None:
    scene = Scene(checkpoint=True).run()
    assert only(cm.AskPause, scene.send(ev.DrainRequested(1.0, 2))) == cm.AskPause(1, 0, store=False)


def test_a_pause_that_was_asked_for_before_a_stop_is_asked_for_again_with_a_checkpoint() -> None:
    scene = Scene(checkpoint=True).run()
    only(cm.AskPause, scene.send(ev.DrainRequested(1.0, 2)))
    assert only(cm.AskPause, scene.send(ev.StopRequested(2.0, "user"))) == cm.AskPause(1, 0, store=True)
    assert every(cm.AskPause, scene.send(ev.StopRequested(3.0, "again"))) == []


def test_a_checkpoint_stored_at_a_stop_is_announced_although_some_have_parked() -> None:
    scene = Scene(checkpoint=True).run()
    scene.send(ev.StopRequested(1.0, "user"))
    scene.park(1, applied=9)
    out = scene.send(ev.CheckpointCommitted(2.0, 1, 9, "/c/9"))
    assert announced(out, "checkpoint") == {"step": 9, "path": "/c/9"}
    scene.park(0, applied=9)
    assert only(cm.EndRun, scene.park(2, applied=9)) == cm.EndRun("stopped", 9, error="user")


def waiting(**changes: Any) -> Scene:
    """Worker 0 has died, which is one too many: 1 and 2 wait with what they have applied."""
    scene = Scene(**{"checkpoint": True, "min_workers": 3, "initial_workers": 3, "max_workers": 3, **changes}).run()
    scene.die(0)
    scene.park(1, 2, applied=7)
    assert scene.machine.phase is Phase.GATHERING
    return scene


def test_a_run_that_waits_for_workers_stores_what_it_has_when_it_is_stopped() -> None:
    scene = waiting()
    plan = only(cm.Form, scene.send(ev.StopRequested(1.0, "user"))).plan
    assert (plan.step, plan.layout.workers) == (7, (1, 2)), "workers.min does not count for a run that ends"
    assert only(cm.AskPause, scene.seal()) == cm.AskPause(2, 1, store=True)
    scene.send(ev.CheckpointCommitted(2.0, 2, 8, "/c/8"))
    scene.park(1, applied=8)
    assert only(cm.EndRun, scene.park(2, applied=8)) == cm.EndRun("stopped", 8, error="user")


def test_nobody_who_waits_is_taken_into_a_generation_that_only_stores() -> None:
    stopped = Scene(checkpoint=True, min_workers=3).run()
    stopped.die(0)
    stopped.park(1, applied=7)
    stopped.ready(3)
    stopped.send(ev.StopRequested(1.0, "user"))
    plan = only(cm.Form, stopped.park(2, applied=7)).plan
    assert plan.layout.workers == (1, 2)
    assert plan.joiners == ()


def test_a_stop_waits_until_a_frozen_worker_is_gone() -> None:
    """It may still step: a generation beside it could decide otherwise than it does."""
    scene = Scene(checkpoint=True, min_workers=4, initial_workers=4).run()
    scene.die(0)
    scene.park(1, 2, 3, applied=7)
    assert scene.machine.phase is Phase.GATHERING
    frozen = ev.WorkerFrozen(1.0, 2, "silent", (), 0.0)
    assert only(cm.Kill, scene.send(frozen)).worker == 2
    out = scene.send(ev.StopRequested(1.5, "user"))
    assert every(cm.Form, out) == every(cm.EndRun, out) == []
    plan = only(cm.Form, scene.die(2)).plan
    assert (plan.step, plan.layout.workers) == (7, (1, 3))


@pytest.mark.parametrize("stored", [True, False])
def test_a_stop_that_meets_a_loss_stores_what_is_not_stored(stored: bool) -> None:
    scene = Scene(checkpoint=True).run()
    if stored:
        scene.send(ev.CheckpointCommitted(0.5, 1, 7, "/c/7"))
    scene.die(0)
    scene.send(ev.StopRequested(1.0, "user"))
    scene.park(1, applied=7)
    out = scene.park(2, applied=7)
    if stored:
        assert only(cm.EndRun, out) == cm.EndRun("stopped", 7, error="user")
    else:
        assert only(cm.Form, out).plan.layout.workers == (1, 2)


def test_a_store_that_takes_nothing_is_not_asked_for_ever() -> None:
    scene = waiting()
    out = scene.send(ev.StopRequested(1.0, "user"))
    for generation in (2, 3):
        assert only(cm.Form, out).plan.generation == generation
        scene.seal()
        scene.park(1, applied=8)
        out = scene.park(2, applied=8)
    assert only(cm.EndRun, out) == cm.EndRun("stopped", 8, error="user")


@pytest.mark.parametrize("changes", [{"checkpoint": False}, {"mirrors": False}])
def test_where_nothing_is_stored_or_nothing_is_left_a_stop_ends_at_once(changes: dict[str, Any]) -> None:
    scene = waiting(**changes)
    step = 7 if "checkpoint" in changes else 0
    assert only(cm.EndRun, scene.send(ev.StopRequested(1.0, "user"))) == cm.EndRun("stopped", step, error="user")


def test_a_seal_says_that_a_step_is_not_redone_and_not_that_its_row_was_seen() -> None:
    """The rows after the last one that has arrived are published again by whoever publishes next."""
    scene = Scene(replace=False, initial_workers=4).run()
    scene.send(ev.Progress(1.0, 1, 5))
    scene.die(0)
    plan = only(cm.Form, scene.park(1, 2, 3, applied=7)).plan
    assert (plan.step, plan.published_step) == (7, 5)
    scene.seal()
    assert view(scene.machine)["step"] == 7
    scene.die(1)  # the publisher, with the rows of 6 and 7
    plan = only(cm.Form, scene.park(2, 3, applied=7)).plan
    assert (plan.step, plan.published_step) == (7, 5)
    scene.seal()
    scene.send(ev.Progress(2.0, 3, 6))  # below the sealed step, and heard all the same
    scene.send(ev.WorkerTroubled(3.0, 3, 2, "lost a peer"))
    plan = only(cm.Form, scene.park(2, 3, applied=7)).plan
    assert plan.published_step == 6


def test_a_committed_checkpoint_does_not_say_that_rows_were_seen() -> None:
    scene = Scene(checkpoint=True, replace=False).run()
    scene.send(ev.Progress(1.0, 1, 5), ev.CheckpointCommitted(1.0, 1, 6, "/c/6"))
    scene.die(0)
    assert only(cm.Form, scene.park(1, 2, applied=7)).plan.published_step == 5
