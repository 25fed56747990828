"""Who has become slow, and why: a robust residual for every worker and step, and a CUSUM over it. Pure, vectorised.

Each step gives four numbers per worker, logarithms so that 0.1 is about 10 %:

- *compute*: seconds per unit of work (`WorkModel`), whatever the number of lanes;
- *data*: how much the wait for batches stretches its computation;
- *link*: how much its transfer in the exchange stretches the step, waiting for others taken out;
- *work*: how much work its lanes are, beyond their number. Too much of it is nobody's fault.

From each is taken the worker's own usual level, and what all its peers (same role) have in common in this step: the
median, or, where there are only two, the change nearest to none. What is left drives Page's CUSUM (Biometrika 1954) of
the likelihood ratio against a shift of 15 %, in both directions, in units of the noise. An alarm needs three steps that
agree, or five (a step counts at most 0.4 of the threshold; hiccups in a row are of different sizes), and a median since
its onset of 11 % or more: the verification of Greyhound (ATC 2025). Then the level is the new one. So the levels are
also the learned speeds, from the first steps on. A change that is within what is not known of the level (it was learned
from few steps, or before it was known what lengths cost) corrects it without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

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
    likely_shift,
)
from elastictrain.stragglers.peers import Lately, back_to_best, in_common
from elastictrain.stragglers.robust import spread, variance
from elastictrain.stragglers.signals import EXCUSED, Flags, Floats, Records, checked, dealt, logarithms
from elastictrain.stragglers.work import WorkModel

_HICCUP = math.log(1.5)
_APART = 3.0
"""Standard errors by which a worker's level differs from the median one where its speed counts as another."""
_JUMP = math.log(1.2)
_LENGTHS = 20
"""Steps with unequal lengths after which it is known how much they vary."""
_FEW = 3
_SURE = 5
"""Steps after which a change is believed although they do not agree."""


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
        self._behind = np.full((4, workers), self.tuning.warm_up)  # so many steps are behind a level
        self._zeros = np.ones(workers)
        """Of two workers one always counts as unchanged, of three one is the median: so much of what is left is 0."""
        for group in self._groups:
            self._zeros[group] = {2: 2.0, 3: 1.5}.get(len(group), 1.0)
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
        self.lanes = np.zeros(workers, dtype=np.int64)  # 0: not known, or none
        self._lately = Lately(4, workers, self._groups)
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
        usual = np.zeros(self.workers)
        for group in self._groups:
            usual[group] = np.median(level[group])
        told = np.abs(level - usual) > _APART * error
        return np.where(self.ready, np.exp(np.where(told, level, usual) + self.common[COMPUTE]), np.nan)

    @property
    def suspected(self) -> Flags:
        """Whose computation seems to become slower or faster, and is looked at further."""
        return np.asarray(np.maximum(self._up, self._down)[COMPUTE] >= STEP_SHARE * self.threshold)

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

    def observe(self, step: int, records: Records, sound: Flags | None = None) -> list[Alarm]:
        """Take in a step; what has changed. `records` has one for every worker, in the order of their places. `sound`:
        which of them are believed (default: what can be true of itself).
        """
        if len(records) != self.workers:
            raise ValueError(f"{len(records)} records for {self.workers} workers")
        sound = checked(records) if sound is None else sound
        self.ignored += ~sound
        self._turn += 1
        self._lanes_moved(records, sound)
        self.model.note(records, sound)
        if self._turn <= self.tuning.skip:
            return []
        used = sound & (records["lanes"] > 0) & self._not_excused(records)
        values, usable = self._values(records, sound, used)
        change = np.where(usable, values - self.level, np.nan)
        learned = usable & (self._seen >= self.tuning.warm_up)
        learned[WORK] = usable[WORK]
        self._lately.add(values, learned)
        theirs = np.where(learned, change, np.nan)
        back = back_to_best(change, self.level, self._best, self.tuning.verified)
        sure = not self.model.by_length or self._lengths_seen > 3 * _LENGTHS  # else levels are not known well
        lately = self._lately if sure else None
        anew = np.where(usable & ~learned & np.isfinite(self._best), change, np.nan)
        anew[WORK] = np.nan
        self.common = in_common(
            theirs, self._groups, changed=back, anew=anew, lately=lately, level=self.level, noise=self._noise
        )
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

    def _lanes_moved(self, records: Records, sound: Flags) -> None:
        """A worker with another number of lanes: what a step costs it whatever its lanes shifts its time per lane,
        which is no slowness. Its level is learned anew, in the next few steps.
        """
        lanes = np.where(sound, dealt(records), self.lanes)
        moved = (lanes != self.lanes) & (self.lanes > 0) & (self._seen[COMPUTE] >= self.tuning.warm_up)
        if moved.any():
            self._more_lanes = np.where(moved, np.sign(lanes - self.lanes), self._more_lanes)
            self._seen[:3, moved] = np.minimum(self._seen[:3, moved], self.tuning.warm_up - 3)
            self._warm[:3, moved] = np.nan
            self._up[:, moved] = self._down[:, moved] = 0.0
            self._recent[:, :, moved] = np.nan
            self._lately.forget(moved)
        self.lanes = lanes

    def _not_excused(self, records: Records) -> Flags:
        flagged = (records["flags"] & EXCUSED) != 0
        self._excused = np.where(flagged, self._excused + 1, 0)
        return np.asarray(~flagged | (self._excused > self.tuning.excuses))

    def _values(self, records: Records, sound: Flags, used: Flags) -> tuple[Floats, Flags]:
        work = self.model.work(records)
        compute = np.maximum(records["compute_s"].astype(np.float64), 1e-9)
        # Of lanes of mean length: what one waits for data does not depend on the lengths of just these lanes.
        mean = np.exp(self.level[COMPUTE]) * np.maximum(records["lanes"], 1)
        ordinary = np.where(self._seen[COMPUTE] >= self.tuning.warm_up, mean, compute)
        values = logarithms(records, sound, used, work, ordinary)
        usable = np.broadcast_to(used, values.shape).copy()
        usable[WORK] &= self.model.by_length
        usable[LINK] &= bool(((records["flags"] & EXCUSED) == 0)[sound].all())  # others would be waited for
        return values, usable & np.isfinite(values)

    # --- levels ---

    def _warm_up(self, step: int, values: Floats, new: Flags) -> list[Alarm]:
        """Collect the first values of whoever has no level yet; their median is the level."""
        if not new.any():
            return []
        causes, places = np.nonzero(new)
        slots = self._seen[causes, places]
        known = np.isfinite(self._best[causes, places])
        # What peers shared in each of these steps, not in the last one: of few peers one may just have a hiccup.
        self._warm[causes, places, slots] = values[causes, places] - np.where(known, self.common[causes, places], 0.0)
        self._seen[causes, places] += 1
        done = self._seen[causes, places] >= self.tuning.warm_up
        if not done.any():
            return []
        causes, places = causes[done], places[done]
        samples = self._warm[causes, places]
        level = np.nanmedian(samples, axis=1)
        before = self.level[causes, places]
        known = np.isfinite(self._best[causes, places])
        shift = np.where(known, level - before, 0.0)
        apart = 1.4826 * np.nanmedian(np.abs(samples - np.nanmedian(samples, axis=1)[:, None]), axis=1)
        self._noise[causes, places] = np.maximum(self._noise[causes, places], 1.5 * apart)
        for cause in np.unique(causes):  # few samples each: nobody is assumed to be much steadier than the others
            likely = np.median if self.workers > _FEW else np.max  # of five samples of few workers it is hardly known
            self._noise[cause] = np.maximum(self._noise[cause], likely(self._noise[cause]))
        noise, count = self._likely_noise()[causes, places], np.isfinite(samples).sum(axis=1)
        unknown = _APART * np.sqrt(variance(noise, count) + variance(noise, self._behind[causes, places]))
        self._behind[causes, places] = count
        # Of one whose lanes were moved, the best level shifts along: the move is what has changed it. Unless it cannot
        # be: with more lanes a lane should not take longer, nor with fewer of them less.
        more = self._more_lanes[places]
        jump = np.maximum(_JUMP, unknown)
        jumped = (causes == COMPUTE) & (((shift > jump) & (more > 0)) | ((shift < -jump) & (more < 0)))
        best = self._best[causes, places]
        self._best[causes, places] = np.where(known, np.where(jumped, np.minimum(best, level), best + shift), level)
        self.level[causes, places] = level
        return [
            Alarm(step, step - 2, int(place), "compute", math.exp(change),
                  math.exp(now - self._best[COMPUTE, place]), math.exp(was))
            for place, change, now, was in zip(
                places[jumped], shift[jumped], level[jumped], (before - best)[jumped], strict=True
            )
        ]  # fmt: skip

    def _learn_lengths(self, rest: Floats, there: Flags) -> None:
        """How much the work of a step varies for all alike; only then is too much of it worth a word. Its usual level
        is that of equal lanes.
        """
        self._seen[WORK] = 0
        if not there.any():
            return
        self._lengths_seen += 1
        apart = 1.2533 * float(np.mean(np.abs(rest * self._zeros)[there]))
        if self._lengths_seen == 1:
            self._noise[WORK] = apart
        self._noise[WORK] += (apart - self._noise[WORK]) / min(self._lengths_seen, 64)
        if self._lengths_seen >= _LENGTHS:
            self._seen[WORK] = self.tuning.warm_up

    def _accumulate(self, step: int, rest: Floats) -> list[Alarm]:
        """One CUSUM step of everybody, in both directions; then the levels follow whoever is calm."""
        t, threshold = self.tuning, self.threshold
        there = ~np.isnan(rest)
        self._recent[self._turn % MEMORY] = rest
        noise = self._likely_noise()
        shift = likely_shift(t, noise)
        shift[WORK] = t.shift
        pace = shift / (noise * noise)
        most = np.full((4, 1), STEP_SHARE * threshold)
        most[WORK] /= 4  # many steps: lengths are drawn anew in each
        value = np.where(there, rest, shift / 2)  # what is not there moves nothing
        up = np.maximum(0.0, self._up + np.minimum(pace * (value - shift / 2), most))
        down = np.maximum(0.0, self._down + np.where(there, np.minimum(pace * (-value - shift / 2), most), 0.0))
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
        apart = 1.2533 * np.minimum(np.abs(np.nan_to_num(rest)) * self._zeros, 4 * noise)
        calm[WORK] = False
        self._behind = np.minimum(self._behind + calm, 64)
        self._noise += np.where(calm, (apart - self._noise) * np.maximum(gain, 1 / 32), 0.0)
        return alarms

    def _count_hiccups(self, rest: Floats) -> None:
        """A step that takes half as long again, with an ordinary one after it."""
        spike = np.nan_to_num(rest) > _HICCUP
        self.hiccups += self._spiked & ~spike & (np.nan_to_num(rest) < self.tuning.shift / 2)
        self._spiked = spike

    def _likely_noise(self) -> Floats:
        """What is known of the noise, and more of it while it is not known well what lengths cost."""
        noise = np.maximum(self._noise, self.tuning.noise)
        if self.model.by_length:
            noise = noise * (1.0 + max(0.0, 1.0 - self._lengths_seen / (2 * _LENGTHS)))
        return np.asarray(noise)

    def _raise(self, step: int, over: Flags) -> list[Alarm]:
        """Verify whoever is over the threshold; the level of a verified change is the new one."""
        alarms = []
        likely = self._likely_noise() if over.any() else self._noise
        for cause, place in zip(*np.nonzero(over), strict=True):
            up = self._up[cause, place] >= self._down[cause, place]
            since = (self._up_since if up else self._down_since)[cause, place]
            length = int(min(MEMORY, self._turn - since + 1))
            turns = np.arange(self._turn - length + 1, self._turn + 1) % MEMORY
            samples = self._recent[turns, cause, place]
            samples = samples[np.isfinite(samples)]
            change, noise = float(np.median(samples)), float(likely[cause, place])
            if abs(change) < self.tuning.verified or (change > 0) != bool(up):
                self._wait(cause, place, 0.5)  # a long weak excess: no alarm, and half of it stays, to look again
                continue
            doubt = variance(noise, len(samples)) + variance(noise, int(self._behind[cause, place]))
            unknown = _APART * math.sqrt(doubt)
            told = cause == WORK or abs(change) >= unknown
            disagree = cause != WORK and np.ptp(samples) > max(6 * noise, abs(change) / 4)  # hiccups in a row?
            if (disagree and len(samples) < _SURE) or (not told and len(samples) < 2 * _SURE):
                self._wait(cause, place, 1 - STEP_SHARE / 2)
                continue
            before = self._change_level(cause, place, samples, told)
            slowness = math.exp(self.level[cause, place] - self._best[cause, place])
            onset = step - (self._turn - int(since))
            if cause == WORK and not (up and slowness >= math.exp(self.tuning.verified)):
                continue  # less work than before is nothing to be told
            if told:
                alarms.append(Alarm(step, onset, int(place), CAUSES[cause], math.exp(change), slowness, before))
        return alarms

    def _wait(self, cause: int, place: int, share: float) -> None:
        """No alarm yet: of what speaks for one, this share of the threshold stays."""
        self._up[cause, place] = min(self._up[cause, place], self.threshold * share)
        self._down[cause, place] = min(self._down[cause, place], self.threshold * share)

    def _change_level(self, cause: int, place: int, samples: Floats, told: bool) -> float:
        """Take the new level from the samples since the onset. If not `told`, the old one was not known well. Returns
        how many times as long as at its best it took before.
        """
        change, count = float(np.median(samples)), len(samples)
        best = self._best[cause, place]
        best = self.level[cause, place] if not np.isfinite(best) else best
        before = self.level[cause, place] - best
        self.level[cause, place] += change
        if change < 0 and self.level[cause, place] - best < before / 2:
            best = self.level[cause, place]  # most of the slowness is over; the rest is what moving lanes has added
        if not told:
            best = self.level[cause, place] - before
        self._best[cause, place] = 0.0 if cause == WORK else min(best, self.level[cause, place])
        self._up[cause, place] = self._down[cause, place] = 0.0
        if cause != WORK:
            self._noise[cause, place] = max(self._noise[cause, place], spread(samples))
            self._behind[cause, place] = count
        if cause == COMPUTE:
            self._counted[place] = count
        self._seen[cause, place] = max(self.tuning.warm_up, count)
        return math.exp(before)
