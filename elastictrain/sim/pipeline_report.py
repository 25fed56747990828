"""Pipelines simulated, and what came out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from elastictrain.errors import ConfigError
from elastictrain.planner.pipelines import Placement
from elastictrain.sim.pipeline_settings import pipelines_from
from elastictrain.sim.pipelines import PipelineOutcome, PipelineScenario, run_pipelines
from elastictrain.sim.scenario import Scenario


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """`healthy_step_s`: of a step when nobody is slow, by the planner's model. `none_s`, `ours_s`, `oracle_s`,
    `free_s`: of the run if nothing is done; as it was decided, `paused_s` of it in changes; as somebody would who knows
    every slowness at once and pays the same; and without paying. `oracle_share`: of what could be won for that price.
    `named`: what was said of slow places; `changes`: what was done, and `outcomes`: what became of it. `reversals`:
    changes the other way although no speed had changed; `false_actions`: changes while nobody was slow.
    """

    workers: int
    pipelines: int
    stages: int
    seed: int
    steps: int
    healthy_step_s: float
    none_s: float
    ours_s: float
    oracle_s: float
    free_s: float
    paused_s: float
    oracle_share: float
    reversals: int
    false_actions: int
    slow: tuple[dict[str, Any], ...]
    named: tuple[dict[str, Any], ...]
    changes: tuple[dict[str, Any], ...]
    outcomes: tuple[str, ...]
    placements: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def simulate_pipelines(scenario: Scenario) -> PipelineReport:
    """Train on the pipelines of a scenario, with slow places, under the real detector, decision and planner of stages.
    Equal scenarios give equal reports. Raises ConfigError when the scenario has none, CapacityError when the model does
    not fit, Violation when a decision would not.
    """
    if scenario.pipeline is None:
        raise ConfigError("simulate: the scenario has no pipeline; `simulate` runs it")
    made = pipelines_from(scenario)
    return _report(scenario, made, run_pipelines(made))


def _report(scenario: Scenario, made: PipelineScenario, out: PipelineOutcome) -> PipelineReport:
    settings = scenario.pipeline
    assert settings is not None
    healthy_s = max(made.work.step_s(placement, made.work.healthy()) for placement in made.placements)
    return PipelineReport(
        len(made.work.kind_of), settings.pipelines, settings.stages, scenario.seed, made.steps,
        healthy_step_s=round(healthy_s, 3), none_s=round(out.none_s, 3), ours_s=round(out.ours_s, 3),
        oracle_s=round(out.oracle_s, 3), free_s=round(out.free_s, 3), paused_s=round(out.paused_s, 3),
        oracle_share=round(out.share_of_oracle, 4), reversals=out.reversals, false_actions=out.false_actions,
        slow=tuple(
            {"worker": one.worker, "factor": round(one.factor, 3), "begin": one.begin, "end": one.end}
            for one in made.slowness
        ),
        named=tuple(
            {"what": one.kind, "step": one.step, "since": one.since, "worker": one.worker, "pipeline": one.pipeline,
             "stage": one.stage, "slowness": round(one.slowness, 3)}
            for one in out.findings
        ),
        changes=tuple(
            {"action": one.action, "step": one.step, "why": one.why, "before_s": round(one.before_s, 3),
             "after_s": round(one.after_s, 3), "cost_s": round(one.cost_s, 3),
             "placements": [_plain(placement) for placement in one.placements]}
            for one in out.decisions
        ),
        outcomes=tuple(out.outcomes), placements=tuple(map(_plain, out.placements)),
    )  # fmt: skip


def _plain(placement: Placement) -> dict[str, Any]:
    return {"workers": list(placement.seats), "layers": list(placement.layers), "again": list(placement.again)}
