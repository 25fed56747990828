"""What the state of every phase implies, who is missing, and deadlines after a gap."""

from __future__ import annotations

import pytest

from elastictrain.controller import Phase, bring_back, dump_event, outstanding, reconcile
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.core import RESTORE_PATIENCE
from elastictrain.errors import ClusterError
from tests.unit.controller.scene import Scene, every, kinds
from tests.unit.controller.test_phases import SCENES


def test_what_each_phase_implies() -> None:
    implied = {phase: kinds(outstanding(make().machine)) for phase, make in SCENES.items()}
    assert implied == {
        Phase.GATHERING: ["StartWorker"] * 3,
        Phase.FORMING: ["Form"],
        Phase.RUNNING: [],
        Phase.PARKING: ["StartWorker", "Park"],
        Phase.FINISHING: [],
        Phase.FINISHED: ["Retire"] * 3 + ["EndRun"],
        Phase.FAILED: ["Kill"] * 3 + ["EndRun"],
        Phase.STOPPED: ["Kill"] * 3 + ["EndRun"],
    }


def test_a_pause_that_was_asked_for_is_asked_for_again_and_the_doomed_are_killed_again() -> None:
    scene = Scene(spares=1).run()
    asked = scene.send(ev.DrainRequested(1.0, 2))
    assert every(cm.AskPause, asked) == every(cm.AskPause, outstanding(scene.machine)) != []
    killed = every(cm.Kill, scene.send(ev.WorkerFrozen(2.0, 1, "no step")))
    assert killed == every(cm.Kill, outstanding(scene.machine)) != []


def test_who_parks_alone_is_told_again() -> None:
    scene = Scene().run()
    scene.send(ev.AddRequested(1.0))
    scene.ready(3)
    scene.park(0, applied=4)
    scene.send(ev.WorkerTroubled(1.0, 1, 2, "peers are gone"))
    assert every(cm.Park, outstanding(scene.machine)) == [cm.Park(1, (2,))]
    scene.park(2, applied=4)
    assert every(cm.Park, outstanding(scene.machine)) == []


def test_strangers_are_killed_and_the_missing_have_died() -> None:
    scene = Scene(spares=1)
    scene.ready(0, 1, 2)
    scene.seal()
    commands, events = reconcile(scene.machine, {0, 2, 7}, 9.0)
    assert commands == [cm.Kill(7, "nobody counts on it any more")]
    assert [(event.now_s, event.worker) for event in events if isinstance(event, ev.WorkerDied)] == [(9.0, 1)]
    scene.send(*events)  # 3, which is still to be started, is not among them
    assert scene.machine.phase is Phase.PARKING
    assert 3 in scene.ledger.workers


def test_the_last_announcements_can_be_written_again() -> None:
    scene = Scene().run()
    last = scene.die(1)
    machine, lines = bring_back(scene.machine.spec, [dump_event(event) for event in scene.log])
    assert machine == scene.machine
    assert lines == every(cm.Announce, last) != []
    with pytest.raises(ClusterError, match=r"^journal line 1 of 2 is broken"):
        bring_back(scene.machine.spec, ["nonsense", dump_event(scene.log[0])])


def test_after_a_gap_everybody_has_the_time_that_was_left() -> None:
    scene = Scene().run()
    scene.die(0)
    assert scene.machine.next_deadline_s() == 60.0
    scene.send(ev.ControllerBack(1000.0, 990.0))
    assert scene.machine.next_deadline_s() == 1050.0
    assert every(cm.Kill, scene.send(ev.Tick(1049.0))) == []
    assert {kill.worker for kill in every(cm.Kill, scene.send(ev.Tick(1050.0)))} == {1, 2}


def test_a_preemption_does_not_wait_for_the_controller() -> None:
    scene = Scene().run()
    scene.send(ev.PreemptionNotice(0.0, 100.0, worker=1))
    out = scene.send(ev.ControllerBack(60.0, 50.0))
    assert len(every(cm.AskPause, out)) == 1  # half of the notice is over


def test_what_a_gap_takes_is_not_learnt_as_the_time_that_things_take() -> None:
    scene = Scene()
    scene.ready(0, 1, 2)
    scene.send(ev.ControllerBack(5000.0, 4999.0))
    scene.now_s = 5001.0
    scene.seal()
    assert scene.ledger.longest_forming_s == 2.0 / RESTORE_PATIENCE  # the first generation comes from storage
