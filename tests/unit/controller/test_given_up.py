"""A checkpoint that came to nothing is said once, in words, and stands in the record of what ended its generation."""

from __future__ import annotations

import pytest

from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller import view
from tests.unit.controller.scene import Scene, announced, every, only


def lost(generation: int, travelled: bool = False, instead: int | None = 7, worker: int = 1) -> ev.CheckpointGivenUp:
    return ev.CheckpointGivenUp(3.0, generation, worker, 6, 1, travelled, instead)


def after_a_loss() -> Scene:
    """Worker 0 has died in generation 1, and generation 2 is sealed at step 7."""
    scene = Scene(checkpoint=True, replace=False).run()
    scene.die(0)
    scene.park(1, 2, applied=7)
    scene.seal()
    return scene


def test_it_is_announced_with_its_cause_and_with_what_is_stored_instead() -> None:
    scene = after_a_loss()
    why = "SIGKILL; not all of it was written"
    data = {"step": 6, "begun_in": 1, "why": why, "stored_instead": 7}
    assert announced(scene.send(lost(2)), "checkpoint_given_up") == data
    assert view(scene.machine)["checkpoint_given_up"] == data
    assert scene.send(lost(2)) == [], "a message that comes again says nothing new"
    scene.send(ev.CheckpointCommitted(4.0, 2, 7, "/c/7"))
    assert view(scene.machine)["checkpoint_given_up"] is None, "there is a newer one"


@pytest.mark.parametrize(
    ("travelled", "how"),
    [(False, "not all of it was written"), (True, "its shares were durable, its manifest was not there")],
)
@pytest.mark.parametrize("sealed_by_all", [True, False])
def test_it_is_in_the_record_of_the_incident(travelled: bool, how: str, sealed_by_all: bool) -> None:
    """Whether the record is open until all have seen the seal, or until the first commit after it."""
    scene = after_a_loss() if sealed_by_all else Scene(checkpoint=True, replace=False).run()
    if not sealed_by_all:
        scene.die(0)
        scene.park(1, 2, applied=7)
        scene.seal(1)
    scene.send(lost(2, travelled))
    if not sealed_by_all:
        scene.seal(2)
    record = announced(scene.send(ev.Progress(5.0, 2, 8)), "incident")
    said = [seen["what"] for seen in record["seen"] if seen["source"] == "worker 1"]
    assert said == [f"the checkpoint of step 6 was given up ({how}); stored instead: step 7"]


def test_without_an_incident_its_generation_is_the_cause() -> None:
    scene = after_a_loss()
    scene.send(ev.Progress(5.0, 2, 8))
    data = announced(scene.send(lost(2, instead=None)), "checkpoint_given_up")
    assert data["why"] == "generation 1 ended; not all of it was written"
    assert data["stored_instead"] is None


def test_what_another_generation_says_or_one_that_is_not_sealed_is_not_heard() -> None:
    scene = after_a_loss()
    assert scene.send(lost(1)) == []
    scene.die(1)
    plan = only(cm.Form, scene.park(2, applied=8)).plan
    assert plan.generation == 3
    assert scene.send(lost(3, worker=2)) == [], "before the seal"
    assert every(cm.Announce, scene.send(lost(2))) == []


# --- what retention has removed ---


def test_nobody_goes_back_to_what_was_removed() -> None:
    scene = Scene(checkpoint=True).run()
    for step in (4, 6, 8):
        scene.send(ev.Progress(1.0, 1, step), ev.CheckpointCommitted(1.0, 1, step, f"/c/{step}"))
    assert scene.send(ev.CheckpointsRemoved(2.0, 1, (6,))) == []
    assert scene.ledger.checkpoints == {4: "/c/4", 8: "/c/8"}
    scene.send(ev.CheckpointsRemoved(2.0, 1, (2, 8)))
    assert scene.ledger.checkpoints == {4: "/c/4", 8: "/c/8"}, "the newest stays, whatever is said"
    scene.send(ev.CheckpointsRemoved(2.0, 2, (4,)))
    assert scene.ledger.checkpoints == {4: "/c/4", 8: "/c/8"}, "of another generation"


# --- what may not have been heard ---


def test_a_plan_says_what_was_heard_to_have_come_to_nothing() -> None:
    """The next generation says again what its publisher may have died with, and nothing that was heard."""
    scene = after_a_loss()
    assert scene.plan.given_up == (0, 0)
    scene.send(lost(2), ev.CheckpointCommitted(4.0, 2, 7, "/c/7"))
    scene.die(1)
    plan = only(cm.Form, scene.park(2, applied=8)).plan
    assert plan.given_up == (1, 6), "generation and step, also when a newer one is committed"


def test_what_is_said_again_was_heard_and_what_was_begun_later_was_not() -> None:
    scene = after_a_loss()
    scene.send(lost(2), ev.CheckpointCommitted(4.0, 2, 7, "/c/7"))
    again = ev.CheckpointGivenUp(5.0, 2, 1, 6, 1, True, None)
    assert scene.send(again) == [], "in other words, after the next commit"
    assert view(scene.machine)["checkpoint_given_up"] is None
    newer = ev.CheckpointGivenUp(5.0, 2, 1, 4, 2, True, None)
    assert announced(scene.send(newer), "checkpoint_given_up")["step"] == 4
