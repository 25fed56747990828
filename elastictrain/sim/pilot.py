"""The controller's shell in the simulation: hands events to the real machine, wakes it at its deadlines, dies, and
comes back from the journal.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from elastictrain.controller import Machine, MachineSpec, Watch, dump_event, read_events
from elastictrain.controller import events as ev
from elastictrain.controller.adoption import outstanding, reconcile
from elastictrain.controller.commands import Announce, Command
from elastictrain.controller.slowness import Slowness
from elastictrain.protocol import StepSignals
from elastictrain.sim.books import require
from elastictrain.sim.clock import Clock

Letter = Callable[[float], Iterable[ev.Event | StepSignals]]
"""Messages on their way: the events as they are observed when they arrive, given the time of that."""

WHOLE_JOURNAL_WORLD = 64
"""Up to this many workers the journal is kept from the first event; in larger worlds the last minutes of it."""
TAIL_S = 300.0
TEXT_LINES = 20_000
"""Up to this many lines a journal goes through its text form; longer ones are replayed from memory."""


def _later(events: Sequence[ev.Event | StepSignals], _: float) -> Sequence[ev.Event | StepSignals]:
    return events


class Pilot:
    """`perform`: carries out a command. `overhear`: is shown every event before the machine is.
    `alive`: the processes that a returning controller finds.
    """

    def __init__(
        self,
        spec: MachineSpec,
        clock: Clock,
        perform: Callable[[Command], None],
        overhear: Callable[[ev.Event], None],
        alive: Callable[[], Iterable[int]],
        check_every: int,
    ) -> None:
        self.spec, self.clock, self.perform, self.overhear, self.alive = spec, clock, perform, overhear, alive
        self.machine = Machine(spec)
        self.check_every = check_every
        self.watch = Watch(self.machine)
        self.events = self.checks = self.deaths = self.replayed = 0
        self.is_down = False
        self.down_since_s = 0.0
        self.waiting: deque[Letter] = deque()
        self.base: Machine | None = None
        self.journal: list[ev.Event] | None = None
        self.wakes_s: float | None = None
        self.is_dying = False
        self.unsaid: list[Command] | None = None
        self.newest_step = 0
        self.slowness = self._new_watch()
        if spec.initial_workers <= WHOLE_JOURNAL_WORLD:
            self.keep_journal()

    def deliver(self, letter: Letter) -> None:
        """Messages have arrived; while the controller is dead they wait."""
        if self.is_down:
            self.waiting.append(letter)
            return
        events = list(letter(self.clock.now_s))
        for at, said in enumerate(events, start=1):
            event = self._hear(said) if isinstance(said, StepSignals) else said
            if event is not None and not self.handle(event):  # it died over this one
                self.waiting.append(partial(_later, events[at:]))
                return
        self._set_alarm()

    def _new_watch(self) -> Slowness | None:
        """A new controller begins to learn anew."""
        return None if self.spec.stragglers is None else Slowness(self.machine, self.spec.stragglers)

    def _hear(self, said: StepSignals) -> ev.Event | None:
        """What the straggler watch makes of it: it is not written down, what follows from it is."""
        if self.slowness is None:
            return None
        told, event = self.slowness.hear(said, self.newest_step)
        self._perform(told)
        return None if event is None else replace(event, now_s=self.clock.now_s)

    def handle(self, event: ev.Event) -> bool:
        """Write the event down, let the machine handle it and do what it commands. False: died before doing it."""
        if self.machine.phase.is_terminal:
            return True
        self.events += 1
        if self.journal is not None:
            self.journal.append(event)
        self.overhear(event)
        checked = self.check_every and self.events % self.check_every == 0
        if checked:
            self.watch.before()
        commands = self.machine.handle(event)
        if checked:
            self.checks += 1
            self.watch.after(commands)
        if self.is_dying:
            self.unsaid, self.is_dying, self.is_down = commands, False, True
            return False
        self._perform(commands)
        return True

    def _perform(self, commands: Sequence[Command]) -> None:
        """Announcements first: they say what the others mean."""
        for command in commands:
            if isinstance(command, Announce):
                self.perform(command)
        for command in commands:
            if not isinstance(command, Announce):
                self.perform(command)

    def _set_alarm(self) -> None:
        wakes_s = self.machine.next_deadline_s()
        if wakes_s is not None and wakes_s != self.wakes_s:
            self.clock.at(wakes_s, self._wake, wakes_s)
        self.wakes_s = wakes_s

    def _wake(self, wakes_s: float) -> None:
        if wakes_s == self.wakes_s and not self.is_down:
            self.wakes_s = None
            self.deliver(lambda now_s: [ev.Tick(now_s)])

    # --- death and return ---

    def keep_journal(self) -> None:
        """From now on the journal is kept, on top of a copy of the machine as it is."""
        if self.journal is None and not self.is_down:
            self.base, self.journal = self._copy(), []

    def _copy(self) -> Machine:
        """A deep copy, except of what is frozen."""
        ledger = self.machine.core.ledger
        frozen = [self.spec, ledger.plan, *ledger.layouts.values()]
        return copy.deepcopy(self.machine, {id(part): part for part in frozen if part is not None})

    def die(self, *, over_an_event: bool) -> None:
        """Now, or when the next event has been written down and handled, but nothing of it has been done."""
        if not self.is_down and not self.machine.phase.is_terminal:
            self.is_dying, self.is_down, self.down_since_s = over_an_event, not over_an_event, self.clock.now_s

    def come_back(self) -> None:
        """A new controller replays the journal, is compared with the one that died, does again what may not have been
        done, and hears what waited.
        """
        if not self.is_down and not self.is_dying:
            return
        self.deaths += 1
        self.is_down = self.is_dying = False
        if self.journal is not None and self.base is not None:
            events = self.journal
            if len(events) <= TEXT_LINES:
                events = read_events([dump_event(event) for event in events])
            machine, commands = self.base, list[Command]()
            for event in events:
                commands = machine.handle(event)
            require(self.unsaid is None or self.unsaid == commands, f"replay commands {commands}, not {self.unsaid}")
            self.replayed += len(events)
            require(machine == self.machine, "the machine that replayed the journal is not equal to the one that died")
            self.machine = self.watch.machine = machine
            self.base, self.journal = None, None
            if self.spec.initial_workers <= WHOLE_JOURNAL_WORLD:
                self.keep_journal()
        self.wakes_s = None
        self.slowness = self._new_watch()
        letters = [partial(_later, list(letter(self.clock.now_s))) for letter in self.waiting]
        waited = [said for letter in letters for said in letter(0.0)]
        self.newest_step = max((said.step for said in waited if isinstance(said, StepSignals | ev.Progress)), default=0)
        self.waiting = deque()
        self._perform([command for command in self.unsaid or () if isinstance(command, Announce)])
        self.unsaid = None
        self._adopt()
        for letter in letters:
            self.deliver(letter)
        self._set_alarm()

    def _adopt(self) -> None:
        """What the state implies is commanded again, and who has died meanwhile is found out."""
        now_s = self.clock.now_s
        strangers, gone = reconcile(self.machine, self.alive(), now_s)
        self._perform([*outstanding(self.machine), *strangers])
        for event in (ev.ControllerBack(now_s, now_s - self.down_since_s), *gone):
            self.handle(event)
