"""Virtual pipelines whose workers become slow, under the real detector, decision and planner of stages.

The engine runs no pipelines; what is simulated is what would be decided. A step is the schedule replayed operation by
operation with what every stage really takes. That is not quite what the planner expects: every layer takes somewhat
more or less (`bias`), every worker's time varies, and there are hiccups, collections and checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

from elastictrain.planner.pipelines import Pipelines, Placement
from elastictrain.sim.books import require
from elastictrain.sim.speeds import Slowness, turns
from elastictrain.stragglers.decision import Policy
from elastictrain.stragglers.signals import FLAG_CHECKPOINT, FLAG_COLLECTION
from elastictrain.stragglers.stage_decision import StageDecision, by_worker
from elastictrain.stragglers.stage_watch import PipelineWatch, StageFinding
from elastictrain.stragglers.stage_ways import ACTIONS, Price, StageAction, changes_of, ways_of

Placements = tuple[Placement, ...]


@dataclass(frozen=True)
class PipelineScenario:
    """`placements`: at the start, one for each pipeline; `spares`: who waits. `allowed`: what may be done; nothing:
    slow places are only named. `noise`: standard deviation of the logarithm of a worker's time in a step; `bias`: of a
    layer's time against the planner's. `hiccup_every`, `collect_every`: mean steps of a worker between such.
    """

    work: Pipelines
    placements: Placements
    spares: tuple[int, ...] = ()
    steps: int = 400
    seed: int = 0
    noise: float = 0.02
    bias: float = 0.03
    hiccup_every: float = 400.0
    collect_every: float = 300.0
    checkpoint_every: int = 100
    slowness: tuple[Slowness, ...] = ()
    allowed: tuple[StageAction, ...] = ACTIONS
    price: Price = field(default_factory=Price)

    def active(self, step: int) -> tuple[Slowness, ...]:
        """Who is slow in this step."""
        return tuple(slow for slow in self.slowness if slow.begin <= step < slow.end)

    def factors(self, slowness: Sequence[Slowness]) -> tuple[float, ...]:
        """By worker, how many times as long as when it is healthy."""
        found = list(self.work.healthy())
        for slow in slowness:
            found[slow.worker] *= slow.factor
        return tuple(found)


@dataclass(slots=True)
class PipelineOutcome:
    """Seconds of the run: `none_s` if nothing is done; `ours_s`; `oracle_s` if somebody knows at once who becomes slow
    and for how long, and pays the same price; `free_s` if changes cost that one nothing. `paused_s`: of ours, in
    changes. `reversals`: changes after which a worker's layers went the other way than at its last one, although no
    speed had changed in between. `false_actions`: changes while nobody was slow and everything stood as at the start.
    """

    findings: list[StageFinding] = field(default_factory=list)
    decisions: list[StageDecision] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    placements: Placements = ()
    none_s: float = 0.0
    ours_s: float = 0.0
    oracle_s: float = 0.0
    free_s: float = 0.0
    paused_s: float = 0.0
    reversals: int = 0
    false_actions: int = 0

    @property
    def share_of_oracle(self) -> float:
        """Of what could be won for the same price; 1 when nothing could."""
        could = self.none_s - self.oracle_s
        return (self.none_s - self.ours_s) / could if could > 1e-9 * self.none_s else 1.0


class _World:
    """What the workers really take."""

    def __init__(self, scenario: PipelineScenario) -> None:
        self.scenario, self.rng = scenario, Random(f"{scenario.seed}/stages")
        rng = Random(f"{scenario.seed}/bias")
        of_layer = [rng.lognormvariate(0.0, scenario.bias) for _ in range(scenario.work.layers)]
        kinds = tuple(
            replace(kind, layer_s=tuple(s * b for s, b in zip(kind.layer_s, of_layer, strict=True)))
            for kind in scenario.work.kinds
        )
        self.truth = replace(scenario.work, kinds=kinds)

    def draw(self, step: int) -> tuple[list[float], dict[int, int]]:
        """Of a step: what noise does to every worker, and flags; the same wherever they sit."""
        s, rng = self.scenario, self.rng
        shared = FLAG_CHECKPOINT if s.checkpoint_every and step % s.checkpoint_every == 0 else 0
        noise, flags = [], {}
        for worker in range(len(s.work.kind_of)):
            factor, flag = rng.lognormvariate(0.0, s.noise), shared
            if rng.random() * s.hiccup_every < 1.0:
                factor *= 1.3 + rng.expovariate(1.0)
            if rng.random() * s.collect_every < 1.0:
                factor, flag = factor * 1.4, flag | FLAG_COLLECTION
            noise.append(factor * (1.0 + 0.5 * rng.random()) if shared else factor)
            flags[worker] = flag
        return noise, flags

    def busy_s(self, placements: Placements, factors: Sequence[float]) -> dict[int, float]:
        """By worker, computing alone."""
        healthy = {w: s for placement in placements for w, s in self.truth.busy_s(placement).items()}
        return {worker: seconds * factors[worker] for worker, seconds in healthy.items()}


def run_pipelines(scenario: PipelineScenario, policy: Policy | None = None) -> PipelineOutcome:
    """Train on virtual pipelines under the real watch. Raises Violation when a placement that was decided on needs more
    memory than a worker has, or is not all layers once.
    """
    world, out = _World(scenario), PipelineOutcome()
    watch = PipelineWatch(
        scenario.work, scenario.placements, scenario.steps, policy=policy, price=scenario.price,
        allowed=scenario.allowed,
    )  # fmt: skip
    start, now, spares = scenario.placements, scenario.placements, scenario.spares
    plan = oracles_plan(scenario)
    last = [(0, 0)] * len(scenario.work.kind_of)
    changed_at = [step for slow in scenario.slowness for step in (slow.begin, slow.end)]
    for step in range(1, scenario.steps + 1):
        noise, flags = world.draw(step)
        active = scenario.active(step)
        factors = tuple(a * b for a, b in zip(scenario.factors(active), noise, strict=True))
        theirs, free, price_s = plan[step]
        each = {
            placement: world.truth.step_s(placement, factors) for placement in {*start, *now, *theirs, *free}
        }  # what is the same for several of them is replayed once
        took_s, none_s, oracle_s, free_s = (max(each[one] for one in placements)
                                            for placements in (now, start, theirs, free))  # fmt: skip
        out.none_s += none_s
        out.ours_s += took_s
        out.oracle_s += oracle_s + price_s
        out.free_s += free_s
        busy = world.busy_s(now, factors)
        verdict = watch.feed(step, busy, took_s, flags=flags, spares=spares, acts=bool(scenario.allowed))
        out.findings += verdict.findings
        decision = verdict.decision
        if decision is None:
            continue
        out.decisions.append(decision)
        out.false_actions += not active and now == start
        out.reversals += turns(last, _layers(scenario, now), _layers(scenario, decision.placements), step, changed_at)
        _check(scenario.work, decision.placements)
        out.paused_s += decision.cost_s
        out.ours_s += decision.cost_s
        now = decision.placements
        seated = by_worker(now)
        spares = tuple(worker for worker in scenario.spares if worker not in seated)
        watch.enter(now)
    out.outcomes, out.placements = watch.decider.outcomes, now
    return out


def _layers(scenario: PipelineScenario, placements: Placements) -> list[int]:
    has = by_worker(placements)
    return [has.get(worker, 0) for worker in range(len(scenario.work.kind_of))]


def _check(work: Pipelines, placements: Placements) -> None:
    """Every pipeline has all layers, everybody has one stage at most, and all of it fits."""
    seats = [worker for placement in placements for worker in placement.seats]
    require(len(seats) == len(set(seats)), f"a worker has two stages: {placements}")
    for placement in placements:
        require(sum(placement.layers) == work.layers and min(placement.layers) > 0, f"not all layers: {placement}")
        for worker, need in zip(placement.seats, work.need_bytes(placement), strict=True):
            there = work.kinds[work.kind_of[worker]].memory_bytes
            require(need <= there * (1 + 1e-9), f"worker {worker} needs {need:.4g} of {there:.4g} bytes: {placement}")


def oracles_plan(scenario: PipelineScenario) -> dict[int, tuple[Placements, Placements, float]]:
    """By step: the placements of somebody who knows every slowness from its first step to its last and pays for
    changes; of one who does not pay; and what the former pays before this step. Both choose among the start and what
    is best for each stretch of time, by the planner's model.
    """
    work, start = scenario.work, scenario.placements
    cuts = sorted({1, scenario.steps + 1, *(min(max(1, at), scenario.steps + 1) for slow in scenario.slowness
                                            for at in (slow.begin, slow.end))})  # fmt: skip
    stretches = [(lo, hi, scenario.active(lo)) for lo, hi in pairwise(cuts)]
    candidates = [start]
    for _, _, active in stretches:
        slow = sorted({one.worker for one in active})
        each = [
            ways_of(work, one, scenario.factors(active), slow=slow, spares=scenario.spares, price=scenario.price,
                    allowed=scenario.allowed)
            for one in start
        ]  # fmt: skip
        changes = changes_of(each, scenario.price) if active and scenario.allowed else []
        if changes:
            candidates.append(min(changes, key=lambda change: (change.step_s, change.cost_s)).placements)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    free: list[int] = []
    for lo, hi, active in stretches:
        factors = scenario.factors(active)
        step_s = [max(work.step_s(one, factors) for one in placements) for placements in candidates]
        best = {
            n: min(
                (spent + _price_s(scenario, candidates[came], candidates[n]) + (hi - lo) * step_s[n], [*way, n])
                for came, (spent, way) in best.items()
            )
            for n in range(len(candidates))
        }
        free.append(min(range(len(candidates)), key=lambda n: step_s[n]))
    _, chosen = min(best.values())
    plan: dict[int, tuple[Placements, Placements, float]] = {}
    before = 0
    for (lo, hi, _), n, without in zip(stretches, chosen, free, strict=True):
        for step in range(lo, hi):
            price_s = _price_s(scenario, candidates[before], candidates[n]) if step == lo else 0.0
            plan[step] = candidates[n], candidates[without], price_s
        before = n
    return plan


def _price_s(scenario: PipelineScenario, before: Placements, after: Placements) -> float:
    if before == after:
        return 0.0
    moved = max(scenario.work.moved_bytes(a, b) for a, b in zip(before, after, strict=True))
    return scenario.price.pause_s + moved / scenario.price.link_bytes_s
