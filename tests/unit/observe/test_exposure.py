"""What would be lost if everything died now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastictrain.observe.events import Event, parse_events
from elastictrain.observe.exposure import exposure_s, stored_step
from elastictrain.observe.live import exposure_words
from elastictrain.observe.metrics import MetricsRow
from elastictrain.observe.rundir import RunDirectory
from elastictrain.observe.standing import status_of
from elastictrain.observe.status import Status

ROWS = [MetricsRow(step=step, step_s=0.5) for step in range(1, 11)]


def events(*told: tuple[str, dict[str, Any]]) -> list[Event]:
    return parse_events({"time": "2026-01-01T00:00:00Z", "kind": kind, "data": data} for kind, data in told)


@pytest.mark.parametrize(
    ("told", "step", "lost_s"),
    [
        ([], None, 5.0),
        ([("checkpoint", {"step": 4, "path": "c"})], 4, 3.0),
        ([("checkpoint", {"step": 4}), ("checkpoint", {"step": 8})], 8, 1.0),
        ([("run_resumed", {"step": 6})], 6, 2.0),
        ([("checkpoint", {"step": 4}), ("checkpoint", {"step": 8}), ("went_back", {"to_step": 4})], 4, 3.0),
        ([("checkpoint", {"step": 8}), ("went_back", {"to_step": 0})], None, 5.0),
        ([("checkpoint", {"step": 8}), ("went_back", {"to_step": 0}), ("checkpoint", {"step": 2})], 2, 4.0),
        ([("checkpoint", {"step": 3}), ("checkpoint", {"step": 8}), ("checkpoint_dropped", {"next_step": 3})], 3, 3.5),
        ([("worker_lost", {"step": 9})], None, 5.0),
        ([("checkpoint", {"step": 10})], 10, 0.0),
    ],
)
def test_what_was_done_since_the_stored_step(told: list[Any], step: int | None, lost_s: float) -> None:
    found = events(*told)
    assert len(found) == len(told)
    assert stored_step(found) == step
    assert exposure_s(stored_step(found), ROWS) == lost_s


def test_status_says_it_while_the_run_goes_on(tmp_path: Path) -> None:
    def lines(name: str, records: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    happened: list[dict[str, Any]] = [
        {"time": "2026-01-01T00:00:00Z", "kind": "run_started", "data": {"steps": 20}},
        {"time": "2026-01-01T00:00:05Z", "kind": "checkpoint", "data": {"step": 4, "path": "c"}},
    ]
    lines("events.jsonl", happened)
    lines("metrics.jsonl", [row.model_dump(mode="json") for row in ROWS])
    now = status_of(RunDirectory.open(tmp_path))
    assert (now.exposure_s, now.stored_step) == (3.0, 4)
    assert exposure_words(now) == "3.0 s of training would be lost if everything died now (stored: step 4)"
    lines("events.jsonl", [*happened, {"time": "2026-01-01T00:00:09Z", "kind": "finished", "data": {"step": 10}}])
    assert status_of(RunDirectory.open(tmp_path)).exposure_s is None


def test_in_words_when_nothing_is_stored() -> None:
    said = exposure_words(Status(exposure_s=12.34))
    assert said == "12.3 s of training would be lost if everything died now (nothing is stored yet)"
