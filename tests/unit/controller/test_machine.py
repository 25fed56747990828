"""What the controller does, scene by scene."""

from __future__ import annotations

import pytest

from elastictrain.controller import Phase, view
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.facts import GradientSpec
from elastictrain.protocol import ReadBytes, Restore
from tests.unit.controller.scene import Scene, announced, every, only


def test_the_first_generation() -> None:
    scene = Scene(spares=1)
    assert set(scene.ledger.workers) == {0, 1, 2, 3}
    assert every(cm.Form, scene.ready(0, 3)) == []
    plan = only(cm.Form, scene.ready(2)).plan
    assert plan.layout.workers == (0, 2, 3)
    assert (plan.generation, plan.step, plan.restore) == (1, 0, Restore(0, None))
    assert plan.gather_to == plan.joiners == (0, 2, 3)
    scene.ready(1)
    assert view(scene.machine)["spares"] == [1]
    scene.seal(0)
    assert scene.machine.phase is Phase.FORMING
    scene.seal()
    assert scene.machine.phase is Phase.RUNNING


def test_it_starts_with_those_that_could_when_the_others_cannot() -> None:
    scene = Scene(start_attempts=2)
    scene.ready(0, 1)
    assert every(cm.StartWorker, scene.send(ev.WorkerStartFailed(1.0, 2, "no room", False))) == [cm.StartWorker(3)]
    plan = only(cm.Form, scene.send(ev.WorkerStartFailed(2.0, 3, "no room", False))).plan
    assert plan.layout.workers == (0, 1)


def test_it_fails_when_fewer_than_min_can_start() -> None:
    scene = Scene(min_workers=2, initial_workers=2, max_workers=2)
    scene.ready(0)
    out = [c for w in (1, 2, 3) for c in scene.send(ev.WorkerStartFailed(1.0, w, "no room", False))]
    assert only(cm.EndRun, out) == cm.EndRun(
        "failed",
        0,
        error="WorkerStartError: 3 workers in a row could not start; 1 are ready, workers.min=2 are needed; "
        "the last error was: no room",
    )
    assert every(cm.Kill, out) == [cm.Kill(0, "the run has failed")]


def test_a_users_error_at_the_start_is_not_tried_again() -> None:
    out = Scene().send(ev.WorkerStartFailed(1.0, 1, "RecipeError: no module named 'mine'", True))
    assert only(cm.EndRun, out).error == "RecipeError: no module named 'mine'"
    assert every(cm.StartWorker, out) == []


def test_a_death_promotes_the_mirror_and_is_written_down() -> None:
    scene = Scene(replace=False).run()
    scene.send(ev.Progress(5.0, 1, 6))
    scene.now_s = 10.0
    assert only(cm.Park, scene.send(ev.WorkerDied(10.0, 1, "SIGKILL"))) == cm.Park(1, (0, 2))
    scene.now_s = 10.2
    assert every(cm.Form, scene.park(0, applied=7)) == []
    plan = only(cm.Form, scene.park(2, applied=7)).plan
    assert (plan.generation, plan.step, plan.restore, plan.roll_forward) == (2, 7, None, None)
    assert plan.layout.held_once == 0
    assert {shard.owner for shard in plan.layout.shards} == {0, 2}
    assert plan.published_step == 6
    scene.now_s = 10.5
    record = announced(scene.seal(), "recovery")
    assert record["workers"] == [1]
    assert (record["cause"], record["generation"], record["steps_redone"]) == ("SIGKILL", 2, 1)
    assert (record["world_before"], record["world_after"]) == (3, 2)
    assert abs(record["parked_s"] - 0.2) < 1e-9
    assert abs(record["sealed_s"] - 0.5) < 1e-9
    assert view(scene.machine)["last_recovery"] == record
    assert view(scene.machine)["step"] == 7  # sealed at 7, so 7 is published (R5)


def test_rolling_forward_costs_no_step_and_gathers_to_everyone() -> None:
    scene = Scene(replace=False).run()
    scene.die(1)
    scene.park(0, applied=8, vote=b"vote of 8")
    plan = only(cm.Form, scene.park(2, applied=7, vote=b"vote of 7")).plan
    assert (plan.step, plan.roll_forward) == (8, b"vote of 8")
    assert plan.previous is not None
    assert plan.previous.generation == 1
    assert plan.gather_to == plan.layout.workers
    assert announced(scene.seal(), "recovery")["steps_redone"] == 0


def test_only_those_gather_that_have_not() -> None:
    scene = Scene().run()
    scene.send(ev.WorkerTroubled(1.0, 1, 0, "lost a peer"))
    scene.park(0, applied=7, gathered=False)
    plan = only(cm.Form, scene.park(1, 2, applied=7)).plan
    assert plan.gather_to == (0,)
    assert plan.layout.workers == (0, 1, 2)  # nobody died: the same members again
    assert plan.moves == ()


def test_a_spare_takes_the_dead_workers_place_at_once() -> None:
    scene = Scene(spares=1).run()
    before = scene.plan.layout
    out = scene.die(1)
    assert every(cm.StartWorker, out) == [cm.StartWorker(4)]  # the next spare
    plan = only(cm.Form, scene.park(0, 2, applied=7)).plan
    assert plan.layout.workers == (0, 3, 2)
    assert plan.layout.lanes == before.lanes
    assert [(s.lo, s.hi) for s in plan.layout.shards] == [(s.lo, s.hi) for s in before.shards]
    assert plan.joiners == (3,)
    assert {move.target for move in plan.moves} == {3}
    assert 3 in plan.gather_to


def test_a_replacement_joins_with_one_pause_and_rebalances() -> None:
    scene = Scene().run()
    assert every(cm.StartWorker, scene.die(1)) == [cm.StartWorker(3)]
    scene.park(0, 2, applied=7)
    scene.seal()
    ask = only(cm.AskPause, scene.ready(3))
    assert ask == cm.AskPause(2, 0)
    out = scene.park(0, applied=9)
    assert every(cm.Park, out) == []  # the others come by themselves
    plan = only(cm.Form, scene.park(2, applied=9)).plan
    assert set(plan.layout.workers) == {0, 2, 3}
    owned = [sum(s.hi - s.lo for s in plan.layout.owned(w)) for w in plan.layout.workers]
    assert max(owned) - min(owned) <= 1
    resized = announced(scene.seal(), "resized")
    assert resized["joined"] == [3]
    assert resized["steps_redone"] == 0
    assert len(scene.ledger.recoveries) == 1


def test_if_the_one_asked_for_a_pause_dies_another_is_asked() -> None:
    scene = Scene(max_workers=4).run()
    scene.send(ev.AddRequested(0.0))
    assert only(cm.AskPause, scene.ready(3)).worker == 0
    scene.die(0)
    scene.park(1, 2, applied=4)
    out = scene.seal()
    assert set(scene.plan.layout.workers) == {1, 2, 3}  # it joined in the same forming
    assert every(cm.AskPause, out) == []
    assert only(cm.AskPause, scene.ready(4)).worker in (1, 2, 3)


def test_below_min_the_survivors_park_and_wait() -> None:
    scene = Scene(min_workers=3).run()
    scene.die(1)
    reason = announced(scene.park(0, 2, applied=7), "gathering")
    assert reason["reason"] == "2 workers are there, workers.min=3 are needed"
    assert reason["parked"] == [0, 2]
    assert scene.machine.phase is Phase.GATHERING
    plan = only(cm.Form, scene.ready(3)).plan
    assert (plan.step, plan.restore) == (7, None)


def test_lost_blocks_send_the_whole_job_back() -> None:
    scene = Scene(checkpoint=True).run()
    scene.send(ev.CheckpointCommitted(1.0, 1, 5, "s3://c/5"), ev.Progress(1.0, 1, 8))
    scene.die(0, 1)
    back = announced(scene.park(2, applied=9), "went_back")
    assert (back["from_step"], back["to_step"], back["steps_redone"]) == (9, 5, 4)
    assert back["reason"] == "3 blocks were held only by workers [0, 1], which are gone"
    assert scene.plan.restore == Restore(5, "s3://c/5")
    assert (scene.plan.step, scene.plan.published_step, scene.plan.checkpointed_step) == (5, 5, 5)
    record = announced(scene.seal(), "recovery")
    assert (record["steps_redone"], record["restored_from"]) == (5, "s3://c/5")  # and the step under way


def test_it_is_counted_alike_whether_both_holders_die_at_once_or_one_after_the_other_has_parked() -> None:
    scene = Scene(checkpoint=True).run()
    scene.send(ev.CheckpointCommitted(1.0, 1, 5, "s3://c/5"), ev.Progress(1.0, 1, 8))
    scene.die(0)
    scene.park(1, 2, applied=9)  # a generation is formed of these two
    scene.die(1)
    assert announced(scene.park(2, applied=9), "went_back")["steps_redone"] == 4
    assert announced(scene.seal(), "recovery")["steps_redone"] == 5


def test_where_lanes_are_dropped_newer_checkpoints_have_not_happened() -> None:
    """What is computed again may come out differently."""
    scene = Scene(checkpoint=True, gradients=GradientSpec(8, way="drop_slowest", depth=1)).run()
    scene.send(ev.CheckpointCommitted(1.0, 1, 5, "s3://c/5"), ev.Progress(1.0, 1, 8))
    scene.die(0, 1)
    scene.park(2, applied=9)
    assert scene.plan.restore == Restore(5, "s3://c/5", discard_newer=True)


def test_without_a_checkpoint_it_starts_again_and_says_why() -> None:
    scene = Scene().run()
    scene.die(0, 1)
    back = announced(scene.park(2, applied=9), "went_back")
    assert back["to_step"] == 0
    assert back["reason"].endswith("without the setting checkpoint only the start is stored")


def test_a_corrupt_checkpoint_is_dropped_and_the_next_older_taken() -> None:
    scene = Scene(begin=False)
    known = ((4, "c4"), (6, "c6"), (9, "c9"))
    scene.send(ev.Begun(0.0, Restore(6, "c6"), known))
    assert scene.ledger.checkpoints == {4: "c4", 6: "c6"}  # 9 belongs to steps that this run has yet to take
    scene.ready(0, 1, 2)
    dropped = announced(scene.send(ev.WorkerFailed(1.0, 1, 1, "restore", "hash differs")), "checkpoint_dropped")
    assert dropped["up_to_generation"] == 1
    assert (dropped["path"], dropped["next_path"]) == ("c6", "c4")
    assert every(cm.Announce, scene.send(ev.WorkerFailed(1.0, 1, 2, "restore", "hash differs"))) == []
    scene.park(0, 1, 2, applied=0, sealed_generation=0, gathered=False)
    assert scene.plan.restore == Restore(4, "c4")
    scene.send(ev.WorkerFailed(2.0, 2, 0, "restore", "hash differs"))
    scene.park(0, 1, 2, applied=0, sealed_generation=0, gathered=False)
    assert scene.plan.restore == Restore(0, None)


@pytest.mark.parametrize("parked", [False, True])
def test_one_that_the_user_asked_for_is_refused_and_no_other_taken(parked: bool) -> None:
    scene = Scene(begin=False, min_workers=3)
    scene.send(ev.Begun(0.0, Restore(6, "c6", insist=True), ((4, "c4"), (6, "c6"))))
    scene.ready(0, 1, 2)
    if parked:
        scene.die(0)
        scene.park(1, 2, applied=0, sealed_generation=0)
        assert scene.machine.phase is Phase.GATHERING
    out = scene.send(ev.WorkerFailed(1.0, 1, 1, "restore", "CorruptCheckpoint: pack-0: its hash differs"))
    (end,) = every(cm.EndRun, out)
    assert end.outcome == "failed"
    assert end.error == "CorruptCheckpoint: checkpoint step 6 (c6) is damaged and refused: pack-0: its hash differs"


def test_once_it_is_sealed_the_newest_is_taken_as_ever() -> None:
    scene = Scene(begin=False)
    scene.send(ev.Begun(0.0, Restore(6, "c6", insist=True), ((4, "c4"), (6, "c6"))))
    scene.ready(0, 1, 2)
    scene.seal()
    scene.die(0, 1)
    scene.park(2, applied=8)
    assert scene.plan.restore == Restore(6, "c6")
    dropped = announced(scene.send(ev.WorkerFailed(2.0, 2, 2, "restore", "hash differs")), "checkpoint_dropped")
    assert dropped["next_path"] == "c4"


def test_what_is_sealed_was_not_damaged() -> None:
    scene = Scene(begin=False)
    scene.send(ev.Begun(0.0, Restore(6, "c6", insist=True), ((6, "c6"),)))
    scene.ready(0, 1, 2)
    scene.seal()
    (end,) = every(cm.EndRun, scene.send(ev.WorkerFailed(1.0, 1, 1, "restore", "CorruptCheckpoint: pack-0")))
    assert (end.error or "").startswith("InternalError in worker 1")


def test_what_a_restore_has_read_is_announced_once() -> None:
    scene = Scene(restore=Restore(6, "c6"))
    scene.ready(0, 1, 2)
    read = ReadBytes(1000, ((0, 400), (1, 350), (2, 300)))
    assert every(cm.Announce, scene.send(ev.Sealed(1.0, 1, 2, 6))) == []
    said = announced(scene.send(ev.Sealed(1.0, 1, 0, 6, read)), "restored")
    by_worker = {"0": 400, "1": 350, "2": 300}
    facts = {"step": 6, "path": "c6", "stored_bytes": 1000, "read_bytes": 1050, "read_by_worker": by_worker}
    assert said == facts
    assert every(cm.Announce, scene.send(ev.Sealed(1.0, 1, 0, 6, read))) == []


def test_that_a_checkpoint_is_corrupt_is_heard_while_gathering_too() -> None:
    scene = Scene(min_workers=3, restore=Restore(6, "c6"))
    scene.ready(0, 1, 2)
    scene.die(0)
    scene.park(1, 2, applied=0, sealed_generation=0)
    assert scene.machine.phase is Phase.GATHERING
    scene.send(ev.WorkerFailed(1.0, 1, 2, "restore", "hash differs"))
    scene.ready(3)
    assert scene.plan.restore == Restore(0, None)


def test_a_users_error_ends_the_run_with_its_traceback() -> None:
    out = Scene().run().send(ev.WorkerFailed(1.0, 1, 1, "user", "Traceback ...\nValueError: boom"))
    assert only(cm.EndRun, out).error == "Traceback ...\nValueError: boom"
    assert [kill.worker for kill in every(cm.Kill, out)] == [0, 1, 2]


def test_a_torn_apply_is_a_death_and_its_report_does_not_count() -> None:
    scene = Scene(replace=False).run()
    out = scene.send(ev.WorkerFailed(1.0, 1, 1, "torn", "out of memory"))
    assert only(cm.Kill, out).worker == 1
    scene.park(1, applied=8)
    assert every(cm.Form, scene.park(0, 2, applied=7)) == []
    plan = only(cm.Form, scene.die(1)).plan
    assert (plan.layout.workers, plan.step) == ((0, 2), 7)


def test_finish_is_final_even_when_a_member_dies() -> None:
    scene = Scene().run()
    scene.send(ev.WorkerFinished(1.0, 1, 0, 100, "abc"))
    scene.die(1)
    out = scene.send(ev.WorkerFinished(1.0, 1, 2, 100, "abc"))
    assert only(cm.EndRun, out) == cm.EndRun("finished", 100, digest="abc")
    assert every(cm.Retire, out) == [cm.Retire(0), cm.Retire(2)]


def test_a_death_seen_before_the_first_finish_does_not_undo_it() -> None:
    scene = Scene().run()
    scene.die(1)
    scene.park(2, applied=100)
    out = scene.send(ev.WorkerFinished(1.0, 1, 0, 100, "abc"))
    assert only(cm.EndRun, out).outcome == "finished"


def test_different_digests_are_a_bug_of_ours() -> None:
    scene = Scene().run()
    scene.send(ev.WorkerFinished(1.0, 1, 0, 100, "abc"))
    error = only(cm.EndRun, scene.send(ev.WorkerFinished(1.0, 1, 1, 100, "xyz"))).error
    assert error == "InternalError: workers ended step 100 with different digests: {0: 'abc', 1: 'xyz'}"


def test_a_stop_pauses_at_a_commit() -> None:
    scene = Scene().run()
    only(cm.AskPause, scene.send(ev.StopRequested(1.0, "user")))
    scene.park(0, 1, applied=9)
    assert only(cm.EndRun, scene.park(2, applied=9)) == cm.EndRun("stopped", 9, error="user")


def test_who_does_not_park_in_time_is_killed() -> None:
    scene = Scene(replace=False).run()
    scene.die(0)
    scene.park(1, applied=3)
    assert scene.machine.next_deadline_s() == 60.0
    assert scene.send(ev.Tick(59.0)) == []
    out = scene.send(ev.Tick(60.0))
    assert only(cm.Kill, out).worker == 2
    assert only(cm.Kill, scene.send(ev.Tick(120.0))).worker == 2  # again: not confirmed yet
    scene.die(2)
    assert scene.plan.layout.workers == (1,)  # it mirrored 0 and was mirrored by 2: everything is still there


def test_forming_that_takes_too_long_parks_everybody_and_doubles_the_patience() -> None:
    scene = Scene().run()
    scene.send(ev.WorkerTroubled(0.0, 1, 0, "x"))
    scene.park(0, 1, 2, applied=3)
    assert scene.machine.next_deadline_s() == 60.0
    assert only(cm.Park, scene.send(ev.Tick(60.0))) == cm.Park(2, (0, 1, 2))
    scene.now_s = 60.0
    scene.park(0, 1, 2, applied=3)
    assert scene.generation == 3
    deadline = scene.machine.next_deadline_s()
    assert deadline is not None
    assert deadline >= 60.0 + 120.0


def test_starts_are_tried_again_later_when_the_run_can_go_on() -> None:
    scene = Scene(start_attempts=1).run()
    scene.die(1)
    scene.park(0, 2, applied=3)
    scene.seal()
    scene.send(ev.WorkerStartFailed(5.0, 3, "no room", False))
    assert scene.machine.phase is Phase.RUNNING
    assert scene.machine.next_deadline_s() == 65.0
    assert every(cm.StartWorker, scene.send(ev.Tick(65.0))) == [cm.StartWorker(4)]


def test_a_state_that_does_not_fit_waits_for_another_worker_and_says_why() -> None:
    facts = {"fixed_bytes": 100, "bytes_per_held_element": 10.0, "initial_workers": 2, "max_workers": 3}
    scene = Scene(**facts)
    out = scene.ready(0, 1, memory_bytes=700)
    reason = announced(out, "gathering")["reason"]
    assert reason.startswith("worker 0 has 700 bytes of memory but would need 900 (100 fixed, and 80 elements held")
    assert "raise workers.start or workers.max" in reason
    scene.send(ev.AddRequested(1.0))
    assert only(cm.Form, scene.ready(2, memory_bytes=700)).plan.layout.world_size == 3


def test_no_replacement_and_nobody_left_is_a_capacity_error() -> None:
    scene = Scene(replace=False, initial_workers=1, max_workers=1).run()
    error = only(cm.EndRun, scene.die(0)).error
    assert error is not None
    assert error.startswith("CapacityError: 0 workers are left, workers.min=1 are needed, and workers.replace=false")


def test_world_size_one_with_replacement_comes_back_from_the_checkpoint() -> None:
    scene = Scene(initial_workers=1, max_workers=1, checkpoint=True).run()
    scene.send(ev.CheckpointCommitted(1.0, 1, 40, "c40"))
    scene.die(0)
    plan = only(cm.Form, scene.ready(1)).plan
    assert (plan.layout.world_size, plan.restore) == (1, Restore(40, "c40"))
