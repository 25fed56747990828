"""What a job may ask of lanes that more than one worker computes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from elastictrain.errors import ConfigError
from elastictrain.job import dump_job, parse_job
from elastictrain.straggler_settings import Redundancy

BASE: dict[str, Any] = {"recipe": "mod:Class", "data": {"kind": "jsonl", "path": "x.jsonl"}, "steps": 10}

WRONG = [
    (
        {"gradients": "hand_over", "redundancy": {"lanes": "take_over"}, "workers": {"max": 2}},
        (
            "job: redundancy.lanes=take_over needs gradients=sum: with gradients=hand_over every lane is sent when "
            "it is computed, and nobody is late alone; set gradients: sum, or redundancy.lanes: none"
        ),
    ),
    (
        {"redundancy": {"lanes": "first_result"}},
        (
            "job: redundancy.lanes=first_result with workers.max=1: expected 2 workers or more, so that others can "
            "compute a worker's lanes; raise workers.max, or set redundancy.lanes: none"
        ),
    ),
    (
        {"redundancy": {"lanes": "coded", "group": 3}, "workers": {"max": 2}},
        (
            "job: redundancy.lanes=coded with workers.max=2: expected 3 workers or more, so that others can "
            "compute a worker's lanes; raise workers.max, or set redundancy.lanes: none"
        ),
    ),
    (
        {"redundancy": {"lanes": "coded"}, "workers": {"max": 2}, "stragglers": {"action": "evict"}},
        (
            "job: redundancy.lanes=coded and stragglers.action=evict: in a group all have the same lanes, so moving "
            "them helps nobody; set stragglers.action: watch, or redundancy.lanes: take_over"
        ),
    ),
    (
        {"redundancy": {"lanes": "drop_slowest"}},
        (
            "job: redundancy.lanes=drop_slowest with workers.max=1: expected 2 workers or more, so that others can "
            "compute a worker's lanes; raise workers.max, or set redundancy.lanes: none"
        ),
    ),
    (
        {"redundancy": {"lanes": "drop_slowest", "drop_at_most": 8}, "workers": {"max": 2}},
        (
            "job: redundancy.drop_at_most=8 with lanes=8: a step needs a lane that counts; set redundancy.drop_at_most "
            "to 1, or raise lanes"
        ),
    ),
    (
        {"redundancy": {"lanes": "coded", "replay": {3: [1]}}, "workers": {"max": 2}},
        (
            "job: redundancy.replay with redundancy.lanes=coded: a run is repeated without lanes of others, by whose "
            "computation no bit changes; set redundancy.lanes: none"
        ),
    ),
    (
        {"redundancy": {"replay": {3: [1]}}, "gradients": "hand_over"},
        "job: redundancy.replay needs gradients=sum (got hand_over); set gradients: sum",
    ),
    (
        {"redundancy": {"replay": {3: [1, 8]}}},
        (
            "job: redundancy.replay: in step 3 lanes [1, 8] do not count, and the job has lanes 0 to 7, of which one "
            "must; set lanes to that of the run that is repeated"
        ),
    ),
    (
        {"redundancy": {"drop_at_most": 128}},
        "job: redundancy.drop_at_most: Input should be less than or equal to 127 (got 128)",
    ),
    ({"redundancy": {"depth": 0}}, "job: redundancy.depth: Input should be greater than or equal to 1 (got 0)"),
    ({"redundancy": {"group": 1}}, "job: redundancy.group: Input should be greater than or equal to 2 (got 1)"),
    ({"redundancy": {"lane": "coded"}}, "job: unknown setting 'redundancy.lane'; did you mean 'lanes'?"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_what_does_not_go_together_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(BASE | settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("way", ["none", "take_over", "first_result", "coded", "drop_slowest"])
def test_it_is_written_down_and_read_back(way: str) -> None:
    job = parse_job(BASE | {"redundancy": {"lanes": way}, "workers": {"max": 4}, "gradients": "sum"})
    assert (job.redundancy.lanes, job.redundancy.depth, job.redundancy.group) == (way, 2, 2)
    assert f"redundancy:\n  lanes: {way}\n" in dump_job(job)


def test_a_run_that_is_repeated_is_written_down_and_read_back() -> None:
    job = parse_job(BASE | {"redundancy": {"replay": {3: [1, 7], 5: [0]}}})
    again = parse_job(yaml.safe_load(dump_job(job)))
    assert again.redundancy.replayed == {3: (1, 7), 5: (0,)}
    assert parse_job(BASE).redundancy.replayed is None
    with pytest.raises(ValueError, match="was not read"):
        _ = parse_job(BASE | {"redundancy": {"replay": "runs/one"}}).redundancy.replayed


def test_by_default_there_is_none() -> None:
    job = parse_job(BASE)
    assert job.redundancy.lanes == "none"
    assert parse_job(BASE | {"gradients": "hand_over"}).redundancy == job.redundancy


def test_no_more_lanes_are_shared_than_a_signal_can_say() -> None:
    assert Redundancy(lanes="take_over", depth=127).depth == 127
    with pytest.raises(ConfigError, match="127"):
        Redundancy(lanes="take_over", depth=128)
