"""Slow places of pipelines: who is named, and what is done about it."""

from __future__ import annotations

import math
from random import Random

import pytest

from elastictrain.planner.pipelines import Placement
from elastictrain.sim.pipelines import PipelineScenario, run_pipelines
from elastictrain.sim.speeds import Slowness
from elastictrain.stragglers.decision import Policy
from elastictrain.stragglers.signals import FLAG_CHECKPOINT
from elastictrain.stragglers.stage_decision import StageDecider, StageDecision, StageSituation
from elastictrain.stragglers.stage_watch import PipelineWatch, StageFinding
from elastictrain.stragglers.stage_ways import Price, changes_of, ways_of
from tests.support.stage_scenarios import scenario, work

CHEAP = Price(0.05, 1e12)


class Played:
    """A watch and what it is told, step by step, with noise of 1 %."""

    def __init__(self, made: PipelineScenario, *, lies: float = 1.0, **more: object) -> None:
        self.made, self.rng, self.lies = made, Random(7), lies
        self.watch = PipelineWatch(made.work, made.placements, 10_000, price=CHEAP, **more)  # type: ignore[arg-type]
        self.findings: list[StageFinding] = []
        self.actions: list[str] = []
        self.changed_at: list[int] = []
        self.step = 0

    def play(
        self, steps: int, factors: dict[int, float] | None = None, flags: int = 0, lying: int = -1, longer: float = 1.0
    ) -> Played:
        """`lying`: a worker that says it takes `lies` times as long as it does. `longer`: whole steps take so
        many times as long as their stages explain.
        """
        for _ in range(steps):
            self.step += 1
            noise = [self.rng.lognormvariate(0, 0.01) for _ in self.made.work.kind_of]
            slow = [(factors or {}).get(worker, 1.0) * one for worker, one in enumerate(noise)]
            took = longer * max(self.made.work.step_s(one, slow) for one in self.watch.placements)
            busy = {w: s * slow[w] for one in self.watch.placements for w, s in self.made.work.busy_s(one).items()}
            if lying >= 0:
                busy[lying] *= self.lies
            verdict = self.watch.feed(self.step, busy, took, flags=dict.fromkeys(busy, flags), spares=self.made.spares)
            self.findings += verdict.findings
            if verdict.decision is not None:
                self.actions.append(verdict.decision.action)
                self.changed_at.append(self.step)
                self.watch.enter(verdict.decision.placements)
        return self

    @property
    def named(self) -> list[tuple[str, int, int, int]]:
        return [(one.kind, one.worker, one.pipeline, one.stage) for one in self.findings]


def test_the_slow_place_is_named_with_its_stage_and_loses_layers_and_gets_them_back() -> None:
    run = Played(scenario(), allowed=("move_layers",)).play(20).play(40, {4: 2.0})
    assert run.named == [("slow", 4, 1, 1)]
    assert 21 <= run.findings[0].since <= 22
    assert run.findings[0].step <= 24
    assert run.findings[0].slowness == pytest.approx(2.0, rel=0.05)
    before, after = run.made.placements[1], run.watch.placements[1]
    assert after.runs[4][1] - after.runs[4][0] < before.runs[4][1] - before.runs[4][0]
    assert run.watch.placements[0] == run.made.placements[0]
    run.play(60)
    assert run.named == [("slow", 4, 1, 1), ("recovered", 4, 1, 1)]
    assert run.watch.decider.fleet_s(run.watch.placements, run.made.work.healthy()) == pytest.approx(
        run.watch.decider.fleet_s(run.made.placements, run.made.work.healthy())
    )
    assert set(run.watch.decider.outcomes) == {"confirmed"}


def test_stages_of_unlike_work_are_no_slowness() -> None:
    """The last stage has the head; one whose layers take half as long again as the planner thinks is no slower."""
    made = scenario(work=work(workers=6, head=4.0))
    run = Played(made)
    run.play(60, {2: 1.5, 5: 1.5})
    assert run.named == []
    assert run.actions == []


@pytest.mark.parametrize("pipelines", [1, 2, 3])
def test_with_and_without_peers(pipelines: int) -> None:
    run = Played(scenario(pipelines=pipelines)).play(15).play(20, {1: 1.4})
    assert run.named[0] == ("slow", 1, 0, 1)
    assert len(run.named) == 1


def test_what_all_peers_of_a_stage_share_is_nobodys_own() -> None:
    run = Played(scenario(pipelines=3)).play(15).play(30, {1: 1.3, 4: 1.3, 7: 1.3})
    assert run.named == []


def test_a_slowness_outlasts_a_swap_of_roles() -> None:
    """Whoever has another stage is learned anew; that it is slow is still known, and its recovery is seen."""
    made = scenario(pipelines=1)
    run = Played(made, allowed=("swap_roles",)).play(20).play(60, {2: 3.0})
    assert run.actions == ["swap_roles"]
    assert run.watch.factors[2] == pytest.approx(3.0, rel=0.05)
    assert run.watch.placements[0].seats != made.placements[0].seats
    run.play(60)
    assert run.watch.factors[2] == 1.0
    assert [one.kind for one in run.findings] == ["slow", "recovered"]


def test_a_stage_changes_hands_as_another_worker_of_it_becomes_fast_again() -> None:
    """Of three with the same stage one is new then: the other two are not half as fast and half as slow each."""
    run = Played(scenario(stages=2, pipelines=3), allowed=("swap_roles",)).play(20)
    while not run.actions:
        run.play(1, {2: 1.4})
    run.play(30, {2: 1.4})
    while len(run.actions) < 2:
        run.play(1, {2: 1.4, 5: 2.5})
    run.play(40, {5: 2.5})
    assert run.actions[:2] == ["swap_roles", "swap_roles"]
    assert [(one.kind, one.worker) for one in run.findings] == [("slow", 2), ("slow", 5), ("recovered", 2)]


def test_errors_of_a_slowness_do_not_add_up() -> None:
    """It becomes less little by little, which nobody says; that it is over is known by what it was before."""
    run = Played(scenario(pipelines=1), allowed=()).play(60).play(10, {1: 1.7})
    for factor in (1.62, 1.55, 1.48, 1.42):
        run.play(60, {1: factor})
    run.play(40)
    assert run.findings[0].slowness == pytest.approx(1.7, rel=0.03)
    assert [one.kind for one in run.findings] == ["slow", "recovered"]
    assert run.watch.factors[1] == 1.0
    assert run.watch.slow == {}


def test_a_spare_takes_the_place_and_a_cap_keeps_the_second_one_out() -> None:
    made = scenario(pipelines=2, spares=2)
    policy = Policy(per_s=1e9)
    run = Played(made, policy=policy, allowed=("replace",)).play(20).play(40, {1: 3.0})
    assert run.actions == ["replace"]
    assert run.watch.placements[0].seats == (0, 6, 2)
    assert run.watch.decider.outcomes == ["confirmed"]
    run.made = PipelineScenario(made.work, made.placements, (7,))
    run.play(60, {1: 3.0, 3: 3.0})
    assert run.actions == ["replace"]


def test_one_stage_fewer() -> None:
    run = Played(scenario(pipelines=1), allowed=("leave_out",)).play(20).play(40, {1: 8.0})
    assert run.actions == ["leave_out"]
    assert run.watch.placements[0].seats == (0, 2)
    assert sum(run.watch.placements[0].layers) == run.made.work.layers


def test_a_worker_that_says_it_is_slow_and_is_not_keeps_its_layers() -> None:
    run = Played(scenario(pipelines=1), lies=2.5).play(20).play(80, lying=1)
    assert run.named == [("slow", 1, 0, 1)]
    assert run.actions == []


def test_a_change_that_makes_steps_longer_is_taken_back() -> None:
    """Whoever gets the layers takes three times as long with them, which nobody could foresee."""
    run = Played(scenario(pipelines=1), allowed=("move_layers",)).play(20)
    while run.actions.count("move_back") < 1:
        moved = run.watch.placements != run.made.placements
        run.play(1, {1: 2.0}, longer=3.0 if moved else 1.0)
        assert run.step < 100
    run.play(100, {1: 2.0})
    assert run.actions == ["move_layers", "move_back"]
    assert run.watch.decider.outcomes == ["taken back", "moved back"]
    assert run.watch.placements == run.made.placements


def test_what_costs_more_than_it_wins_is_left() -> None:
    """A change is not made for the last steps of a run, nor for one that would take the rest of it."""
    made = scenario(pipelines=1)
    watch = PipelineWatch(made.work, made.placements, 40, price=Price(1e6, 1e12))
    run = Played(made)
    run.watch = watch
    assert run.play(20).play(20, {1: 3.0}).actions == []
    assert [one.kind for one in run.findings] == ["slow"]


def test_nonsense_leads_to_nothing() -> None:
    made = scenario(pipelines=1)
    run = Played(made).play(20)
    for value in (math.nan, -1.0, math.inf, 0.0):
        for _ in range(10):
            run.step += 1
            busy = run.made.work.busy_s(made.placements[0]) | {1: value}
            verdict = run.watch.feed(run.step, busy, 1.0)
            assert verdict.findings == ()
            assert verdict.decision is None
    for took in (math.nan, math.inf, -1.0):
        run.step += 1
        assert run.watch.feed(run.step, made.work.busy_s(made.placements[0]), took).decision is None
    assert run.play(30, {1: 2.0}).named == [("slow", 1, 0, 1)]


@pytest.mark.parametrize("first", [1, 15])
def test_who_talks_nonsense_keeps_the_layers_of_its_own_pipeline_alone(first: int) -> None:
    run = Played(scenario(), lies=math.nan, allowed=("move_layers",)).play(first).play(20 - first, lying=0)
    run.play(40, {4: 2.0}, lying=0)
    assert run.named == [("slow", 4, 1, 1)]
    assert run.actions == ["move_layers"]
    assert run.watch.placements[0] == run.made.placements[0]
    assert run.watch.placements[1] != run.made.placements[1]
    assert run.watch.decider.outcomes == ["confirmed"]


def test_in_its_own_pipeline_nothing_moves_until_it_talks_sense() -> None:
    run = Played(scenario(pipelines=1), lies=-1.0).play(20).play(40, {1: 2.0}, lying=0)
    assert run.named == [("slow", 1, 0, 1)]
    assert run.actions == []
    run.play(20, {1: 2.0})
    assert len(run.actions) == 1


def test_steps_with_an_excuse_do_not_count() -> None:
    run = Played(scenario(pipelines=1)).play(20).play(6, {1: 3.0}, flags=FLAG_CHECKPOINT).play(20)
    assert run.named == []


def test_nor_do_they_when_a_change_is_judged() -> None:
    run = Played(scenario(pipelines=1), allowed=("move_layers",)).play(20)
    while not run.actions:
        run.play(1, {1: 2.0})
    run.play(30, {1: 2.0}, flags=FLAG_CHECKPOINT, longer=3.0)
    assert run.watch.decider.outcomes == []
    run.play(30, {1: 2.0})
    assert run.watch.decider.outcomes == ["confirmed"]
    assert run.actions == ["move_layers"]


def test_nothing_is_done_at_a_step_that_makes_no_sense() -> None:
    def until(step: int) -> Played:
        run = Played(scenario(pipelines=1)).play(20)
        return run.play(step - 20, {1: 2.0})

    (due,) = until(30).changed_at
    run = until(due - 1)
    busy = run.made.work.busy_s(run.made.placements[0])
    assert run.watch.feed(due, busy | {1: 2.0 * busy[1]}, math.nan).decision is None


def test_some_steps_lie_between_two_changes() -> None:
    run = Played(scenario(pipelines=1), policy=Policy(hold_steps=60), allowed=("move_layers",)).play(20)
    run.play(30, {1: 2.0})
    assert run.watch.decider.outcomes == ["confirmed"]
    run.play(100, {1: 2.0, 0: 2.0})
    first, second = run.changed_at
    assert second - first > 60
    assert run.findings[-1].worker == 0
    assert second - run.findings[-1].step > 20, "it was known long before"


def test_who_is_fast_again_is_not_trusted_at_once() -> None:
    run = Played(scenario(pipelines=1), policy=Policy(hold_steps=60), allowed=("move_layers",)).play(20)
    run.play(130, {1: 2.0}).play(120)
    assert [one.kind for one in run.findings] == ["slow", "recovered"]
    assert run.changed_at[1] - run.findings[1].step >= 59


def test_a_small_correction_of_the_last_change_is_not_made() -> None:
    """Back and forth for a few percent is how things swing: it must win twice as much as any other change."""
    made = scenario(pipelines=1)
    decider = StageDecider(made.work, price=CHEAP, allowed=("move_layers",))
    placements, step = made.placements, 0

    def play(steps: int, slowness: float, slow: dict[int, int]) -> list[StageDecision]:
        nonlocal placements, step
        found = []
        for _ in range(steps):
            step += 1
            factors = (1.0, slowness, *made.work.healthy()[2:])
            took_s = decider.fleet_s(placements, factors)
            now = StageSituation(step, placements, factors, took_s, float(step), 10_000, slow)
            decision = decider.decide(now)
            if decision is not None:
                found.append(decision)
                placements = decision.placements
        return found

    def gain(slowness: float) -> float:
        factors = (1.0, slowness, *made.work.healthy()[2:])
        ways = [ways_of(made.work, one, factors, slow=[1], allowed=("move_layers",), price=CHEAP) for one in placements]
        least_s = min((change.step_s for change in changes_of(ways, CHEAP)), default=math.inf)
        return 1.0 - least_s / decider.fleet_s(placements, factors)

    play(10, 1.0, {})
    assert [one.action for one in play(40, 3.0, {1: 11})] == ["move_layers"]
    assert decider.outcomes == ["confirmed"]
    gains = {1.0 + n / 100: gain(1.0 + n / 100) for n in range(20, 200)}
    small = next(slowness for slowness, won in gains.items() if 0.035 < won < 0.055)
    large = next(slowness for slowness, won in gains.items() if won > 0.07)
    assert play(60, small, {1: 11}) == []
    assert len(play(60, large, {1: 11})) == 1


def test_another_stage_is_learned_anew() -> None:
    """Layers of the last stage take longer than the planner thinks, whoever has them."""

    class Biased(Played):
        def play(self, steps: int, factors: dict[int, float] | None = None, **more: object) -> Played:  # type: ignore[override]
            for _ in range(steps):
                last = self.watch.placements[0].seats[-1]
                known = factors or {}
                super().play(1, known | {last: 1.3 * known.get(last, 1.0)})
            return self

    run = Biased(scenario(pipelines=1), allowed=("swap_roles",)).play(20).play(60, {2: 3.0})
    assert run.actions == ["swap_roles"]
    assert run.watch.placements[0].seats[-1] != 2
    assert run.named == [("slow", 2, 0, 2)]


def test_other_workers_than_those_with_stages_are_refused() -> None:
    made = scenario(pipelines=1)
    with pytest.raises(ValueError, match=r"stages are with \[0, 1, 2\]"):
        PipelineWatch(made.work, made.placements, 10).feed(1, {0: 1.0, 1: 1.0}, 1.0)


def test_two_pipelines_are_mended_in_one_pause() -> None:
    """Neither alone would win anything: the step is as long as the slower of the two."""
    slowness = (Slowness(1, "compute", 2.0, 30, 300), Slowness(5, "compute", 2.0, 30, 300))
    out = run_pipelines(scenario(steps=100, slowness=slowness, price=CHEAP, allowed=("move_layers",), noise=0.01))
    assert len(out.decisions) == 1
    (decision,) = out.decisions
    start = scenario().placements
    assert all(one != other for one, other in zip(decision.placements, start, strict=True))
    assert decision.cost_s == pytest.approx(0.05, rel=0.1)


def test_a_placement_says_who_has_which_layers() -> None:
    assert Placement((5, 3), (4, 8), (0, 0)).runs == {5: (0, 4), 3: (4, 12)}
