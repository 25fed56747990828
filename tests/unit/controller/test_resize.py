"""Add, drain, resize, rebalance."""

from __future__ import annotations

from elastictrain.controller import Phase, view
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.clockwork import ASKS_IN_VAIN
from elastictrain.controller.facts import Role
from tests.unit.controller.scene import Scene, announced, every, only


def test_add_starts_a_worker_that_joins_at_a_commit() -> None:
    scene = Scene().run()
    assert every(cm.StartWorker, scene.send(ev.AddRequested(1.0))) == [cm.StartWorker(3)]
    only(cm.AskPause, scene.ready(3))
    scene.park(0, 1, 2, applied=5)
    assert scene.plan.layout.workers == (0, 1, 2, 3)


def test_add_above_max_is_refused() -> None:
    scene = Scene(max_workers=3).run()
    refused = announced(scene.send(ev.AddRequested(1.0)), "refused")
    assert refused == {"request": "add", "reason": "3 workers are workers.max; raise workers.max"}


def test_several_that_are_ready_join_in_the_same_pause() -> None:
    scene = Scene(initial_workers=2).run()
    scene.send(ev.ResizeRequested(1.0, 4))
    assert len(every(cm.AskPause, scene.ready(2, 3))) == 1
    scene.park(0, 1, applied=5)
    assert scene.plan.layout.world_size == 4


def test_resize_outside_the_bounds_is_refused() -> None:
    scene = Scene(min_workers=2).run()
    for size in (1, 5):
        reason = announced(scene.send(ev.ResizeRequested(1.0, size)), "refused")["reason"]
        assert reason.startswith(f"{size} workers are outside workers.min=2 .. workers.max=4; ")


def test_a_drained_worker_stays_parked_until_the_seal_of_all() -> None:
    scene = Scene().run()
    only(cm.AskPause, scene.send(ev.DrainRequested(1.0, 1)))
    plan = only(cm.Form, scene.park(0, 1, 2, applied=5)).plan
    assert plan.layout.workers == (0, 2)
    assert all(move.source in (0, 2) for move in plan.moves)
    assert scene.ledger.workers[1].role is Role.LEAVING
    assert every(cm.Retire, scene.seal(0)) == []
    out = scene.seal(2)
    assert every(cm.Retire, out) == [cm.Retire(1)]
    assert announced(out, "resized")["left"] == [1]
    assert every(cm.StartWorker, out) == []


def test_a_leaving_worker_is_taken_back_when_it_is_the_last_holder() -> None:
    """R4: until the new generation is sealed the old holders count."""
    scene = Scene(replace=False).run()
    scene.send(ev.DrainRequested(1.0, 1))
    scene.park(0, 1, 2, applied=5)
    scene.die(0)  # 0 and 1 were the two holders of some blocks
    plan = only(cm.Form, scene.park(2, applied=5)).plan
    assert plan.restore is None
    assert 1 in plan.layout.workers
    assert scene.ledger.workers[1].role is Role.MEMBER


def test_without_mirrors_a_drained_worker_first_hands_over() -> None:
    scene = Scene(mirrors=False).run()
    scene.send(ev.DrainRequested(1.0, 1))
    first = only(cm.Form, scene.park(0, 1, 2, applied=5)).plan
    assert set(first.layout.workers) == {0, 1, 2}
    assert first.layout.held(1) == frozenset()
    assert {move.source for move in first.moves} == {1}
    assert only(cm.AskPause, scene.seal()).generation == 2
    second = only(cm.Form, scene.park(0, 1, 2, applied=7)).plan
    assert second.layout.workers == (0, 2)
    assert every(cm.Retire, scene.seal()) == [cm.Retire(1)]


def test_both_holders_of_a_block_can_be_drained_together() -> None:
    scene = Scene(initial_workers=4).run()
    scene.send(ev.ResizeRequested(1.0, 2))
    for _ in range(3):
        if scene.machine.phase is Phase.RUNNING and scene.plan.layout.world_size > 2:
            scene.park(*scene.plan.layout.workers, applied=5)
            scene.seal()
    assert scene.plan.layout.workers == (0, 1)
    assert scene.plan.restore is None


def test_drains_that_are_refused() -> None:
    scene = Scene(min_workers=2, initial_workers=2).run()
    reason = announced(scene.send(ev.DrainRequested(1.0, 9)), "refused")["reason"]
    assert reason == "worker 9 is not one of [0, 1]"
    reason = announced(scene.send(ev.DrainRequested(1.0, 1)), "refused")["reason"]
    assert reason.startswith("draining worker 1 would leave 1 workers, fewer than workers.min=2; ")
    alone = Scene(initial_workers=1).run()
    reason = announced(alone.send(ev.DrainRequested(1.0, 0)), "refused")["reason"]
    assert reason == "worker 0 is the last one; add a worker first, or stop the run"


def test_a_world_that_could_not_hold_the_state_is_refused() -> None:
    scene = Scene(bytes_per_held_element=10.0)
    scene.ready(0, 1, 2, memory_bytes=700)
    scene.seal()
    for event in (ev.DrainRequested(1.0, 2), ev.ResizeRequested(1.0, 2)):
        reason = announced(scene.send(event), "refused")["reason"]
        assert reason.startswith("worker 0 has 700 bytes of memory but would need 800 (0 fixed, and 80 elements held ")
    assert scene.ledger.draining == []


def test_a_drained_spare_goes_at_once_and_is_replaced() -> None:
    scene = Scene(spares=1).run()
    out = scene.send(ev.DrainRequested(1.0, 3))
    assert every(cm.Retire, out) == [cm.Retire(3)]
    assert every(cm.StartWorker, out) == [cm.StartWorker(4)]
    assert scene.machine.phase is Phase.RUNNING


def test_a_death_at_the_pause_comes_before_the_drain() -> None:
    scene = Scene(replace=False, initial_workers=4).run()
    scene.send(ev.DrainRequested(1.0, 1))
    scene.park(0, applied=5)
    scene.die(2)
    plan = only(cm.Form, scene.park(1, 3, applied=5)).plan
    assert set(plan.layout.workers) == {0, 1, 3}
    assert only(cm.AskPause, scene.seal()).generation == 2  # the drain is not forgotten


def test_uneven_blocks_are_rebalanced_after_some_steps() -> None:
    facts = {"initial_workers": 5, "max_workers": 5, "rebalance_after_steps": 5, "block_elements": (10,) * 20}
    scene = Scene(replace=False, **facts).run()
    scene.die(1)
    scene.park(0, 2, 3, 4, applied=10)
    scene.seal()
    owned = sorted(w["blocks_owned"] for w in view(scene.machine)["workers"])
    assert owned == [4, 4, 4, 8]
    assert every(cm.AskPause, scene.send(ev.Progress(1.0, 2, 14))) == []
    only(cm.AskPause, scene.send(ev.Progress(1.0, 2, 15)))
    scene.park(0, 2, 3, 4, applied=17)
    out = scene.seal()
    assert sorted(w["blocks_owned"] for w in view(scene.machine)["workers"]) == [5, 5, 5, 5]
    assert every(cm.AskPause, [*out, *scene.send(ev.Progress(1.0, 3, 40))]) == []


def test_held_once_counts_blocks_with_a_single_live_holder() -> None:
    scene = Scene(replace=False).run()
    assert view(scene.machine)["held_once"] == 0
    scene.die(1)
    assert view(scene.machine)["held_once"] == 5  # what 1 owned and what it mirrored
    scene.park(0, 2, applied=5)
    scene.seal()
    assert view(scene.machine)["held_once"] == 0


def test_members_that_neither_pause_nor_commit_are_parked() -> None:
    scene = Scene(max_workers=3).run()
    scene.send(ev.StopRequested(1.0, "enough"))
    asked = set()
    for _ in range(ASKS_IN_VAIN - 1):
        scene.now_s = scene.machine.next_deadline_s() or 0.0
        asked.add(only(cm.AskPause, scene.send(ev.Tick(scene.now_s))).worker)
    assert asked == {0, 1, 2}
    scene.now_s = scene.machine.next_deadline_s() or 0.0
    assert only(cm.Park, scene.send(ev.Tick(scene.now_s))).workers == (0, 1, 2)


def test_a_commit_shows_that_an_ask_was_not_in_vain() -> None:
    scene = Scene(max_workers=3).run()
    scene.send(ev.StopRequested(1.0, "enough"))
    for step in range(3 * ASKS_IN_VAIN):
        scene.now_s = scene.machine.next_deadline_s() or 0.0
        scene.send(ev.Progress(scene.now_s, scene.generation, step + 1))
        only(cm.AskPause, scene.send(ev.Tick(scene.now_s)))
