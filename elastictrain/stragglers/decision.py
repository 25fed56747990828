"""What to do about slow workers: nothing, move lanes, replace one by a spare, leave one out. Pure.

Lanes first: they cost next to nothing and change no bit. Their split is the planner's exact one. A worker is replaced
or left out only for what moving lanes cannot give back. Every move is verified: when it is known not to bring half of
what was promised it is taken back, and no lanes move again before somebody becomes slow or fast, or 1,000 steps have
passed; what noise hides stays. A worker that has become fast again gets its lanes back when it has stayed so, for a
time that doubles each time it was slow lately; so nothing swings. Where there is no memory for the best split, the best
one is made that fits; what that does not give back is what a worker may be replaced or left out for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from statistics import median
from typing import Literal

from elastictrain.planner.split import split_affine
from elastictrain.stragglers.patience import Patience
from elastictrain.stragglers.rental import Case, pays, prior_s
from elastictrain.stragglers.room import PLENTY, Answers, Fits, Found, Room, best_with_room, makespan_s
from elastictrain.stragglers.trial import judged

Action = Literal["move_lanes", "move_back", "replace", "leave_out"]
Instead = Literal["smaller_move", "replace", "leave_out", "nothing"]
_INSTEAD: dict[str, Instead] = {"move_lanes": "smaller_move", "replace": "replace", "leave_out": "leave_out"}
_TURNING = 2.0
"""So many times the least gain must a move win that corrects the last one: it may be noise that asks for either."""
_PENDING_STEPS = 50
_USUAL_STEPS = 15
_ASKED_AGAIN = 5
"""For which split there is room is asked again after so many times `hold_steps`, if nothing else has changed."""


@dataclass(frozen=True, slots=True)
class Policy:
    """`min_gain`: share of a step that a move must win. `hold_steps`: between two moves. `verify_steps`: over which a
    move is judged. `lanes_cost_steps`: what moving lanes costs, in steps (batches of the new lanes have not been read
    ahead). `replace_cost_s`, `leave_cost_s`: a pause. `evict`: whether workers may be replaced or left out at all.
    `evicted_share`, `per_s`: at most this share of the workers (and always one) within that time. `memory_steps`: for
    how long a worker's slow times count against it.
    """

    min_gain: float = 0.03
    hold_steps: int = 10
    verify_steps: int = 6
    lanes_cost_steps: float = 1.0
    replace_cost_s: float = 5.0
    leave_cost_s: float = 5.0
    evict: bool = False
    evicted_share: float = 0.05
    per_s: float = 3600.0
    memory_steps: int = 1000


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known at a step, by place of the workers.

    `lanes`: in force. `unit_s`: seconds that each needs for a lane, noise taken out: who cannot be told from its peers
    counts as one of them. `own_s`: as they were measured (default: the same). `arrived_s`: when the last of them had
    computed its lanes in this step; None if the step says nothing (a checkpoint, an evaluation). `elapsed_s`: since the
    start, as the steps add up. `left_steps`: of the run. `work`: of this step's lanes, in mean lanes (default: their
    number). `slow`: whose slowness is known, with the step of its onset. `spares`: that wait. `least_workers`: fewer
    must not be left. `room`: which splits there is memory for. `frozen`: who cannot be believed at this step; it keeps
    its lanes and its place, except that a move which has brought nothing is taken back as a whole.
    """

    step: int
    lanes: tuple[int, ...]
    unit_s: tuple[float, ...]
    arrived_s: float | None
    elapsed_s: float
    left_steps: int
    work: tuple[float, ...] = ()
    slow: Mapping[int, int] = field(default_factory=dict)
    spares: int = 0
    least_workers: int = 1
    own_s: tuple[float, ...] = ()
    room: Room = PLENTY
    frozen: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """`lanes` for moves; `worker` (its place) for the others. `before_s`, `after_s`: of a step's computation, as it is
    and as it is expected to be. `why` in words.
    """

    action: Action
    step: int
    why: str
    before_s: float
    after_s: float
    lanes: tuple[int, ...] = ()
    worker: int | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """There is no room for the split that speeds ask for (`lanes`), and why. `instead`: what is done."""

    lanes: tuple[int, ...]
    reason: str
    instead: Instead


@dataclass(slots=True)
class _Trial:
    """A move whose gain is being looked at. `unit_s`, `slow`: as known when it was decided. `usual`: how much later
    than expected the last worker arrives anyway (the largest of many noisy times is above its mean). `began`: the step
    from which its lanes were in force. `won`, `promised`: seconds of each step since, for the work that it had.
    """

    decision: Decision
    lanes_before: tuple[int, ...]
    unit_s: tuple[float, ...]
    slow: dict[int, int]
    usual: float
    began: int | None = None
    won: list[float] = field(default_factory=list)
    promised: list[float] = field(default_factory=list)

    def add(self, arrived_s: float, work: Sequence[float]) -> None:
        """One step: what it would have taken before the move, what it should take now, and what it took."""
        now_s = max(unit * own for unit, own in zip(self.unit_s, work, strict=True))
        before_s = max(
            unit * own * old / new
            for unit, own, old, new in zip(self.unit_s, work, self.lanes_before, self.decision.lanes, strict=True)
        )
        self.won.append(before_s - arrived_s / self.usual)
        self.promised.append(before_s - now_s)


class Decider:
    """Decides for one generation's workers; `outcomes` says what became of its moves. `evicted_s`: when workers were
    told to go before, by `Situation.elapsed_s`; it goes on being written to, since whoever goes ends the generation.
    """

    def __init__(self, workers: int, policy: Policy | None = None, *, evicted_s: list[float] | None = None) -> None:
        self.policy = policy or Policy()
        self.workers = workers
        self.outcomes: list[str] = []
        self._trial: _Trial | None = None
        self._recent: list[float] = []
        self._hold_until = 0
        self._refuted: tuple[dict[int, int], int] = ({}, 0)
        self._patience = Patience(self.policy.hold_steps, self.policy.memory_steps)
        self._last_ways: tuple[tuple[int, ...], set[int]] = ((), set())
        self._lost_s: dict[tuple[str, int], float] = {}
        self._evicted_s = [] if evicted_s is None else evicted_s
        self._answers = Answers(_ASKED_AGAIN * self.policy.hold_steps)
        self._told_refused: set[frozenset[int]] = set()
        self.refused: Refused | None = None

    @property
    def judges(self) -> bool:
        """Whether a move is being verified, or waits to be heard of."""
        return self._trial is not None

    def decide(self, now: Situation) -> Decision | None:
        """What to do after this step; None: nothing. `refused` is what is to be told besides, once of the same slow
        workers: that there is no room for what would be best.
        """
        self.refused = None
        if len(now.lanes) != self.workers or len(now.unit_s) != self.workers:
            raise ValueError(f"{len(now.lanes)} lane counts, {len(now.unit_s)} speeds for {self.workers} workers")
        self._patience.note(now.step, now.slow, now.unit_s)
        trial = self._trial
        if trial is not None:
            back = self._verify(now, trial)
            if back is not None or self._trial is not None:
                return back
        before_s = makespan_s(now.unit_s, now.lanes)
        if now.arrived_s is not None and trial is None:
            expected_s = makespan_s(now.unit_s, now.work or now.lanes)
            self._recent = [*self._recent[1 - _USUAL_STEPS :], now.arrived_s / max(expected_s, 1e-9)]
        found = self._split(now, before_s)
        best = found.lanes or now.lanes
        after_s = makespan_s(now.unit_s, best)
        self._count_losses(now, before_s, after_s)
        if now.step < self._hold_until:
            return None
        slow, until = self._refuted
        knows_better = now.step >= until or dict(now.slow) != slow
        move = self._move(now, best, before_s, after_s) if knows_better else None
        decision = move or self._evict(now, min(before_s, after_s))
        if knows_better and found.lack is not None:
            self._tell_refused(now, found, before_s, after_s, decision)
        return decision

    # --- lanes ---

    def _split(self, now: Situation, before_s: float, *, patient: bool = True) -> Found:
        """The best split, and the best that fits, if it wins enough for anybody to ask."""
        units = self._patience.trusted(now.step, now.slow, now.unit_s, patient=patient)
        total = sum(now.lanes)
        least = [lanes if place in now.frozen else min(1, lanes) for place, lanes in enumerate(now.lanes)]
        most = [lanes if place in now.frozen else total for place, lanes in enumerate(now.lanes)]
        wanted = split_affine(total, [0.0] * self.workers, units, least=least, most=most, before=now.lanes).parts
        if now.room is PLENTY or not self._wins(before_s, makespan_s(now.unit_s, wanted)):
            return Found(wanted, wanted, None)
        what, about = ("lanes", patient), _about(now)
        known = self._answers.get(what, about, now.step)
        if known is not None and (known.lack is not None or known.wanted == wanted):
            return known
        found = best_with_room(total, units, now.room.split, least=least, most=most, before=now.lanes)
        return self._answers.keep(what, about, now.step, found)

    def _wins(self, before_s: float, after_s: float, times: float = 1.0) -> bool:
        return after_s <= (1 - times * self.policy.min_gain) * before_s

    def _turns(self, now: Situation, lanes: tuple[int, ...]) -> bool:
        """Whether somebody's lanes go the other way than in the last move, and nobody has become slow or fast since."""
        ways, slow = self._last_ways
        turned = (way * (new - old) < 0 for way, old, new in zip(ways, now.lanes, lanes, strict=False))
        return slow == set(now.slow) and any(turned)

    def _move(self, now: Situation, lanes: tuple[int, ...], before_s: float, after_s: float) -> Decision | None:
        times = _TURNING if self._turns(now, lanes) else 1.0
        if lanes == now.lanes or not self._wins(before_s, after_s, times):
            return None
        own_s = now.own_s or now.unit_s
        own_gain_s = makespan_s(own_s, now.lanes) - makespan_s(own_s, lanes)
        if own_gain_s < (before_s - after_s) / 2:
            return None  # who is not told from its peers yet may well be slow, and the step would be as long for it
        why = self._lanes_pay(now, before_s, after_s)
        if why is None:
            return None
        # Lanes move now: then those of a worker that is fast again go back in the same move, unless it was so before.
        lanes = self._split(now, before_s, patient=False).lanes or lanes
        decision = Decision("move_lanes", now.step, why, before_s, makespan_s(now.unit_s, lanes), lanes)
        self._last_ways = (tuple(new - old for old, new in zip(now.lanes, lanes, strict=True)), set(now.slow))
        usual = max(1.0, median(self._recent)) if self._recent else 1.0
        self._trial = _Trial(decision, now.lanes, now.unit_s, dict(now.slow), usual)
        self._lost_s.pop(("lanes", -1), None)
        return decision

    def _lanes_pay(self, now: Situation, before_s: float, after_s: float) -> str | None:
        cost_s = self.policy.lanes_cost_steps * after_s
        onset = min(now.slow.values(), default=now.step)
        case = Case(
            before_s - after_s, cost_s, cost_s, before_s, self._lost_s.get(("lanes", -1), 0.0),
            (now.step - onset) * before_s, now.left_steps * before_s,
        )  # fmt: skip
        return pays(case, prior=prior_s(self.workers))

    def _tell_refused(
        self, now: Situation, found: Found, before_s: float, after_s: float, decision: Decision | None
    ) -> None:
        """That there is no room for the best split: when something else is done, or when nothing can be."""
        who = frozenset(now.slow)
        if found.lack is None or who in self._told_refused:
            return
        if decision is None:
            could = self._wins(before_s, after_s) or self._options(now, min(before_s, after_s))
            if could or self._lanes_pay(now, before_s, makespan_s(now.unit_s, found.wanted)) is None:
                return
        instead = "nothing" if decision is None else _INSTEAD[decision.action]
        self._told_refused.add(who)
        self.refused = Refused(found.wanted, found.lack.reason, instead)

    def _verify(self, now: Situation, trial: _Trial) -> Decision | None:
        """Whether the move brings what was promised; if not, the way back."""
        decision = trial.decision
        if now.lanes != decision.lanes:
            if trial.began is not None or now.step > decision.step + _PENDING_STEPS:
                self._end_trial(now, "overtaken")  # somebody else has dealt the lanes out, or it was never heard
            return None
        if trial.began is None:
            trial.began = now.step
            return None  # the first step under a new split reads data that nobody has asked for ahead
        if dict(now.slow) != trial.slow:
            self._end_trial(now, "overtaken")
            return None
        if now.arrived_s is not None:
            trial.add(now.arrived_s, now.work or now.lanes)
        verdict = judged(
            trial.won, trial.promised, since=now.step - trial.began, verify_steps=self.policy.verify_steps,
            returning=decision.action == "move_back",
        )  # fmt: skip
        if verdict is None:
            return None
        if verdict != "taken back":
            moved_back = decision.action == "move_back" and verdict == "confirmed"
            self._end_trial(now, "moved back" if moved_back else verdict)
            return None
        won_s, promised_s = median(trial.won), median(trial.promised)
        why = f"it won {won_s:.3g} s a step instead of {promised_s:.3g} s"
        back = Decision("move_back", now.step, why, decision.after_s, decision.before_s, trial.lanes_before)
        self.outcomes.append("taken back")
        self._trial = _Trial(back, now.lanes, trial.unit_s, dict(now.slow), trial.usual)
        return back

    def _end_trial(self, now: Situation, outcome: str) -> None:
        self.outcomes.append(outcome)
        self._trial = None
        self._hold_until = now.step + (0 if outcome == "overtaken" else self.policy.hold_steps)
        if outcome == "moved back":
            self._refuted = (dict(now.slow), now.step + self.policy.memory_steps)

    # --- workers ---

    def _without(self, now: Situation, worker: int) -> float:
        """Seconds of computation of a step when all but one share the lanes; infinite if there is no room for that."""
        units = [unit for place, unit in enumerate(now.unit_s) if place != worker]
        return self._shared_s(now, ("leave_out", worker), units, partial(now.room.without, worker))

    def _replaced(self, now: Situation, worker: int) -> float:
        """The same when a worker like the median one takes its place."""
        units = list(now.unit_s)
        units[worker] = median(unit for place, unit in enumerate(units) if place != worker)
        return self._shared_s(now, ("replace", worker), units, partial(now.room.replaced, worker))

    def _shared_s(self, now: Situation, what: tuple[Action, int], units: list[float], fits: Fits) -> float:
        total, least = sum(now.lanes), [1] * len(units)
        if now.room is PLENTY:
            return split_affine(total, [0.0] * len(units), units, least=least).makespan
        about = _about(now)
        found = self._answers.get(what, about, now.step) or self._answers.keep(
            what, about, now.step, best_with_room(total, units, fits, least=least)
        )
        return inf if found.lanes is None else makespan_s(units, found.lanes)

    def _options(self, now: Situation, with_lanes_s: float) -> list[tuple[float, Action, int, float]]:
        """(cost, action, worker, seconds of a step after it), the cheapest first."""
        if not self.policy.evict or self.workers < 2:
            return []
        options: list[tuple[float, Action, int, float]] = []
        for worker in sorted(set(now.slow) - now.frozen):
            if now.spares:
                options.append((self.policy.replace_cost_s, "replace", worker, self._replaced(now, worker)))
            if self.workers > max(1, now.least_workers):
                options.append((self.policy.leave_cost_s, "leave_out", worker, self._without(now, worker)))
        worth = [option for option in options if option[3] < (1 - self.policy.min_gain) * with_lanes_s]
        return sorted(worth, key=lambda option: (option[0], option[3], option[2]))

    def _count_losses(self, now: Situation, before_s: float, after_s: float) -> None:
        """What is lost in this step for want of each change."""
        if after_s < before_s:
            self._lost_s[("lanes", -1)] = self._lost_s.get(("lanes", -1), 0.0) + before_s - after_s
        kept = {("lanes", -1)}
        for _, action, worker, then_s in self._options(now, min(before_s, after_s)):
            key = (action, worker)
            kept.add(key)
            self._lost_s[key] = self._lost_s.get(key, 0.0) + min(before_s, after_s) - then_s
        self._lost_s = {key: lost for key, lost in self._lost_s.items() if key in kept}

    def _evict(self, now: Situation, with_lanes_s: float) -> Decision | None:
        self._evicted_s[:] = [at for at in self._evicted_s if at > now.elapsed_s - self.policy.per_s]
        if len(self._evicted_s) >= max(1, int(self.policy.evicted_share * self.workers)):
            return None
        for cost_s, action, worker, then_s in self._options(now, with_lanes_s):
            case = Case(
                with_lanes_s - then_s, cost_s, cost_s, with_lanes_s, self._lost_s.get((action, worker), 0.0),
                (now.step - now.slow[worker]) * with_lanes_s, now.left_steps * with_lanes_s,
            )  # fmt: skip
            why = pays(case, prior=prior_s(self.workers))
            if why is not None:
                self._evicted_s.append(now.elapsed_s)
                self._hold_until = now.step + 4 * self.policy.hold_steps
                return Decision(action, now.step, why, with_lanes_s, then_s, worker=worker)
        return None


def _about(now: Situation) -> object:
    """While this is the same, so is what there is room for."""
    return now.lanes, frozenset(now.slow), now.spares, now.frozen
