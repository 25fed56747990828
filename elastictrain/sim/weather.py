"""Seeded faults. Each kind strikes at exponential intervals with a random stream of its own, so that one kind more or
less does not move the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from elastictrain.controller import events as ev
from elastictrain.protocol import ParkReport
from elastictrain.sim.cluster import Cluster
from elastictrain.sim.nodes import Node
from elastictrain.sim.pilot import TAIL_S
from elastictrain.sim.process import Process, Stage


def _stale(report: ParkReport, now_s: float) -> list[ev.Event]:
    """What a worker still had to say when it was cut off."""
    generation, worker = report.generation, report.worker
    troubled = ev.WorkerTroubled(now_s, generation, worker, "peer lost")
    return [troubled, ev.WorkerParked(now_s, generation, report), ev.Sealed(now_s, generation, worker, 0)]


class Weather:
    """Strikes `cluster` until `until_s`."""

    def __init__(self, cluster: Cluster, until_s: float) -> None:
        self.cluster, self.until_s = cluster, until_s
        self.scenario, self.costs, self.clock = cluster.scenario, cluster.costs, cluster.clock
        rates, workers = self.scenario.rates, self.scenario.workers
        nodes = -(-workers // self.scenario.workers_per_node)
        self._begin("worker death", rates.worker_death_h, workers, self._kill)
        self._begin("worker freeze", rates.worker_freeze_h, workers, self._freeze)
        self._begin("torn apply", rates.torn_apply_h, workers, self._tear)
        self._begin("node loss", rates.node_loss_h, nodes, self._lose_node)
        self._begin("preemption", rates.node_notice_h, nodes, self._announce)
        self._begin("partition", rates.node_partition_h, nodes, self._cut)
        self._begin("slow-down", rates.slow_down_h, workers, self._slow_down)
        self._begin("controller death", rates.controller_death_h, 1, self._kill_controller, TAIL_S)

    def _begin(
        self, kind: str, mean_h: float | None, units: int, strike: Callable[[str, Random], bool], lead_s: float = 0.0
    ) -> None:
        if mean_h is not None:
            self._next(kind, units / (mean_h * 3600.0), strike, lead_s, Random(f"{self.scenario.seed}/{kind}"))

    def _next(self, kind: str, per_s: float, strike: Callable[[str, Random], bool], lead_s: float, rng: Random) -> None:
        when_s = self.clock.now_s + rng.expovariate(per_s)
        if when_s >= self.until_s:
            return

        def happen() -> None:
            if strike(kind, rng):
                self.cluster.tally.faults[kind] += 1
            self._next(kind, per_s, strike, lead_s, rng)

        if lead_s:
            self.clock.at(when_s - lead_s, self.cluster.pilot.keep_journal)
        self.clock.at(when_s, happen)

    # --- victims ---

    def _process(self, rng: Random, *stages: Stage) -> Process | None:
        """Any process that still answers, in one of `stages` (in any, if none is given)."""
        living = self.cluster.processes
        for _ in range(20):  # most of them qualify: do not list ten thousand
            process = living.get(rng.randrange(max(living, default=0) + 1)) if len(living) > 1000 else None
            if process is not None and not process.silent and (not stages or process.stage in stages):
                return process
        found = [p for p in living.values() if not p.silent and (not stages or p.stage in stages)]
        return rng.choice(found) if found else None

    def _node(self, rng: Random) -> Node | None:
        """Any machine that is up and within reach."""
        processes = self.cluster.processes
        found = [
            node
            for node in self.cluster.nodes.live.values()
            if not node.leaving and not any(w in processes and processes[w].cut for w in node.workers)
        ]
        return rng.choice(found) if found else None

    # --- strikes; each says whether it found a victim ---

    def _kill(self, kind: str, rng: Random) -> bool:
        process = self._process(rng)
        if process is not None:
            self.cluster.lose(process, kind, self.costs.detect_death_s)
        return process is not None

    def _slow_down(self, _: str, rng: Random) -> bool:
        """A busy host, a hot device: it computes, only slower, and some time later as before."""
        process = self._process(rng, Stage.STEPPING)
        if process is None or self.clock.now_s < process.slow_until_s:
            return False
        devices = self.cluster.devices
        self.clock.after(devices.slow_down(process, self.clock.now_s, rng), self._as_before)
        return True

    def _as_before(self) -> None:
        self.cluster.devices.changed_s = self.clock.now_s

    def _freeze(self, kind: str, rng: Random) -> bool:
        """Detection names it, or nobody does: then its peers complain, or all are seen to wait for each other."""
        process = self._process(rng, Stage.IDLE, Stage.FORMING, Stage.STEPPING, Stage.PARKED)
        if process is None:
            return False
        cluster, number = self.cluster, process.number
        unseen = rng.random() < self.scenario.rates.unseen_freeze
        cluster.fall_silent(process, kind if not unseen else f"{kind}, unseen")
        if not unseen:
            self.clock.after(self.costs.detect_frozen_s * rng.uniform(0.5, 1.5), self._name, process)
            return True
        crew, delay_s = cluster.crew, self.costs.collective_timeout_s
        if crew is not None and process.generation == crew.generation:
            if rng.random() < 0.5:
                self.clock.after(delay_s, crew.complain)
            else:
                suspect = rng.choice((number, None))
                hung = ev.GenerationHung(0.0, crew.generation, "no vote is complete", suspect)
                cluster.say(delay_s, lambda now_s: ev.GenerationHung(now_s, hung.generation, hung.reason, suspect))
                self.clock.after(2 * delay_s, crew.complain)
        return True

    def _name(self, process: Process) -> None:
        """Detection says that it is frozen, and says so again while it stands there."""
        if self.cluster.processes.get(process.number) is process:
            number = process.number
            self.cluster.send(lambda now_s: [ev.WorkerFrozen(now_s, number, "no sign of life")])
            self.clock.after(4 * self.costs.detect_frozen_s + 1.0, self._name, process)

    def _tear(self, kind: str, rng: Random) -> bool:
        """An exception between vote and end of apply (R7): the vote was complete."""
        cluster = self.cluster
        process = self._process(rng, Stage.STEPPING) if cluster.is_stepping() else None
        if process is None:
            return False
        number, generation = process.number, process.generation
        cluster.fall_silent(process, kind, in_apply=True)
        cluster.say(self.costs.message_s, lambda now_s: ev.WorkerFailed(now_s, generation, number, "torn", "no memory"))
        return True

    def _lose_node(self, kind: str, rng: Random) -> bool:
        """Nothing is heard of it any more; its processes are dead."""
        node = self._node(rng)
        if node is None:
            return False
        workers = tuple(sorted(node.workers))
        for process in self._processes_on(node):
            self.cluster.lose(process, kind, None)
        self._end(node, rng)
        self._report_lost(node, workers)
        return True

    def _cut(self, kind: str, rng: Random) -> bool:
        """The machine is cut off. A short cut delays a message; a long one is a loss, and what returns is fenced."""
        node, long_s = self._node(rng), rng.expovariate(1 / self.costs.partition_s)
        if node is None:
            return False
        cluster, victims = self.cluster, self._processes_on(node)
        if long_s < self.costs.silence_s:
            if cluster.crew is not None and any(cluster.is_member(process) for process in victims):
                cluster.crew.delay(long_s)
            return True
        for process in victims:
            process.cut = True
            cluster.fall_silent(process, kind)
        self._report_lost(node, tuple(sorted(node.workers)))
        self.clock.after(long_s, self._heal, victims)
        return True

    def _heal(self, victims: list[Process]) -> None:
        """They are back, and say what they had to say: of an old generation, by workers that count as gone. Nothing of
        it may change anything. Then they find that they are fenced, and end.
        """
        for process in victims:
            if self.cluster.processes.get(process.number) is process:
                if process.generation:
                    self.cluster.send(partial(_stale, process.park(process.generation)))
                process.cut = False
                self.cluster.lose(process, "fenced", self.costs.detect_death_s)

    def _announce(self, kind: str, rng: Random) -> bool:
        """Spot capacity is taken back: notice, and at its end the machine goes whatever stands on it."""
        node = self._node(rng)
        if node is None:
            return False
        self.cluster.nodes.announce(node)
        deadline_s, name = self.clock.now_s + self.costs.notice_s, node.name
        self.cluster.say(0.0, lambda now_s: ev.PreemptionNotice(now_s, deadline_s, None, name))
        self.clock.at(deadline_s, self._take_away, node, kind, rng)
        return True

    def _take_away(self, node: Node, kind: str, rng: Random) -> None:
        for process in self._processes_on(node):
            self.cluster.lose(process, f"{kind}: not gone in time", self.costs.detect_death_s)
        self._end(node, rng)

    def _kill_controller(self, _: str, rng: Random) -> bool:
        pilot = self.cluster.pilot
        if pilot.is_down or pilot.is_dying:
            return False
        pilot.die(over_an_event=rng.random() < 0.5)
        self.clock.after(self.costs.controller_back_s * rng.uniform(0.5, 2.0), pilot.come_back)
        return True

    # --- machines ---

    def _processes_on(self, node: Node) -> list[Process]:
        return [self.cluster.processes[worker] for worker in sorted(node.workers) if worker in self.cluster.processes]

    def _report_lost(self, node: Node, workers: tuple[int, ...]) -> None:
        name = node.name
        self.cluster.say(
            self.costs.silence_s, lambda now_s: ev.NodeLost(now_s, name, "no beat came back", workers, None)
        )

    def _end(self, node: Node, rng: Random) -> None:
        """The machine is gone; after a while another one comes in its place."""
        self.cluster.nodes.lose(node)
        self.clock.after(rng.expovariate(1 / self.costs.node_back_s), self._arrive)

    def _arrive(self) -> None:
        """A new machine: workers without a place start there, and if the world has shrunk it is asked to grow again."""
        self.cluster.nodes.arrive()
        self.cluster.place_waiting()
        missing = self.scenario.workers - self.cluster.pilot.machine.core.ledger.target
        for _ in range(min(missing, self.scenario.workers_per_node)):
            self.cluster.send(lambda now_s: [ev.AddRequested(now_s)])
