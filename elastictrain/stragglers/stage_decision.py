"""What to do about slow places of pipelines: nothing, move layers, swap roles, replace by a spare, leave out. Pure.

Like moving lanes (`decision`), with two differences. A change costs a pause for all and the state that moves, so it is
made when it pays (`rental`), and of all changes that pay the one is made that is expected to take the least time in
all, itself included. And going back costs as much: a change that has not brought half of what it promised is taken back
where the placement before is so much better, by what was measured, that it pays; where it is not, things stay as they
are. Either way nothing more is done for the same slow workers for `memory_steps`. And before anything is done the steps
themselves must show the slowness: a worker may say that it is slow, but the others would wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from elastictrain.planner.pipelines import Pipelines, Placement
from elastictrain.stragglers.decision import Policy
from elastictrain.stragglers.patience import Patience
from elastictrain.stragglers.rental import Case, pays, prior_s, remaining_s
from elastictrain.stragglers.stage_ways import ACTIONS, Change, Price, StageAction, Way, changes_of, ways_of
from elastictrain.stragglers.trial import judged

_EVICTIONS = ("replace", "leave_out")
_KEPT_ANSWERS = 64
_TURNING = 2.0
"""So many times the least gain must a change win that corrects the last one."""
_USUAL_STEPS = 15
_KEPT_STEPS = 32
_MOST_WAITING = 5
_PENDING_STEPS = 50


@dataclass(frozen=True, slots=True)
class StageSituation:
    """What is known at a step. `placements`: in force, one for each pipeline. `factors`: by worker, how many times as
    long as its device it takes. `slow`: who of those in a pipeline is known to be slow, with the step of its onset.
    `took_s`: this step; None when it says nothing (a checkpoint, the first one after a change). `elapsed_s`: since the
    start. `left_steps`: of the run. `spares`: who waits. `unsettled`: somebody else may have become slow, or fast, too;
    that is known in a few steps. `frozen`: who cannot be believed at this step; a pipeline with one of them stays as it
    is, except that a change which has brought nothing is taken back as a whole.
    """

    step: int
    placements: tuple[Placement, ...]
    factors: tuple[float, ...]
    took_s: float | None
    elapsed_s: float
    left_steps: int
    slow: Mapping[int, int] = field(default_factory=dict)
    spares: tuple[int, ...] = ()
    unsettled: bool = False
    frozen: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class StageDecision:
    """`placements`: of all pipelines from now on. `before_s`, `after_s`: of a step, as it is and as it is expected to
    be; `cost_s`: of the change. `why` in words.
    """

    action: StageAction | Literal["move_back"]
    step: int
    why: str
    before_s: float
    after_s: float
    cost_s: float
    placements: tuple[Placement, ...]


@dataclass(slots=True)
class _Trial:
    """A change whose gain is being looked at. `usual`: how many times as long as expected steps took before it."""

    decision: StageDecision
    before: tuple[Placement, ...]
    slow: dict[int, int]
    usual: float
    began: int | None = None
    won: list[float] = field(default_factory=list)
    promised: list[float] = field(default_factory=list)


class StageDecider:
    """Decides for the pipelines of one run; `outcomes` says what became of its changes. `allowed`: what it may do;
    `replace` and `leave_out` are bounded as `Policy` says, too.
    """

    def __init__(
        self,
        work: Pipelines,
        policy: Policy | None = None,
        *,
        price: Price | None = None,
        allowed: Sequence[StageAction] = ACTIONS,
    ) -> None:
        self.work, self.policy, self.price, self.allowed = work, policy or Policy(), price or Price(), tuple(allowed)
        self.outcomes: list[str] = []
        self._patience = Patience(self.policy.hold_steps, self.policy.memory_steps)
        self._trial: _Trial | None = None
        self._usual: list[float] = []
        """How many times as long as expected steps took while nobody was slow."""
        self._took: list[tuple[int, float]] = []
        self._measured: tuple[Placement, ...] = ()
        self._home: tuple[Placement, ...] = ()
        self._hold_until = self._waited = 0
        self._refuted: tuple[dict[int, int], int] = ({}, 0)
        self._last_ways: tuple[dict[int, int], set[int]] = ({}, set())
        self._lost_s: dict[tuple[Placement, ...], float] = {}
        self._evicted_s: list[float] = []
        self._changes: tuple[object, list[Change]] = (None, [])
        self._known_s: dict[tuple[tuple[Placement, ...], tuple[float, ...]], float] = {}

    def fleet_s(self, placements: Sequence[Placement], factors: Sequence[float]) -> float:
        """Seconds of a step by the model: of the slowest pipeline."""
        about = tuple(placements), tuple(factors)
        if about not in self._known_s:
            if len(self._known_s) >= _KEPT_ANSWERS:
                self._known_s.clear()
            self._known_s[about] = max(self.work.step_s(placement, factors) for placement in placements)
        return self._known_s[about]

    def decide(self, now: StageSituation) -> StageDecision | None:
        """What to do after this step; None: nothing. While nobody is slow the placements of the first step stay, even
        if others would be better.
        """
        self._home = self._home or now.placements
        self._patience.note(now.step, now.slow, now.factors)
        self._measure(now)
        if self._trial is not None:
            back = self._verify(now, self._trial)
            if back is not None or self._trial is not None:
                return back
        trusted = self._patience.trusted(now.step, now.slow, now.factors)
        before_s = self.fleet_s(now.placements, trusted)
        changes = [change for change in self._possible(now, trusted) if self._wins(now, change, before_s)]
        self._lost_s = {
            change.placements: self._lost_s.get(change.placements, 0.0) + before_s - change.step_s for change in changes
        }
        slow, until = self._refuted
        if not now.slow and now.placements == self._home:
            return None
        self._waited = self._waited + 1 if now.unsettled else 0
        if 0 < self._waited <= _MOST_WAITING:
            return None  # one pause for all
        if now.step < self._hold_until or (now.step < until and dict(now.slow) == slow):
            return None
        return self._pick(now, [change for change in changes if self._shows(now, change)], before_s)

    def _measure(self, now: StageSituation) -> None:
        """Keep what steps have taken under these placements, and what is usual of that."""
        if now.placements != self._measured:
            self._took, self._measured = [], now.placements
        if now.took_s is None:
            return
        self._took = [*self._took[1 - _KEPT_STEPS :], (now.step, now.took_s)]
        if not now.slow or not self._usual:
            ratio = now.took_s / self.fleet_s(now.placements, now.factors)
            self._usual = [*self._usual[1 - _USUAL_STEPS :], ratio]

    def _shows(self, now: StageSituation, change: Change) -> bool:
        """Whether it wins by what is known now, too (`trusted` is what is dealt out by), and steps have been so long,
        since somebody became slow, that half of the gain is there to be won.
        """
        before_s, after_s = (self.fleet_s(one, now.factors) for one in (now.placements, change.placements))
        if after_s > (1 - self.policy.min_gain) * before_s:
            return False
        if not now.slow:
            return True
        onset = max(now.slow.values())
        since = [took_s for step, took_s in self._took if step >= onset]
        return bool(since) and median(since) / median(self._usual) >= (before_s + after_s) / 2

    # --- choosing ---

    def _possible(self, now: StageSituation, trusted: Sequence[float]) -> list[Change]:
        """Every change worth a look; worked out anew when anything of it is another."""
        may_evict = self._may_evict(now)
        allowed = tuple(action for action in self.allowed if may_evict or action not in _EVICTIONS)
        about = now.placements, tuple(trusted), tuple(sorted(now.slow)), now.spares, allowed, now.frozen
        if self._changes[0] != about:
            each: list[list[Way]] = [
                ways_of(self.work, placement, trusted, slow=sorted(now.slow), spares=now.spares, price=self.price,
                        allowed=() if now.frozen & set(placement.seats) else allowed)
                for placement in now.placements
            ]  # fmt: skip
            self._changes = about, changes_of(each, self.price)
        return self._changes[1]

    def _may_evict(self, now: StageSituation) -> bool:
        self._evicted_s = [at for at in self._evicted_s if at > now.elapsed_s - self.policy.per_s]
        seats = sum(len(placement.seats) for placement in now.placements)
        return len(self._evicted_s) < max(1, int(self.policy.evicted_share * seats))

    def _wins(self, now: StageSituation, change: Change, before_s: float) -> bool:
        ways, slow = self._last_ways
        moved = _moved(now.placements, change.placements)
        turns = slow == set(now.slow) and any(ways.get(worker, 0) * more < 0 for worker, more in moved.items())
        times = _TURNING if turns else 1.0
        return change.step_s <= (1 - times * self.policy.min_gain) * before_s

    def _pick(self, now: StageSituation, changes: Sequence[Change], before_s: float) -> StageDecision | None:
        prior = prior_s(len(self.work.kind_of))
        lasted_s = (now.step - min(now.slow.values(), default=now.step)) * before_s
        left_s = now.left_steps * before_s
        steps = min(remaining_s(prior, lasted_s), left_s) / before_s
        paying = []
        for change in changes:
            lost_s = self._lost_s[change.placements]
            case = Case(before_s - change.step_s, change.cost_s, change.cost_s, before_s, lost_s, lasted_s, left_s)
            why = pays(case, prior=prior)
            if why is not None:
                paying.append((change.cost_s + steps * change.step_s, change.cost_s, why, change))
        if not paying:
            return None
        _, cost_s, why, change = min(paying, key=lambda one: one[:2])
        decision = StageDecision(change.action, now.step, why, before_s, change.step_s, cost_s, change.placements)
        if any(way.action in _EVICTIONS for way in change.ways):
            self._evicted_s.append(now.elapsed_s)
        self._last_ways = _moved(now.placements, change.placements), set(now.slow)
        self._begin(now, decision)
        return decision

    # --- verifying ---

    def _begin(self, now: StageSituation, decision: StageDecision) -> None:
        usual = median(self._usual) if self._usual else 1.0
        seated = by_worker(decision.placements)
        slow = {worker: since for worker, since in now.slow.items() if worker in seated}
        self._trial = _Trial(decision, now.placements, slow, usual)
        self._lost_s = {}

    def _verify(self, now: StageSituation, trial: _Trial) -> StageDecision | None:
        """Whether the change brings what it promised; if not, the way back where that pays."""
        decision = trial.decision
        if now.placements != decision.placements:
            if trial.began is not None or now.step > decision.step + _PENDING_STEPS:
                self._end_trial(now, "overtaken")
            return None
        if trial.began is None:
            trial.began = now.step
        if dict(now.slow) != trial.slow:
            self._end_trial(now, "overtaken")
            return None
        if now.took_s is not None:
            before_s = self.fleet_s(trial.before, now.factors)
            trial.won.append(before_s - now.took_s / trial.usual)
            trial.promised.append(before_s - self.fleet_s(now.placements, now.factors))
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
        self._refuted = dict(now.slow), now.step + self.policy.memory_steps
        after_s = decision.before_s
        before_s = after_s - won_s
        left_s = now.left_steps * before_s
        case = Case(-won_s, decision.cost_s, decision.cost_s, before_s, 0.0, 0.0, left_s)
        why = pays(case, prior=prior_s(len(self.work.kind_of)))
        if why is None:
            self._end_trial(now, "kept")
            return None
        why = f"it won {won_s:.3g} s a step instead of {promised_s:.3g} s; going back is {why}"
        back = StageDecision("move_back", now.step, why, before_s, after_s, decision.cost_s, trial.before)
        self.outcomes.append("taken back")
        self._trial = _Trial(back, now.placements, dict(now.slow), trial.usual)
        return back

    def _end_trial(self, now: StageSituation, outcome: str) -> None:
        self.outcomes.append(outcome)
        self._trial = None
        self._hold_until = now.step + (0 if outcome == "overtaken" else self.policy.hold_steps)


def _moved(before: Sequence[Placement], after: Sequence[Placement]) -> dict[int, int]:
    """By worker: how many layers more it has."""
    had, has = by_worker(before), by_worker(after)
    return {worker: has.get(worker, 0) - had.get(worker, 0) for worker in had.keys() | has.keys()}


def by_worker(placements: Sequence[Placement]) -> dict[int, int]:
    """How many layers each worker has."""
    return {w: n for placement in placements for w, n in zip(placement.seats, placement.layers, strict=True)}
