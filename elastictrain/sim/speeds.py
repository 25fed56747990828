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

import numpy as np
import numpy.typing as npt

from elastictrain.planner.split import split_affine
from elastictrain.sim import draws
from elastictrain.stragglers.alarms import Cause
from elastictrain.stragglers.decision import Decision, Policy, Refused
from elastictrain.stragglers.room import PLENTY, Room
from elastictrain.stragglers.signals import (
    FLAG_CHECKPOINT,
    FLAG_COLLECTION,
    FLAG_EVALUATION,
    Floats,
    table,
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
    `nonsense`: workers, each with the step from which nothing that it says can be true.
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
    nonsense: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class SpeedReport:
    """`none_s`, `ours_s`, `oracle_s`: the run with lanes as they were at first, as the watch moved them, and as
    somebody would who knows every speed at once. `reversals`: moves after which some worker's
    lanes went the other way than at its last one, although no speed had changed in between. `refused`: splits for which
    there was no room.
    """

    findings: list[Finding] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
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
    lasts_s, factor = draws.lasts_s(rng, workers), draws.factor(rng)
    begin = rng.randrange(first, max(first + 1, steps - 60))
    return Slowness(rng.randrange(workers), rng.choice(list(causes)), factor, begin, begin + 20 + int(lasts_s / step_s))


@dataclass(slots=True)
class _Drawn:
    """What a step would be like whoever has the lanes, by worker: noise of its times, tokens and Σ squares per lane."""

    noise: Floats
    tokens: Floats
    squares: Floats
    flags: npt.NDArray[np.int64]

    @property
    def work(self) -> Floats:
        """A lane's work against a mean one: seven tenths linear, three tenths attention."""
        return 0.7 * self.tokens / 1000.0 + 0.3 * self.squares / 1e6


class _Devices:
    """What each worker needs in a step, and what it would say of it."""

    def __init__(self, scenario: SpeedScenario) -> None:
        self.scenario, self.rng = scenario, Random(f"{scenario.seed}/devices")
        self.unit_s = scenario.lane_s / np.array(scenario.speeds or (1.0,) * scenario.workers)
        self.step_s = max(scenario.lane_s * scenario.lanes / scenario.workers, 1e-9)

    def active(self, step: int) -> tuple[Slowness, ...]:
        """Who is slow in this step."""
        return tuple(slow for slow in self.scenario.slowness if slow.begin <= step < slow.end)

    def true_units(self, slowness: Sequence[Slowness]) -> Floats:
        """Seconds per lane of every worker now, without noise."""
        units = self.unit_s.copy()
        for slow in slowness:
            if slow.cause == "compute":
                units[slow.worker] *= slow.factor
        return units

    def extra_s(self, slowness: Sequence[Slowness], cause: Cause) -> Floats:
        """Seconds more of every worker, for a cause that is not the computation."""
        extra = np.zeros(self.scenario.workers)
        for slow in slowness:
            if slow.cause == cause:
                extra[slow.worker] += (slow.factor - 1.0) * self.step_s
        return extra

    def draw(self, step: int) -> _Drawn:
        """The same whoever has the lanes, and one worker after the other."""
        s, rng = self.scenario, self.rng
        shared = 0
        if s.checkpoint_every and step % s.checkpoint_every == 0:
            shared |= FLAG_CHECKPOINT
        if s.evaluate_every and step % s.evaluate_every == 0:
            shared |= FLAG_EVALUATION
        rows = []
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
            rows.append((factor, 1000.0 * length, 1e6 * length * length * spread, flags))
        noise, tokens, squares, flags_of = np.array(rows).T
        return _Drawn(noise, tokens, squares, flags_of.astype(np.int64))


def unwatched_s(scenario: SpeedScenario) -> float:
    """Seconds of the run when nobody looks: the lanes stay as they were at first."""
    devices, lanes = _Devices(scenario), _even(scenario)
    return sum(
        _take(devices, devices.active(step), np.array(lanes), devices.draw(step)).total_s
        for step in range(1, scenario.steps + 1)
    )


def _even(scenario: SpeedScenario) -> tuple[int, ...]:
    base, more = divmod(scenario.lanes, scenario.workers)
    return tuple(base + (worker < more) for worker in range(scenario.workers))


def run_speeds(scenario: SpeedScenario, policy: Policy | None = None, room: Room = PLENTY) -> SpeedReport:
    """Train on virtual devices under the real watch; its moves take effect at the next step but one. `room`: of the
    devices' memory; the oracle does not care for it.
    """
    devices, report = _Devices(scenario), SpeedReport()
    watch = StragglerWatch(scenario.steps, policy=policy)
    workers, first = tuple(range(scenario.workers)), _even(scenario)
    lanes, coming = first, list[tuple[int, tuple[int, ...]]]()
    best_for: dict[tuple[Slowness, ...], tuple[int, ...]] = {}
    last = [(0, 0)] * scenario.workers
    changes = [step for slow in scenario.slowness for step in (slow.begin, slow.end)]
    for step in range(1, scenario.steps + 1):
        while coming and coming[0][0] <= step:
            lanes = coming.pop(0)[1]
        drawn, slowness = devices.draw(step), devices.active(step)
        oracle = best_for.get(slowness)
        if oracle is None:
            even, units = [0.0] * scenario.workers, devices.true_units(slowness).tolist()
            oracle = split_affine(scenario.lanes, even, units, least=[1] * scenario.workers, before=first).parts
            best_for[slowness] = oracle
        took = _take(devices, slowness, np.array(lanes), drawn)
        taken_s = took.total_s
        report.ours_s += taken_s
        report.none_s += taken_s if lanes == first else _take(devices, slowness, np.array(first), drawn).total_s
        report.oracle_s += taken_s if lanes == oracle else _take(devices, slowness, np.array(oracle), drawn).total_s
        babble = [worker for worker, begin in scenario.nonsense if step >= begin]
        verdict = watch.feed(1, workers, step, _records(took, lanes, drawn, babble), room=room, splits=(lanes,))
        report.findings += verdict.findings
        report.refused += [] if verdict.refused is None else [verdict.refused]
        decision = verdict.decision
        if decision is not None:
            report.decisions.append(decision)
            if decision.lanes:
                coming.append((step + 2, decision.lanes))
                report.reversals += turns(last, lanes, decision.lanes, step, changes)
    assert watch.decider is not None
    report.outcomes, report.lanes = watch.decider.outcomes, lanes
    return report


def turns(
    last: list[tuple[int, int]], before: Sequence[int], after: Sequence[int], step: int, changes: Sequence[int]
) -> bool:
    """Whether some worker's lanes (or layers) go the other way than at their last move, although no speed has changed
    since. `last`: of each worker, which way and at which step; kept up to date here.
    """
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

    compute: Floats
    data: Floats
    transfer: Floats

    @property
    def arrive(self) -> Floats:
        return self.compute + self.data

    @property
    def total_s(self) -> float:
        return float(self.arrive.max() + self.transfer.max())


def _take(devices: _Devices, slowness: Sequence[Slowness], lanes: npt.NDArray[np.int64], drawn: _Drawn) -> _Step:
    """A step under this split of the lanes."""
    return _Step(
        compute=devices.true_units(slowness) * lanes * drawn.noise * drawn.work,
        data=devices.extra_s(slowness, "data"),
        transfer=(0.03 * devices.step_s + devices.extra_s(slowness, "link")) * drawn.noise**0.5,
    )


def _records(took: _Step, lanes: Sequence[int], drawn: _Drawn, babble: Sequence[int] = ()) -> bytes:
    """What the workers would say of it, and `babble` instead."""
    arrive, counts = took.arrive, np.array(lanes)
    said = table(
        lanes=counts,
        compute_s=took.compute,
        data_s=took.data,
        arrive_s=arrive,
        exchange_s=arrive.max() - arrive + took.transfer,
        tokens=counts * drawn.tokens,
        squares=counts * drawn.squares,
        flags=drawn.flags,
    )
    for number, name in enumerate(("compute_s", "arrive_s", "exchange_s", "data_s")):
        said[name][list(babble)] = (np.nan, -1.0, 1e30, np.inf)[number]
    return said.tobytes()
