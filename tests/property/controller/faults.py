"""What can go wrong in the model cluster, and what detection says about it, rightly or wrongly."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Container

from elastictrain.controller import MachineSpec, Phase, Watch, dump_event, outstanding, reconcile, replay
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.machine import speaker
from elastictrain.protocol import Doubt, Restore
from tests.property.controller.cluster import FROM_THE_START, Cluster
from tests.property.controller.worker import Worker


class FaultyCluster(Cluster):
    """Every method is one fault, or one thing that detection says; it answers whether it happened."""

    def __init__(self, spec: MachineSpec, restore: Restore = FROM_THE_START) -> None:
        self.lost_nodes: set[str] = set()
        self.spoke: set[int] = set()  # fenced workers that the controller has heard from
        self.named: set[int] = set()  # said to be frozen, or to make the others hang
        self.going: dict[int, float] = {}  # workers whose machine goes, and when
        self.hangs: list[int] = []  # generations that hung
        self.poison: tuple[int, int] | None = None  # (step, lane): whoever computes it dies
        self.poison_apply: int | None = None  # applying this step fails, on all workers alike
        self.poisoned: list[int] = []
        self.flaky: Container[int] = ()  # these are troubled in every generation, before its first commit
        self.unacknowledged: deque[tuple[deque[ev.Event], ev.Event]] = deque(maxlen=3)
        self.begins_at = restore.step
        super().__init__(spec, restore)

    # -- workers

    def tear(self, number: int) -> bool:
        """An exception between vote and end of apply (R7)."""
        worker = self.workers.get(number)
        if worker is None or worker.frozen or worker.state != "stepping":
            return False
        worker.state, worker.frozen = "torn", True
        worker.outbox.append(ev.WorkerFailed(self.now_s, worker.generation, number, "torn", "out of memory"))
        return True

    def freeze(self, number: int) -> bool:
        """The process stops; its peers notice only by their own timeouts."""
        worker = self.workers.get(number)
        if worker is None or worker.frozen or worker.state not in ("forming", "stepping"):
            return False
        worker.frozen = True
        return True

    def dispute(self, number: int) -> bool:
        """Copies differ, and there is no third computation: whoever has come to this verdict says so when it parks."""
        jury = self.jury(number)
        if jury:
            good = max(0, jury[0].applied - 1)
            doubt = Doubt(good, "copies differ", tuple(sorted({number, jury[0].number})))
            for juror in jury:
                self.interrupt(juror, doubt)
        return bool(jury)

    def convict(self, number: int) -> bool:
        """Sums name `number`, and all who have come to the verdict say so of it; nothing else is spoilt."""
        return self.find_corrupt(number, None)

    def miscompute(self, number: int) -> bool:
        """As `convict`, and what it has done in the last steps is not to be trusted."""
        worker = self.workers.get(number)
        return self.find_corrupt(number, Doubt(max(0, worker.applied - 3), "wrong lanes") if worker else None)

    def find_corrupt(self, number: int, doubt: Doubt | None) -> bool:
        jury = self.jury(number)
        for juror in jury:
            failed = ev.WorkerFailed(self.now_s, juror.generation, number, "corrupt", "its sums differ", doubt)
            juror.outbox.append(failed)
            if juror.number == number:
                juror.state, juror.frozen = "torn", True
            else:
                self.interrupt(juror, doubt)
        return bool(jury)

    def jury(self, number: int) -> list[Worker]:
        """Whoever of the members of a complete vote has come to its verdict; the others are only interrupted by it."""
        worker = self.workers.get(number)
        if worker is None or worker.plan is None or worker.state != "stepping":
            return []
        members = [self.workers.get(w) for w in worker.plan.layout.workers]
        together = [m for m in members if m is not None and m.state == "stepping" and not (m.frozen or m.cut)]
        same = {(m.generation, m.applied) for m in together}
        if len(together) < len(members) or same != {(worker.generation, worker.applied)}:
            return []
        return [m for m in together if m is worker or (m.number + worker.applied) % 3]

    def interrupt(self, worker: Worker, doubt: Doubt | None) -> None:
        worker.state, worker.doubt = "troubled", doubt
        worker.outbox.append(ev.WorkerTroubled(self.now_s, worker.generation, worker.number, "sums differ"))

    def fail_restore(self, number: int) -> bool:
        """The checkpoint of the plan turns out to be corrupt."""
        worker = self.workers.get(number)
        if worker is None or worker.frozen or worker.state != "forming" or worker.plan is None:
            return False
        restore = worker.plan.restore
        if restore is None or restore.checkpoint is None or self.votes[worker.generation, "seal"]:
            return False
        worker.state = "troubled"
        worker.outbox.append(ev.WorkerFailed(self.now_s, worker.generation, number, "restore", "hash differs"))
        return True

    def fail_start(self, number: int) -> bool:
        worker = self.workers.get(number)
        if worker is None or worker.state != "starting":
            return False
        del self.workers[number]
        self.notices.append(ev.WorkerStartFailed(self.now_s, number, "no room", False))
        return True

    # -- a job that cannot go on

    def act(self, number: int, *, unlucky: bool = False) -> bool:
        worker = self.workers.get(number)
        if worker is not None and self.poison is not None and worker.state == "stepping" and not worker.frozen:
            step, lane = self.poison
            assert worker.plan is not None
            if worker.applied + 1 == step and lane in worker.plan.layout.lanes_of(number):
                self.poisoned.append(number)
                return self.kill(number, lose_messages=False)
        if worker is not None and number in self.flaky and worker.state == "stepping" and not worker.frozen:
            assert worker.plan is not None
            if worker.applied == worker.plan.step and (worker.generation, self.topic(worker)) not in self.voted(number):
                worker.state = "troubled"
                worker.outbox.append(ev.WorkerTroubled(self.now_s, worker.generation, number, "connection reset"))
                return True
        return super().act(number, unlucky=unlucky)

    def voted(self, number: int) -> set[tuple[int, str]]:
        return {key for key, voters in self.votes.items() if number in voters}

    def apply(self, worker: Worker) -> None:
        if self.poison_apply == worker.applied + 1:
            worker.state, worker.frozen = "torn", True
            self.poisoned.append(worker.number)
            text = f"Traceback ...\nRuntimeError: no memory for {worker.number}00 bytes at 0x{worker.number:x}f"
            worker.outbox.append(ev.WorkerFailed(self.now_s, worker.generation, worker.number, "torn", text))
        else:
            super().apply(worker)

    # -- detection

    def name_frozen(self, number: int) -> bool:
        """Somebody takes it for frozen; it may be well."""
        if self.down:
            return False
        truth, known = self.true_layout(), self.machine.core.ledger.truth
        live = set(self.believed()) - self.doomed
        first = number not in self.named and number in self.machine.core.ledger.members()
        alone = truth is not None and any(set(shard.holders()) & live == {number} for shard in truth.shards)
        steps = self.machine.phase in (Phase.FORMING, Phase.RUNNING, Phase.PARKING)
        commands = self.send(ev.WorkerFrozen(self.now_s, number, "no step for 3 s", ("step 2.9 s ago",)))
        if first and alone and truth == known and steps:
            assert cm.Kill not in map(type, commands), f"{number} alone holds a block, and was given no chance"
        if any(isinstance(c, cm.Announce) and c.kind == "frozen" for c in commands):
            self.named.add(number)
        return True

    def hang(self, number: int) -> bool:
        """All wait for each other, says the watch, and suspects `number`."""
        if self.down or self.machine.phase not in (Phase.FORMING, Phase.RUNNING):
            return False
        self.hangs.append(self.machine.generation)
        self.named.add(number)
        self.send(ev.GenerationHung(self.now_s, self.machine.generation, "all wait", number))
        return True

    def cut(self, number: int) -> bool:
        """Its node can be reached no more, in neither direction."""
        if number not in self.workers:
            return False
        node = self.workers[number].node
        for worker in self.workers.values():
            worker.cut |= worker.node == node
        return True

    def lose_node(self, number: int) -> bool:
        """A node that is cut off is said to be lost."""
        node = self.workers[number].node if number in self.workers else ""
        if self.down or node not in {worker.node for worker in self.workers.values() if worker.cut}:
            return False
        there = {n for n, w in {**self.workers, **self.unnoticed}.items() if w.node == node}
        known = there & set(self.machine.core.ledger.workers)
        self.fenced |= known
        self.send(ev.NodeLost(self.now_s, node, "no beat for 2 s", tuple(sorted(known))))
        self.lost_nodes.add(node)
        return True

    def heal(self, number: int) -> bool:
        """A node that was lost comes back. Workers of it that the controller has not lost start to be heard."""
        node = self.workers[number].node if number in self.workers else ""
        if node not in self.lost_nodes:
            return False
        self.lost_nodes.discard(node)
        for worker in self.workers.values():
            if worker.node == node:
                worker.cut = False
        return True

    def preempt(self, number: int, notice_s: float = 20.0) -> bool:
        """Its machine goes at a stated time."""
        if self.down or number not in self.workers or number in self.going:
            return False
        self.going[number] = self.now_s + notice_s
        commands = self.send(ev.PreemptionNotice(self.now_s, self.now_s + notice_s, number))
        assert not any(isinstance(c, cm.Announce) and c.kind == "refused" for c in commands)
        return True

    def tick(self, by_s: float) -> None:
        for number in [n for n, at_s in self.going.items() if at_s <= self.now_s + by_s]:
            self.kill(number, lose_messages=False)
        super().tick(by_s)

    def decided(self, command: cm.Command) -> None:
        super().decided(command)
        if isinstance(command, cm.Kill) and "second hang" in command.reason and command.worker in self.workers:
            *_, before, last = self.hangs
            reached = max(w.applied for w in self.believed().values() if w.generation == last)
            assert reached <= self.plans[before + 1].step, "a step was committed between the two hangs"

    # -- the controller

    def deliver(self, choice: int) -> bool:
        before = len(self.log)
        queues = {id(worker.outbox): worker.outbox for worker in self.workers.values()}
        heads = {key: queue[0] for key, queue in queues.items() if queue}
        done = super().deliver(choice)
        if done and len(self.log) > before:
            event = self.log[-1] if self.performs is None else self.log[before]
            if speaker(event) in self.fenced:
                self.spoke.add(speaker(event) or 0)
            for key, head in heads.items():
                if head is event:
                    self.unacknowledged.append((queues[key], event))
        return done

    def lose_controller(self, after: int) -> bool:
        """It dies when it has performed `after` more commands: between journal and effect, if there are more."""
        if self.down or self.ended is not None:
            return False
        self.performs = after
        return True

    def bring_back(self, gone_s: float) -> bool:
        """A new controller: the journal again, the workers that are there, what was decided, what was not confirmed."""
        if not self.down:
            return False
        old, deadline_s = self.machine, self.machine.next_deadline_s()
        was_s, self.now_s = self.now_s, self.now_s + gone_s
        self.machine = replay(self.spec, [dump_event(event) for event in self.log])
        assert self.machine == old
        started, self.watch = self.watch.started, Watch(self.machine)
        self.watch.started = started
        self.down, self.performs = False, None
        while self.unacknowledged:  # each worker tells again what was not acknowledged, in its order, perhaps twice
            outbox, event = self.unacknowledged.pop()
            outbox.extendleft([event, event] if event.now_s % 2 < 1 else [event])
        strangers, gone = reconcile(self.machine, set(self.workers) - self.fenced, self.now_s)
        waiting = {e.worker for e in self.notices if isinstance(e, ev.WorkerDied)}
        assert all(e.worker in waiting | self.lost_starts() for e in gone), (gone, waiting)
        for command in [*strangers, *outstanding(self.machine)]:
            self.perform(command)
        commands = self.send(ev.ControllerBack(self.now_s, gone_s))
        if deadline_s is not None and deadline_s > was_s:
            commands = commands + self.send(ev.Tick(self.now_s))
        killed = [c for c in commands if isinstance(c, cm.Kill) and ("in time" in c.reason or "grace" in c.reason)]
        assert not killed, f"{killed}: for not having answered while nobody listened"
        return True

    def lost_starts(self) -> set[int]:
        """Workers that failed to start, and of which the controller has not heard yet."""
        return {e.worker for e in self.notices if isinstance(e, ev.WorkerStartFailed)}

    def attend(self) -> bool:
        if self.down:
            return self.bring_back(1.0)
        cut = [worker.number for worker in self.workers.values() if worker.cut]
        if cut:
            return self.lose_node(cut[0]) and self.heal(cut[0])
        return super().attend()

    def check_end(self) -> None:
        super().check_end()
        assert not self.spoke & set(self.workers), "a fenced worker has spoken, and lives"
        if self.poison is not None or self.poison_apply is not None:
            assert self.ended is not None
            step = self.poison_apply or (self.poison[0] if self.poison else 0)
            assert self.ended.outcome != "finished" or not self.begins_at < step <= self.spec.steps


def random_harm(cluster: FaultyCluster, rng: random.Random, kind: str, number: int) -> None:
    """One fault of `kind`, aimed at worker `number`."""
    if kind == "kill":
        cluster.kill(number, lose_messages=rng.random() < 0.5)
    elif kind == "lose_controller":
        cluster.lose_controller(rng.randrange(4))
    elif kind == "preempt":
        cluster.preempt(number, rng.choice([0.0, 1.0, 20.0, 120.0]))
    else:
        getattr(cluster, kind)(number)
