"""What a run writes before its controller is there."""

from __future__ import annotations

from pathlib import Path

import pytest

import elastictrain as et
from elastictrain.engine.resume import Start
from elastictrain.errors import ConfigError
from elastictrain.job import parse_job
from elastictrain.observe.rundir import RunDirectory
from elastictrain.protocol import Restore
from elastictrain.run import _open_run_directory


def test_a_run_that_goes_on_from_an_earlier_step_takes_back_the_rows_after_it(tmp_path: Path) -> None:
    """Whoever takes the directory up next, the controller, writes them again: generations 2 and 3 had committed
    nothing, and only the folder of generations knows of them.
    """
    place = tmp_path / "run"
    job = parse_job({"recipe": "a:B", "data": {"kind": "jsonl", "path": "x"}, "steps": 9, "run_dir": str(place)})
    with RunDirectory.create(None, job) as run:
        for step in range(1, 7):
            run.row({"step": step, "generation": 1 + step // 3})
    (place / "generations").mkdir()
    for generation in (1, 2, 3):
        (place / "generations" / str(generation)).touch()
    start = Start(Restore(2, "c/2"), (), (), resumed=True, generation=1)
    assert _open_run_directory(job, 10, start) == (place, 3)
    with RunDirectory.resume(place, job) as run:
        assert run.last_step == 2
        assert not run.row({"step": 3, "generation": 2}), "of the run before"
        assert run.row({"step": 3, "generation": 4})
        assert [(row.step, row.generation) for row in run.metrics()] == [(1, 1), (2, 1), (3, 4)]


def test_a_choice_about_changed_data_is_for_a_run_that_is_taken_up() -> None:
    """Said before the recipe, the data or a cluster are looked at: here there are none."""
    job = parse_job({"recipe": "a:B", "data": {"kind": "jsonl", "path": "x"}, "steps": 9})
    with pytest.raises(ConfigError, match=r"--data-changed.*add --resume"):
        et.run(job, data_changed="new_stage")
