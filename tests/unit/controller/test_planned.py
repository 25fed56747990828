"""`plan: auto` when the world changes: lanes by what was learned of speeds, blocks by memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.facts import GradientSpec, StragglerSpec
from elastictrain.controller.journal import dump_event, load_event, replay
from elastictrain.controller.policies import even_layout, fullest_share, needed_bytes, shortfall
from elastictrain.controller.slowness import Slowness
from elastictrain.layout import Layout
from tests.unit.controller.scene import Scene, every, only, spec
from tests.unit.controller.test_slowness import said

FACTS: dict[str, Any] = {"block_elements": (10,) * 40, "bytes_per_held_element": 4.0, "fixed_bytes": 100}


def layouts(memory: dict[int, int], **changes: Any) -> tuple[Layout, Layout]:
    """Planned, and not."""
    return tuple(
        even_layout(spec(**FACTS, plans=plans, **changes), 1, sorted(memory), {}, (), memory) for plans in (True, False)
    )  # type: ignore[return-value]


def test_blocks_follow_memory() -> None:
    """1,600 bytes of state, twice. Even shares would need 1,180 on each."""
    planned, even = layouts({0: 4000, 1: 1000, 2: 1000})
    plans, memory = spec(**FACTS, plans=True), {0: 4000, 1: 1000, 2: 1000}
    assert shortfall(plans, even, memory) is not None
    assert shortfall(plans, planned, memory) is None
    needs = needed_bytes(plans, planned)
    assert needs[0] > 1500
    assert max(needs[1], needs[2]) < 1000
    assert planned.lanes == even.lanes, "lanes go by speed"


@pytest.mark.parametrize("memory", [{0: 2000, 1: 2000, 2: 2000}, {0: 2000, 1: 2000}, {}])
def test_where_memory_is_alike_or_unknown_shares_stay_even(memory: dict[int, int]) -> None:
    workers = sorted(memory) or [0, 1]
    plans = even_layout(spec(**FACTS, plans=True), 1, workers, {}, (), memory)
    assert plans == even_layout(spec(**FACTS), 1, workers, {})


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(200, 5000), min_size=1, max_size=8),
    st.booleans(),
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.sets(st.integers(0, 7)),
)
def test_planning_never_makes_the_fullest_worker_fuller(
    rooms: list[int], mirrors: bool, blocks: list[int], leaving: set[int]
) -> None:
    memory = dict(enumerate(rooms))
    facts = FACTS | {"block_elements": tuple(blocks), "mirrors": mirrors}
    handing = sorted(leaving & set(memory))
    found = even_layout(spec(**facts, plans=True), 1, sorted(memory), {}, handing, memory)
    even = even_layout(spec(**facts), 1, sorted(memory), {}, handing)
    assert fullest_share(spec(**facts), found, memory) <= fullest_share(spec(**facts), even, memory)
    assert found.lanes == even.lanes
    if set(handing) < set(memory):
        assert not any(shard.owner in leaving for shard in found.shards), "who leaves owns nothing"
    assert found.blocks == len(blocks)
    assert all((shard.mirror is not None) == (mirrors and len(memory) > 1) for shard in found.shards)


def test_a_worker_that_joins_gets_what_suits_its_memory() -> None:
    scene = Scene(**FACTS, plans=True, initial_workers=2)
    scene.ready(0, 1, memory_bytes=4000)
    scene.seal()
    scene.send(ev.AddRequested(1.0))
    only(cm.AskPause, scene.ready(2, memory_bytes=900))
    plan = only(cm.Form, scene.park(0, 1, applied=5)).plan
    needs = needed_bytes(scene.machine.spec, plan.layout)
    assert needs[2] < 900 < min(needs[0], needs[1])
    unplanned = Scene(**FACTS, initial_workers=2)
    unplanned.ready(0, 1, memory_bytes=4000)
    unplanned.seal()
    unplanned.send(ev.AddRequested(1.0))
    assert every(cm.AskPause, unplanned.ready(2, memory_bytes=900)) == [], "it would have to hold too much, and waits"


def learned(scene: Scene, *speeds: float, **changes: Any) -> ev.SpeedsLearned:
    pairs = tuple(enumerate(speeds))
    return ev.SpeedsLearned(**({"now_s": 1.0, "generation": scene.generation, "step": 9, "speeds": pairs} | changes))


def test_the_next_generation_is_dealt_out_by_what_was_learned_and_this_one_stays() -> None:
    scene = Scene(lane_count=12, plans=True).run()
    event = learned(scene, 1.0, 0.5, 2.0)
    assert scene.send(event) == []
    assert load_event(dump_event(event)) == event
    scene.die(1)
    plan = only(cm.Form, scene.park(0, 2, applied=5)).plan
    assert [len(lanes) for lanes in plan.layout.lanes] == [4, 8]
    scene.seal()
    scene.send(learned(scene, speeds=((0, 1.0), (2, 1.0))))
    assert scene.ledger.speeds == {0: 1.0, 2: 1.0}, "newer"
    assert replay(scene.machine.spec, [dump_event(event) for event in scene.log]) == scene.machine


def test_who_is_drained_goes_though_the_lanes_by_speed_would_not_fit_afterwards() -> None:
    """The pause was worth it because even lanes fit; the plan after it must not go back on that, for ever again."""
    scene = Scene(lane_count=4, plans=True, gradients=GradientSpec(8), fixed_bytes=640, min_workers=1)
    scene.ready(0, 1, 2, memory_bytes=740)
    scene.seal()
    scene.send(learned(scene, 4.0, 1.0, 1.0))
    only(cm.AskPause, scene.send(ev.DrainRequested(2.0, 2)))
    plan = only(cm.Form, scene.park(0, 1, 2, applied=9)).plan
    assert plan.layout.workers == (0, 1)
    assert [len(lanes) for lanes in plan.layout.lanes] == [2, 2]


def test_nobody_pauses_again_and_again_for_a_balance_that_the_speeds_in_force_do_not_bring() -> None:
    """Who has most of the state has it because of its memory; how much it is depends on everybody's lanes."""
    facts: dict[str, Any] = {"block_elements": (1,) * 200, "gradients": GradientSpec(200), "rebalance_after_steps": 5}
    facts |= {"initial_workers": 4, "max_workers": 4}
    scene = Scene(**facts, lane_count=16, plans=True, bytes_per_held_element=12.0, fixed_bytes=0, steps=1000)
    scene.send(
        *(
            ev.WorkerReady(0.0, worker, f"node{worker}", room)
            for worker, room in enumerate((10_700, 1600, 11_900, 5000))
        )
    )
    scene.seal()
    scene.send(learned(scene, 1.0, 4.0, 1.0, 1.0))
    scene.send(ev.DrainRequested(2.0, 3))
    scene.park(0, 1, 2, 3, applied=5)
    scene.seal()
    pauses = 0
    for step in range(10, 100, 10):
        if every(cm.AskPause, scene.send(ev.Progress(1.0, scene.generation, step))):
            pauses += 1
            scene.park(0, 1, 2, applied=step)
            scene.seal()
    assert pauses == 0


@pytest.mark.parametrize(
    "wrong",
    [{"generation": 2}, {"speeds": ((0, 1.0),)}, {"speeds": ((0, 1.0), (1, 0.0), (2, 1.0))},
     {"speeds": ((0, 1.0), (1, math.inf), (2, 1.0))}, {"speeds": ((0, 1.0), (1, 1.0), (3, 1.0))}],
)  # fmt: skip
def test_speeds_that_cannot_be_are_not_taken(wrong: dict[str, Any]) -> None:
    scene = Scene(plans=True).run()
    scene.send(learned(scene, 1.0, 1.0, 1.0, **wrong))
    assert scene.ledger.speeds == {}


def hear(scene: Scene, slowness: Slowness, steps: range, factors: tuple[float, ...]) -> list[ev.SpeedsLearned]:
    found = [slowness.hear(said(step, factors))[1] for step in steps]
    return [event for event in found if isinstance(event, ev.SpeedsLearned)]


@pytest.mark.parametrize(("plans", "moves"), [(True, False), (False, False), (True, True)])
def test_speeds_are_told_once_where_lanes_do_not_move_by_themselves(plans: bool, moves: bool) -> None:
    scene = Scene(steps=1000, plans=plans, stragglers=StragglerSpec(moves=moves)).run()
    slowness = Slowness(scene.machine, StragglerSpec(moves=moves))
    assert hear(scene, slowness, range(1, 20), (1.0, 1.0, 1.0)) == [], "all alike: nothing to tell"
    told = hear(scene, slowness, range(20, 40), (1.0, 2.0, 1.0))
    assert len(told) == (1 if plans and not moves else 0)
    if told:
        assert dict(told[0].speeds) == pytest.approx({0: 1.0, 1: 0.5, 2: 1.0}, rel=0.02)
        scene.send(*told)
        assert scene.ledger.speeds[1] == pytest.approx(0.5, rel=0.02)
        (again,) = hear(scene, slowness, range(40, 60), (1.0, 1.0, 1.0))
        assert dict(again.speeds)[1] == pytest.approx(1.0, rel=0.02)
