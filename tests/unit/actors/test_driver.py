"""The loop around the machine, with a world that only remembers what was asked of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.controller.facts import MachineSpec, StragglerSpec
from elastictrain.controller.journal import replay
from elastictrain.controller.machine import Machine
from elastictrain.controller.view import view
from elastictrain.faults import add, drain, kill_controller
from elastictrain.protocol import Awaited, ParkReport, Restore, Row, StepSignals
from elastictrain.stragglers.signals import Signal
from elastictrain_actors import driver as module
from elastictrain_actors.driver import STATUS_EVERY_S, Driver, status_fields
from elastictrain_actors.journal_file import Replaced

SPEC = MachineSpec(lane_count=4, steps=8, block_elements=(4096,) * 4, max_workers=3, initial_workers=1, replace=False)


class Scripted:
    """Answers each command with the next batch of messages; remembers all commands."""

    def __init__(self, *batches: list[Any], there: Sequence[int] = ()) -> None:
        self.batches, self.commands, self.there = list(batches), [], there

    def adopt(self) -> Sequence[int]:
        return self.there

    def perform(self, command: cmd.Command) -> None:
        self.commands.append(command)

    def poll(self, timeout_s: float) -> list[Any]:
        return self.batches.pop(0) if self.batches else []


class Record:
    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.data: list[Any] = []
        self.rows: list[Any] = []
        self.signalled: list[Any] = []

    def event(self, kind: str, data: Any, generation: int | None) -> None:
        self.kinds.append(kind)
        self.data.append(data)

    def row(self, values: Any) -> None:
        self.rows.append(values)

    def signals(self, said: Any, workers: Any) -> None:
        self.signalled.append((said, tuple(workers)))

    def status(self, values: Any) -> None:
        self.last = values


class Journal(list[str]):
    def __init__(self, taken: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.taken = set(taken)

    def claim(self, generation: int) -> bool:
        free = generation not in self.taken
        self.taken.add(generation)
        return free


def drive(*batches: list[Any], journal: Journal | None = None, script: tuple[Any, ...] = (), spec: Any = SPEC) -> Any:
    effects, record, journal = Scripted(*batches), Record(), journal if journal is not None else Journal()
    driver = Driver(Machine(spec), effects, record, journal, script=script)
    outcome = driver.run(ev.Begun(0.0, Restore(0, None)))
    return outcome, effects, record, journal, driver


READY = ev.WorkerReady(0.0, 0, "here")
DONE = [ev.Sealed(0.0, 1, 0, 0), Row({"step": 8}), ev.Progress(0.0, 1, 8), ev.WorkerFinished(0.0, 1, 0, 8, "abc")]


def test_a_run_from_start_to_end():
    outcome, effects, record, _, _ = drive([READY], DONE)
    assert (outcome.outcome, outcome.digest) == ("finished", "abc")
    assert [type(c).__name__ for c in effects.commands] == ["StartWorker", "Form", "Retire"]
    assert record.rows == [{"step": 8}]
    assert record.kinds[-1] == "finished"
    assert record.last["state"] == "finished"


def test_the_journal_brings_the_machine_back():
    _, _, _, journal, driver = drive([READY], DONE)
    assert replay(SPEC, journal) == driver.machine


def test_a_second_controller_changes_nothing():
    """R5: the generation is taken, so this controller forms none and ends; the workers are the other one's now."""
    effects = Scripted([READY], DONE)
    driver = Driver(Machine(SPEC), effects, Record(), Journal(taken=(1,)))
    with pytest.raises(Replaced, match="generation 1 of this run has been formed by another controller"):
        driver.run(ev.Begun(0.0, Restore(0, None)))
    assert not [c for c in effects.commands if isinstance(c, cmd.Form | cmd.Kill)]


def test_the_fault_script_asks_when_its_step_is_published():
    progress = [ev.Sealed(0.0, 1, 0, 0), ev.Progress(0.0, 1, 3)]
    _, effects, record, _, _ = drive([READY], progress, DONE[2:], script=(add(3), drain(9, 3), add(7)))
    assert [c.worker for c in effects.commands if isinstance(c, cmd.StartWorker)] == [0, 1, 2]
    assert record.kinds.count("refused") == 1  # there is no worker 9


class Death(Exception):
    pass


def test_a_script_may_kill_the_controller_once_and_asks_for_what_else_is_due_before():
    """Who goes on does nothing of it again."""

    def die() -> None:
        raise Death

    script = (kill_controller(3), add(3), add(7))
    journal, effects = Journal(), Scripted([READY], [ev.Sealed(0.0, 1, 0, 0), ev.Progress(0.0, 1, 3)])
    with pytest.raises(Death):
        Driver(Machine(SPEC), effects, Record(), journal, script=script, die=die).run(ev.Begun(0.0, Restore(0, None)))
    machine = replay(SPEC, journal)
    assert machine.core.ledger.shown_step == 3
    assert len(machine.core.ledger.workers) == 2
    again = Scripted([ev.Progress(0.0, 1, 4)], [ev.Progress(0.0, 1, 7)], DONE[3:], there=(0, 1))
    assert Driver(machine, again, Record(), journal, script=script, die=die).take_over(1.0, ()).outcome == "finished"
    assert [c.worker for c in again.commands if isinstance(c, cmd.StartWorker)] == [1, 2], "the one under way, one new"


def test_requests_come_in_between_events():
    effects, record = Scripted([READY], [ev.Sealed(0.0, 1, 0, 0)], []), Record()
    driver = Driver(Machine(SPEC), effects, record, Journal())
    driver.request(ev.StopRequested(0.0, "enough"))
    paused = ev.WorkerParked(0.0, 1, ParkReport(0, 1, 2, 1, True, b"vote"))
    effects.batches.append([paused])
    outcome = driver.run(ev.Begun(0.0, Restore(0, None)))
    assert outcome.outcome == "stopped"


@pytest.mark.parametrize("kind", ["user", "internal"])
def test_what_others_have_published_before_an_error_is_heard(kind: str):
    """The error may come first: it is urgent, and rows ride along with what comes later."""
    failed = ev.WorkerFailed(0.0, 1, 0, kind, "ValueError: the recipe's")
    later = [Row({"step": 4}), ev.Progress(0.0, 1, 4)]
    sealed = [ev.Sealed(0.0, 1, 0, 0), Row({"step": 1})]
    with_it = [Row({"step": 2}), failed, Row({"step": 3})]
    outcome, _, record, _, _ = drive([READY], sealed, with_it, [], later)
    assert (outcome.outcome, outcome.step) == ("failed", 4)
    assert "ValueError: the recipe's" in outcome.error
    assert [row["step"] for row in record.rows] == [1, 2, 3, 4], "in order: a row after a later one's is not written"


def test_of_several_errors_the_first_that_is_heard_ends_the_run():
    failed = [ev.WorkerFailed(0.0, 1, 0, "user", f"ValueError: {which}") for which in ("first", "second")]
    outcome, _, record, _, _ = drive([READY], [ev.Sealed(0.0, 1, 0, 0)], failed[:1], [Row({"step": 1}), failed[1]])
    assert (outcome.outcome, "ValueError: first" in outcome.error) == ("failed", True)
    assert [row["step"] for row in record.rows] == [1]


def test_nothing_is_done_while_last_words_are_heard():
    """A worker that was parked because of the error would train on in a generation that nobody is to form."""
    failed = ev.WorkerFailed(0.0, 1, 0, "internal", "ValueError: the disk")
    asked: list[int] = []

    class Counting(Scripted):
        def poll(self, timeout_s: float) -> list[Any]:
            asked.append(len(self.commands))
            return super().poll(timeout_s)

    joined, sealed = ev.WorkerReady(0.0, 1, "there"), ev.Sealed(0.0, 1, 0, 0)
    effects = Counting([READY, joined], [sealed], [ev.WorkerDied(0.0, 1, "gone"), failed], [], [])
    driver = Driver(Machine(replace(SPEC, initial_workers=2)), effects, Record(), Journal())
    outcome = driver.run(ev.Begun(0.0, Restore(0, None)))
    assert "ValueError: the disk" in outcome.error
    assert len(asked) > 5
    assert len(set(asked[2:])) == 1, "nobody is told to park"
    assert any(isinstance(command, cmd.Park) for command in effects.commands), "after them he is"


def test_status_speaks_the_words_of_the_run_directory():
    _, _, _, _, driver = drive([READY], DONE)
    fields = status_fields(driver.status())
    assert fields["lanes"] == {0: 4}
    assert fields["steps"] == 8


def test_what_the_data_wait_for_is_shown_and_written_down_once():
    says = [Awaited(0, "step 9: two segments"), Awaited(1, "step 9: two segments")]
    rest = (DONE[:1], says, [Awaited(0, None)], [Awaited(1, None), Awaited(0, "step 12: none")], DONE[1:])
    _, _, record, journal, driver = drive([READY], *rest)
    said = [data for kind, data in zip(record.kinds, record.data, strict=True) if kind == "data_awaited"]
    assert said == [{"worker": 0, "reason": "step 9: two segments"}, {"worker": 0, "reason": "step 12: none"}]
    assert replay(SPEC, journal) == driver.machine, "nothing of it is journalled"


def test_the_status_says_what_the_data_wait_for():
    record = Record()
    driver = Driver(Machine(SPEC), Scripted([READY]), record, Journal())
    driver._handle(ev.Begun(0.0, Restore(0, None)))
    driver._hear([READY, *DONE[:1], Awaited(0, "step 9: none"), Awaited(7, "a worker that is gone")])
    driver._show(force=True)
    assert record.last["waiting"] == "data: step 9: none"
    driver._hear([Awaited(0, None)])
    driver._show(force=True)
    assert record.last["waiting"] is None


class Asked(Scripted):
    """While it performs a command, and so in the middle of an event, somebody else asks how things stand."""

    driver: Driver

    def __init__(self, *batches: list[Any]) -> None:
        super().__init__(*batches)
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def perform(self, command: cmd.Command) -> None:
        super().perform(command)
        asking = threading.Thread(target=lambda: self.seen.append((type(command).__name__, self.driver.status())))
        asking.start()
        asking.join()


def test_status_from_another_thread_is_of_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[threading.Thread] = []

    def watched(machine: Machine) -> dict[str, Any]:
        looked.append(threading.current_thread())
        return view(machine)

    monkeypatch.setattr(module, "view", watched)
    effects = Asked([READY], DONE)
    effects.driver = Driver(Machine(SPEC), effects, Record(), Journal())
    assert effects.driver.status()["phase"] == "gathering", "before its thread has begun"
    effects.driver.run(ev.Begun(0.0, Restore(0, None)))
    assert set(looked) == {threading.current_thread()}, "nobody else reads the machine"
    stands = {kind: (seen["phase"], seen["generation"], seen["digest"]) for kind, seen in effects.seen}
    assert stands == {
        "StartWorker": ("gathering", 0, None),
        "Form": ("gathering", 0, None),  # the machine itself is forming by now
        "Retire": ("forming", 1, None),
    }
    assert effects.driver.status()["digest"] == "abc"


def test_what_a_reader_does_with_its_status_changes_nobody_elses() -> None:
    _, _, _, _, driver = drive([READY], DONE)
    mine = driver.status()
    mine["incidents"].append("x")
    mine["phase"] = "?"
    assert driver.status()["phase"] == "finished"
    assert driver.status()["incidents"] == []


def test_a_change_of_phase_is_seen_at_once_and_a_step_after_half_a_second() -> None:
    now_s = 100.0
    effects = Scripted([READY], DONE[:1], [ev.Progress(0.0, 1, 3)])
    driver = Driver(Machine(SPEC), effects, Record(), Journal(), clock=lambda: now_s)
    driver._handle(ev.Begun(0.0, Restore(0, None)))
    found = []
    for _ in range(3):
        driver._turn()
        found.append((driver.status()["phase"], driver.status()["step"]))
    now_s += STATUS_EVERY_S
    driver._turn()
    found.append((driver.status()["phase"], driver.status()["step"]))
    assert found == [("forming", 0), ("running", 0), ("running", 0), ("running", 3)]


def test_signals_of_the_generation_that_is_there_are_written_down():
    said = [StepSignals(generation, 3, Signal(4, 0.1).encode()) for generation in (1, 2)]
    watched = replace(SPEC, stragglers=StragglerSpec())
    _, _, record, journal, _ = drive([READY], [ev.Sealed(0.0, 1, 0, 0), *said], DONE[1:], spec=watched)
    assert record.signalled == [(said[0], (0,))]
    assert not any("StepSignals" in line for line in journal), "what follows from them is journalled"


def test_the_watch_is_told_how_far_the_run_has_come_by_what_is_heard_with_old_words(monkeypatch):
    """What has piled up comes at once: the first of it is as old as the last of it is new."""
    heard: list[tuple[int, int]] = []

    def hear(self: Any, signals: StepSignals, newest_step: int = 0) -> Any:
        heard.append((signals.step, newest_step))
        return [], None

    monkeypatch.setattr(module.Slowness, "hear", hear)
    said = [StepSignals(1, step, Signal(4, 0.1).encode()) for step in (3, 4)]
    watched = replace(SPEC, stragglers=StragglerSpec())
    drive([READY], [ev.Sealed(0.0, 1, 0, 0), *said, ev.Progress(0.0, 1, 7)], DONE[1:], spec=watched)
    assert heard == [(3, 7), (4, 7)]


def test_nobody_hears_signals_where_slow_workers_are_not_looked_for():
    said = StepSignals(1, 3, Signal(4, 0.1).encode())
    _, _, record, _, _ = drive([READY], [ev.Sealed(0.0, 1, 0, 0), said], DONE[1:])
    assert record.signalled == []


def test_a_watch_that_breaks_ends_and_the_run_goes_on(monkeypatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(module.Slowness, "hear", broken)
    said = [StepSignals(1, step, Signal(4, 0.1).encode()) for step in (3, 4)]
    watched = replace(SPEC, stragglers=StragglerSpec())
    outcome, _, record, _, _ = drive([READY], [ev.Sealed(0.0, 1, 0, 0), *said], DONE[1:], spec=watched)
    assert outcome.outcome == "finished"
    assert record.kinds.count("watch_ended") == 1
    assert record.data[record.kinds.index("watch_ended")] == {"reason": "ZeroDivisionError: float division by zero"}
