"""The loop around the machine: journal, handle, perform. It knows no Ray; what it does to the world goes through
`Effects`, which Ray actors implement in production and plain processes in tests.
"""

from __future__ import annotations

import errno
import os
import queue
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.controller.adoption import outstanding, reconcile
from elastictrain.controller.events import Message
from elastictrain.controller.journal import dump_event
from elastictrain.controller.machine import Machine
from elastictrain.controller.slowness import Slowness
from elastictrain.controller.view import view
from elastictrain.errors import ElasticTrainError
from elastictrain.faults import Add, Drain, Fault, KillController
from elastictrain.protocol import Awaited, Ready, Row, StepSignals
from elastictrain_actors.journal_file import Replaced

Heard = Message | cmd.Announce
"""What effects hand to the driver: what workers say, and lines for events.jsonl."""
POLL_S = 0.1
STATUS_EVERY_S = 0.5
LAST_WORDS_S = 1.5
"""Longer than a long poll: rows ride along with its end."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
NO_END = ("torn", "corrupt", "restore")
"""Failures of a worker that do not end the run: it recovers at once, and in the order in which things were said."""


class Effects(Protocol):
    """What can be done to the world. None of these may block for long or raise: failures come back as events."""

    def perform(self, command: cmd.Command) -> None: ...

    def adopt(self) -> Sequence[int]:
        """Take over the workers that a controller before this one has left; says which are there."""
        ...

    def poll(self, timeout_s: float) -> Sequence[Heard]:
        """What has happened; returns as soon as there is something, or after `timeout_s`."""
        ...


class Journal(Protocol):
    """Where events go before they are handled."""

    def append(self, line: str) -> None: ...

    def claim(self, generation: int) -> bool:
        """Take a generation number by compare-and-set: False when another controller has it (R5)."""
        ...


class Record(Protocol):
    """Where a run writes what people read (`observe.RunDirectory` behind it)."""

    def event(self, kind: str, data: Mapping[str, Any], generation: int | None) -> None: ...

    def row(self, values: Mapping[str, Any]) -> None: ...

    def signals(self, said: StepSignals, workers: Sequence[int]) -> None:
        """What `workers` have said of a step, in their order."""
        ...

    def status(self, values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `outcome`: finished, failed or stopped."""

    outcome: str
    step: int
    digest: str | None
    error: str | None


class Driver:
    """Runs one machine to its end."""

    def __init__(
        self,
        machine: Machine,
        effects: Effects,
        record: Record,
        journal: Journal,
        *,
        script: Sequence[Fault] = (),
        clock: Callable[[], float] = time.monotonic,
        die: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGKILL),
    ) -> None:
        self.machine, self.effects, self.record, self.journal = machine, effects, record, journal
        self._script = [fault for fault in script if isinstance(fault, Add | Drain | KillController)]
        self._clock, self._die = clock, die
        self._slowness = None if machine.spec.stragglers is None else Slowness(machine, machine.spec.stragglers)
        self._requests: queue.SimpleQueue[ev.Event] = queue.SimpleQueue()
        self._outcome: Outcome | None = None
        self._status_at_s = 0.0
        self._seen = view(machine)
        self._shown: tuple[object, ...] = ()
        self._awaiting: dict[int, str] = {}

    def request(self, event: ev.Event) -> None:
        """Hand in a user's request (add, drain, resize, stop) from any thread."""
        self._requests.put(event)

    def status(self) -> dict[str, Any]:
        """The machine's view, for `elastictrain status`, from any thread: as it was between two events, at most
        `STATUS_EVERY_S` ago. Only the driver's own thread reads the machine, which others would see half-changed.
        """
        return deepcopy(self._seen)

    def run(self, begun: ev.Begun) -> Outcome:
        """Until the run is over. An error of ours ends the run as failed instead of leaving workers behind."""
        return self._until_over(lambda: self._handle(begun))

    def take_over(self, gone_s: float, unsaid: Sequence[cmd.Announce]) -> Outcome:
        """Go on where a controller that has died left off: the machine has replayed its journal. `gone_s`: how long
        nobody was there; `unsaid`: lines of events.jsonl that may be missing. What had been decided may or may not have
        been done, so all of it is done again.
        """
        return self._until_over(lambda: self._adopt(gone_s, unsaid))

    def _adopt(self, gone_s: float, unsaid: Sequence[cmd.Announce]) -> None:
        shown = self.machine.core.ledger.shown_step
        self._script = [fault for fault in self._script if fault.step > shown]
        alive = self.effects.adopt()
        for announce in unsaid:
            self._perform(announce)
        strangers, gone = reconcile(self.machine, alive, self._clock())
        self._handle(ev.ControllerBack(0.0, gone_s))
        for command in [*strangers, *outstanding(self.machine)]:
            self._perform(command)
        for event in gone:
            self._handle(event)

    def _until_over(self, begin: Callable[[], None]) -> Outcome:
        try:
            begin()
            while self._outcome is None:
                self._turn()
        except Replaced:
            raise
        except ElasticTrainError as error:
            self._abandon(f"{type(error).__name__}: {error}")
        except OSError as error:
            self._abandon(_in_words(error))
        with suppress(OSError, ElasticTrainError):  # a full disk must not replace the outcome by its last status
            self._show(force=True)
        assert self._outcome is not None
        return self._outcome

    def _abandon(self, error: str) -> None:
        for worker in sorted(self.machine.core.ledger.workers):
            self.effects.perform(cmd.Kill(worker, "the controller has failed"))
        with suppress(OSError, ElasticTrainError):
            self.record.event("failed", {"error": error, "step": self.machine.core.ledger.published_step}, None)
        self._outcome = Outcome("failed", self.machine.core.ledger.published_step, None, error)

    def _turn(self) -> None:
        deadline_s = self.machine.next_deadline_s()
        wait_s = POLL_S if deadline_s is None else min(POLL_S, max(0.0, deadline_s - self._clock()))
        messages = list(self.effects.poll(wait_s))
        if any(map(_ends, messages)):
            messages = sorted(messages + self._last_words(), key=_ends)
        self._hear(messages)
        while not self._requests.empty():
            self._handle(self._requests.get())
        if deadline_s is not None and self._clock() >= deadline_s:
            self._handle(ev.Tick(self._clock()))
        self._show()

    def _hear(self, messages: Sequence[Heard]) -> None:
        newest = max((said.step for said in messages if isinstance(said, StepSignals | ev.Progress)), default=0)
        for message in messages:
            if isinstance(message, Row):
                self.record.row(message.values)
            elif isinstance(message, cmd.Announce):
                self.record.event(message.kind, message.data, self.machine.generation or None)
            elif isinstance(message, StepSignals):
                self._watch(message, newest)
            elif isinstance(message, Awaited):
                self._await_data(message)
            elif not isinstance(message, Ready):  # effects have made a WorkerReady of it
                self._handle(message)

    def _watch(self, signals: StepSignals, newest_step: int) -> None:
        """They are not journalled: what follows from them is. `newest_step`: of which something is heard now."""
        if self._slowness is None:
            return
        try:
            members = self._slowness.members(signals)
            if members:
                self.record.signals(signals, members)
            said, event = self._slowness.hear(signals, newest_step)
        except Exception as error:  # advice: a run does not end for want of it
            self._slowness = None
            said, event = [cmd.Announce("watch_ended", {"reason": f"{type(error).__name__}: {error}"})], None
        for announce in said:
            self._perform(announce)
        if event is not None:
            self._handle(event)

    def _await_data(self, said: Awaited) -> None:
        """All workers come to the same wait; the first of them is written down for all."""
        if said.why is None:
            self._awaiting.pop(said.worker, None)
            return
        if not self._awaiting:
            data = {"worker": said.worker, "reason": said.why}
            self.record.event("data_awaited", data, self.machine.generation or None)
        self._awaiting[said.worker] = said.why

    def _last_words(self) -> list[Heard]:
        """An error may end the run at once; what others have published by then must still be heard, before it and in
        the order in which it was said: the row of a step that comes after a later one's is none. Until then nothing is
        done about any of it: who is told to go on would.
        """
        until_s, found = time.monotonic() + LAST_WORDS_S, list[Heard]()
        while (left_s := until_s - time.monotonic()) > 0:
            found += self.effects.poll(left_s)
        return found

    def _handle(self, event: ev.Event) -> None:
        if self._outcome is not None:
            return
        stamped = replace(event, now_s=self._clock())
        self.journal.append(dump_event(stamped))
        for command in self.machine.handle(stamped):
            self._perform(command)
        if isinstance(stamped, ev.Progress):
            self._follow_script(stamped.step)

    def _follow_script(self, step: int) -> None:
        due = [fault for fault in self._script if fault.step <= step]
        self._script = [fault for fault in self._script if fault.step > step]
        for fault in due:
            self.record.event("fault", fault.model_dump(), self.machine.generation or None)
            if isinstance(fault, Add):
                self._handle(ev.AddRequested(0.0))
            elif isinstance(fault, Drain):
                self._handle(ev.DrainRequested(0.0, fault.worker))
        if any(isinstance(fault, KillController) for fault in due):
            self._die()

    def _perform(self, command: cmd.Command) -> None:
        if isinstance(command, cmd.Announce):
            self.record.event(command.kind, command.data, self.machine.generation or None)
        elif isinstance(command, cmd.EndRun):
            facts = {"step": command.step, "digest": command.digest, "error": command.error}
            self.record.event(command.outcome, {k: v for k, v in facts.items() if v is not None}, None)
            self._outcome = Outcome(command.outcome, command.step, command.digest, command.error)
        elif isinstance(command, cmd.Form) and not self.journal.claim(command.plan.generation):
            raise Replaced(
                f"generation {command.plan.generation} of this run has been formed by another controller; this one "
                "ends and changes nothing any more"
            )
        else:
            self.effects.perform(command)

    def _show(self, *, force: bool = False) -> None:
        now_s, stands_at = self._clock(), (self.machine.phase, self.machine.generation)
        due = force or now_s - self._status_at_s >= STATUS_EVERY_S
        if due or stands_at != self._shown:
            self._shown = stands_at
            self._seen = view(self.machine)  # one assignment: who reads meanwhile has the old one or the new one
        if due:
            self._status_at_s = now_s
            self.record.status(status_fields(self._seen, self._awaited()))

    def _awaited(self) -> str | None:
        """What the data of the next step wait for; workers that have gone wait no more."""
        alive = {worker["worker"] for worker in self._seen["workers"]}
        self._awaiting = {worker: why for worker, why in self._awaiting.items() if worker in alive}
        return next((f"data: {why}" for why in self._awaiting.values()), None)


def _ends(message: Heard) -> bool:
    return isinstance(message, ev.WorkerFailed) and message.kind not in NO_END


def _in_words(error: OSError) -> str:
    """The files of a run say `ClusterError` themselves; this is what slipped past them, or was no file at all."""
    if error.errno in DISK:
        return f"ClusterError: the run directory cannot be written: {error}; free the disk under run_dir"
    return f"ClusterError: the controller cannot go on: {type(error).__name__}: {error}; then run with --resume"


def status_fields(seen: Mapping[str, Any], awaited: str | None = None) -> dict[str, Any]:
    """The machine's view in the words of `observe.Status`. `awaited`: what the data wait for, if they do."""
    return {
        "state": seen["phase"],
        "step": seen["step"],
        "steps": seen["steps"],
        "generation": seen["generation"],
        "world": seen["world"],
        "lanes": {worker["worker"]: len(worker["lanes"]) for worker in seen["workers"]},
        "held_once": seen["held_once"],
        "spares": len(seen["spares"]),
        "last_recovery": seen["last_recovery"],
        "checkpoint_given_up": seen["checkpoint_given_up"],
        "copies": seen["copies"],
        "speeds": seen["speeds"],
        "waiting": seen["reason"] or awaited,
        "error": seen["error"],
    }
