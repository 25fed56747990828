"""How `stragglers` may be written down: in a job, and in a scenario of the simulator."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastictrain.errors import ConfigError
from elastictrain.job import dump_job, load_job, parse_job
from elastictrain.sim.scenario import make_scenario, read_settings
from elastictrain.straggler_settings import Stragglers

JOB = "recipe: mod:Class\ndata: {kind: jsonl, path: x.jsonl}\nsteps: 10\n"


@pytest.mark.parametrize(
    ("written", "action"),
    [
        ("{action: off}", "off"),
        ("{action: no}", "off"),
        ('{action: "off"}', "off"),
        ("off", "off"),
        ("lanes", "lanes"),
        ("evict", "evict"),
        ("{action: lanes, min_gain: 0.1}", "lanes"),
        ("{}", "watch"),
    ],
)
def test_a_job_takes_it_as_documented_and_in_the_short_form(tmp_path: Path, written: str, action: str) -> None:
    """YAML reads `off` as a switch."""
    file = tmp_path / "job.yaml"
    file.write_text(JOB + f"stragglers: {written}\n")
    job = load_job(file)
    assert job.stragglers.action == action
    file.write_text(dump_job(job))
    assert load_job(file) == job


def test_in_python_too() -> None:
    raw = {"recipe": "mod:Class", "data": {"kind": "jsonl", "path": "x.jsonl"}, "steps": 10}
    assert parse_job(raw | {"stragglers": Stragglers(action="lanes")}).stragglers.action == "lanes"


@pytest.mark.parametrize("written", ["{action: on}", "on", "yes"])
def test_on_does_not_say_what(tmp_path: Path, written: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB + f"stragglers: {written}\n")
    with pytest.raises(ConfigError, match=r"stragglers.action.*got True.*say which: watch, lanes or evict"):
        load_job(file)


@pytest.mark.parametrize(("written", "says"), [("lanse", "stragglers.action"), ("3", "stragglers")])
def test_other_words_are_refused(tmp_path: Path, written: str, says: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB + f"stragglers: {written}\n")
    with pytest.raises(ConfigError, match=says):
        load_job(file)


def test_a_scenario_may_say_off(tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    for written, action in (("off", "off"), ("lanes", "lanes")):
        file.write_text(f"stragglers: {written}\n")
        assert make_scenario(read_settings(file)).stragglers == action
