"""`plan: auto`: who would not make a step quicker waits, as a spare."""

from __future__ import annotations

from typing import Any

import pytest

from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.journal import dump_event, replay
from elastictrain.planner.pace import Pace
from tests.unit.controller.scene import Scene, announced, every, kinds, only

FREE = Pace(1.0, (0.0,))
FACTS: dict[str, Any] = {"lane_count": 16, "initial_workers": 8, "max_workers": 8, "min_workers": 2, "plans": True}


def begun(workers: int, **changes: Any) -> Scene:
    """`workers` of eight are there, all others have failed to start and nobody follows them."""
    scene = Scene(**(FACTS | {"pace": FREE, "replace": False} | changes))
    scene.ready(*range(workers))
    scene.seal()
    return scene


def lose(scene: Scene, *workers: int, applied: int = 5) -> list[cm.Command]:
    staying = [worker for worker in scene.plan.layout.workers if worker not in workers]
    scene.die(*workers)
    return scene.park(*staying, applied=applied)


def test_all_take_part_where_all_are_there_that_were_planned_with() -> None:
    assert begun(8).plan.layout.world_size == 8
    slow = begun(8, pace=Pace(1.0, tuple(float(n) for n in range(8))))
    assert slow.plan.layout.world_size == 8, "the plan said eight"


def test_a_newcomer_that_lowers_nothing_is_not_worth_a_pause_and_two_are() -> None:
    """16 lanes: of six workers somebody has three, of seven too, of eight two."""
    scene = begun(8)
    lose(scene, 6, 7)
    scene.seal()
    assert scene.plan.layout.world_size == 6
    scene.send(ev.ResizeRequested(1.0, 8))
    assert every(cm.AskPause, scene.ready(8)) == []
    only(cm.AskPause, scene.ready(9))
    plan = only(cm.Form, scene.park(*range(6), applied=9)).plan
    assert plan.layout.workers == (0, 1, 2, 3, 4, 5, 8, 9)
    plain = begun(8, pace=None)
    lose(plain, 6, 7)
    plain.seal()
    plain.send(ev.ResizeRequested(1.0, 8))
    only(cm.AskPause, plain.ready(8))
    assert replay(scene.machine.spec, [dump_event(event) for event in scene.log]) == scene.machine


def test_a_loss_that_changes_nothing_leaves_who_waits_waiting() -> None:
    """12 lanes: of six workers to eleven somebody has two."""
    scene = begun(9, lane_count=12, initial_workers=9, max_workers=9)
    lose(scene, 7, 8)
    scene.seal()
    scene.send(ev.ResizeRequested(1.0, 9))
    assert every(cm.AskPause, scene.ready(9)) == []
    plan = only(cm.Form, lose(scene, 6, applied=9)).plan
    assert plan.layout.workers == (0, 1, 2, 3, 4, 5)


def test_who_waits_is_said_when_a_generation_forms_and_stands_in_at_the_next_loss() -> None:
    """Nothing is held after going back, so that all are counted anew: of seven, six take part."""
    scene = begun(8, mirrors=False)
    out = lose(scene, 3)
    assert "went_back" in kinds(out)
    assert only(cm.Form, out).plan.layout.workers == (0, 1, 2, 4, 5, 6)
    waiting = announced(out, "workers_waiting")
    assert waiting == {
        "generation": scene.generation, "workers": [0, 1, 2, 4, 5, 6], "waiting": [7], "step_s": 3.0, "all_s": 3.0,
    }  # fmt: skip
    scene.seal()
    assert every(cm.Retire, scene.send(ev.Progress(2.0, scene.generation, 3))) == [], "it is wanted as a spare"
    out = lose(scene, 0, applied=3)
    assert only(cm.Form, out).plan.layout.workers == (1, 2, 4, 5, 6, 7)
    assert "workers_waiting" not in kinds(out)
    assert replay(scene.machine.spec, [dump_event(event) for event in scene.log]) == scene.machine


def test_survivors_stay_and_a_waiting_worker_joins_only_where_it_helps() -> None:
    scene = begun(8)
    lose(scene, 3, 4, 5, 6, 7)
    scene.seal()
    assert scene.plan.layout.workers == (0, 1, 2), "16 lanes: six for one of them; nobody is sent away"
    scene.send(ev.ResizeRequested(1.0, 8))
    only(cm.AskPause, scene.ready(8))  # four lanes each
    only(cm.Form, scene.park(0, 1, 2, applied=8))
    scene.seal()
    assert every(cm.AskPause, scene.ready(9)) == [], "of five workers one has four lanes too"
    out = lose(scene, 2, applied=11)
    assert only(cm.Form, out).plan.layout.workers == (0, 1, 9, 8)


def test_learned_speeds_count() -> None:
    """Two lanes on a worker that is twice as fast take as long as one: a seventh worker brings something."""
    scene = begun(8)
    lose(scene, 6, 7)
    scene.seal()
    speeds = ((0, 2.5), (1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0))
    scene.send(ev.SpeedsLearned(1.0, scene.generation, 9, speeds))
    scene.send(ev.ResizeRequested(1.0, 8))
    only(cm.AskPause, scene.ready(8))


@pytest.mark.parametrize(("mirrors", "size"), [(True, 2), (False, 1)])
def test_where_there_are_mirrors_nobody_is_left_alone(mirrors: bool, size: int) -> None:
    dear = Pace(1.0, (0.0, 100.0))
    scene = begun(4, initial_workers=4, max_workers=4, min_workers=1, pace=dear, mirrors=mirrors)
    out = lose(scene, 0, 1)
    assert "went_back" in kinds(out)
    assert only(cm.Form, out).plan.layout.world_size == size


def test_what_does_not_fit_otherwise_takes_more_workers() -> None:
    facts: dict[str, Any] = {"block_elements": (10,) * 42, "bytes_per_held_element": 4.0, "fixed_bytes": 100}
    scene = Scene(**(FACTS | facts), pace=FREE, replace=False, mirrors=False)
    scene.ready(*range(8), memory_bytes=350)
    scene.seal()
    out = lose(scene, 7)
    assert "went_back" in kinds(out)
    assert only(cm.Form, out).plan.layout.world_size == 7, "six would have 280 bytes of blocks each"
