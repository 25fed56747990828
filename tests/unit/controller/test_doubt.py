"""Survivors that doubt their state: the job goes back to what was stored before, and to nothing that came after."""

from __future__ import annotations

from typing import Any

from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.journal import dump_event, load_event
from elastictrain.controller.phases import Phase
from elastictrain.protocol import Doubt, ParkReport, Restore
from tests.unit.controller.scene import Scene, announced, every, kinds, only


def stepping(*checkpoints: int, published: int = 60, **changes: Any) -> Scene:
    """Three workers, some checkpoints, published up to a step."""
    scene = Scene(checkpoint=True, **changes).run()
    for step in range(10, published + 1, 10):
        scene.send(ev.Progress(scene.now_s, scene.generation, step))
        if step in checkpoints:
            scene.send(ev.CheckpointCommitted(scene.now_s, scene.generation, step, f"ckpt/{step}"))
    return scene


def troubled(scene: Scene, worker: int = 0) -> list[cm.Command]:
    return scene.send(ev.WorkerTroubled(scene.now_s, scene.generation, worker, "copies differ"))


def test_undecided_copies_send_the_job_back_and_mark_both_nodes() -> None:
    scene = stepping(20, 40)
    troubled(scene)
    doubt = Doubt(60, "workers [0, 1] have different copies", (0, 1))
    out = scene.park(0, 1, 2, applied=61, doubt=doubt)
    back = announced(out, "went_back")
    assert (back["from_step"], back["to_step"], back["restored_from"]) == (61, 40, "ckpt/40")
    assert back["up_to_generation"] == only(cm.Form, out).plan.generation - 1
    assert "workers [0, 1] have different copies" in back["reason"]
    plan = only(cm.Form, out).plan
    assert plan.restore == Restore(40, "ckpt/40", discard_newer=True)
    assert plan.layout.workers == (0, 1, 2), "nobody is ended without evidence"
    assert [len(scene.ledger.nodes[f"node{w}"].failures) for w in range(3)] == [1, 1, 0]
    assert len(scene.ledger.failures["corrupt"]) == 2


def test_checkpoints_after_the_last_good_step_are_not_taken() -> None:
    scene = stepping(20, 40)
    scene.send(ev.WorkerFailed(scene.now_s, scene.generation, 1, "corrupt", "it has computed lane 3 wrongly"))
    scene.park(0, 2, applied=60, doubt=Doubt(39, "worker 1 was wrong"))
    out = scene.die(1)
    assert announced(out, "went_back")["to_step"] == 20
    assert only(cm.Form, out).plan.restore == Restore(20, "ckpt/20", discard_newer=True)
    assert scene.ledger.checkpoints == {20: "ckpt/20"}
    assert scene.ledger.published_step == 20


def test_without_any_that_is_old_enough_it_is_the_start() -> None:
    scene = stepping(20, 40)
    troubled(scene)
    out = scene.park(0, 1, 2, applied=60, doubt=Doubt(19, "long wrong"))
    assert only(cm.Form, out).plan.restore == Restore(0, None, discard_newer=True)
    assert announced(out, "went_back")["restored_from"] == "initial state"


def test_a_checkpoint_that_retention_has_removed_is_not_gone_back_to() -> None:
    scene = stepping(10, 20, 30, 40, checkpoints_kept=2)
    assert sorted(scene.ledger.checkpoints) == [30, 40]
    troubled(scene)
    out = scene.park(0, 1, 2, applied=60, doubt=Doubt(25, "long wrong"))
    assert only(cm.Form, out).plan.restore == Restore(0, None, discard_newer=True)


def test_one_survivor_that_doubts_is_enough_and_the_oldest_doubt_counts() -> None:
    scene = stepping(20, 40)
    troubled(scene)
    scene.park(0, applied=60)
    scene.park(1, applied=60, doubt=Doubt(50, "a"))
    out = scene.park(2, applied=60, doubt=Doubt(30, "b"))
    assert announced(out, "went_back")["to_step"] == 20


def test_nobody_goes_back_twice_for_the_same_doubt() -> None:
    """Too few workers are left: the survivors wait, parked, with their old reports."""
    scene = stepping(20, 40, min_workers=3, replace=True)
    scene.send(ev.WorkerFailed(scene.now_s, scene.generation, 1, "corrupt", "wrong"))
    scene.park(0, 2, applied=60, doubt=Doubt(45, "worker 1 was wrong"))
    out = scene.die(1)
    assert "went_back" in kinds(out)
    assert scene.machine.phase is Phase.GATHERING
    started = [w for w in scene.ledger.workers if w > 2]
    out = scene.ready(*started)
    assert "went_back" not in kinds(out)
    assert only(cm.Form, out).plan.restore == Restore(40, "ckpt/40", discard_newer=True)
    scene.seal()
    assert scene.ledger.published_step == 40


def test_a_checkpoint_that_cannot_be_read_after_a_doubt_gives_way_to_an_older_one_still_in_doubt_of_the_newer() -> None:
    scene = stepping(20, 40)
    troubled(scene)
    scene.park(0, 1, 2, applied=60, doubt=Doubt(45, "wrong"))
    scene.send(ev.WorkerFailed(scene.now_s, scene.generation, 0, "restore", "pruned"))
    out = scene.park(0, 1, 2, applied=0, sealed_generation=0)
    assert only(cm.Form, out).plan.restore == Restore(20, "ckpt/20", discard_newer=True)


def test_a_doubt_after_a_generation_that_was_never_sealed() -> None:
    scene = stepping(20, 40)
    troubled(scene)
    scene.park(0, 1, 2, applied=60, doubt=Doubt(45, "wrong"))
    assert scene.plan.restore == Restore(40, "ckpt/40", discard_newer=True)
    troubled(scene)
    out = scene.park(0, 1, 2, applied=40, sealed_generation=0, doubt=Doubt(39, "wrong again"))
    assert only(cm.Form, out).plan.restore == Restore(20, "ckpt/20", discard_newer=True)
    assert announced(out, "went_back")["from_step"] == 40


def test_a_doubt_survives_the_journal() -> None:
    report = ParkReport(1, 3, 7, 3, True, doubt=Doubt(5, "workers [1, 2] differ", (1, 2)))
    event = ev.WorkerParked(1.5, 3, report)
    assert load_event(dump_event(event)) == event
    plain = ev.WorkerParked(1.5, 3, ParkReport(1, 3, 7, 3, True))
    assert load_event(dump_event(plain)) == plain


def test_the_one_who_says_who_is_wrong_says_how_far_back_although_nobody_reports_it() -> None:
    """The survivors are parked before they have come to the verdict themselves."""
    scene = stepping(20, 40)
    failed = ev.WorkerFailed(scene.now_s, scene.generation, 1, "corrupt", "wrong", Doubt(39, "worker 1 was wrong"))
    assert load_event(dump_event(failed)) == failed
    scene.send(failed)
    scene.park(0, 2, applied=60)
    out = scene.die(1)
    assert announced(out, "went_back")["to_step"] == 20
    scene.seal()
    out = scene.die(0)
    out += scene.park(2, applied=20)
    assert "went_back" not in kinds(out), "once"


def test_a_doubt_before_the_last_worker_is_gone_waits_for_new_ones() -> None:
    scene = stepping(20, 40, max_workers=1, initial_workers=1, replace=True)
    scene.send(ev.WorkerFailed(scene.now_s, scene.generation, 0, "corrupt", "wrong", Doubt(39, "wrong")))
    scene.die(0)
    out = scene.ready(1)
    assert only(cm.Form, out).plan.restore == Restore(20, "ckpt/20", discard_newer=True)


def test_without_a_doubt_nothing_is_stored_away() -> None:
    scene = stepping(20, 40)
    out = scene.die(0, 1)
    out += scene.park(2, applied=60)
    assert every(cm.Form, out)[0].plan.restore == Restore(40, "ckpt/40")


def test_a_doubt_counts_although_whoever_has_said_it_dies_before_the_others_have_parked() -> None:
    """The others were parked before they came to the verdict: what they hold may be what is wrong."""
    scene = stepping(20, 40)
    troubled(scene)
    scene.park(1, applied=60, doubt=Doubt(45, "workers [0, 1] have different copies", (0, 1)))
    scene.die(1)
    out = scene.park(0, 2, applied=60)
    assert announced(out, "went_back")["to_step"] == 40
    assert only(cm.Form, out).plan.restore == Restore(40, "ckpt/40", discard_newer=True)
