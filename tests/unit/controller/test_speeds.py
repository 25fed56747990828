"""Lanes by learned speed, and workers that are too slow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from elastictrain.controller import Phase, view
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.adoption import outstanding
from elastictrain.controller.facts import GradientSpec, StragglerSpec
from elastictrain.controller.journal import dump_event, load_event, replay
from elastictrain.controller.policies import even_layout, sums_bytes
from tests.unit.controller.scene import Scene, announced, every, only, spec


def proposed(scene: Scene, lanes: tuple[int, ...] = (4, 1, 3), **changes) -> ev.LanesProposed:
    facts = {"generation": scene.generation, "step": 9, "lanes": lanes, "action": "move_lanes", "reason": "slow"}
    facts["speeds"] = ((0, 1.2), (1, 0.3), (2, 1.0))
    return ev.LanesProposed(1.0, **(facts | changes))  # type: ignore[arg-type]


def test_a_split_is_offered_to_all_members_and_told():
    scene = Scene().run()
    out = scene.send(proposed(scene))
    offer = only(cm.OfferLanes, out)
    assert (offer.generation, offer.plan, offer.workers) == (1, 1, (0, 1, 2))
    assert offer.lanes == ((0, 1, 2, 3), (4,), (5, 6, 7))
    told = announced(out, "lanes_moved")
    assert told["lanes"] == {0: [3, 4], 1: [3, 1], 2: [2, 3]}
    assert told["reason"] == "slow"
    assert scene.machine.phase is Phase.RUNNING, "nobody pauses for it"
    seen = view(scene.machine)
    assert [len(worker["lanes"]) for worker in seen["workers"]] == [4, 1, 3]
    assert seen["speeds"] == {0: 1.2, 1: 0.3, 2: 1.0}


def test_splits_are_numbered_and_a_new_controller_offers_the_newest_again():
    scene = Scene(lane_order="round_major").run()
    first = only(cm.OfferLanes, scene.send(proposed(scene)))
    second = only(cm.OfferLanes, scene.send(proposed(scene, (3, 2, 3))))
    assert (first.plan, second.plan) == (1, 2)
    assert first.lanes[1] == (1,), "in rounds"
    assert every(cm.OfferLanes, outstanding(scene.machine)) == [second]
    again = replay(scene.machine.spec, [dump_event(event) for event in scene.log])
    assert again == scene.machine
    event = proposed(scene)
    assert load_event(dump_event(event)) == event


@pytest.mark.parametrize(
    "wrong",
    [
        {"generation": 0},
        {"generation": 2},
        {"lanes": (4, 1)},
        {"lanes": (4, 0, 4)},
        {"lanes": (4, 1, 4)},
        {"speeds": ((0, 0.0),)},
        {"speeds": ((0, math.nan),)},
    ],
)
def test_what_does_not_fit_changes_nothing(wrong):
    scene = Scene().run()
    assert scene.send(proposed(scene, **wrong)) == []
    assert scene.ledger.lane_offers == ()


def test_only_while_all_step():
    scene = Scene()
    scene.ready(0, 1, 2)
    assert scene.machine.phase is Phase.FORMING
    assert scene.send(proposed(scene)) == []
    scene.seal()
    scene.die(2)
    assert scene.send(proposed(scene)) == []


def test_the_next_generation_deals_out_by_the_speeds_and_numbers_anew():
    scene = Scene().run()
    scene.send(proposed(scene))
    scene.die(2)
    plan = only(cm.Form, scene.park(0, 1, applied=5)).plan
    assert [len(lanes) for lanes in plan.layout.lanes] == [6, 2], "1.2 : 0.3 of eight"
    scene.seal()
    assert every(cm.OfferLanes, outstanding(scene.machine)) == []
    offer = only(cm.OfferLanes, scene.send(proposed(scene, (5, 3))))
    assert (offer.generation, offer.plan) == (2, 1)


def test_what_a_move_that_is_taken_back_was_made_for_is_dealt_out_by_no_more():
    """It did not bring what its speeds promised; the next generation would make the same move again."""
    scene = Scene().run()
    scene.send(proposed(scene))
    back = proposed(scene, (3, 3, 2), action="move_back", step=20, speeds=((0, 1.2), (1, 0.3), (2, 1.0)))
    assert only(cm.OfferLanes, scene.send(back)).lanes == scene.plan.layout.lanes
    assert view(scene.machine)["speeds"] == {}
    scene.die(2)
    plan = only(cm.Form, scene.park(0, 1, applied=25)).plan
    assert [len(lanes) for lanes in plan.layout.lanes] == [4, 4]


def test_only_the_last_move_is_taken_back():
    """What was learned with the one before it has held; who has gone since is not remembered."""
    scene = Scene(lane_shares={2: 5.0}).run()
    scene.send(proposed(scene, (3, 1, 4), speeds=((0, 1.0), (1, 0.5), (2, 1.5))))
    scene.send(proposed(scene, (4, 1, 3)))
    scene.send(proposed(scene, (3, 1, 4), action="move_back"))
    assert scene.ledger.speeds == {0: 1.0, 1: 0.5, 2: 1.5}
    scene.die(2)
    plan = only(cm.Form, scene.park(0, 1, applied=25)).plan
    assert [len(lanes) for lanes in plan.layout.lanes] == [5, 3]
    scene.seal()
    scene.send(proposed(scene, (6, 2), speeds=((0, 3.0), (1, 1.0))))
    scene.send(proposed(scene, (5, 3), action="move_back"))
    assert scene.ledger.speeds == {0: 1.0, 1: 0.5}
    assert replay(scene.machine.spec, [dump_event(event) for event in scene.log]) == scene.machine


def test_a_newcomer_counts_as_the_median_worker():
    scene = Scene(replace=True).run()
    scene.send(proposed(scene))
    scene.send(ev.AddRequested(1.0))
    scene.ready(3)
    plan = only(cm.Form, scene.park(0, 1, 2, applied=5)).plan
    counts = dict(zip(plan.layout.workers, map(len, plan.layout.lanes), strict=True))
    assert counts[3] == counts[2] > counts[1]


def test_a_new_controller_offers_the_split_of_the_layout_where_none_was_written_down():
    """The one before it may have offered another, and lost the line: what the workers do must be what it knows."""
    scene = Scene(stragglers=StragglerSpec(moves=True)).run()
    (offer,) = every(cm.OfferLanes, outstanding(scene.machine))
    assert (offer.generation, offer.plan, offer.lanes) == (1, 0, scene.plan.layout.lanes)
    assert offer.workers == (0, 1, 2)
    scene.send(proposed(scene))
    (offer,) = every(cm.OfferLanes, outstanding(scene.machine))
    assert (offer.plan, offer.lanes[1]) == (1, (4,))
    only_watching = Scene(stragglers=StragglerSpec(moves=False)).run()
    assert every(cm.OfferLanes, outstanding(only_watching.machine)) == []


def leaves(scene: Scene, action: str, worker: int = 1) -> ev.StragglerLeaves:
    return ev.StragglerLeaves(1.0, scene.generation, 9, worker, action, "far too slow", 5.0, 2.0)


def test_a_slow_worker_gives_its_place_to_a_spare():
    scene = Scene(spares=1)
    scene.ready(0, 1, 2)
    scene.seal()
    scene.ready(3)
    out = scene.send(leaves(scene, "replace"))
    assert announced(out, "straggler_leaves")["worker"] == 1
    only(cm.AskPause, out)
    only(cm.StartWorker, out)  # another spare
    plan = only(cm.Form, scene.park(0, 1, 2, applied=5)).plan
    assert plan.layout.workers == (0, 2, 3)
    assert scene.ledger.target == 3


def test_without_a_spare_nobody_is_replaced():
    scene = Scene().run()
    assert scene.send(leaves(scene, "replace")) == []
    assert scene.ledger.draining == []


def test_a_slow_worker_is_left_out():
    scene = Scene().run()
    only(cm.AskPause, scene.send(leaves(scene, "leave_out")))
    plan = only(cm.Form, scene.park(0, 1, 2, applied=5)).plan
    assert plan.layout.workers == (0, 2)
    assert scene.ledger.target == 2


def test_nobody_is_left_out_below_the_minimum_or_twice():
    scene = Scene(min_workers=3).run()
    assert scene.send(leaves(scene, "leave_out")) == []
    scene = Scene(min_workers=1).run()
    scene.send(leaves(scene, "leave_out"))
    assert scene.send(leaves(scene, "leave_out")) == []
    assert scene.ledger.draining == [1]
    assert scene.send(leaves(scene, "leave_out", worker=99)) == []


def test_speeds_replace_the_setting():
    scene = Scene(lane_shares={0: 1.0, 1: 1.0, 2: 2.0}).run()
    assert [len(lanes) for lanes in scene.plan.layout.lanes] == [2, 2, 4]
    scene.send(proposed(scene, (6, 1, 1), speeds=((0, 6.0), (1, 1.0), (2, 1.0))))
    scene.die(1)
    plan = only(cm.Form, scene.park(0, 2, applied=5)).plan
    assert [len(lanes) for lanes in plan.layout.lanes] == [7, 1]
    assert spec().lane_shares == {}


def test_a_split_that_is_in_force_is_not_offered_again():
    scene = Scene().run()
    scene.send(proposed(scene))
    assert scene.send(proposed(scene, step=60)) == []


@pytest.mark.parametrize("mirrors", [True, False])
def test_a_watch_does_not_take_the_mirrors_away(mirrors):
    """A user may shrink a run to one worker; that one is slow is no reason to."""
    scene = Scene(initial_workers=2, min_workers=1, mirrors=mirrors).run()
    assert bool(scene.send(leaves(scene, "leave_out"))) == (not mirrors)


def test_nobody_is_left_out_whose_share_of_the_state_fits_nowhere_else():
    scene = Scene(fixed_bytes=0, bytes_per_held_element=1)
    scene.ready(*scene.ledger.workers, memory_bytes=70)  # of 2 × 80 bytes, with the mirrors
    scene.seal()
    assert scene.send(leaves(scene, "leave_out")) == []
    assert scene.ledger.draining == []


def full(**changes: Any) -> Scene:
    """Eight lanes on two workers: four each leave no more than two sums of the gradients of 80 elements; six leave two,
    beside the one that comes of 40. There is no room for that.
    """
    scene = Scene(initial_workers=2, max_workers=3, gradients=GradientSpec(8), fixed_bytes=640, **changes)
    scene.ready(*scene.ledger.workers, memory_bytes=640 + 100)
    scene.seal()
    return scene


def test_a_split_that_needs_more_sums_of_gradients_than_there_is_room_for_is_refused():
    scene = full()
    told = announced(scene.send(proposed(scene, (6, 2), speeds=((0, 3.0), (1, 1.0)))), "lanes_refused")
    assert told["lanes"] == {0: 6, 1: 2}
    assert told["reason"] == (
        "worker 0 has 740 bytes of memory but would need 800 (640 fixed, 160 for the sums of 6 lanes, and 80 elements "
        "held with 2 workers); add workers (raise workers.start or workers.max), lower its share in "
        "workers.block_shares, lower its share in workers.lane_shares, or give workers more memory"
    )
    assert scene.ledger.lane_offers == ()
    assert scene.ledger.speeds == {}
    assert scene.send(proposed(scene, (6, 2), speeds=((0, 3.0), (1, 1.0)))) == [], "said once"
    announced(scene.send(proposed(scene, (2, 6), speeds=((0, 1.0), (1, 3.0)))), "lanes_refused")
    assert replay(scene.machine.spec, [dump_event(event) for event in scene.log]) == scene.machine


def test_sums_are_counted_while_lanes_are_computed_and_as_they_come_in_the_exchange():
    """80 elements, of which two sums are counted already."""
    facts = spec(gradients=GradientSpec(8))
    alone = even_layout(facts, 1, [0], {})
    assert sums_bytes(facts, alone) == {0: 4 * 80}, "eight lanes: three sums at once, and one in the end"
    two = even_layout(replace(facts, lane_shares={0: 5.0, 1: 3.0}), 1, [0, 1], {})
    assert sums_bytes(facts, two) == {0: 4 * 80, 1: 4 * 80}, "two roots each, and of 40 elements two more come"
    frozen = replace(facts, gradients=GradientSpec(4))
    assert sums_bytes(frozen, two) == {0: 4 * 80, 1: 0}, "the other half of the blocks has no gradients"
    apart = replace(facts, gradients=GradientSpec(8, apart=True))
    assert sums_bytes(apart, alone) == {0: 8 * 80}
    assert sums_bytes(spec(), alone) == {}


def test_sums_of_lanes_of_others_are_counted():
    """80 elements, two sums of which are counted; four lanes each, one root, of which two have a second holder."""
    facts = spec(gradients=GradientSpec(8))
    layout = even_layout(facts, 1, [0, 1], {})

    def more(way: str) -> dict[int, int]:
        shared = GradientSpec(8, way=way, depth=2, group=2)  # type: ignore[arg-type]
        return sums_bytes(replace(facts, gradients=shared), layout)

    assert sums_bytes(facts, layout) == {0: 0, 1: 0}, "while it computes two, and one and one half of another come"
    assert more("take_over") == {0: 4 * 200, 1: 4 * 200}, "three sums at most (lanes 0 and 1, 2, 7), and three halves"
    assert more("first_result")[0] >= more("take_over")[0]
    assert more("coded") == {0: 4 * 80, 1: 4 * 80}, "eight lanes, as one who is alone"


def test_where_memory_is_not_known_nothing_is_refused():
    scene = Scene(initial_workers=2, gradients=GradientSpec(8), fixed_bytes=640).run()
    only(cm.OfferLanes, scene.send(proposed(scene, (6, 2), speeds=((0, 3.0), (1, 1.0)))))


@pytest.mark.parametrize(("spare_bytes", "dealt"), [(330, [6, 6]), (480, [11, 1])])
def test_a_generation_whose_lanes_do_not_fit_by_speed_is_formed_with_even_ones(spare_bytes, dealt):
    """Eleven lanes of twelve leave three sums, and what comes: 480 bytes more than are counted; six each, 320."""
    scene = Scene(lane_count=12, gradients=GradientSpec(8), fixed_bytes=640, replace=False)
    scene.ready(*scene.ledger.workers, memory_bytes=640 + spare_bytes)
    scene.seal()
    only(cm.OfferLanes, scene.send(proposed(scene, (10, 1, 1), speeds=((0, 11.0), (1, 1.0), (2, 1.0)))))
    scene.die(2)
    plan = only(cm.Form, scene.park(0, 1, applied=5)).plan
    assert [len(lanes) for lanes in plan.layout.lanes] == dealt


@pytest.mark.parametrize(("spare_bytes", "dealt"), [(700, [4, 4, 4, 4]), (800, [5, 5, 5, 1])])
def test_a_worker_joins_with_even_lanes_where_those_by_speed_do_not_fit(spare_bytes, dealt):
    """Lanes 5 to 9 leave three sums, and six more of 20 elements come: 800 bytes more than are counted."""
    scene = Scene(lane_count=16, gradients=GradientSpec(8), fixed_bytes=640)
    scene.ready(*scene.ledger.workers, memory_bytes=640 + spare_bytes)
    scene.seal()
    only(cm.OfferLanes, scene.send(proposed(scene, (6, 6, 4), speeds=((0, 5.0), (1, 5.0), (2, 5.0)))))
    scene.send(ev.AddRequested(1.0))
    only(cm.AskPause, scene.ready(3, memory_bytes=640 + spare_bytes))
    plan = only(cm.Form, scene.park(0, 1, 2, applied=5)).plan
    assert [len(lanes) for lanes in plan.layout.lanes] == dealt


def test_learned_speeds_and_shares_that_were_set_are_not_mixed():
    """The ones are about 1, the others are in whatever unit the user likes: a newcomer counts as the median worker."""
    scene = Scene(lane_shares={0: 100.0, 1: 50.0, 2: 100.0, 3: 100.0}, lane_count=12).run()
    only(cm.OfferLanes, scene.send(proposed(scene, (6, 2, 4), speeds=((0, 1.0), (1, 0.5), (2, 1.0)))))
    scene.die(2)
    scene.ready(3)
    plan = only(cm.Form, scene.park(0, 1, applied=5)).plan
    assert dict(zip(plan.layout.workers, map(len, plan.layout.lanes), strict=True)) == {0: 5, 1: 2, 3: 5}
