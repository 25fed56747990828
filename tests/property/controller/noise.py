"""A small world for detection: workers that step together, a noisy machine under them, an agent, a controller.

Everything is drawn from one seeded generator: how long work takes, when a worker is kept from the processor, when the
agent or the controller stands still, which datagrams are lost. Faults are put where a test says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from elastictrain.controller.suspicion import Kind, Suspicion, Verdict
from elastictrain.signs import WAITING, Activity, NodeReport, WorkerSign

TICK_S = 0.02
BEAT_S = 0.1
LOOK_S = 0.1
A = Activity


@dataclass(frozen=True)
class Noise:
    """`starved`: share of time in which a worker gets only a little of the processor. `pauses`: chance per second that
    the agent, the controller or the whole node stands still for up to `pause_s`. `lost`: of the datagrams.
    `counts_waits`: the kernel says how long threads waited for a processor. `outliers`: chance that a piece of work
    takes more than twice its time.
    """

    starved: float = 0.0
    pauses: float = 0.0
    pause_s: float = 6.0
    lost: float = 0.0
    counts_waits: bool = True
    outliers: float = 0.0


@dataclass
class Worker:
    number: int
    script: list[tuple[Activity, str, float]] = field(default_factory=list)
    kind: str = "barrier"
    left_s: float = 0.0
    activity: Activity = A.IDLE
    count: int = 1
    step: int = 0
    place: int = 0
    steps_done: int = 0
    step_s: float = 0.0
    step_began_s: float = 0.0
    beat_s: float = 0.0
    entered_s: float = 0.0
    cpu_s: float = 0.0
    held_up_s: float = 0.0
    share: float = 1.0
    share_until_s: float = 0.0
    fault: str = ""

    @property
    def state(self) -> str:
        if self.fault in ("stopped", "gone"):
            return {"stopped": "T", "gone": "X"}[self.fault]
        if self.fault in ("deadlocked", "livelocked"):
            return "S" if self.fault == "deadlocked" else "R"
        return "R" if self.kind == "work" else "S"


class World:
    """`step_s`: how long a step takes about; `pieces`: signs of progress in compute."""

    def __init__(
        self, seed: int, *, workers: int = 3, step_s: float = 0.2, pieces: int = 4, noise: Noise | None = None,
        suspicion: Suspicion | None = None, evaluate_every: int = 0, evaluate_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.random, self.noise = Random(seed), noise or Noise()
        self.step_s, self.pieces = step_s, pieces
        self.evaluate_every, self.evaluate_s = evaluate_every, evaluate_s
        self.workers = [Worker(number) for number in range(workers)]
        self.suspicion = suspicion or Suspicion()
        self.suspicion.expect(1, range(workers), 0.0)
        self.now_s = 0.0
        self.verdicts: list[tuple[float, Verdict]] = []
        self.hung_barrier: tuple[int, Activity] | None = None
        self._beat_due_s = self._look_due_s = self._late_s = 0.0
        self._number = 0
        self._asleep_until = {"agent": 0.0, "controller": 0.0, "node": 0.0}
        self._arrived: NodeReport | None = None

    # --- the workers ---

    def _takes(self, about_s: float) -> float:
        factor = self.random.uniform(2.0, 2.4) if self.random.random() < self.noise.outliers else None
        return about_s * (factor or self.random.uniform(0.7, 1.3))

    def _script(self, worker: Worker) -> list[tuple[Activity, str, float]]:
        piece_s = 0.8 * self.step_s / self.pieces
        script = [(A.DATA, "sleep", self._takes(0.05 * self.step_s))]
        script += [(A.COMPUTE, "work", self._takes(piece_s)) for _ in range(self.pieces)]
        script += [(A.EXCHANGE, "barrier", 0.0), (A.MIRROR, "barrier", 0.0), (A.VOTE, "barrier", 0.0)]
        script += [(A.APPLY, "work", self._takes(0.1 * self.step_s)), (A.GATHER, "barrier", 0.0)]
        if self.evaluate_every and worker.step % self.evaluate_every == 0 and worker.number == 0:
            script.append((A.EVALUATE, "work", self._takes(self.evaluate_s)))
        return script

    def _advance(self, worker: Worker, dt_s: float) -> None:
        if worker.fault:
            if worker.fault == "livelocked":
                worker.cpu_s += dt_s * worker.share
                worker.held_up_s += dt_s * (1 - worker.share)
            return
        while dt_s > 1e-9:
            if worker.kind == "barrier" and not self._passes(worker):
                return
            speed = worker.share if worker.kind == "work" else 1.0
            used_s = min(dt_s, worker.left_s / speed if speed else dt_s)
            if worker.kind == "work":
                worker.cpu_s += used_s * speed
                worker.held_up_s += used_s * (1 - speed)
            worker.left_s -= used_s * speed
            dt_s -= used_s
            if worker.left_s <= 1e-9:
                self._next(worker, self.now_s - dt_s)

    def _passes(self, worker: Worker) -> bool:
        if (worker.step, worker.activity) == self.hung_barrier:
            return False
        here = (worker.step, worker.place)
        return all((other.step, other.place) >= here for other in self.workers)

    def _next(self, worker: Worker, at_s: float) -> None:
        if not worker.script:
            if worker.step:
                worker.steps_done += 1
                worker.step_s = at_s - worker.step_began_s
            worker.step += 1
            worker.place = 0
            worker.step_began_s = at_s
            worker.script = self._script(worker)
        activity, worker.kind, worker.left_s = worker.script.pop(0)
        worker.place += 1
        if activity is not worker.activity:
            worker.activity, worker.entered_s = activity, at_s
        worker.count += 1
        worker.beat_s = at_s

    # --- the machine, the agent, the controller ---

    def _disturb(self) -> None:
        for worker in self.workers:
            if self.now_s >= worker.share_until_s:
                starved = self.random.random() < self.noise.starved
                worker.share = self.random.choice([0.0, 0.02, 0.1, 0.3]) if starved else 1.0
                worker.share_until_s = self.now_s + self.random.uniform(0.1, 4.0)
        for who in self._asleep_until:
            if self.random.random() < self.noise.pauses * TICK_S:
                self._asleep_until[who] = self.now_s + self.random.uniform(0.0, self.noise.pause_s)

    def tick(self) -> list[Verdict]:
        """One step of time; what the controller has just found."""
        self.now_s += TICK_S
        self._disturb()
        if self._asleep_until["node"] <= self.now_s:  # else nobody runs, and only the agent's own lateness tells
            for worker in self.workers:
                self._advance(worker, TICK_S)
        if self.now_s + 1e-9 >= max(self._beat_due_s, self._asleep_until["agent"], self._asleep_until["node"]):
            self._beat()
        if self.now_s < max(self._look_due_s, self._asleep_until["controller"]):
            return []
        self._look_due_s = self.now_s + LOOK_S
        if self._arrived is not None:
            self.suspicion.observe(self._arrived, self.now_s)
            self._arrived = None
        found = self.suspicion.verdicts(self.now_s)
        self.verdicts += [(self.now_s, verdict) for verdict in found]
        return found

    def _beat(self) -> None:
        late_s = self.now_s - self._beat_due_s
        self._late_s += late_s if late_s > TICK_S else 0.0
        self._beat_due_s = self.now_s + BEAT_S
        self._number += 1
        if self.random.random() >= self.noise.lost:
            signs = tuple(self._sign(worker) for worker in self.workers)
            self._arrived = NodeReport("node", 1, self._number, 0, self.now_s, self._late_s, signs)

    def _sign(self, w: Worker) -> WorkerSign:
        return WorkerSign(
            w.number, 100 + w.number, 7, w.state, w.cpu_s, w.held_up_s if self.noise.counts_waits else None, w.count, 1,
            w.step, w.activity, w.steps_done, w.step_s, self.now_s - w.beat_s, self.now_s - w.entered_s,
        )  # fmt: skip

    # --- for tests ---

    def steps(self, count: int) -> int:
        """Run until everybody has done `count` more steps, or something was found."""
        goal = min(worker.steps_done for worker in self.workers) + count
        while min(worker.steps_done for worker in self.workers) < goal and not self.verdicts:
            self.tick()
        return count

    def until(self, seconds: float) -> list[tuple[float, Verdict]]:
        """Run on for a while; everything that was found."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.tick()
        return self.verdicts

    def break_worker(self, number: int, fault: str, *, waiting: bool | None = False) -> float:
        """Break a worker as soon as it is in work of its own (`waiting`: in a waiting activity; None: anywhere).
        Returns when.
        """
        worker = self.workers[number]
        while waiting is not None and (worker.activity in WAITING) is not waiting:
            self.tick()
        worker.fault = fault
        return self.now_s


NAMES = {"stopped": Kind.STOPPED, "deadlocked": Kind.DEADLOCKED, "livelocked": Kind.LIVELOCKED, "gone": Kind.GONE}
