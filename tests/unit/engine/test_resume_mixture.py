"""Resuming with another mixture: a stage that goes on where every source was, recorded and in force from then on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastictrain.data import LaneReader, MixedSource
from elastictrain.data.stages import open_stage, order_begins
from elastictrain.engine.resume import find_start
from elastictrain.engine.saver import Saver
from elastictrain.engine.saving import owned_state
from elastictrain.errors import DataError
from elastictrain.job import Job, Mixture
from elastictrain.layout import Shard
from elastictrain.protocol import Stage
from tests.unit.engine.worlds import NetRecipe, committed, make_job, started


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in "abc":
        rows = [json.dumps({"x": number, "y": ord(name)}) for number in range(64)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    made = make_job(NetRecipe(), lanes=2, lane_batch_size=2, checkpoint={"path": str(tmp_path / "ckpt"), "keep": 10})
    return with_mixture(made, tmp_path, "ab", weights={"a": 1, "b": 1})


def with_mixture(job: Job, folder: Path, names: str, **settings: Any) -> Job:
    sources = {n: {"kind": "jsonl", "path": str(folder / f"{n}.jsonl"), "rows_per_block": 16} for n in names}
    return job.model_copy(update={"data": Mixture.model_validate({"sources": sources, **settings})})


def store(job: Job, stages: tuple[Stage, ...], step: int) -> None:
    """A checkpoint as a run with these stages writes it."""
    assert job.checkpoint is not None
    model, saver = started(job), Saver(job.checkpoint)
    owned = owned_state(model.flat, model.held, [Shard(0, len(model.space.blocks), 0, None)], with_counters=True)
    source = open_stage(job, stages[-1], stages[:-1])
    tree = {"seed": job.seed, "data": dict(source.fingerprint), "stages": [stage.as_json() for stage in stages]}
    source.close()
    share = saver.begin(owned, step=step, generation=step, worker=0).share()
    committed(saver, [share], step=step, generation=step, tree=tree, aliases=model.space.aliases, info={})


def rows(job: Job, stages: tuple[Stage, ...], run_steps: range) -> list[tuple[int, int]]:
    """What the run's steps read; step 1 is the first."""
    source = open_stage(job, stages[-1], stages[:-1])
    assert isinstance(source, MixedSource)
    reader, begin = LaneReader(source), order_begins(stages).from_step
    found = []
    for step in run_steps:
        batch = reader.batch(step - 1 - begin, 0)
        found += list(zip(batch["y"].tolist(), batch["x"].tolist(), strict=True))
    return found


def test_a_new_run_records_the_plan_in_integers(job: Job) -> None:
    (stage,) = find_start(job, resume=False).stages
    assert stage.mixture == ({"from_step": 0, "weights": {"a": 1, "b": 1}},)
    assert Stage.from_json(json.loads(json.dumps(stage.as_json()))) == stage


def test_the_same_mixture_goes_on_without_a_stage(job: Job) -> None:
    stages = find_start(job, resume=False).stages
    store(job, stages, 6)
    start = find_start(job, resume=True)
    assert (start.stages, start.notes) == (stages, ())


def test_another_mixture_is_a_stage_that_continues(job: Job, tmp_path: Path) -> None:
    first = find_start(job, resume=False).stages
    store(job, first, 6)
    changed = with_mixture(job, tmp_path, "abc", weights={"a": 1, "b": 1, "c": 2})
    start = find_start(changed, resume=True)
    assert [(s.index, s.from_step, s.continues) for s in start.stages] == [(0, 0, False), (1, 6, True)]
    assert [kind for kind, _ in start.notes] == ["stage"]
    old, new = rows(job, first, range(1, 13)), rows(changed, start.stages, range(7, 13))
    for source in (ord("a"), ord("b")):
        before = [x for y, x in rows(job, first, range(1, 7)) if y == source]
        mine = [x for y, x in new if y == source]
        whole = [x for y, x in old if y == source]
        assert [*before, *mine] == whole[: len(before) + len(mine)], "nothing lost, nothing repeated"
    assert sum(y == ord("c") for y, _ in new) == 6
    store(changed, start.stages, 10)
    assert find_start(changed, resume=True).stages == start.stages
    again = find_start(job, resume=True)
    assert [s.from_step for s in again.stages] == [0, 6, 10]
    c_is_gone = rows(job, again.stages, range(11, 13))
    assert {y for y, _ in c_is_gone} == {ord("a"), ord("b")}


def test_other_lanes_begin_the_order_anew_with_the_plan_in_force(job: Job, tmp_path: Path) -> None:
    staged = with_mixture(job, tmp_path, "ab", weights={"a": 1}, stages=[{"from_step": 8, "weights": {"b": 1}}])
    store(staged, find_start(staged, resume=False).stages, 6)
    wider = staged.model_copy(update={"lanes": 4})
    start = find_start(wider, resume=True)
    assert [(s.from_step, s.lanes, s.continues) for s in start.stages] == [(0, 2, False), (6, 4, False)]
    got = rows(wider, start.stages, range(7, 11))
    assert [y for y, _ in got] == [ord("a")] * 4 + [ord("b")] * 4
    store(wider, start.stages, 7)
    changed = with_mixture(wider, tmp_path, "ab", weights={"a": 1, "b": 1})
    stages = find_start(changed, resume=True).stages
    assert [(s.from_step, s.continues) for s in stages] == [(0, False), (6, False), (7, True)]
    before, after = rows(wider, start.stages, range(7, 8)), rows(changed, stages, range(8, 20))
    of_a = [x for y, x in [*before, *after] if y == ord("a")]
    assert len(set(of_a)) == len(of_a) == 14, "the stage that continues counts from where the order began"


def test_a_source_whose_files_changed_is_refused(job: Job, tmp_path: Path) -> None:
    store(job, find_start(job, resume=False).stages, 6)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"x": n, "y": 0}) for n in np.arange(60).tolist()))
    with pytest.raises(
        DataError, match=r"since checkpoint step 6:\n  source 'b': there were 64 samples and are now 60"
    ):
        find_start(job, resume=True)
