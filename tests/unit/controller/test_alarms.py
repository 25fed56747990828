"""Frozen workers, lost nodes, hung generations, preempted machines: scene by scene."""

from __future__ import annotations

import pytest

from elastictrain.controller import Phase, view
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.facts import Role
from tests.unit.controller.scene import Scene, announced, every, kinds, only


def frozen(worker: int, now_s: float = 1.0) -> ev.WorkerFrozen:
    return ev.WorkerFrozen(now_s, worker, "no step for 3 s", ("its training thread sleeps in exchange",), now_s - 3.0)


def test_a_frozen_worker_is_killed_and_the_others_park_at_once() -> None:
    scene = Scene(replace=False).run()
    out = scene.send(frozen(1))
    assert only(cm.Kill, out) == cm.Kill(1, "frozen: no step for 3 s")
    assert only(cm.Park, out) == cm.Park(1, (0, 2))
    said = announced(out, "frozen")
    assert (said["worker"], said["node"]) == (1, "node1")
    assert said["evidence"] == ["its training thread sleeps in exchange"]
    assert scene.send(frozen(1)) == []
    assert every(cm.Form, scene.park(0, 2, applied=7)) == []  # not before it is known to be gone
    assert scene.park(1, applied=8) == []  # it wakes, and is not heard
    plan = only(cm.Form, scene.die(1)).plan
    assert (plan.layout.workers, plan.step) == ((0, 2), 7)


def test_a_frozen_spare_and_a_frozen_starter_are_replaced_without_a_pause() -> None:
    scene = Scene(spares=1).run()
    out = scene.send(frozen(3))
    assert only(cm.Kill, out).worker == 3
    assert only(cm.StartWorker, out).worker == 4
    assert scene.machine.phase is Phase.RUNNING
    assert view(scene.machine)["spares"] == []
    assert only(cm.StartWorker, scene.send(frozen(4))).worker == 5
    assert scene.die(3, 4) != []
    assert set(scene.ledger.workers) == {0, 1, 2, 5}


def test_the_last_holder_gets_its_grace_and_goes_on_when_it_answers() -> None:
    """R7: its state cannot be had otherwise, so it is not killed before it had a chance to park."""
    scene = Scene(initial_workers=1).run()
    out = scene.send(frozen(0))
    assert every(cm.Kill, out) == []
    assert only(cm.Park, out) == cm.Park(1, (0,))
    assert announced(out, "frozen")["blocks_held_alone"] == 8
    assert scene.machine.next_deadline_s() == 3.0
    plan = only(cm.Form, scene.park(0, applied=7)).plan
    assert (plan.layout.workers, plan.step, plan.restore) == ((0,), 7, None)
    record = [sighting["what"] for sighting in sealed_and_stepped(scene)["seen"]]
    assert record[-1] == "parked, although it was taken for frozen"


def sealed_and_stepped(scene: Scene) -> dict:  # type: ignore[type-arg]
    scene.seal()
    return announced(scene.send(ev.Progress(scene.now_s, scene.generation, scene.plan.step + 1)), "incident")


def test_the_last_holder_that_does_not_answer_is_reported_as_the_loss_of_both() -> None:
    scene = Scene(initial_workers=1, checkpoint=True).run()
    scene.send(ev.CheckpointCommitted(0.5, 1, 5, "c5"))
    scene.send(frozen(0))
    assert scene.send(ev.Tick(2.9)) == []
    out = scene.send(ev.Tick(3.0))
    assert only(cm.Kill, out).reason == "frozen: no step for 3 s; it did not answer within its grace"
    said = announced(out, "doomed")
    assert said["blocks_held_alone"] == 8
    assert said["reason"].endswith("; the last holder of 8 blocks: both their holders are lost")
    scene.die(0)
    assert scene.ledger.restore.step == 5


def test_a_second_grace_only_after_a_commit() -> None:
    scene = Scene(initial_workers=1).run()
    scene.send(frozen(0))
    scene.park(0, applied=0)
    scene.seal()
    assert only(cm.Kill, scene.send(frozen(0, 2.0))).worker == 0
    other = Scene(initial_workers=1).run()
    other.send(frozen(0))
    other.park(0, applied=0)
    other.seal()
    other.send(ev.Progress(1.5, 2, 1))
    assert every(cm.Kill, other.send(frozen(0, 2.0))) == []


def test_with_a_second_holder_there_is_no_grace() -> None:
    scene = Scene(initial_workers=2).run()
    assert only(cm.Kill, scene.send(frozen(1))).worker == 1
    assert every(cm.Kill, scene.send(frozen(0))) == []  # now it is the last


def test_workers_of_a_lost_node_are_gone_at_once_and_never_heard_again() -> None:
    scene = Scene(begin=True, initial_workers=4)
    scene.send(*(ev.WorkerReady(0.0, w, f"node{w // 2}") for w in range(4)))
    scene.seal()
    out = scene.send(ev.NodeLost(1.0, "node1", "no beat for 1.8 s"))
    assert {kill.worker for kill in every(cm.Kill, out)} == {2, 3}
    assert only(cm.Park, out) == cm.Park(1, (0, 1))
    assert {start.avoid for start in every(cm.StartWorker, out)} == {("node1",)}
    assert view(scene.machine)["fenced"] == [2, 3]
    before = scene.ledger.workers
    assert scene.park(2, applied=9) == [cm.Kill(2, "its node node1 is lost: no beat for 1.8 s")]
    assert scene.ledger.workers == before
    plan = only(cm.Form, scene.park(0, 1, applied=7)).plan
    assert (plan.layout.workers, plan.restore) == ((0, 1), None)  # no block had both holders on one node
    assert scene.send(ev.WorkerReady(2.0, 3, "node1")) == [cm.Kill(3, "its node node1 is lost: no beat for 1.8 s")]
    scene.die(2)
    assert view(scene.machine)["fenced"] == [3]
    assert scene.send(ev.NodeLost(2.5, "node1", "again")) == []


def test_a_lost_node_with_all_workers_goes_back_to_the_checkpoint_elsewhere() -> None:
    scene = Scene(initial_workers=2, checkpoint=True)
    scene.send(*(ev.WorkerReady(0.0, w, "node0") for w in range(2)))
    scene.seal()
    scene.send(ev.CheckpointCommitted(0.5, 1, 5, "c5"))
    out = scene.send(ev.NodeLost(1.0, "node0", "gone"))
    assert announced(out, "went_back")["to_step"] == 5
    assert scene.send(ev.Progress(1.5, 1, 9)) == []  # what the fenced still do among themselves does not count
    assert scene.send(ev.CheckpointCommitted(1.5, 1, 9, "c9")) == []
    plan = only(cm.Form, scene.ready(2, 3)).plan
    assert plan.restore is not None
    assert plan.restore.step == 5


def test_a_lost_node_is_avoided_for_a_while_only() -> None:
    scene = Scene().run()
    scene.send(ev.NodeLost(1.0, "node1", "gone"))
    scene.park(0, 2, applied=1)
    scene.seal()
    assert scene.machine.next_deadline_s() == 121.0
    out = scene.send(ev.Tick(121.0))
    assert announced(out, "node_taken_back") == {"node": "node1"}
    assert every(cm.Kill, out) == [cm.Kill(3, "not needed any more")]  # it may have waited for a place elsewhere
    assert only(cm.StartWorker, out) == cm.StartWorker(4)
    assert scene.machine.next_deadline_s() is None


def test_a_worker_that_has_its_place_is_not_asked_for_anew() -> None:
    scene = Scene().run()
    scene.send(ev.NodeLost(1.0, "node1", "gone"))
    scene.park(0, 2, applied=1)
    scene.seal()
    scene.send(ev.WorkerPlaced(2.0, 3, "node9"))
    out = scene.send(ev.Tick(121.0))
    assert announced(out, "node_taken_back") == {"node": "node1"}
    assert every(cm.Kill, out) == every(cm.StartWorker, out) == []


@pytest.mark.parametrize("notice_first", [True, False])
def test_a_worker_that_is_being_prepared_leaves_a_node_that_goes(notice_first: bool) -> None:
    scene = Scene().run()
    scene.send(ev.AddRequested(1.0))
    placed, notice = ev.WorkerPlaced(1.0, 3, "node9"), ev.PreemptionNotice(1.0, 121.0, node="node9")
    first, second = (notice, placed) if notice_first else (placed, notice)
    assert every(cm.Kill, scene.send(first)) == []
    out = scene.send(second)
    assert [kill.worker for kill in every(cm.Kill, out)] == [3]
    assert "node9" in only(cm.StartWorker, out).avoid


def test_a_worker_that_is_being_prepared_is_lost_with_its_node_and_fails_on_its_account() -> None:
    scene = Scene().run()
    scene.send(ev.AddRequested(1.0), ev.WorkerPlaced(1.0, 3, "node9"))
    out = scene.send(ev.NodeLost(2.0, "node9", "gone"))
    assert announced(out, "node_lost")["workers"] == [3]
    assert only(cm.StartWorker, out).worker == 4
    scene.send(ev.WorkerPlaced(3.0, 4, "node8"), ev.WorkerStartFailed(4.0, 4, "no room", False))
    assert [kind for _, kind in scene.ledger.nodes["node8"].failures] == ["start"]


def test_mirrors_go_by_the_label_and_nodes_by_the_node() -> None:
    scene = Scene(initial_workers=4, domain_label="rack")
    for worker in range(4):
        node = f"n{worker}"
        scene.send(ev.WorkerReady(0.0, worker, node, node=node, labels={"rack": f"r{worker // 2}"}))
    racks = {0: "r0", 1: "r0", 2: "r1", 3: "r1"}
    assert all(racks[s.owner] != racks[s.mirror or 0] for s in scene.plan.layout.shards)
    assert [w["node"] for w in view(scene.machine)["workers"]] == ["n0", "n1", "n2", "n3"]
    scene.seal()
    scene.send(ev.NodeLost(1.0, "n1", "gone"), ev.NodeLost(1.0, "n0", "gone"))
    scene.park(2, 3, applied=3)
    assert scene.plan.restore is None  # a whole rack is lost, and no block with it
    assert {w: scene.ledger.domains()[w] for w in (2, 3)} == {2: "n2", 3: "n3"}  # one rack is left: nodes count


def test_a_hung_generation_forms_again_without_blame_and_the_second_time_with() -> None:
    scene = Scene(replace=False).run()
    out = scene.send(ev.GenerationHung(1.0, 1, "all wait in exchange", suspect=2))
    assert only(cm.Park, out) == cm.Park(1, (0, 1, 2))
    assert every(cm.Kill, out) == []
    scene.park(0, 1, 2, applied=3)
    assert scene.plan.layout.workers == (0, 1, 2)
    scene.seal()
    out = scene.send(ev.GenerationHung(2.0, 2, "all wait in exchange", suspect=2))
    assert every(cm.Kill, out) == []
    assert announced(out, "hung")["times"] == 2
    out = scene.park(0, 1, 2, applied=3)
    assert only(cm.Kill, out) == cm.Kill(2, "second hang in a row: all wait in exchange")
    assert scene.generation == 2
    assert only(cm.Form, scene.die(2)).plan.layout.workers == (0, 1)


def test_the_suspect_of_a_second_hang_that_does_not_park_is_killed_after_its_grace() -> None:
    scene = Scene().run()
    for generation in (1, 2):
        scene.send(ev.GenerationHung(generation, generation, "all wait", suspect=2))
        if generation == 1:
            scene.park(0, 1, 2, applied=3)
            scene.seal()
    scene.park(0, 1, applied=3)
    assert scene.machine.next_deadline_s() == 4.0
    assert only(cm.Kill, scene.send(ev.Tick(4.0))).worker == 2


def test_a_commit_between_two_hangs_forgives() -> None:
    scene = Scene().run()
    scene.send(ev.GenerationHung(1.0, 1, "all wait", suspect=2))
    scene.park(0, 1, 2, applied=3)
    scene.seal()
    assert every(cm.Kill, scene.send(ev.GenerationHung(2.0, 2, "all wait", suspect=2))) == []
    assert scene.send(ev.GenerationHung(2.0, 2, "all wait", suspect=2)) == []
    out = scene.park(0, 1, 2, applied=4)  # nobody had published it, but step 4 has been committed
    assert every(cm.Kill, out) == []
    only(cm.Form, out)


def test_a_preempted_worker_trains_until_its_stand_in_is_there() -> None:
    scene = Scene().run()
    out = scene.send(ev.PreemptionNotice(1.0, 121.0, worker=1))
    assert only(cm.StartWorker, out) == cm.StartWorker(3)  # at once
    assert every(cm.AskPause, out) == []
    assert view(scene.machine)["preempted"] == [{"worker": 1, "deadline_s": 121.0}]
    assert scene.machine.next_deadline_s() == 61.0
    only(cm.AskPause, scene.ready(3))
    plan = only(cm.Form, scene.park(0, 1, 2, applied=9)).plan
    assert set(plan.layout.workers) == {0, 2, 3}
    scene.now_s = 5.0
    out = scene.seal()
    assert every(cm.Retire, out) == [cm.Retire(1)]
    assert announced(out, "resized")["steps_redone"] == 0
    record = announced(scene.send(ev.Progress(6.0, 2, 10)), "incident")
    assert (record["planned"], record["left"], record["joined"], record["outcome"]) == (True, [1], [3], "recovered")
    assert record["seconds"]["first_commit"] == 1.0
    assert scene.ledger.target == 3


def test_a_preempted_node_is_avoided_and_all_its_workers_leave() -> None:
    scene = Scene(initial_workers=4, max_workers=4)
    scene.send(*(ev.WorkerReady(0.0, w, f"node{w // 2}") for w in range(4)))
    scene.seal()
    out = scene.send(ev.PreemptionNotice(1.0, 31.0, node="node1"))
    assert [start.avoid for start in every(cm.StartWorker, out)] == [("node1",)] * 2
    out = scene.send(ev.WorkerReady(1.5, 4, "node1"))  # it was placed before the shell knew
    assert every(cm.Kill, out) == [cm.Kill(4, "not needed any more")]
    assert only(cm.StartWorker, out) == cm.StartWorker(6, ("node1",))
    scene.ready(5, 6)
    scene.park(0, 1, 2, 3, applied=4)
    assert set(scene.plan.layout.workers) == {0, 1, 5, 6}


def test_without_a_stand_in_it_leaves_when_half_of_the_notice_is_over() -> None:
    scene = Scene(spares=0).run()
    scene.send(ev.PreemptionNotice(1.0, 31.0, worker=1))
    assert scene.send(ev.Tick(15.9)) == []
    only(cm.AskPause, scene.send(ev.Tick(16.0)))
    scene.park(0, 1, 2, applied=4)
    assert scene.plan.layout.workers == (0, 2)
    scene.seal()
    only(cm.AskPause, scene.ready(3))


def test_a_spare_stands_in_at_once_and_without_replacement_nobody_is_waited_for() -> None:
    for facts in ({"spares": 1}, {"replace": False}):
        scene = Scene(**facts).run()  # type: ignore[arg-type]
        only(cm.AskPause, scene.send(ev.PreemptionNotice(1.0, 121.0, worker=1)))


def test_below_min_a_preemption_parks_with_a_checkpoint_and_is_never_refused() -> None:
    scene = Scene(min_workers=3, checkpoint=True).run()
    out = scene.send(ev.PreemptionNotice(1.0, 31.0, worker=1))
    assert every(cm.AskPause, out) == []
    out = scene.send(ev.Tick(16.0))
    assert only(cm.AskPause, out) == cm.AskPause(1, 0, store=True)
    scene.send(ev.CheckpointCommitted(17.0, 1, 4, "c4"))
    out = scene.park(0, 1, 2, applied=4)
    assert announced(out, "gathering")["kind"] == "preemption"
    assert "2 workers are there, which is not enough (workers.min=3)" in view(scene.machine)["reason"]
    out = scene.ready(3)  # in time: it takes over from memory
    assert only(cm.Form, out).plan.restore is None
    assert set(scene.plan.layout.workers) == {0, 2, 3}
    assert scene.ledger.workers[1].role is Role.LEAVING


def test_the_only_worker_hands_over_through_the_checkpoint() -> None:
    scene = Scene(initial_workers=1, max_workers=1, checkpoint=True).run()
    scene.send(ev.PreemptionNotice(1.0, 31.0, worker=0))
    out = scene.ready(1)  # there is room for one only
    assert every(cm.AskPause, out) == []
    assert only(cm.AskPause, scene.send(ev.Tick(16.0))).store
    scene.send(ev.CheckpointCommitted(17.0, 1, 9, "c9"))
    out = scene.park(0, applied=9)
    assert only(cm.Kill, out).reason == "its machine goes, and its state is in the checkpoint of step 9"
    out = scene.die(0)
    assert announced(out, "went_back")["steps_redone"] == 0
    assert (scene.plan.layout.workers, scene.plan.step) == ((1,), 9)
    assert scene.ledger.failures.get("died", []) == []  # nobody's fault


def test_that_a_preempted_worker_dies_at_its_time_is_no_failure() -> None:
    scene = Scene().run()
    scene.send(ev.PreemptionNotice(1.0, 31.0, worker=1))
    scene.die(1)
    assert scene.ledger.failures == {}
    assert scene.ledger.notices == {}
    assert len(scene.ledger.workers) == 3  # its stand-in was asked for already


def test_a_parked_workers_knowledge_of_the_seal_outlives_it() -> None:
    """It says that it has seen the seal, and dies before the last one has parked."""
    scene = Scene(spares=1, initial_workers=2).run()
    scene.send(ev.WorkerTroubled(0.0, 1, 0, "x"))
    scene.park(0, 1, applied=4)
    assert scene.ledger.sealed == 1
    scene.send(ev.WorkerTroubled(0.0, 2, 0, "x"))
    scene.park(0, applied=4, sealed_generation=2)
    assert scene.ledger.sealed == 2
    scene.die(0)
    assert scene.ledger.sealed == 2


def test_a_run_that_waits_says_what_the_cluster_has() -> None:
    scene = Scene(min_workers=3)
    words = "Ray has 2 nodes with 4 CPUs, 1 of them free; a worker needs 2"
    scene.send(ev.ClusterChanged(0.0, ("a", "b"), words))
    scene.ready(0)
    reason = view(scene.machine)["reason"]
    assert reason == (f"waiting for the first workers; 1 of 3 are ready, workers.min=3; 2 are starting; {words}")
    assert kinds(scene.send(ev.ClusterChanged(0.0, ("a", "b", "node0"), words))) == []


def test_without_replacement_nobody_is_started_for_a_frozen_worker() -> None:
    """Between the verdict and the confirmation of its death it is one too few, and stays so."""
    scene = Scene(replace=False).run()
    out = scene.send(frozen(1))
    out += scene.die(1)
    assert every(cm.StartWorker, out) == []


def test_with_replacement_the_next_one_starts_before_the_frozen_one_is_gone() -> None:
    out = Scene(replace=True).run().send(frozen(1))
    assert [start.worker for start in every(cm.StartWorker, out)] == [3]
