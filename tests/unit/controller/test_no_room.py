"""A slow worker whose lanes have no room elsewhere: watch, controller and their memory, step by step."""

from __future__ import annotations

from typing import Any

import pytest

from elastictrain.controller import events as ev
from elastictrain.controller.commands import Announce, AskPause, Command, Form
from elastictrain.controller.facts import GradientSpec, StragglerSpec
from elastictrain.controller.journal import dump_event, replay
from elastictrain.controller.policies import sums_bytes
from elastictrain.controller.room import MemoryRoom
from elastictrain.controller.slowness import Slowness
from elastictrain.controller.speeds import lanes_in_force
from elastictrain.protocol import StepSignals
from elastictrain.stragglers.signals import Signal
from tests.unit.controller.scene import Scene, every, only

EVICTS = StragglerSpec(moves=True, evicts=True)
MOVES = StragglerSpec(moves=True)
BASE = 640
"""For the 80 elements of the state, and two sums of their gradients: one more needs 320 bytes."""


def scene_of(spare_bytes: int, watch: StragglerSpec = EVICTS, **changes: Any) -> Scene:
    """Four workers with four lanes each, which leave no more than two sums; most other splits leave three."""
    facts: dict[str, Any] = {"lane_count": 16, "steps": 10_000, "initial_workers": 4, "max_workers": 5}
    facts |= {"gradients": GradientSpec(8), "fixed_bytes": BASE, "stragglers": watch}
    scene = Scene(**(facts | changes))
    scene.ready(*scene.ledger.workers, memory_bytes=BASE + spare_bytes)
    scene.seal()
    return scene


def lanes_of(scene: Scene) -> list[int]:
    layout = lanes_in_force(scene.machine.spec, scene.ledger)
    assert layout is not None
    return [len(lanes) for lanes in layout.lanes]


def train(scene: Scene, slowness: Slowness, steps: range, slow: dict[int, float]) -> list[Command]:
    """Every step's signals go to the watch, and what it proposes to the machine; from step 20 on some are `slow`."""
    out: list[Command] = []
    for step in steps:
        members = scene.plan.layout.workers
        taken = [
            0.1 * own * (slow.get(who, 1.0) if step >= 20 else 1.0)
            for who, own in zip(members, lanes_of(scene), strict=True)
        ]
        raw = b"".join(
            Signal(own, own_s, arrive_s=own_s, exchange_s=max(taken) - own_s + 0.01).encode()
            for own, own_s in zip(lanes_of(scene), taken, strict=True)
        )
        said, event = slowness.hear(StepSignals(scene.generation, step, raw, 0.0))
        out += said
        out += [] if event is None else scene.send(event)
    return out


def told(out: list[Command], kind: str) -> list[dict[str, Any]]:
    return [one.data for one in out if isinstance(one, Announce) and one.kind == kind]


def watch_of(scene: Scene) -> Slowness:
    assert scene.machine.spec.stragglers is not None
    return Slowness(scene.machine, scene.machine.spec.stragglers)


def test_a_smaller_move_is_made_where_the_best_one_does_not_fit():
    """320 bytes are room for a third sum; the best split of all would leave a fourth."""
    scene = scene_of(400, MOVES)
    out = train(scene, watch_of(scene), range(1, 80), {2: 4.0})
    (refused,) = told(out, "lanes_refused")
    assert refused["instead"] == "smaller_move"
    assert refused["lanes"][2] == 1
    assert "bytes of memory but would need" in refused["reason"]
    (moved,) = told(out, "lanes_moved")
    assert moved["lanes"][2][1] < 4
    assert max(lanes_of(scene)) > 4
    assert MemoryRoom(scene.machine.core).split(tuple(lanes_of(scene))) is None
    assert replay(scene.machine.spec, [dump_event(event) for event in scene.log]) == scene.machine


def test_nothing_is_done_and_told_once_where_nobody_has_room():
    scene = scene_of(0)
    out = train(scene, watch_of(scene), range(1, 300), {2: 4.0})
    assert [one["instead"] for one in told(out, "lanes_refused")] == ["nothing"]
    assert told(out, "lanes_moved") == told(out, "straggler_leaves") == []
    assert scene.ledger.lane_offers == ()


def test_a_spare_takes_the_place_of_who_keeps_lanes_for_want_of_room():
    """Without any other spare it stays; then one comes."""
    scene = scene_of(0)
    slowness = watch_of(scene)
    train(scene, slowness, range(1, 60), {2: 4.0})
    assert scene.ledger.draining == []
    scene.ready(scene_spare(scene), memory_bytes=BASE)
    out = train(scene, slowness, range(60, 100), {2: 4.0})
    (leaves,) = told(out, "straggler_leaves")
    assert (leaves["worker"], leaves["action"]) == (2, "replace")
    only(AskPause, out)
    plan = only(Form, scene.park(0, 1, 2, 3, applied=100)).plan
    assert 2 not in plan.layout.workers
    assert [len(lanes) for lanes in plan.layout.lanes] == [4, 4, 4, 4]


def scene_spare(scene: Scene) -> int:
    """A fifth worker is added and waits: the target stays four."""
    (added,) = [one for one in scene.send(ev.AddRequested(1.0)) if type(one).__name__ == "StartWorker"]
    scene.ledger.target = 4
    return int(added.worker)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("spare_bytes", "leaves"), [(400, []), (1200, [2])])
def test_who_is_too_slow_for_one_lane_is_left_out_only_where_others_have_room(spare_bytes, leaves):
    """Worker 2 keeps a lane at 60 times its time; for all of its lanes the others need four sums, and what comes."""
    scene = scene_of(spare_bytes)
    out = train(scene, watch_of(scene), range(1, 200), {2: 60.0})
    assert [one["worker"] for one in told(out, "straggler_leaves")] == leaves
    assert scene.ledger.draining == leaves
    assert every(AskPause, out) != [] or not leaves


def test_without_known_memory_everything_fits():
    scene = scene_of(0, MOVES)
    plain = Scene(lane_count=16, initial_workers=4, gradients=GradientSpec(8), fixed_bytes=BASE, stragglers=MOVES).run()
    assert MemoryRoom(scene.machine.core).split((6, 6, 2, 2)) is not None
    assert MemoryRoom(plain.machine.core).split((6, 6, 2, 2)) is None
    assert told(train(plain, watch_of(plain), range(1, 80), {2: 4.0}), "lanes_moved")[0]["lanes"][2] == [4, 1]


def test_a_spare_has_the_lanes_of_the_place_that_it_takes():
    """The others have plenty, the spare has room for three sums; it comes last in the new generation."""
    scene = scene_of(1600)
    scene.ready(scene_spare(scene), memory_bytes=BASE + 400)
    room = MemoryRoom(scene.machine.core)
    assert room.replaced(0, (1, 5, 5, 5)) is None
    lack = room.replaced(0, (7, 3, 3, 3))
    assert lack is not None
    assert lack.worker == 0
    assert room.replaced(3, (5, 5, 5, 1)) is None


def test_whoever_may_not_leave_has_no_room_to_leave():
    """Its mirror would be gone; too few would stay; the watch asks before it counts one as evicted."""
    for changes, reason in (
        ({"initial_workers": 2}, "without worker 0 nobody would hold a mirror"),
        ({"min_workers": 4}, "draining worker 0 would leave 3 workers, fewer than workers.min=4"),
    ):
        scene = scene_of(1600, **changes)
        lanes = tuple(lanes_of(scene)[1:])
        lack = MemoryRoom(scene.machine.core).without(0, (lanes[0] + lanes_of(scene)[0], *lanes[1:]))
        assert lack is not None
        assert lack.worker is None
        assert reason in lack.reason


def test_where_no_spare_waits_there_is_no_place_for_one():
    lack = MemoryRoom(scene_of(1600).machine.core).replaced(0, (4, 4, 4, 4))
    assert lack is not None
    assert lack.reason == "no spare waits any more"


def test_of_a_group_with_the_same_lanes_one_hands_sums_over():
    """Both groups of two hand over two sums: beside its own two a worker gets two of its blocks, not six."""
    gradients = GradientSpec(8, way="coded", group=2)
    scene = Scene(lane_count=12, initial_workers=4, gradients=gradients, fixed_bytes=BASE).run()
    layout = lanes_in_force(scene.machine.spec, scene.ledger)
    assert layout is not None
    needed = sums_bytes(scene.machine.spec, layout)
    assert needed[0] == needed[1] == 4 * 2 * 20
    assert needed[2] == needed[3] == 4 * 80, "lanes 6 to 11: three sums at once while they are computed"
