"""The virtual cluster: carries out what the machine commands, on virtual machines and in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random

from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.errors import InternalError
from elastictrain.protocol import Restore, StepSignals
from elastictrain.sim.books import Books, require
from elastictrain.sim.clock import Clock
from elastictrain.sim.crew import Band, Crew
from elastictrain.sim.nodes import Node, Nodes
from elastictrain.sim.pace import Devices, Samples, Swings
from elastictrain.sim.paced import PacedCrew
from elastictrain.sim.pilot import Letter, Pilot
from elastictrain.sim.process import Process, Stage
from elastictrain.sim.report import Tally
from elastictrain.sim.scenario import SMALL_WORLD, Scenario


class Cluster:
    """`processes`: those that live. `unreported`: dead, but the controller has not heard of it. `gone`: it has.

    What the controller must take for alive, and so has to count as a holder of state, are the first two.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.costs = scenario, scenario.costs
        self.clock = Clock()
        self.rng = Random(f"{scenario.seed}/cluster")
        self.books, self.tally = Books(), Tally()
        lanes = scenario.lanes_per_worker * scenario.workers
        self.devices, self.swings = Devices(scenario), Swings()
        self.samples = Samples(lanes) if scenario.paced and scenario.workers <= SMALL_WORLD else None
        self.nodes = Nodes(scenario.nodes, scenario.workers_per_node)
        self.processes: dict[int, Process] = {}
        self.unreported: dict[int, Process] = {}
        self.gone: set[int] = set()
        self.doomed: set[int] = set()
        self.started: set[int] = set()
        self.crew: Crew | None = None
        self.ended: cm.EndRun | None = None
        self.next_checkpoint_s = scenario.costs.checkpoint_every_s
        spec = scenario.machine_spec()
        self.machine_steps = spec.steps
        self.pilot = Pilot(spec, self.clock, self.perform, self.overhear, self.found, scenario.check_every)
        self.post(0.0, lambda now_s: [ev.Begun(now_s, Restore(0, None))])

    def post(self, delay_s: float, letter: Letter) -> None:
        """Messages to the controller, on their way for so long."""
        self.clock.after(delay_s, self.pilot.deliver, letter)

    def tell(self, delay_s: float, said: StepSignals) -> None:
        """For the straggler watch; it says how long it has waited when somebody listens."""
        begun_s = self.clock.now_s
        self.post(delay_s, lambda now_s: [replace(said, age_s=now_s - begun_s)])

    def found(self) -> list[int]:
        """The processes that a returning controller finds, and those for which a place is still being sought."""
        return [*self.processes, *(worker for worker, _ in self.nodes.waiting)]

    def believed(self) -> dict[int, Process]:
        """What the controller must take for alive; it does not listen to the doomed, but knows that they hold state."""
        living = {**self.processes, **self.unreported}
        return {number: process for number, process in living.items() if number not in self.gone}

    def speaks(self, worker: int) -> bool:
        """Whether the controller listens to it."""
        return worker not in self.gone and worker not in self.doomed

    # --- what the controller is told ---

    def overhear(self, event: ev.Event) -> None:
        """Note what the controller learns from an event that it is about to handle."""
        books, generation = self.books, self.pilot.machine.generation
        if isinstance(event, ev.Sealed):
            if event.generation == generation and self.speaks(event.worker):
                books.heard_seals.add(generation)
        elif isinstance(event, ev.WorkerParked):
            if event.generation == generation and self.speaks(event.report.worker):
                books.heard_seals.add(event.report.sealed_generation)
        elif isinstance(event, ev.WorkerDied):
            self.forget(event.worker)
        elif isinstance(event, ev.NodeLost):
            for worker in event.workers:
                self.forget(worker)
        elif isinstance(event, ev.Progress | ev.WorkerFinished | ev.CheckpointCommitted):
            if event.generation == generation:
                books.heard_seals.add(generation)
                if isinstance(event, ev.CheckpointCommitted):
                    books.stored[event.step] = event.path
        elif isinstance(event, ev.WorkerFailed) and event.kind == "restore" and event.generation == generation:
            restore = books.plans[generation].restore
            if restore is not None and self.speaks(event.worker):
                books.stored.pop(restore.step, None)

    def forget(self, worker: int) -> None:
        """The controller knows that this one is gone."""
        self.gone.add(worker)
        self.unreported.pop(worker, None)

    # --- what the controller commands ---

    def perform(self, command: cm.Command) -> None:
        """Every command takes a moment to arrive, and two of them arrive in their order."""
        delay_s = self.costs.message_s
        if isinstance(command, cm.StartWorker):
            self._start(command.worker, command.avoid)
        elif isinstance(command, cm.Form):
            if command.plan.generation not in self.books.plans:  # a new controller may command it again
                self.books.form(command.plan, self.believed())
            self.clock.after(delay_s, self._form, command)
        elif isinstance(command, cm.Park):
            self.clock.after(delay_s, self._park, command)
        elif isinstance(command, cm.AskPause):
            self.clock.after(delay_s, self._ask_pause, command)
        elif isinstance(command, cm.OfferLanes):
            if isinstance(self.crew, PacedCrew) and self.crew.generation == command.generation:
                self.crew.offer(command, self.pilot.deaths)  # elsewhere it does not matter who has which lanes
        elif isinstance(command, cm.Retire):
            self._check_retire(command.worker)
            self.clock.after(delay_s, self.end_process, command.worker)
        elif isinstance(command, cm.Kill):
            self.doomed.add(command.worker)
            self.clock.after(delay_s, self._kill, command)
        elif isinstance(command, cm.Announce):
            if command.kind in ("straggler", "lanes_moved", "straggler_leaves"):
                self.tally.note_slowness(command.kind, command.data)
            elif command.kind == "went_back":
                self.tally.went_back += 1
                self.books.went_back(command.data["to_step"], self.believed())
        elif isinstance(command, cm.EndRun):
            self.books.end(command.step, self.believed())
            self.ended = command
        else:
            raise InternalError(f"the simulator does not know the command {command}")

    def _check_retire(self, worker: int) -> None:
        truth = None if self.pilot.machine.phase.is_terminal else self.books.true_layout(self.believed())
        counts = truth is not None and worker in truth.workers
        require(not counts, f"worker {worker} is retired, but the layout sealed last counts on it")

    def _form(self, command: cm.Form) -> None:
        if self.crew is None or self.crew.generation < command.plan.generation:
            self.crew = (PacedCrew if self.scenario.paced else Crew)(self, command.plan)

    def _park(self, command: cm.Park) -> None:
        if self.crew is not None:
            self.crew.park(command.generation, command.workers)

    def _ask_pause(self, command: cm.AskPause) -> None:
        if self.crew is not None and self.crew.generation == command.generation:
            self.crew.ask_pause(command.worker, command.store)

    def _kill(self, command: cm.Kill) -> None:
        process = self.processes.get(command.worker)
        if process is None:
            self.nodes.waiting = type(self.nodes.waiting)(w for w in self.nodes.waiting if w[0] != command.worker)
        elif not process.cut:
            self.lose(process, "killed", self.costs.detect_death_s)

    # --- processes ---

    def _start(self, worker: int, avoid: tuple[str, ...]) -> None:
        if worker in self.started:
            return  # commanded again
        self.started.add(worker)
        self._place(worker, avoid)

    def _place(self, worker: int, avoid: tuple[str, ...]) -> None:
        node = self.nodes.place(worker, avoid)
        if node is None:
            self.nodes.waiting.append((worker, avoid))
            return
        process, name = Process(worker, node.number), node.name
        self.processes[worker] = process
        self.post(self.costs.message_s, lambda now_s: [ev.WorkerPlaced(now_s, worker, name)])
        self.clock.after(self.costs.start_s * self.rng.uniform(0.8, 1.2), self._ready, process, node)

    def place_waiting(self) -> None:
        """There may be room again for the workers that wait for a place."""
        waiting, self.nodes.waiting = list(self.nodes.waiting), type(self.nodes.waiting)()
        for worker, avoid in waiting:
            self._place(worker, avoid)

    def _ready(self, process: Process, node: Node) -> None:
        if self.processes.get(process.number) is not process or process.silent:
            return
        number, name = process.number, node.name
        if self.rng.random() < self.scenario.rates.start_failure:
            self.end_process(number)
            self.tally.faults["start failure"] += 1
            self.post(self.costs.message_s, lambda now_s: [ev.WorkerStartFailed(now_s, number, "no room", False, name)])
            return
        process.stage = Stage.IDLE
        self.post(self.costs.message_s, lambda now_s: [ev.WorkerReady(now_s, number, name, None, name)])

    def end_process(self, worker: int) -> None:
        """The process ends, and leaves its place."""
        process = self.processes.pop(worker, None)
        if process is not None:
            self.nodes.leave(worker, process.node)
            self.place_waiting()

    def is_member(self, process: Process) -> bool:
        crew = self.crew
        return (
            crew is not None
            and process.generation == crew.generation
            and process.stage in (Stage.FORMING, Stage.STEPPING)
        )

    def lose(self, process: Process, cause: str, notice_s: float | None) -> None:
        """The process dies. The controller hears of it after `notice_s` (None: in another way)."""
        if self.is_member(process) and self.crew is not None:
            self.crew.stall(cause)
            self.clock.after(self._around(self.costs.detect_death_s), self.crew.complain)
        self.end_process(process.number)
        if process.number not in self.gone:
            self.unreported[process.number] = process
        if notice_s is not None:
            self.clock.after(self._around(notice_s), self.report_death, process.number, cause)

    def report_death(self, worker: int, cause: str) -> None:
        self.pilot.deliver(lambda now_s: [ev.WorkerDied(now_s, worker, cause)])

    def fall_silent(self, process: Process, cause: str, *, in_apply: bool = False) -> None:
        """The process lives, but answers nobody."""
        process.silent = True
        if self.is_member(process) and self.crew is not None:
            self.crew.stall(cause, in_apply=in_apply)

    def _around(self, seconds: float) -> float:
        return seconds * self.rng.uniform(0.5, 1.5)

    def is_stepping(self) -> bool:
        return self.crew is not None and self.crew.band is Band.STEPPING

    def say(self, delay_s: float, event: Callable[[float], ev.Event]) -> None:
        """One event about the cluster itself."""
        self.post(delay_s, lambda now_s: [event(now_s)])

    def send(self, events: Callable[[float], Iterable[ev.Event]]) -> None:
        self.pilot.deliver(events)
