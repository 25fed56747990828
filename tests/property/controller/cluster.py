"""A model of a cluster, independent of the controller: workers with engine-like behaviour, and the truth about them.

Every worker keeps for each block the step that its copy is at. Votes are sent one by one; a complete vote may or may
not reach a survivor when a voter dies; messages of a worker arrive in order, those of different workers in any order
and at any time. The model knows what really happened and checks every `Form` against it.
"""

from __future__ import annotations

import copy
from collections import defaultdict, deque

from elastictrain.controller import Machine, MachineSpec, Phase, Watch, dump_event, replay
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.machine import speaker
from elastictrain.layout import Layout
from elastictrain.protocol import FormPlan, ParkReport, Restore
from tests.property.controller.demands import check_form, check_stop
from tests.property.controller.doubts import Doubts
from tests.property.controller.worker import Worker, vote_bytes, waits_for_shares

FROM_THE_START = Restore(0, None)


class Cluster:
    """Drives a machine. Every public method is one thing that can happen; it answers whether it did."""

    def __init__(self, spec: MachineSpec, restore: Restore = FROM_THE_START) -> None:
        self.spec = spec
        self.machine = Machine(spec)
        self.watch = Watch(self.machine)
        self.log: list[ev.Event] = []
        self.past: list[ev.Event] = []
        self.now_s = 0.0
        self.workers: dict[int, Worker] = {}  # live processes
        self.unnoticed: dict[int, Worker] = {}  # dead, but the controller has not been told
        self.doomed: set[int] = set()  # killed by the controller: it does not listen to them any more
        self.notices: deque[ev.Event] = deque()
        self.votes: dict[tuple[int, str], set[int]] = defaultdict(set)
        self.pausing: set[tuple[int, str]] = set()
        self.storing: set[tuple[int, str]] = set()  # pauses at which the state is stored
        self.plans: dict[int, FormPlan] = {}
        self.seal_known: set[int] = {0}  # generations whose `Sealed` the controller has got
        self.voided: set[int] = set()
        self.checkpoints: dict[int, str] = {} if restore.checkpoint is None else {restore.step: restore.checkpoint}
        self.went_back_to: list[int] = []
        self.doubts = Doubts()
        self.ended: cm.EndRun | None = None
        self.started: set[int] = set()
        self.fenced: set[int] = set()  # workers of lost nodes: the controller takes them for gone
        self.down = False  # nobody listens: the controller is dead
        self.performs: int | None = None  # so many commands more will it perform before it dies
        self.not_performed: list[cm.Command] = []
        self.send(ev.Begun(0.0, restore))

    def send(self, event: ev.Event) -> list[cm.Command]:
        """The journal takes it, the machine decides, and what it decides is done, unless the controller dies first."""
        if self.down:
            return []
        self.log.append(event)
        if isinstance(event, ev.Sealed) and event.worker not in self.doomed | self.fenced:
            self.seal_known.add(event.generation)
        elif isinstance(event, ev.WorkerParked) and event.generation == self.machine.generation:
            if event.report.worker not in self.doomed | self.fenced:
                self.seal_known.add(event.report.sealed_generation)
        elif isinstance(event, ev.Progress) and event.generation == self.machine.generation:
            if self.machine.phase is not Phase.GATHERING and event.step > self.machine.core.ledger.shown_step:
                self.seal_known.add(event.generation)  # whoever says so: a vote of all members was complete
        elif isinstance(event, ev.WorkerDied):
            self.unnoticed.pop(event.worker, None)
        self.doubts.hear(event, self.machine.generation, self.machine.phase, set(self.believed()) - self.doomed)
        self.watch.before(event)
        commands = self.machine.handle(event)
        self.watch.after(commands)
        for command in commands:
            self.decided(command)
        for command in commands:
            if self.performs == 0:
                self.down, self.performs = True, None
            if self.down:
                self.not_performed.append(command)
                continue
            self.perform(command)
            if self.performs is not None and not isinstance(command, cm.Announce):
                self.performs -= 1
        return commands

    def decided(self, command: cm.Command) -> None:
        """The journal knows: whether it is performed or not, it counts."""
        if isinstance(command, cm.Form):
            check_form(self, command.plan)
            self.plans[command.plan.generation] = command.plan
        elif isinstance(command, cm.Kill):
            self.doomed.add(command.worker)
        elif isinstance(command, cm.Announce) and command.kind == "went_back":
            assert self.is_lost() or self.doubts.open, f"{command}: every block has a live holder, and nobody doubts"
            self.checkpoints = self.doubts.settled(self.checkpoints)
            assert command.data["to_step"] == max(self.checkpoints, default=0)
            self.went_back_to.append(command.data["to_step"])
            self.voided |= set(self.plans)

    def perform(self, command: cm.Command) -> None:
        """Idempotent, as effects must be."""
        if isinstance(command, cm.StartWorker):
            if command.worker not in self.started:
                self.started.add(command.worker)
                self.workers[command.worker] = Worker(command.worker)
        elif isinstance(command, cm.Form):
            for number in command.plan.layout.workers:
                self.enter(self.workers.get(number), command.plan)
        elif isinstance(command, cm.Park):
            for number in command.workers:
                self.park(self.workers.get(number), command.generation)
        elif isinstance(command, cm.AskPause):
            worker = self.workers.get(command.worker)
            if worker is not None and worker.generation == command.generation and not worker.cut:
                worker.pause, worker.store = True, command.store
        elif isinstance(command, cm.Retire):
            if command.worker in self.workers and not self.workers[command.worker].cut:
                del self.workers[command.worker]
        elif isinstance(command, cm.Kill):
            if command.worker in self.workers and not self.workers[command.worker].cut:
                self.kill(command.worker, lose_messages=True)
        elif isinstance(command, cm.EndRun):
            assert self.ended in (None, command), "the run ended twice"
            if command.outcome == "stopped":
                check_stop(self, command)
            self.ended = command

    def believed(self) -> dict[int, Worker]:
        """The workers that the controller must take for alive."""
        there = {**self.workers, **self.unnoticed}
        return {number: worker for number, worker in there.items() if number not in self.fenced}

    def true_layout(self) -> Layout | None:
        """The layout that counts: sealed, and known to be so by a survivor or by the controller."""
        seen = {w.sealed for w in self.believed().values() if w.number not in self.doomed} | self.seal_known
        newest = max(seen - self.voided)
        return None if newest == 0 else self.plans[newest].layout

    def is_lost(self) -> bool:
        """Whether a block of the true layout has no live holder."""
        truth = self.true_layout()
        return truth is not None and any(not set(shard.holders()) & set(self.believed()) for shard in truth.shards)

    # -- the workers' side

    def enter(self, worker: Worker | None, plan: FormPlan) -> None:
        if worker is None or worker.cut or max(worker.parked_at, worker.generation) >= plan.generation:
            return
        worker.plan, worker.state, worker.pause, worker.store, worker.doubt = plan, "forming", False, False, None

    def park(self, worker: Worker | None, generation: int) -> None:
        if worker is None or worker.frozen or worker.cut or worker.generation > generation:
            return
        worker.state, worker.parked_at, vote = "parked", generation, worker.vote
        facts = (worker.number, worker.generation, worker.applied, worker.sealed, worker.gathered, vote)
        report = ParkReport(*facts, doubt=worker.doubt)
        event = ev.WorkerParked(self.now_s, generation, report)
        if generation % 2:  # the answer to a call may overtake what waits to be polled
            worker.outbox.appendleft(event)
        else:
            worker.outbox.append(event)

    def kill(self, number: int, *, lose_messages: bool) -> bool:
        worker = self.workers.pop(number, None)
        if worker is None:
            return False
        self.unnoticed[number] = worker
        if not lose_messages:
            self.notices.extend(worker.outbox)
        self.notices.append(ev.WorkerDied(self.now_s, number, "killed"))
        return True

    def act(self, number: int, *, unlucky: bool = False) -> bool:
        """One engine step of one worker. `unlucky`: if a peer is gone, notice that rather than its last vote."""
        worker = self.workers.get(number)
        if worker is None or worker.frozen:
            return False
        if worker.state == "starting":
            worker.state = "waiting"
            worker.outbox.append(ev.WorkerPlaced(self.now_s, number, worker.node))
            worker.outbox.append(ev.WorkerReady(self.now_s, number, worker.node, node=worker.node))
            return True
        if worker.state not in ("forming", "voted", "stepping"):
            return False
        assert worker.plan is not None
        topic = "seal" if worker.state != "stepping" else self.topic(worker)
        key = (worker.generation, topic)
        if number not in self.votes[key]:
            if worker.cut:
                return self.lose_peer(worker)
            if worker.state == "forming" and not self.prepare(worker):
                return self.lose_peer(worker)
            self.votes[key].add(number)
            worker.gathered = True
            if worker.pause and topic.startswith("step"):
                self.pausing.add(key)
                self.storing |= {key} if worker.store else set()
            return True
        complete = self.votes[key] >= set(worker.plan.layout.workers)
        if complete and key in self.storing and waits_for_shares(worker, self.workers):
            return False
        if not complete or (unlucky and self.peer_gone(worker)):
            return self.lose_peer(worker)
        self.take(worker, topic, key, gathered=not unlucky)
        return True

    def topic(self, worker: Worker) -> str:
        return "closing" if worker.applied >= self.spec.steps else f"step {worker.applied + 1}"

    def prepare(self, worker: Worker) -> bool:
        """Roll forward, receive what the plan says, check that all is there. False: a source is not there yet."""
        plan = worker.plan
        assert plan is not None
        held = plan.layout.held(worker.number)
        if plan.restore is not None:
            worker.applied, worker.vote, worker.sealed, worker.copies = (
                plan.step,
                None,
                0,
                dict.fromkeys(held, plan.step),
            )
            return True
        self.roll(worker, plan)
        for move in plan.moves:
            if move.target != worker.number:
                continue
            source = self.workers.get(move.source)
            if (
                source is None
                or source.frozen
                or source.cut
                or source.generation != plan.generation
                or source.state == "parked"
            ):
                return False
            self.roll(source, plan)
            for block in range(move.lo, move.hi):
                assert source.copies.get(block) == plan.step, f"{source} cannot give block {block} of step {plan.step}"
                worker.copies[block] = plan.step
        if worker.number in plan.joiners:
            worker.applied = plan.step
        assert worker.applied == plan.step, f"{worker} enters {plan} at the wrong step"
        missing = [block for block in held if worker.copies.get(block) != plan.step]
        assert not missing, f"{worker} should hold blocks {missing} at step {plan.step}"
        assert worker.gathered or worker.number in plan.gather_to, f"{worker} would compute with old parameters"
        return True

    def roll(self, worker: Worker, plan: FormPlan) -> None:
        if worker.number not in plan.joiners and worker.applied == plan.step - 1:
            assert plan.roll_forward == vote_bytes(plan.step), f"{worker} needs the vote of {plan.step}"
            self.apply(worker)
            worker.gathered = False

    def apply(self, worker: Worker) -> None:
        worker.applied += 1
        worker.vote = vote_bytes(worker.applied)
        worker.copies = {block: step + 1 for block, step in worker.copies.items() if step == worker.applied - 1}

    def take(self, worker: Worker, topic: str, key: tuple[int, str], gathered: bool) -> None:
        """The vote is complete here."""
        plan = worker.plan
        assert plan is not None
        if topic == "seal":
            worker.state, worker.sealed, worker.vote, worker.gathered = "stepping", plan.generation, None, True
            worker.outbox.append(ev.Sealed(self.now_s, plan.generation, worker.number, plan.step))
            if worker.number == plan.layout.workers[0] and plan.generation % 3 == 0:
                instead = None if plan.restore else plan.step
                facts = (worker.number, plan.step + 1, plan.generation - 1, plan.generation % 2 == 0, instead)
                worker.outbox.append(ev.CheckpointGivenUp(self.now_s, plan.generation, *facts))
            if worker.number == plan.layout.workers[0]:
                facts = (worker.number, "far", plan.step, (plan.step + 1,), "it is full" if plan.generation % 2 else "")
                worker.outbox.append(ev.CopiesStand(self.now_s, plan.generation, *facts))
        elif topic == "closing":
            worker.state = "finished"
            facts = (worker.number, worker.applied, f"digest of {worker.applied}")
            worker.outbox.append(ev.WorkerFinished(self.now_s, plan.generation, *facts))
        else:
            if worker.applied > 0:
                worker.outbox.append(ev.Progress(self.now_s, plan.generation, worker.applied))
            if worker.applied and worker.applied % 4 == 0:
                self.commit_checkpoint(worker)
            held = plan.layout.held(worker.number)
            worker.copies = {block: step for block, step in worker.copies.items() if block in held}
            self.apply(worker)
            worker.gathered = gathered
            if key in self.pausing:
                if key in self.storing:
                    self.commit_checkpoint(worker)
                self.park(worker, plan.generation)

    def commit_checkpoint(self, worker: Worker) -> None:
        """What the first member says; the others have written their shares."""
        assert worker.plan is not None
        if worker.number == worker.plan.layout.workers[0]:
            path = f"checkpoint {worker.applied}"
            worker.outbox.append(ev.CheckpointCommitted(self.now_s, worker.generation, worker.applied, path))

    def peer_gone(self, worker: Worker) -> bool:
        assert worker.plan is not None
        gone = ("parked", "troubled", "torn")
        peers = map(self.workers.get, worker.plan.layout.workers)
        return worker.cut or any(
            p is None or p.generation != worker.generation or p.state in gone or p.frozen or p.cut for p in peers
        )

    def lose_peer(self, worker: Worker) -> bool:
        if not self.peer_gone(worker):
            return False
        worker.state = "troubled"
        worker.outbox.append(ev.WorkerTroubled(self.now_s, worker.generation, worker.number, "peer lost"))
        return True

    # -- messages and time

    def deliver(self, choice: int) -> bool:
        """Hand over the oldest message of one sender."""
        if self.down:
            return False
        queues = [worker.outbox for worker in self.workers.values() if worker.outbox and not worker.cut]
        if self.notices:
            queues.append(self.notices)
        if not queues:
            return False
        event = queues[choice % len(queues)].popleft()
        newest = getattr(event, "generation", None) == self.machine.generation
        if isinstance(event, ev.CheckpointCommitted) and newest and event.generation not in self.voided:
            self.checkpoints[event.step] = event.path
        if (
            isinstance(event, ev.WorkerFailed)
            and event.kind == "restore"
            and newest
            and event.worker in self.believed()
        ):
            plan = self.plans[event.generation]
            assert plan.restore is not None
            self.checkpoints.pop(plan.restore.step, None)
        self.past.append(event)
        self.send(event)
        return True

    def tick(self, by_s: float) -> None:
        """The clock goes on; somebody looks at it if the controller lives."""
        self.now_s += by_s
        self.send(ev.Tick(self.now_s))

    def send_stale(self, choice: int) -> bool:
        """Repeat a message of another generation: it must change nothing at all."""
        if self.down:
            return False
        old = [
            event
            for event in self.past
            if not isinstance(event, ev.WorkerDied | ev.WorkerPlaced | ev.WorkerReady)
            and getattr(event, "generation", None) != self.machine.generation
        ]
        if not old:
            return False
        before = copy.deepcopy(self.machine)
        stale = old[choice % len(old)]
        answer = self.machine.handle(stale)
        assert answer == [] or (speaker(stale) in self.fenced and isinstance(answer[0], cm.Kill)), (
            f"{stale} was answered"
        )
        assert self.machine == before, f"{stale} changed the state"
        return True

    def calm(self, rounds: int = 600) -> None:
        """No more faults: with fair scheduling the run must end."""
        for number in range(rounds):
            if self.ended is not None:
                return
            busy = False
            for worker in list(self.workers):
                busy |= self.act(worker)
            while self.deliver(number):
                busy = True
            if not busy and not self.attend():
                deadline = self.machine.next_deadline_s()
                if deadline is None and self.ended is None:
                    self.send(ev.AddRequested(self.now_s))  # replace is off, and too few are left
                elif deadline is not None:
                    self.tick(max(0.0, deadline - self.now_s))
        assert self.ended is not None, f"no end after {rounds} quiet rounds: {self.machine.core}"

    def attend(self) -> bool:
        """What the agents of the nodes do when nothing else happens."""
        frozen = [worker.number for worker in self.workers.values() if worker.frozen]
        return bool(frozen) and self.machine.phase is Phase.RUNNING and self.kill(frozen[0], lose_messages=False)

    def check_end(self) -> None:
        """What holds of every ended run."""
        assert self.ended is not None
        assert "InternalError" not in (self.ended.error or ""), self.ended.error
        if self.ended.outcome == "finished":
            assert self.ended.step == self.spec.steps
            assert self.ended.digest == f"digest of {self.spec.steps}"
        assert replay(self.spec, [dump_event(event) for event in self.log]) == self.machine
