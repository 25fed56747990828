"""Simulated pipelines: what a scenario file may say, and what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.errors import CapacityError, ConfigError
from elastictrain.planner.pipelines import Pipelines
from elastictrain.sim import PipelineReport, make_scenario, simulate, simulate_pipelines
from elastictrain.sim.books import Violation
from elastictrain.sim.pipeline_settings import pipelines_from
from elastictrain.sim.pipelines import oracles_plan, run_pipelines
from elastictrain.sim.speeds import Slowness
from elastictrain.stragglers.stage_ways import Price
from tests.support.stage_scenarios import MODEL, scenario, work

SLOW = {"worker": 1, "factor": 2.5, "begin": 30, "end": 120}


def settings(more: dict[str, Any] | None = None, **pipeline: Any) -> dict[str, Any]:
    said = {"model": MODEL, "stages": 3, "micro_batches": 6, "slowness": [SLOW]} | pipeline
    return {"steps": 200, "seed": 4, "pipeline": said} | (more or {})


def made(more: dict[str, Any] | None = None, **pipeline: Any) -> PipelineReport:
    return simulate_pipelines(make_scenario(settings(more, **pipeline)))


def test_the_slow_place_is_named_and_layers_move_there_and_back() -> None:
    report = made(pause_s=0.5)
    assert [(one["what"], one["worker"], one["stage"]) for one in report.named] == [("slow", 1, 1), ("recovered", 1, 1)]
    assert report.named[0]["step"] - 30 <= 4
    assert report.named[0]["slowness"] == pytest.approx(2.5, rel=0.1)
    assert report.changes[0]["action"] in ("move_layers", "swap_roles")
    assert report.oracle_s < report.ours_s < report.none_s
    assert report.oracle_share > 0.8
    assert (report.false_actions, report.reversals) == (0, 0)
    assert set(report.outcomes) == {"confirmed"}
    (last,) = report.placements
    assert sorted(last["layers"]) == sorted(pipelines_from(make_scenario(settings())).placements[0].layers)
    assert report.paused_s == pytest.approx(sum(one["cost_s"] for one in report.changes), abs=0.01)


def test_without_actions_slow_places_are_only_named() -> None:
    report = made(actions=[])
    assert [one["what"] for one in report.named] == ["slow", "recovered"]
    assert report.changes == ()
    assert report.ours_s == report.none_s == report.oracle_s == report.free_s


def test_the_same_scenario_gives_the_same_report_and_drawn_slowness_too() -> None:
    drawn = settings({"rates": {"slow_down_h": 0.1}, "steps": 300}, slowness=[], pipelines=2)
    first, second = (simulate_pipelines(make_scenario(drawn)).as_dict() for _ in range(2))
    assert first == second
    assert first["slow"]
    assert json.loads(json.dumps(first))
    assert simulate_pipelines(make_scenario(drawn, worse=20)).as_dict()["slow"] != first["slow"]


def test_a_spare_takes_the_place_where_that_is_allowed() -> None:
    report = made({"spares": 1}, actions=["replace"], pause_s=0.1)
    assert report.workers == 4
    assert report.changes[0]["action"] == "replace"
    assert report.changes[0]["placements"][0]["workers"] == [0, 3, 2]


@pytest.mark.parametrize(
    ("more", "pipeline", "words"),
    [
        ({"workers": 8}, {}, "workers=8, but pipeline has 1 x 3 stages: remove workers, or say 3"),
        ({"hours": 2}, {}, "hours: has no meaning with pipeline, remove it; say how many steps"),
        ({"stragglers": "lanes"}, {}, "stragglers: .*pipeline.actions says what is done"),
        ({"speeds": [1, 2], "mirrors": False}, {}, "mirrors, speeds: has no meaning"),
        ({"rates": {"worker_death_h": 5}}, {}, "rates.worker_death_h: with pipeline only slow_down_h"),
        ({"rates": {"slow_down_h": 5}}, {}, "pipeline.slowness and rates.slow_down_h: .*remove one"),
        ({}, {"actions": ["replace"]}, "actions has replace, but spares=0"),
        ({}, {"actions": ["leave_out"], "stages": 1}, "leave_out, but stages=1"),
        ({}, {"actions": ["move_lanes"]}, "pipeline.actions.0: "),
        ({}, {"slowness": [SLOW | {"worker": 3}]}, "there is no worker 3, they are 0 to 2"),
        ({}, {"slowness": [SLOW | {"end": 30}]}, "end=30 is not after begin=30"),
        ({}, {"slowness": [SLOW | {"factor": 1}]}, "pipeline.slowness.0.factor: .*greater than 1"),
        ({}, {"stages": 17}, "stages=17 is more than the model's 16 layers"),
        ({}, {"stages": True}, "expected a whole number"),
        ({}, {"devices": ["h100", "h100"]}, "devices has 2 names for stages=3"),
        ({}, {"devices": "h10"}, "'h10' has no profile; did you mean 'h100'"),
        ({}, {"link": "ib-hd"}, "link='ib-hd' is no known link; did you mean 'ib-hdr'"),
        ({}, {"model": MODEL | {"layer": 3}}, "pipeline.model: unknown setting 'layer'; did you mean 'layers'"),
        ({}, {"model": {"layers": 3}}, "pipeline.model: hidden: .*[Ff]ield required"),
        ({}, {"stage": 3}, "unknown setting 'pipeline.stage'; did you mean 'stages'"),
    ],
)
def test_settings_that_contradict_each_other_are_named(more: Any, pipeline: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(more, **pipeline)


def test_a_model_that_does_not_fit_is_said_so() -> None:
    with pytest.raises(CapacityError, match="do not fit on 3 stages of t4; more stages"):
        made(model=MODEL | {"hidden": 8192, "heads": 64}, devices="t4")


def test_each_kind_of_scenario_has_its_function() -> None:
    with pytest.raises(ConfigError, match="is for simulate_pipelines"):
        simulate(make_scenario(settings()))
    with pytest.raises(ConfigError, match="has no pipeline"):
        simulate_pipelines(make_scenario({"workers": 3}))


def test_the_command_says_what_was_done_and_that_it_was_only_decided(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(settings(pause_s=0.5)))
    shown = CliRunner().invoke(app, ["simulate", "--scenario", str(file)], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    for words in ("the engine runs no pipelines yet", "worker 1 slow at step 3", "What was done", "at best"):
        assert words in shown.stdout
    told = json.loads(CliRunner().invoke(app, ["simulate", "--scenario", str(file), "--json"]).stdout)
    assert told.pop("wall_s") > 0
    assert told == json.loads(json.dumps(made(pause_s=0.5).as_dict()))
    wrong = CliRunner().invoke(app, ["simulate", "--scenario", str(file), "--hours", "2"])
    assert wrong.exit_code == 2
    assert "say how many steps" in wrong.output


def test_the_oracle_does_nothing_where_that_is_cheapest() -> None:
    """A slowness of a few steps is not worth a pause; one that lasts is, there and back."""
    for end, dear, changes in ((33, 100.0, 0), (180, 0.001, 2)):
        slow = (Slowness(1, "compute", 3.0, 30, end),)
        made_of = scenario(slowness=slow, allowed=("move_layers",), price=Price(dear, 1e15))
        plan = oracles_plan(made_of)
        assert [step for step, (_, _, paid_s) in plan.items() if paid_s] == [30, end][:changes]
        assert plan[31][1] != made_of.placements  # who pays nothing moves at once
        assert plan[29][0] == plan[end][0] == made_of.placements


def test_a_decision_without_room_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator's own account of memory, when the one of the decision is wrong."""
    tight = work(workers=3, head=0.0, memory=6.4e9)
    slow = (Slowness(1, "compute", 3.0, 30, 200),)
    tight_one = scenario(work=tight, pipelines=1, slowness=slow, allowed=("move_layers",))
    run_pipelines(tight_one)
    roomy, real = work(workers=3, head=0.0), Pipelines.best
    monkeypatch.setattr(Pipelines, "best", lambda _, seats, factors: real(roomy, seats, factors))
    with pytest.raises(Violation, match="worker 0 needs"):
        run_pipelines(tight_one)
