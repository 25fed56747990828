"""A worker that becomes slow on Ray: its lanes go to the others while all step, and the bits stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import elastictrain as et
from elastictrain.faults import slow
from elastictrain.observe import Blind, Event, RunDirectory
from tests.support.process_cluster import RECIPES, byte_job, run_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]
LANES, STEPS, FIRST, SLOW = 12, 150, 40, 1
"""By `FIRST` it is known what lanes take here, however busy the host was in the first steps: a change within what is
not known of that is learned without a word.
"""


class Hurries(Blind):
    """Lets the lanes wait no more once some were taken from the slow worker, and ten steps were taken since."""

    def __init__(self, until: Path) -> None:
        self.until, self.moves, self.left = until, list[Mapping[str, Any]](), 10

    def event(self, event: Event) -> None:
        if event.kind == "lanes_moved":
            self.moves.append(event.data)

    def row(self, metrics: Mapping[str, Any]) -> None:
        del metrics
        self.left -= any(takes_from_the_slow_one(move) for move in self.moves)
        if self.left <= 0:
            self.until.touch()


def takes_from_the_slow_one(move: Mapping[str, Any]) -> bool:
    before, after = move["lanes"].get(str(SLOW), move["lanes"].get(SLOW, (0, 0)))
    return bool(move["step"] > FIRST and after < before)


def job(folder: Path, **settings: Any) -> et.Job:
    """Its lanes wait 30 ms each and compute two: what the slow one adds is far above what a busy host does."""
    waits = {"recipe": f"{RECIPES}:Unhurried", "recipe_args": {"until": str(folder / "hurry")}}
    return byte_job(folder, lanes=LANES, steps=STEPS, **waits, **settings)


def test_lanes_move_away_from_a_slow_worker(tmp_path: Path) -> None:
    hurries = Hurries(tmp_path / "hurry")
    disturbed = job(tmp_path, workers=3, stragglers={"action": "lanes"}, run_dir=str(tmp_path / "run"))
    summary = et.run(disturbed, faults=[slow(SLOW, FIRST, factor=4.0)], observer=hurries)
    hurries.until.touch()
    assert summary.digest == run_job(job(tmp_path, workers=1, stragglers={"action": "off"})).digest
    run = RunDirectory.open(tmp_path / "run")
    assert [row.step for row in run.metrics()] == list(range(1, STEPS + 1)), "every step once"
    events = list(run.events())
    said = [event.data for event in events if event.kind == "straggler"]
    assert (SLOW, "slow", "compute") in {(one["worker"], one["what"], one["cause"]) for one in said}
    assert any(takes_from_the_slow_one(event.data) for event in events if event.kind == "lanes_moved")
    assert not [event for event in events if event.kind in ("parking", "straggler_leaves")], "without a pause"
    assert len([event for event in events if event.kind == "running"]) == 1
