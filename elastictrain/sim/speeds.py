"""Virtual workers that differ in speed and become slow: the records they would send, under the real straggler watch.

What is drawn, and from where: how long a slowness lasts from a Lomax distribution with the means that Greyhound's
authors give for one node, four nodes and hundreds of GPUs (10, 24, 72 minutes; heavy tails); how strong it is from 15 %
upwards with a mean of 2 (ByteDance's study gives a mean of 3 for bad workers, Greyhound's cases 1.1 to 2). Besides:
noise, hiccups, garbage collection, checkpoints, evaluations, and sequences of unequal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from elastictrain.planner.split import split_affine
from elastictrain.stragglers.alarms import Cause
from elastictrain.stragglers.decision import Decision, Policy
from elastictrain.stragglers.rental import prior_s
from elastictrain.stragglers.signals import (
    FLAG_CHECKPOINT,
    FLAG_COLLECTION,
    FLAG_EVALUATION,
    Signal,
)
from elastictrain.stragglers.watch import Finding, StragglerWatch


@dataclass(frozen=True, slots=True)
class Slowness:
    """From step `begin` to before `end`, `worker` takes `factor` times as long for `cause` (of the whole step, where it
    is not the computation).
    """

    worker: int
    cause: Cause
    factor: float
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SpeedScenario:
    """A training of `workers` with `lanes` in all. `lane_s`: of a mean lane on a device of speed 1. `speeds`: of the
    devices, default equal. `noise`: standard deviation of the logarithm of a worker's time in a step. `hiccup_every`,
    `collect_every`: mean steps of a worker between such. `lengths`: coefficient of variation of a lane's length.
    """

    workers: int = 16
    lanes: int = 128
    steps: int = 400
    seed: int = 0
    lane_s: float = 0.2
    speeds: tuple[float, ...] = ()
    noise: float = 0.02
    hiccup_every: float = 400.0
    collect_every: float = 300.0
    checkpoint_every: int = 100
    evaluate_every: int = 250
    lengths: float = 0.0
    slowness: tuple[Slowness, ...] = ()


@dataclass(slots=True)
class SpeedReport:
    """`none_s`, `ours_s`, `oracle_s`: the run with lanes as they were at first, as the watch moved them, and as
    somebody would who knows every speed at once. `reversals`: moves after which some worker's
    lanes went the other way than at its last one, although no speed had changed in between.
    """

    findings: list[Finding] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    lanes: tuple[int, ...] = ()
    none_s: float = 0.0
    ours_s: float = 0.0
    oracle_s: float = 0.0
    reversals: int = 0

    @property
    def share_of_oracle(self) -> float:
        """Of what could be won; 1 when nothing could."""
        could = self.none_s - self.oracle_s
        return (self.none_s - self.ours_s) / could if could > 1e-9 * self.none_s else 1.0


def draw_slowness(
    rng: Random, *, workers: int, steps: int, step_s: float, first: int = 30, causes: Sequence[Cause] = ("compute",)
) -> Slowness:
    """One slow-down that lasts at least 20 steps, somewhere in the run."""
    mean = prior_s(workers)
    lasts_s = mean * ((1.0 - rng.random()) ** -0.5 - 1.0)  # Lomax, shape 2
    factor = min(6.0, 1.15 + rng.expovariate(1 / 0.85))
    begin = rng.randrange(first, max(first + 1, steps - 60))
    return Slowness(rng.randrange(workers), rng.choice(list(causes)), factor, begin, begin + 20 + int(lasts_s / step_s))


class _Devices:
    """What each worker needs in a step, and what it would say of it."""

    def __init__(self, scenario: SpeedScenario) -> None:
        self.scenario, self.rng = scenario, Random(f"{scenario.seed}/devices")
        speeds = scenario.speeds or (1.0,) * scenario.workers
        self.unit_s = [scenario.lane_s / speed for speed in speeds]
        self.step_s = max(scenario.lane_s * scenario.lanes / scenario.workers, 1e-9)

    def true_units(self, step: int) -> list[float]:
        """Seconds per lane of every worker now, without noise."""
        units = list(self.unit_s)
        for slow in self.scenario.slowness:
            if slow.cause == "compute" and slow.begin <= step < slow.end:
                units[slow.worker] *= slow.factor
        return units

    def extra_s(self, step: int, cause: Cause, worker: int) -> float:
        return sum(
            (slow.factor - 1.0) * self.step_s
            for slow in self.scenario.slowness
            if slow.cause == cause and slow.worker == worker and slow.begin <= step < slow.end
        )

    def draw(self, step: int) -> list[tuple[float, float, float, int]]:
        """(noise, tokens per lane, Σ squares per lane, flags) of every worker: the same whoever has the lanes."""
        s, rng = self.scenario, self.rng
        shared = 0
        if s.checkpoint_every and step % s.checkpoint_every == 0:
            shared |= FLAG_CHECKPOINT
        if s.evaluate_every and step % s.evaluate_every == 0:
            shared |= FLAG_EVALUATION
        drawn = []
        for _ in range(s.workers):
            factor, flags = rng.lognormvariate(0.0, s.noise), shared
            if rng.random() * s.hiccup_every < 1.0:
                factor *= 1.3 + rng.expovariate(1.0)
            if rng.random() * s.collect_every < 1.0:
                factor, flags = factor * 1.4, flags | FLAG_COLLECTION
            if shared:
                factor *= 1.0 + 0.5 * rng.random()
            length = max(0.2, rng.gauss(1.0, s.lengths / 2.83)) if s.lengths else 1.0
            spread = 1.0 + s.lengths**2 * max(0.1, rng.gauss(1.0, 0.3)) if s.lengths else 1.0
            drawn.append((factor, 1000.0 * length, 1e6 * length * length * spread, flags))
        return drawn


def _work(tokens: float, squares: float) -> float:
    """A lane's work against a mean one: seven tenths linear, three tenths attention."""
    return 0.7 * tokens / 1000.0 + 0.3 * squares / 1e6


def run_speeds(scenario: SpeedScenario, policy: Policy | None = None) -> SpeedReport:
    """Train on virtual devices under the real watch; its moves take effect at the next step but one."""
    devices, report = _Devices(scenario), SpeedReport()
    watch = StragglerWatch(scenario.steps, policy=policy)
    workers = tuple(range(scenario.workers))
    base, more = divmod(scenario.lanes, scenario.workers)
    first = tuple(base + (worker < more) for worker in workers)
    lanes, coming = first, list[tuple[int, tuple[int, ...]]]()
    best_for: dict[tuple[float, ...], tuple[int, ...]] = {}
    last = [(0, 0)] * scenario.workers
    changes = [step for slow in scenario.slowness for step in (slow.begin, slow.end)]
    for step in range(1, scenario.steps + 1):
        while coming and coming[0][0] <= step:
            lanes = coming.pop(0)[1]
        drawn, units = devices.draw(step), devices.true_units(step)
        oracle = best_for.get(tuple(units))
        if oracle is None:
            even = [0.0] * scenario.workers
            oracle = split_affine(scenario.lanes, even, units, least=[1] * scenario.workers, before=first).parts
            best_for[tuple(units)] = oracle
        took = _take(devices, step, lanes, units, drawn)
        taken_s = took.total_s
        report.ours_s += taken_s
        report.none_s += taken_s if lanes == first else _take(devices, step, first, units, drawn).total_s
        report.oracle_s += taken_s if lanes == oracle else _take(devices, step, oracle, units, drawn).total_s
        verdict = watch.feed(1, workers, step, _records(took, lanes, drawn))
        report.findings += verdict.findings
        decision = verdict.decision
        if decision is not None:
            report.decisions.append(decision)
            if decision.lanes:
                coming.append((step + 2, decision.lanes))
                report.reversals += _turns(last, lanes, decision.lanes, step, changes)
    assert watch.decider is not None
    report.outcomes, report.lanes = watch.decider.outcomes, lanes
    return report


def _turns(
    last: list[tuple[int, int]], before: Sequence[int], after: Sequence[int], step: int, changes: Sequence[int]
) -> bool:
    """Whether some worker's lanes go the other way than at their last move, although no speed has changed since."""
    found = False
    for worker, (old, new) in enumerate(zip(before, after, strict=True)):
        sign = (new > old) - (new < old)
        if not sign:
            continue
        way, at = last[worker]
        if way == -sign and not any(at <= change <= step for change in changes):
            found = True
        last[worker] = (sign, step)
    return found


@dataclass(slots=True)
class _Step:
    """What a step took of each worker, in seconds."""

    compute: list[float]
    data: list[float]
    transfer: list[float]

    @property
    def arrive(self) -> list[float]:
        return [own + waited for own, waited in zip(self.compute, self.data, strict=True)]

    @property
    def total_s(self) -> float:
        return max(self.arrive) + max(self.transfer)


def _take(
    devices: _Devices,
    step: int,
    lanes: Sequence[int],
    units: Sequence[float],
    drawn: Sequence[tuple[float, float, float, int]],
) -> _Step:
    """A step under this split of the lanes."""
    found = _Step([], [], [])
    slow_there = any(slow.begin <= step < slow.end for slow in devices.scenario.slowness)
    for worker, (factor, tokens, squares, _) in enumerate(drawn):
        found.compute.append(units[worker] * lanes[worker] * factor * _work(tokens, squares))
        found.data.append(devices.extra_s(step, "data", worker) if slow_there else 0.0)
        own = devices.extra_s(step, "link", worker) if slow_there else 0.0
        found.transfer.append((0.03 * devices.step_s + own) * factor**0.5)
    return found


def _records(took: _Step, lanes: Sequence[int], drawn: Sequence[tuple[float, float, float, int]]) -> bytes:
    """What the workers would say of it."""
    arrive = took.arrive
    last = max(arrive)
    return b"".join(
        Signal(
            lanes=lanes[worker],
            compute_s=took.compute[worker],
            data_s=took.data[worker],
            arrive_s=arrive[worker],
            exchange_s=last - arrive[worker] + took.transfer[worker],
            tokens=lanes[worker] * tokens,
            squares=lanes[worker] * squares,
            flags=flags,
        ).encode()
        for worker, (_, tokens, squares, flags) in enumerate(drawn)
    )
