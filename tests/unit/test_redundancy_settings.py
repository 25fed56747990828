"""What a job may ask of lanes that more than one worker computes."""

from __future__ import annotations

from typing import Any

import pytest

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
    ({"redundancy": {"depth": 0}}, "job: redundancy.depth: Input should be greater than or equal to 1 (got 0)"),
    ({"redundancy": {"group": 1}}, "job: redundancy.group: Input should be greater than or equal to 2 (got 1)"),
    ({"redundancy": {"lane": "coded"}}, "job: unknown setting 'redundancy.lane'; did you mean 'lanes'?"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_what_does_not_go_together_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(BASE | settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("way", ["none", "take_over", "first_result", "coded"])
def test_it_is_written_down_and_read_back(way: str) -> None:
    job = parse_job(BASE | {"redundancy": {"lanes": way}, "workers": {"max": 4}, "gradients": "sum"})
    assert (job.redundancy.lanes, job.redundancy.depth, job.redundancy.group) == (way, 2, 2)
    assert f"redundancy:\n  lanes: {way}\n" in dump_job(job)


def test_by_default_there_is_none() -> None:
    job = parse_job(BASE)
    assert job.redundancy.lanes == "none"
    assert parse_job(BASE | {"gradients": "hand_over"}).redundancy == job.redundancy


def test_no_more_lanes_are_shared_than_a_signal_can_say() -> None:
    assert Redundancy(lanes="take_over", depth=127).depth == 127
    with pytest.raises(ConfigError, match="127"):
        Redundancy(lanes="take_over", depth=128)
