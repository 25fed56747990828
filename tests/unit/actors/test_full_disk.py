"""The loop on a disk that is full: the run ends as failed, the error names the run directory, no worker is left."""

from __future__ import annotations

from typing import Any

import pytest

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.controller.machine import Machine
from elastictrain.errors import ClusterError
from elastictrain.protocol import Restore, Row
from elastictrain_actors.driver import Driver, Outcome
from tests.unit.actors.test_driver import DONE, READY, SPEC, Journal, Record, Scripted

NO_SPACE = OSError(28, "No space left on device", "runs/x/metrics.jsonl")


class FullRecord(Record):
    """Refuses what `refused` names."""

    def __init__(self, *refused: str) -> None:
        super().__init__()
        self.refused = refused

    def _refuse(self, what: str) -> None:
        if what in self.refused:
            raise NO_SPACE

    def event(self, kind: str, data: Any, generation: int | None) -> None:
        self._refuse(kind)
        super().event(kind, data, generation)

    def row(self, values: Any) -> None:
        self._refuse("row")
        super().row(values)

    def status(self, values: Any) -> None:
        self._refuse("status")
        super().status(values)


@pytest.mark.parametrize("refused", [("row",), ("running",), ("row", "failed"), ("row", "failed", "status")])
def test_a_record_that_cannot_be_written_ends_the_run(refused: tuple[str, ...]) -> None:
    effects = Scripted([READY], [ev.Sealed(0.0, 1, 0, 0), Row({"step": 1})], DONE[1:])
    outcome = Driver(Machine(SPEC), effects, FullRecord(*refused), Journal()).run(ev.Begun(0.0, Restore(0, None)))
    assert outcome == Outcome(
        "failed",
        0,
        None,
        "ClusterError: the run directory cannot be written: [Errno 28] No space left on device: "
        "'runs/x/metrics.jsonl'; free the disk under run_dir",
    )
    assert [c.worker for c in effects.commands if isinstance(c, cmd.Kill)] == [0]


@pytest.mark.parametrize("lines", [0, 1, 2, 3])
def test_a_journal_that_cannot_be_written_ends_the_run_before_anything_is_done(lines: int) -> None:
    """What is not in the journal has not happened: no command may follow from it."""
    said = "journal runs/x/journal.jsonl cannot be written: No space left on device; free the disk under run_dir"

    class Full(Journal):
        def append(self, line: str) -> None:
            if len(self) == lines:
                raise ClusterError(said)
            super().append(line)

    effects, record, journal = Scripted([READY], [ev.Sealed(0.0, 1, 0, 0)], DONE[1:]), FullRecord(), Full()
    outcome = Driver(Machine(SPEC), effects, record, journal).run(ev.Begun(0.0, Restore(0, None)))
    assert (outcome.outcome, outcome.digest, outcome.error) == ("failed", None, f"ClusterError: {said}")
    asked_before = [cmd.StartWorker, cmd.Form][:lines]
    assert [type(c) for c in effects.commands] == [*asked_before, *([cmd.Kill] if lines else [])]
    assert record.kinds[-1] == "failed"


def test_a_last_status_that_cannot_be_written_takes_nothing_from_a_run_that_has_finished() -> None:
    record = FullRecord()

    class Late(Scripted):
        def perform(self, command: cmd.Command) -> None:
            super().perform(command)
            record.refused = ("status",) if isinstance(command, cmd.Retire) else ()

    effects = Late([READY], DONE)
    outcome = Driver(Machine(SPEC), effects, record, Journal()).run(ev.Begun(0.0, Restore(0, None)))
    assert (outcome.outcome, outcome.digest) == ("finished", "abc")


def test_other_trouble_of_files_or_sockets_is_not_called_a_full_disk() -> None:
    class Cut(Scripted):
        def perform(self, command: cmd.Command) -> None:
            if isinstance(command, cmd.Form):
                raise ConnectionResetError(104, "Connection reset by peer")
            super().perform(command)

    outcome = Driver(Machine(SPEC), Cut([READY], DONE), FullRecord(), Journal()).run(ev.Begun(0.0, Restore(0, None)))
    assert outcome.outcome == "failed"
    assert outcome.error is not None
    assert "ConnectionResetError: [Errno 104] Connection reset by peer" in outcome.error
    assert "disk" not in outcome.error
