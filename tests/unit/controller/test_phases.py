"""The transition table, its diagram, and what every phase does with every event."""

from __future__ import annotations

import copy
import itertools
import re

import pytest

from elastictrain.controller import TRANSITIONS, Phase, diagram
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.phases import check_change
from elastictrain.errors import InternalError
from elastictrain.protocol import ParkReport, Restore
from tests.unit.controller.scene import Scene


def test_every_phase_is_in_the_table_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(Phase)
    assert set().union(*TRANSITIONS.values()) | {Phase.GATHERING} == set(Phase)
    assert {phase for phase in Phase if phase.is_terminal} == {Phase.FINISHED, Phase.FAILED, Phase.STOPPED}


def test_a_change_against_the_table_is_an_internal_error() -> None:
    message = "phase finishing -> running is not in the table; allowed: ['failed', 'finished']"
    with pytest.raises(InternalError, match=f"^{re.escape(message)}$"):
        check_change(Phase.FINISHING, Phase.RUNNING)


def test_the_diagram_is_the_table() -> None:
    arrows = set(re.findall(r"^    (\S+) --> (\S+)$", diagram(), re.M))
    inner = {(a, b) for a, b in arrows if "[*]" not in (a, b)}
    assert inner == {(before.value, after.value) for before in Phase for after in TRANSITIONS[before]}
    assert ("[*]", "gathering") in arrows
    assert {a for a, b in arrows if b == "[*]"} == {"finished", "failed", "stopped"}


def gathering() -> Scene:
    return Scene()


def forming() -> Scene:
    scene = Scene()
    scene.ready(0, 1, 2)
    return scene


def running() -> Scene:
    return Scene().run()


def parking() -> Scene:
    scene = running()
    scene.die(2)
    return scene


def finishing() -> Scene:
    scene = running()
    scene.send(ev.WorkerFinished(1.0, 1, 0, 100, "d"))
    return scene


def finished() -> Scene:
    scene = finishing()
    scene.send(ev.WorkerFinished(1.0, 1, 1, 100, "d"), ev.WorkerFinished(1.0, 1, 2, 100, "d"))
    return scene


def failed() -> Scene:
    scene = running()
    scene.send(ev.WorkerFailed(1.0, 1, 0, "user", "ValueError: x"))
    return scene


def stopped() -> Scene:
    scene = gathering()
    scene.send(ev.StopRequested(1.0, "enough"))
    return scene


SCENES = {
    Phase.GATHERING: gathering,
    Phase.FORMING: forming,
    Phase.RUNNING: running,
    Phase.PARKING: parking,
    Phase.FINISHING: finishing,
    Phase.FINISHED: finished,
    Phase.FAILED: failed,
    Phase.STOPPED: stopped,
}

EVENTS: dict[str, ev.Event] = {
    "begun again": ev.Begun(2.0, Restore(9, "elsewhere")),
    "placed": ev.WorkerPlaced(2.0, 0, "node1"),
    "ready again": ev.WorkerReady(2.0, 0, "node0"),
    "start failed": ev.WorkerStartFailed(2.0, 0, "no room", False),
    "died": ev.WorkerDied(2.0, 0, "SIGKILL"),
    "troubled": ev.WorkerTroubled(2.0, 1, 0, "peer lost"),
    "user error": ev.WorkerFailed(2.0, 1, 0, "user", "ValueError: x"),
    "torn": ev.WorkerFailed(2.0, 1, 0, "torn", "out of memory"),
    "parked": ev.WorkerParked(2.0, 1, ParkReport(0, 1, 4, 1, True, b"v")),
    "sealed": ev.Sealed(2.0, 1, 0, 0),
    "progress": ev.Progress(2.0, 1, 5),
    "checkpoint": ev.CheckpointCommitted(2.0, 1, 5, "p"),
    "removed": ev.CheckpointsRemoved(2.0, 1, (3,)),
    "given up": ev.CheckpointGivenUp(2.0, 1, 0, 4, 1, False, 5),
    "copies": ev.CopiesStand(2.0, 1, 0, "s3://far", 4, (5,), ""),
    "worker finished": ev.WorkerFinished(2.0, 1, 0, 100, "d"),
    "add": ev.AddRequested(2.0),
    "drain": ev.DrainRequested(2.0, 0),
    "resize": ev.ResizeRequested(2.0, 2),
    "stop": ev.StopRequested(2.0, "enough"),
    "tick": ev.Tick(2.0),
    "frozen": ev.WorkerFrozen(2.0, 0, "no step for 3 s"),
    "node lost": ev.NodeLost(2.0, "node0", "no beat for 2 s"),
    "hung": ev.GenerationHung(2.0, 1, "all wait", suspect=0),
    "preemption": ev.PreemptionNotice(2.0, 32.0, worker=0),
    "cluster": ev.ClusterChanged(2.0, ("node0", "node1"), "8 CPUs"),
    "back": ev.ControllerBack(2.0, 1.0),
    "speeds": ev.SpeedsLearned(2.0, 1, 5, ((0, 1.0), (1, 0.5), (2, 1.0))),
}

# Where each event leads to from each phase, in the order of SCENES; "." = stays. Terminal phases are tested apart.
G, F, R, P, FI, FA, ST = "gathering", "forming", "running", "parking", "finishing", "failed", "stopped"
TABLE: dict[str, tuple[str, ...]] = {
    "begun again": (".", ".", ".", ".", "."),
    "placed": (".", ".", ".", ".", "."),
    "ready again": (".", ".", ".", ".", "."),
    "start failed": (".", ".", ".", ".", "."),
    "died": (".", P, P, ".", "."),
    "troubled": (".", P, P, ".", "."),
    "user error": (".", FA, FA, FA, FA),
    "torn": (".", P, P, ".", "."),
    "parked": (".", P, P, ".", "."),
    "sealed": (".", ".", ".", ".", "."),
    "progress": (".", ".", ".", ".", "."),
    "checkpoint": (".", ".", ".", ".", "."),
    "removed": (".", ".", ".", ".", "."),
    "given up": (".", ".", ".", ".", "."),
    "copies": (".", ".", ".", ".", "."),
    "worker finished": (".", FI, FI, FI, "."),
    "add": (".", ".", ".", ".", "."),
    "drain": (".", ".", ".", ".", "."),
    "resize": (".", ".", ".", ".", "."),
    "stop": (ST, ".", ".", ".", "."),
    "tick": (".", ".", ".", ".", "."),
    "frozen": (".", P, P, ".", "."),
    "node lost": (".", P, P, ".", "."),
    "hung": (".", P, P, ".", "."),
    "preemption": (".", ".", ".", ".", "."),
    "cluster": (".", ".", ".", ".", "."),
    "back": (".", ".", ".", ".", "."),
    "speeds": (".", ".", ".", ".", "."),
}


@pytest.mark.parametrize(("name", "column"), list(itertools.product(EVENTS, range(5))))
def test_phase_by_event(name: str, column: int) -> None:
    phase = list(SCENES)[column]
    scene = SCENES[phase]()
    assert scene.machine.phase is phase
    expected = TABLE[name][column]
    scene.send(EVENTS[name])
    assert scene.machine.phase.value == (phase.value if expected == "." else expected)


@pytest.mark.parametrize("phase", [Phase.FINISHED, Phase.FAILED, Phase.STOPPED])
@pytest.mark.parametrize("name", EVENTS)
def test_a_terminal_phase_stays_and_emits_nothing(phase: Phase, name: str) -> None:
    scene = SCENES[phase]()
    assert scene.machine.phase is phase
    before = copy.deepcopy(scene.machine)
    assert scene.send(EVENTS[name]) == []
    assert scene.machine == before
    assert scene.machine.next_deadline_s() is None


def test_before_it_has_begun_only_a_stop_counts() -> None:
    for event in EVENTS.values():
        scene = Scene(begin=False)
        before = copy.deepcopy(scene.machine)
        commands = scene.send(event)
        if isinstance(event, ev.Begun):
            assert [type(c) for c in commands] == [cm.StartWorker] * 3
        elif isinstance(event, ev.StopRequested):
            assert commands == [cm.EndRun("stopped", 0, error="enough")]
        else:
            assert commands == []
            assert scene.machine == before
