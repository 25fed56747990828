"""Pipelines' steps in, slow places and what to do about them out: detector and decider together. Pure.

Stages do different work, so what a worker says is first divided by what the planner's model expects of its layers; what
is left is held against its own history and against the peers that have the same stage in other pipelines. A worker
whose layers change is learned anew within a few steps; one that has another stage begins anew. How slow somebody is
known to be is kept through that: it is the product of the changes that were told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elastictrain.planner.pipelines import Pipelines, Placement
from elastictrain.stragglers.alarms import COMPUTE, Alarm, Tuning
from elastictrain.stragglers.decision import Policy
from elastictrain.stragglers.detector import Detector
from elastictrain.stragglers.signals import EXCUSED, Records, checked, table
from elastictrain.stragglers.stage_decision import StageDecider, StageDecision, StageSituation, by_worker
from elastictrain.stragglers.stage_ways import ACTIONS, Price, StageAction

_SLOW = 1.1
"""Who takes less than so many times what it should is not slow."""


@dataclass(frozen=True, slots=True)
class StageFinding:
    """`worker`, which had `stage` of pipeline `pipeline`, has become slow, or fast again, since step `since`. `factor`:
    against before; `slowness`: how many times as long as it should it takes now.
    """

    kind: str
    step: int
    since: int
    worker: int
    pipeline: int
    stage: int
    factor: float
    slowness: float


@dataclass(frozen=True, slots=True)
class StageVerdict:
    """What one step has brought."""

    findings: tuple[StageFinding, ...] = ()
    decision: StageDecision | None = None


class PipelineWatch:
    """Feed it every step; tell it which placements are in force (`enter`)."""

    def __init__(
        self,
        work: Pipelines,
        placements: Sequence[Placement],
        steps: int,
        *,
        policy: Policy | None = None,
        price: Price | None = None,
        allowed: Sequence[StageAction] = ACTIONS,
        tuning: Tuning | None = None,
    ) -> None:
        self.work, self.steps, self.tuning = work, steps, tuning or Tuning()
        self.decider = StageDecider(work, policy, price=price, allowed=allowed)
        self.factors = list(work.healthy())
        self.slow: dict[int, int] = {}
        self._healthy: dict[int, float] = {}
        """Of whoever has become slow: its level before that, wherever it sat."""
        self._elapsed_s = 0.0
        self._fresh = True
        self.placements: tuple[Placement, ...] = ()
        self._seats: dict[int, tuple[int, int]] = {}
        self._detector: Detector | None = None
        self.enter(placements)

    def enter(self, placements: Sequence[Placement]) -> None:
        """These are in force from the next step on."""
        seats = {
            worker: (number, stage)
            for number, placement in enumerate(placements)
            for stage, worker in enumerate(placement.seats)
        }
        if seats != self._seats:
            known = {worker: self._level(worker) for worker, seat in self._seats.items() if seats.get(worker) == seat}
            self._detector = Detector(
                len(seats), tuning=self.tuning, roles=[seats[worker][1] for worker in sorted(seats)],
                known=[known.get(worker, math.nan) for worker in sorted(seats)],
            )  # fmt: skip
            for place, worker in enumerate(sorted(seats)):
                if not math.isnan(known.get(worker, math.nan)):  # who is fast again is not slow in another way
                    self._detector.remember_best(place, known[worker] - math.log(self.factors[worker]))
        self.placements, self._seats, self._fresh = tuple(placements), seats, True

    def _level(self, worker: int) -> float:
        assert self._detector is not None
        place = sorted(self._seats).index(worker)
        return float(self._detector.level[COMPUTE, place]) if self._detector.ready[place] else math.nan

    def feed(
        self,
        step: int,
        busy_s: Mapping[int, float],
        took_s: float,
        *,
        flags: Mapping[int, int] | None = None,
        spares: Sequence[int] = (),
        acts: bool = True,
    ) -> StageVerdict:
        """A step: `busy_s` of every worker's computation, all micro-batches, without waiting for other stages; `took_s`
        as a whole. `flags`: as in a record (`signals`), of those that have any. `acts`: False for findings alone.
        Raises ValueError when `busy_s` is not of the workers that have stages.
        """
        if set(busy_s) != set(self._seats):
            raise ValueError(f"a step of workers {sorted(busy_s)}, but stages are with {sorted(self._seats)}")
        assert self._detector is not None
        records = self._records(busy_s, flags or {})
        alarms = self._detector.observe(step, records)
        findings = tuple(self._finding(alarm) for alarm in alarms if alarm.cause == "compute")
        believed, sound = checked(records), 0 < took_s < math.inf
        frozen = frozenset(w for w, true in zip(sorted(self._seats), believed, strict=True) if not true)
        quiet = sound and not self._fresh and not bool((records["flags"] & EXCUSED).any())
        self._fresh = False
        self._elapsed_s += took_s if sound else 0.0
        if not acts or not sound:
            return StageVerdict(findings)
        situation = StageSituation(
            step, self.placements, tuple(self.factors), took_s if quiet else None, self._elapsed_s,
            max(0, self.steps - step), {w: since for w, since in self.slow.items() if w in self._seats}, tuple(spares),
            unsettled=bool(self._detector.suspected.any()), frozen=frozen,
        )  # fmt: skip
        return StageVerdict(findings, self.decider.decide(situation))

    def _records(self, busy_s: Mapping[int, float], flags: Mapping[int, int]) -> Records:
        """As of lanes: so many layers, and seconds for each in units of what the model expects of it."""
        layers = by_worker(self.placements)
        expected = {w: s for placement in self.placements for w, s in self.work.busy_s(placement).items()}
        workers = sorted(self._seats)
        lanes = np.array([layers[worker] for worker in workers])
        relative = np.array([busy_s[worker] / expected[worker] for worker in workers], dtype=np.float64) * lanes
        return table(
            lanes=lanes, compute_s=relative, arrive_s=relative,
            flags=np.array([flags.get(worker, 0) for worker in workers]),
        )  # fmt: skip

    def _finding(self, alarm: Alarm) -> StageFinding:
        assert alarm.worker is not None
        worker = sorted(self._seats)[alarm.worker]
        before, now = self.factors[worker], self.factors[worker] * alarm.factor
        level = self._level(worker)
        if before == 1.0:
            self._healthy[worker] = level - math.log(alarm.factor)
        elif alarm.factor < 1 and worker in self._healthy:  # a product of changes adds up their errors
            now = min(now, math.exp(level - self._healthy[worker]))
        if now < _SLOW:
            now = 1.0
            self.slow.pop(worker, None)
        else:
            self.slow.setdefault(worker, alarm.onset)
        self.factors[worker] = now
        kind = "slow" if now > 1.0 else "recovered" if before > 1.0 else "faster"
        return StageFinding(kind, alarm.step, alarm.onset, worker, *self._seats[worker], alarm.factor, now)
