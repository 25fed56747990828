"""Who has become slow, and why: a robust residual for every worker and step, and a CUSUM over it. Pure, vectorised.

Each step gives four numbers per worker, logarithms so that 0.1 is about 10 %:

- *compute*: seconds per unit of work (`WorkModel`), whatever the number of lanes;
- *data*: how much the wait for batches stretches its computation;
- *link*: how much its transfer in the exchange stretches the step, waiting for others taken out;
- *work*: how much work its lanes are, beyond their number. Too much of it is nobody's fault.

From each is taken the worker's own usual level, and what all its peers (same role) have in common in this step: the
median, or, where there are only two, the change nearest to none. What is left drives Page's CUSUM (Biometrika 1954) of
the likelihood ratio against a shift of 15 %, in both directions, in units of the noise. An alarm needs three steps at
least (a step counts at most 0.4 of the threshold, so hiccups never add up to one), and a median since its onset of 11 %
or more: the verification of Greyhound (ATC 2025). Then the level is the new one. So the levels are also the learned
speeds, from the first steps on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elastictrain.stragglers.alarms import (
    CAUSES,
    COMPUTE,
    DATA,
    LINK,
    MEMORY,
    STEP_SHARE,
    WORK,
    Alarm,
    Together,
    Tuning,
)
from elastictrain.stragglers.signals import EXCUSED, Flags, Floats, Records, checked, parts
from elastictrain.stragglers.work import WorkModel

_HICCUP = math.log(1.5)
_APART = 3.0
"""Standard errors by which a worker's level differs from the median one where its speed counts as another."""
_JUMP = math.log(1.2)
_LENGTHS = 20
"""Steps with unequal lengths after which it is known how much they vary."""


class Detector:
    """Of the workers of one generation, by their places. `roles`: peers are those of the same role.

    `known`: levels (log seconds per unit of work) of workers that were there before; NaN for the others.
    """

    def __init__(
        self,
        workers: int,
        *,
        tuning: Tuning | None = None,
        roles: Sequence[int] | None = None,
        known: Sequence[float] | None = None,
        model: WorkModel | None = None,
    ) -> None:
        self.tuning = tuning or Tuning()
        self.workers = workers
        self.model = model or WorkModel()
        role = np.zeros(workers, dtype=np.int64) if roles is None else np.asarray(roles)
        self._groups = [np.flatnonzero(role == one) for one in np.unique(role)]
        self.level: Floats = np.zeros((4, workers))
        self._seen = np.zeros((4, workers), dtype=np.int64)
        self._lengths_seen = 0
        if known is not None:
            there = np.isfinite(np.asarray(known, dtype=np.float64))
            self.level[COMPUTE, there] = np.asarray(known, dtype=np.float64)[there]
            self._seen[COMPUTE, there] = self.tuning.warm_up
        self._warm = np.full((4, workers, self.tuning.warm_up), np.nan)
        self._noise = np.full((4, workers), 2 * self.tuning.noise)
        self._up: Floats = np.zeros((4, workers))
        self._down: Floats = np.zeros((4, workers))
        self._up_since = np.zeros((4, workers), dtype=np.int64)
        self._down_since = np.zeros((4, workers), dtype=np.int64)
        self._recent = np.full((MEMORY, 4, workers), np.nan)
        self._best = np.full((4, workers), np.inf)
        self._best[WORK] = 0.0  # equal lanes
        self._excused = np.zeros(workers, dtype=np.int64)
        self._spiked = np.zeros(workers, dtype=bool)
        self._counted = np.zeros(workers, dtype=np.int64)
        self._more_lanes = np.zeros(workers, dtype=np.int64)
        self._lanes: npt.NDArray[np.int64] | None = None
        self._together = Together(self.tuning)
        self._turn = 0
        self.common = np.zeros((4, workers))
        self.hiccups = np.zeros(workers, dtype=np.int64)
        self.ignored = np.zeros(workers, dtype=np.int64)

    @property
    def threshold(self) -> float:
        return -math.log(self.tuning.rate / max(1, self.workers))

    @property
    def ready(self) -> Flags:
        """Whose compute level is learned."""
        return np.asarray(self._seen[COMPUTE] >= self.tuning.warm_up)

    @property
    def unit_s(self) -> Floats:
        """Seconds per unit of work of every worker, as things stand; NaN while it is not learned."""
        return np.where(self.ready, np.exp(self.level[COMPUTE] + self.common[COMPUTE]), np.nan)

    @property
    def dealt_unit_s(self) -> Floats:
        """`unit_s` for dealing lanes out: a worker that cannot be told from its peers counts as the median one, so that
        noise moves no lanes.
        """
        level = self.level[COMPUTE]
        error = np.maximum(self._noise[COMPUTE], self.tuning.noise) / np.sqrt(np.clip(self._counted, 1, 64))
        if self.model.by_length:  # what lengths cost is not known well at first
            error = error * (1.0 + 3.0 * max(0.0, 1.0 - self._lengths_seen / (3 * _LENGTHS)))
        middle = np.zeros(self.workers)
        for group in self._groups:
            middle[group] = np.median(level[group])
        told = np.abs(level - middle) > _APART * error
        return np.where(self.ready, np.exp(np.where(told, level, middle) + self.common[COMPUTE]), np.nan)

    @property
    def slowness(self) -> Floats:
        """By cause and worker: how much longer it takes than at its best."""
        best = np.where(np.isfinite(self._best), self._best, self.level)
        return np.exp(self.level - best)

    def remember_best(self, place: int, level: float) -> None:
        """The best level that a worker had in an earlier generation."""
        self._best[COMPUTE, place] = level

    def best_level(self, place: int) -> float:
        """The lowest level of a worker's computation since it was first learned."""
        best = float(self._best[COMPUTE, place])
        return best if math.isfinite(best) else float(self.level[COMPUTE, place])

    def observe(self, step: int, records: Records) -> list[Alarm]:
        """Take in a step; what has changed. `records` has one for every worker, in the order of their places."""
        if len(records) != self.workers:
            raise ValueError(f"{len(records)} records for {self.workers} workers")
        sound = checked(records)
        self.ignored += ~sound
        self._turn += 1
        self._lanes_moved(records)
        self.model.note(records, sound)
        if self._turn <= self.tuning.skip:
            return []
        used = sound & (records["lanes"] > 0) & self._not_excused(records)
        values, usable = self._values(records, sound, used)
        change = np.where(usable, values - self.level, np.nan)
        learned = usable & (self._seen >= self.tuning.warm_up)
        learned[WORK] = usable[WORK]
        self.common = self._in_common(np.where(learned, change, np.nan))
        rest = change - self.common
        self._learn_lengths(rest[WORK], usable[WORK])
        learned[WORK] &= self._seen[WORK] >= self.tuning.warm_up
        new = usable & ~learned
        new[WORK] = False
        self._counted += usable[COMPUTE]
        alarms = self._warm_up(step, values, new)
        alarms += self._accumulate(step, np.where(learned, rest, np.nan))
        alarms += self._together.observe(step, float(self.common[LINK].mean()), bool(usable[LINK].any()))
        relative = np.exp(self.level[COMPUTE] - np.median(self.level[COMPUTE]))
        calm = np.abs(np.nan_to_num(rest[COMPUTE], nan=np.inf)) < 3 * self._noise[COMPUTE]
        self.model.learn(records, relative, used & learned[COMPUTE] & calm)
        return alarms

    # --- what is taken from the records ---

    def _lanes_moved(self, records: Records) -> None:
        """A worker with another number of lanes: what a step costs it whatever its lanes shifts its time per lane,
        which is no slowness. Its level is learned anew, in the next few steps.
        """
        lanes = records["lanes"].astype(np.int64)
        if self._lanes is not None:
            moved = (lanes != self._lanes) & (self._seen[COMPUTE] >= self.tuning.warm_up)
            if moved.any():
                self._more_lanes = np.where(moved, np.sign(lanes - self._lanes), self._more_lanes)
                self._seen[:3, moved] = np.minimum(self._seen[:3, moved], self.tuning.warm_up - 3)
                self._warm[:3, moved] = np.nan
                self._up[:, moved] = self._down[:, moved] = 0.0
                self._recent[:, :, moved] = np.nan
        self._lanes = lanes

    def _not_excused(self, records: Records) -> Flags:
        flagged = (records["flags"] & EXCUSED) != 0
        self._excused = np.where(flagged, self._excused + 1, 0)
        return np.asarray(~flagged | (self._excused > self.tuning.excuses))

    def _values(self, records: Records, sound: Flags, used: Flags) -> tuple[Floats, Flags]:
        work = self.model.work(records)
        compute = np.maximum(records["compute_s"].astype(np.float64), 1e-9)
        ordinary = np.where(self._seen[COMPUTE] >= self.tuning.warm_up, np.exp(self.level[COMPUTE]) * work, compute)
        _, transfer = parts(records, sound)
        longest = float(np.median(ordinary[used])) if used.any() else 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.stack(
                [
                    np.log(compute / work),
                    np.log1p(records["data_s"] / ordinary),
                    np.log1p(transfer / longest),
                    np.log(work / np.maximum(records["lanes"], 1)),
                ]
            )
        usable = np.broadcast_to(used, values.shape).copy()
        usable[WORK] &= self.model.by_length
        usable[LINK] &= bool(((records["flags"] & EXCUSED) == 0)[sound].all())  # others would be waited for
        return values, usable & np.isfinite(values)

    def _in_common(self, change: Floats) -> Floats:
        """What all peers of a worker share in this step, shape as `change`; 0 where nobody is to be compared with."""
        common = np.zeros_like(change)
        for group in self._groups:
            part = change[:, group]
            if len(group) <= 2:
                nearest = np.nanargmin(np.where(np.isnan(part), np.inf, np.abs(part)), axis=1)
                shared = np.nan_to_num(part[np.arange(len(part)), nearest])
                if len(group) == 1:  # nobody to compare with: its own history alone
                    shared = np.zeros(len(part))
            else:
                shared = _middle(part)
            common[:, group] = shared[:, None]
        return common

    # --- levels ---

    def _warm_up(self, step: int, values: Floats, new: Flags) -> list[Alarm]:
        """Collect the first values of whoever has no level yet; their median is the level."""
        if not new.any():
            return []
        causes, places = np.nonzero(new)
        slots = self._seen[causes, places]
        self._warm[causes, places, slots] = values[causes, places]
        self._seen[causes, places] += 1
        done = self._seen[causes, places] >= self.tuning.warm_up
        if not done.any():
            return []
        causes, places = causes[done], places[done]
        samples = self._warm[causes, places]
        level = np.nanmedian(samples, axis=1)
        before = self.level[causes, places]
        known = np.isfinite(self._best[causes, places])
        level = level - np.where(known, self.common[causes, places], 0.0)
        shift = np.where(known, level - before, 0.0)
        # Of one whose lanes were moved, the best level shifts along: the move is what has changed it. Unless it cannot
        # be: with more lanes a lane should not take longer, nor with fewer of them less.
        more = self._more_lanes[places]
        jumped = (causes == COMPUTE) & (((shift > _JUMP) & (more > 0)) | ((shift < -_JUMP) & (more < 0)))
        best = self._best[causes, places]
        self._best[causes, places] = np.where(known, np.where(jumped, np.minimum(best, level), best + shift), level)
        self.level[causes, places] = level
        middle = np.nanmedian(samples, axis=1)
        spread = 1.4826 * np.nanmedian(np.abs(samples - middle[:, None]), axis=1)
        self._noise[causes, places] = np.maximum(self._noise[causes, places], 1.5 * spread)
        for cause in np.unique(causes):  # few samples each: nobody is assumed to be much steadier than the others
            self._noise[cause] = np.maximum(self._noise[cause], np.median(self._noise[cause]))
        return [
            Alarm(step, step - 2, int(place), "compute", math.exp(change), math.exp(now - self._best[COMPUTE, place]))
            for place, change, now in zip(places[jumped], shift[jumped], level[jumped], strict=True)
        ]

    def _learn_lengths(self, rest: Floats, there: Flags) -> None:
        """How much the work of a step varies for all alike; only then is too much of it worth a word. Its usual level
        is that of equal lanes.
        """
        self._seen[WORK] = 0
        if not there.any():
            return
        self._lengths_seen += 1
        spread = 1.2533 * float(np.mean(np.abs(rest[there])))
        if self._lengths_seen == 1:
            self._noise[WORK] = spread
        self._noise[WORK] += (spread - self._noise[WORK]) / min(self._lengths_seen, 64)
        if self._lengths_seen >= _LENGTHS:
            self._seen[WORK] = self.tuning.warm_up

    def _accumulate(self, step: int, rest: Floats) -> list[Alarm]:
        """One CUSUM step of everybody, in both directions; then the levels follow whoever is calm."""
        t, threshold = self.tuning, self.threshold
        there = ~np.isnan(rest)
        self._recent[self._turn % MEMORY] = rest
        noise = np.maximum(self._noise, t.noise)
        if self.model.by_length:  # what lengths cost is not known well at first
            noise = noise * (1.0 + max(0.0, 1.0 - self._lengths_seen / (2 * _LENGTHS)))
        pace = t.shift / (noise * noise)
        most = np.full((4, 1), STEP_SHARE * threshold)
        most[WORK] /= 4  # many steps: lengths are drawn anew in each
        value = np.where(there, rest, t.shift / 2)  # what is not there moves nothing
        up = np.maximum(0.0, self._up + np.minimum(pace * (value - t.shift / 2), most))
        down = np.maximum(0.0, self._down + np.where(there, np.minimum(pace * (-value - t.shift / 2), most), 0.0))
        self._up_since = np.where((self._up == 0) & (up > 0), self._turn, self._up_since)
        self._down_since = np.where((self._down == 0) & (down > 0), self._turn, self._down_since)
        self._up, self._down = up, down
        self._count_hiccups(rest[COMPUTE] + np.maximum(rest[DATA], 0.0))
        alarms = self._raise(step, np.maximum(up, down) >= threshold)
        calm = there & (np.maximum(self._up, self._down) < threshold / 8)
        self._seen += there
        gain = 1.0 / np.minimum(np.maximum(self._seen, 1), 64)
        follow = np.array([[0.02], [0.02], [0.02], [0.0]])
        gain[WORK] = 0.0
        bounded = np.clip(np.nan_to_num(rest), -3 * noise, 3 * noise)
        closer = np.where(calm, gain * bounded, 0.0) + follow * self.common * (self._seen >= t.warm_up)
        self.level += closer
        self._best[:3] += closer[:3]  # knowing a level better is no slowness: only what was an alarm is
        spread = 1.2533 * np.minimum(np.abs(np.nan_to_num(rest)), 4 * noise)
        calm[WORK] = False
        self._noise += np.where(calm, (spread - self._noise) * np.maximum(gain, 1 / 32), 0.0)
        return alarms

    def _count_hiccups(self, rest: Floats) -> None:
        """A step that takes half as long again, with an ordinary one after it."""
        spike = np.nan_to_num(rest) > _HICCUP
        self.hiccups += self._spiked & ~spike & (np.nan_to_num(rest) < self.tuning.shift / 2)
        self._spiked = spike

    def _raise(self, step: int, over: Flags) -> list[Alarm]:
        """Verify whoever is over the threshold; the level of a verified change is the new one."""
        alarms = []
        for cause, place in zip(*np.nonzero(over), strict=True):
            up = self._up[cause, place] >= self._down[cause, place]
            since = (self._up_since if up else self._down_since)[cause, place]
            length = int(min(MEMORY, self._turn - since + 1))
            turns = np.arange(self._turn - length + 1, self._turn + 1) % MEMORY
            samples = self._recent[turns, cause, place]
            change = float(np.nanmedian(samples))
            if abs(change) < self.tuning.verified or (change > 0) != bool(up):
                # A long weak excess: no alarm, and half of it stays, so that it is looked at again.
                self._up[cause, place] = min(self._up[cause, place], self.threshold / 2)
                self._down[cause, place] = min(self._down[cause, place], self.threshold / 2)
                continue
            best = self._best[cause, place]
            best = self.level[cause, place] if not np.isfinite(best) else best
            before = self.level[cause, place] - best
            self.level[cause, place] += change
            if change < 0 and self.level[cause, place] - best < before / 2:
                best = self.level[cause, place]  # most of the slowness is over; the rest is what moving lanes has added
            self._best[cause, place] = 0.0 if cause == WORK else min(best, self.level[cause, place])
            self._up[cause, place] = self._down[cause, place] = 0.0
            if cause == COMPUTE:
                self._counted[place] = int(np.isfinite(samples).sum())
            self._seen[cause, place] = max(self.tuning.warm_up, int(np.isfinite(samples).sum()))
            slowness = math.exp(self.level[cause, place] - self._best[cause, place])
            onset = step - (self._turn - int(since))
            if cause == WORK and not (up and slowness >= math.exp(self.tuning.verified)):
                continue  # less work than before is nothing to be told
            alarms.append(Alarm(step, onset, int(place), CAUSES[cause], math.exp(change), slowness))
        return alarms


def _middle(rows: Floats) -> Floats:
    """The median of each row without its NaN; 0 where nothing else is there. (NumPy's is slow for short rows.)"""
    ordered = np.sort(rows, axis=1)  # NaN last
    count = (~np.isnan(rows)).sum(axis=1)
    each = np.arange(len(rows))
    found = (ordered[each, np.maximum(count - 1, 0) // 2] + ordered[each, np.maximum(count, 1) // 2 * (count > 1)]) / 2
    return np.asarray(np.where(count > 0, found, 0.0))
