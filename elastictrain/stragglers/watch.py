"""From the records of a run's steps to what should be done: detector and decider over its generations. Pure.

One object for a whole run, wherever it is fed: by the controller's loop in a run, by the simulator, by a benchmark.
What it has learned of a worker's speed outlives a generation; a new controller begins to learn anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from elastictrain.stragglers.alarms import COMPUTE, Alarm, Tuning
from elastictrain.stragglers.belief import Arrival, believed, in_force
from elastictrain.stragglers.decision import Decider, Decision, Policy, Refused, Situation
from elastictrain.stragglers.detector import Detector
from elastictrain.stragglers.room import PLENTY, Room
from elastictrain.stragglers.signals import EXCUSED, RECORD_BYTES, Flags, Floats, Records, as_dealt, decode
from elastictrain.stragglers.work import WorkModel

_NONSENSE = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to be told: `alarm` of `worker` (its number; None: all), in words. `kind`: "slow", "recovered",
    "faster" (than ever, and it was not slow), "imbalance" or "nonsense".
    """

    kind: str
    step: int
    worker: int | None
    cause: str
    factor: float
    since: int
    words: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one step has brought. `refused`: that there is no room for the split that would be best."""

    findings: tuple[Finding, ...] = ()
    decision: Decision | None = None
    refused: Refused | None = None


class StragglerWatch:
    """Feed it every step: `feed`. `steps`: of the run. Workers are named by number, in rank order."""

    def __init__(self, steps: int, *, policy: Policy | None = None, tuning: Tuning | None = None) -> None:
        self.steps, self.policy, self.tuning = steps, policy or Policy(), tuning or Tuning()
        self.generation = 0
        self.workers: tuple[int, ...] = ()
        self._roles: tuple[int, ...] = ()
        self.detector: Detector | None = None
        self.decider: Decider | None = None
        self._model = WorkModel()
        self._levels: dict[int, float] = {}
        self._best: dict[int, float] = {}
        self._slow: dict[int, int] = {}
        self._elapsed_s = 0.0
        self._evicted_s: list[float] = []
        self._last_step = 0
        self._accused: set[int] = set()
        self._arrival = Arrival()

    def enter(self, generation: int, workers: Sequence[int], roles: Sequence[int] = ()) -> None:
        """Another generation: other workers, or the same again. `roles`: of each, by any numbers; peers are those of
        the same one (none: all are peers). Raises ValueError when there are not as many as workers.
        """
        if roles and len(roles) != len(workers):
            raise ValueError(f"{len(roles)} roles for {len(workers)} workers")
        self._keep()
        self.generation, self.workers, self._roles = generation, tuple(workers), tuple(roles)
        known = [self._levels.get(worker, math.nan) for worker in workers]
        self.detector = Detector(len(workers), tuning=self.tuning, roles=roles or None, known=known, model=self._model)
        for place, worker in enumerate(workers):
            if worker in self._best:
                self.detector.remember_best(place, self._best[worker])
        self.decider = Decider(len(workers), self.policy, evicted_s=self._evicted_s)
        self._arrival = Arrival()
        self._slow = {worker: since for worker, since in self._slow.items() if worker in set(workers)}

    def _keep(self) -> None:
        if self.detector is None:
            return
        for place, worker in enumerate(self.workers):
            if self.detector.ready[place]:
                self._levels[worker] = float(self.detector.level[COMPUTE, place])
                self._best[worker] = self.detector.best_level(place)

    def speeds(self) -> dict[int, float]:
        """Relative speed of every worker whose speed is known; the median worker's is 1."""
        if self.detector is None:
            return {}
        units = {w: float(u) for w, u in zip(self.workers, self.detector.unit_s, strict=True) if u == u}
        middle = median(units.values()) if units else 1.0
        return {worker: middle / unit for worker, unit in units.items()}

    def dealt_speeds(self) -> dict[int, float]:
        """As `speeds`, for dealing lanes out: who cannot be told from its peers counts as the median one. Nothing while
        anybody's is unknown, except of those who talk nonsense.
        """
        if self.detector is None:
            return {}
        units = dict(zip(self.workers, self.detector.dealt_unit_s.tolist(), strict=True))
        known = {worker: unit for worker, unit in units.items() if unit == unit}
        if not known or units.keys() - known.keys() - self._accused:
            return {}
        middle = median(known.values())
        return {worker: middle / unit for worker, unit in known.items()}

    def feed(
        self,
        generation: int,
        workers: Sequence[int],
        step: int,
        raw: bytes,
        *,
        spares: int = 0,
        least_workers: int = 1,
        acts: bool = True,
        room: Room = PLENTY,
        splits: Sequence[tuple[int, ...]] = (),
        roles: Sequence[int] = (),
    ) -> Verdict:
        """The records of all workers for `step`, in rank order. `acts`: False for findings alone. `room`: for which
        splits there is memory. `splits`: of the lanes, that may be in force, the newest first (none: what workers say
        of their lanes is believed). `roles`: as for `enter`; all members of a job have the same. What is older than
        what is known says nothing; nor do records whose number is not that of the workers.
        """
        if generation < self.generation or len(raw) != RECORD_BYTES * len(workers):
            return Verdict()
        if generation != self.generation or tuple(workers) != self.workers or tuple(roles) != self._roles:
            self.enter(generation, workers, roles)
        elif step <= self._last_step:
            return Verdict()
        self._last_step = step
        assert self.detector is not None
        records = decode(raw)
        sound = believed(records, splits)
        alarms = self.detector.observe(step, records, sound)
        findings = [*self._nonsense(step, records), *(self._finding(alarm) for alarm in alarms)]
        if not acts:
            return Verdict(tuple(findings))
        decision, refused = self._decide(step, records, sound, in_force(records, splits), spares, least_workers, room)
        return Verdict(tuple(findings), decision, refused)

    def _nonsense(self, step: int, records: Records) -> list[Finding]:
        """Said once of each worker, when it has happened a few times."""
        assert self.detector is not None
        found = []
        for place in np.flatnonzero(self.detector.ignored >= _NONSENSE):
            worker = self.workers[place]
            if worker not in self._accused:
                self._accused.add(worker)
                shown = {name: records[name][place].item() for name in ("lanes", "compute_s", "data_s", "arrive_s")}
                words = f"reports lanes or times that cannot be true ({shown}); they are ignored"
                found.append(Finding("nonsense", step, worker, "signals", 1.0, step, words))
        return found

    def _finding(self, alarm: Alarm) -> Finding:
        worker = None if alarm.worker is None else self.workers[alarm.worker]
        if worker is not None and alarm.cause == "compute":
            if alarm.is_slow:
                self._slow.setdefault(worker, alarm.onset)
            else:
                self._slow.pop(worker, None)
        kind = "imbalance" if alarm.cause == "work" else alarm.kind
        what = {
            "compute": "its lanes take", "data": "with the wait for its data a step takes",
            "link": "with its transfer a step takes", "work": "its lanes are",
        }[alarm.cause]  # fmt: skip
        if worker is None:
            what = "with all workers' transfers a step takes"
        words = f"since step {alarm.onset} {what} {alarm.factor:.2f} x what was usual"
        if kind == "slow" and alarm.factor < 1:
            words += f", and still {alarm.slowness:.2f} x what is known of it at best"
        return Finding(kind, alarm.step, worker, alarm.cause, alarm.factor, alarm.onset, words)

    def _decide(
        self, step: int, records: Records, sound: Flags, split: tuple[int, ...] | None, spares: int,
        least_workers: int, room: Room,
    ) -> tuple[Decision | None, Refused | None]:  # fmt: skip
        """`split`: in force; None: not known. Who is not `sound` keeps its lanes, and what was known of it stays."""
        assert self.detector is not None
        assert self.decider is not None
        quiet = bool(sound.any() and (records["lanes"] > 0)[sound].all())
        quiet &= not bool((records["flags"] & EXCUSED)[sound].any())
        said = records
        records = as_dealt(records)  # lanes that were taken over within the step stay dealt out as they are
        arrived = None
        if quiet:
            computed_s = float((records["compute_s"][sound] + records["data_s"][sound]).max())
            arrived = self._arrival.last_s(computed_s, said[sound], judging=self.decider.judges)
        self._elapsed_s += arrived or 0.0
        usual, own = (_filled(units, sound) for units in (self.detector.dealt_unit_s, self.detector.unit_s))
        if not np.isfinite(usual).all():
            return None, None
        lanes = self.detector.lanes if split is None else np.asarray(split)
        places = {worker: place for place, worker in enumerate(self.workers)}
        situation = Situation(
            step=step,
            lanes=tuple(int(n) for n in lanes),
            unit_s=tuple(float(unit) for unit in usual),
            arrived_s=arrived,
            elapsed_s=self._elapsed_s,
            left_steps=max(0, self.steps - step),
            work=tuple(float(work) for work in np.where(sound, self._model.work(records), lanes)),
            slow={places[worker]: since for worker, since in self._slow.items() if worker in places},
            spares=spares,
            least_workers=least_workers,
            own_s=tuple(float(unit) for unit in own),
            room=room,
            frozen=frozenset(np.flatnonzero(~sound).tolist()),
        )
        return self.decider.decide(situation), self.decider.refused


def _filled(units: Floats, sound: Flags) -> Floats:
    """Of whoever is not believed and was never known: as the others at the median."""
    known = units[np.isfinite(units)]
    return np.where(sound | np.isfinite(units), units, np.median(known) if len(known) else np.nan)
