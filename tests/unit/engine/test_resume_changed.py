"""Resuming on data that have changed: refused with what can be chosen, or a new stage that is recorded for good."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, Source, fingerprint
from elastictrain.data.audit import Auditor
from elastictrain.data.kept import Beside, recall
from elastictrain.data.seeds import stage_seed
from elastictrain.data.stages import Skip, open_stage
from elastictrain.engine.resume import Start, find_start
from elastictrain.errors import DataError
from elastictrain.job import Job, Mixture
from elastictrain.protocol import Stage
from tests.unit.data.live_place import Place
from tests.unit.engine.test_resume_mixture import store
from tests.unit.engine.worlds import NetRecipe, make_job

LANES, SIZE = 2, 2


def write(folder: Path, name: str, first: int, count: int = 32) -> None:
    folder.mkdir(exist_ok=True)
    table = pa.table({"x": np.arange(first, first + count), "t": [f"text {n} " * (n % 5) for n in range(count)]})
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, first in (("a", 0), ("b", 100)):
        write(tmp_path / "data", name, first)
    return tmp_path


def job_on(folder: Path, **settings: Any) -> Job:
    made = make_job(
        NetRecipe(), lanes=LANES, lane_batch_size=SIZE, checkpoint={"path": str(folder / "ckpt"), "keep": 10}
    )
    data = {"kind": "parquet", "path": str(folder / "data"), "columns": ("x",)} | settings
    return made.model_copy(update={"data": type(made.data).model_validate(data)})


def kept(folder: Path, start: Start) -> Path:
    """What a run keeps beside it."""
    for one in start.kept.values():
        one.write(folder / "kept")
    return folder / "kept"


def samples(job: Job, stages: tuple[Stage, ...], run_steps: range) -> list[int]:
    reader = LaneReader(open_stage(job, stages[-1], stages[:-1]))
    found = []
    for step in run_steps:
        for lane in range(LANES):
            found += reader.batch(stages[-1].position(step), lane)["x"].tolist()
    return found


def test_the_error_says_what_can_be_chosen_and_what_it_costs(folder: Path) -> None:
    job = job_on(folder)
    store(job, find_start(job, resume=False).stages, 6)
    write(folder / "data", "b", 500, 30)
    with pytest.raises(DataError) as caught:
        find_start(job, resume=True)
    lines = str(caught.value).splitlines()
    assert lines.pop(2).startswith("  b.parquet has changed (")
    cost = (
        "of the 64 samples of the epoch under way 40 have not been used and are left out; up to 24 that were used lie "
        "in 1 unchanged file(s) and may come again"
    )
    assert lines == [
        "the data have changed since checkpoint step 6:",
        "  there were 64 samples and are now 62",
        "put the data back, or choose:",
        "    take them as a new stage (--data-changed new_stage): a new order begins at their beginning",
        f"      {cost}",
        "    start again: a new run (another checkpoint.path and run directory)",
    ]


def test_a_new_stage_begins_a_new_order_and_is_recorded(folder: Path) -> None:
    job = job_on(folder)
    first = find_start(job, resume=False)
    store(job, first.stages, 6)
    write(folder / "data", "b", 500)
    write(folder / "data", "c", 700)
    start = find_start(job, resume=True, changed="new_stage", kept=kept(folder, first))
    (old_id,), (new_id,) = ([one.identity for one in s.kept.values()] for s in (first, start))
    assert start.stages == (Stage(0, 0, LANES, SIZE, data=old_id), Stage(1, 6, LANES, SIZE, data=new_id))
    ((kind, said),) = start.notes
    assert (kind, said["step"]) == ("data_changed", 6)
    assert said["left"] == [{"name": "", "samples": 64, "unused": 40, "may_repeat": 24, "same_files": 1}]
    assert "c.parquet is new" in said["changes"]
    epoch = samples(job, start.stages, range(7, 31))
    assert sorted(epoch) == [*range(32), *range(500, 532), *range(700, 732)], "an epoch of the new data"
    order = open_stage(job, start.stages[-1]).order
    assert order.seed == stage_seed(job.seed, 1)
    store(job, start.stages, 10)
    again = find_start(job, resume=True)
    assert (again.stages, again.notes) == (start.stages, ()), "nobody has to choose again"
    wider = find_start(job.model_copy(update={"lanes": 4}), resume=True)
    assert wider.stages[-1] == Stage(2, 10, 4, SIZE, data=new_id)
    store(job.model_copy(update={"lanes": 4}), wider.stages, 12)
    assert find_start(job.model_copy(update={"lanes": 4}), resume=True).notes == ()


def test_the_steps_before_cannot_be_trained_again_but_are_looked_back_on(folder: Path) -> None:
    job = job_on(folder)
    first = find_start(job, resume=False)
    store(job, first.stages, 6)
    before = Auditor(first.stages, lambda stage: open_stage(job, stage))
    expected = [(before.hash_of(step), before.locations(step, 1)) for step in range(1, 7)]
    write(folder / "data", "b", 500)
    start = find_start(job, resume=True, changed="new_stage")
    with pytest.raises(DataError, match=r"after step 0 \(stage 0\) used data that are not there any more: data.path"):
        open_stage(job, start.stages[0])
    beside = Beside(kept(folder, first), {}, start.stages[-1].data)
    after = Auditor(start.stages, lambda stage: open_stage(job, stage, beside=beside))
    assert [(after.hash_of(step), after.locations(step, 1)) for step in range(1, 7)] == expected
    with pytest.raises(DataError, match=r"a.parquet, row group \d: the data have changed since this stage"):
        after.source(1)[0].read_block(0)
    assert after.hash_of(7) != before.hash_of(7)
    write(folder / "data", "b", 100)  # put back, and so it is the data of the first stage again
    open_stage(job, start.stages[0]).close()


@pytest.mark.parametrize("settings", [{}, {"packing": "best_fit"}, {"document_ids": True}])
def test_text_is_looked_back_on_too(folder: Path, settings: dict[str, Any]) -> None:
    job = job_on(folder, columns=None, text_column="t", sequence_length=16, **settings)
    first = find_start(job, resume=False)
    stage = first.stages[0]
    real = open_stage(job, stage)
    assert isinstance(real, Source)
    how = {"seed": job.seed, "lanes": LANES, "lane_batch_size": SIZE}
    past = recall(kept(folder, first), first.kept[""].identity, **how)
    assert past is not None
    assert past.fingerprint == real.fingerprint
    assert (past.samples, past.schema) == (real.samples, real.schema)
    blocks = len(real.order.block_rows)
    for block in (0, blocks - 1):
        mine, theirs = past.location(block, 0), real.location(block, 0)
        if settings.get("packing") != "best_fit":
            assert mine == theirs
        elif block == 0:
            assert [(p.file, p.row_group) for p in mine.parts] == [(p.file, p.row_group) for p in theirs.parts[:1]]
    part = real.location(0, 0).parts[0]
    with pytest.raises(DataError, match="only the index is kept"):
        past.rows_of(replace(part, rows=None))
    assert recall(folder / "kept", "0" * 16, **how) is None


def test_what_is_kept_of_other_data_does_not_stand_in_for_them(folder: Path) -> None:
    job = job_on(folder)
    place = kept(folder, find_start(job, resume=False))
    (file,) = place.iterdir()
    file.rename(place / f"index-{'0' * 16}.npz")
    assert recall(place, "0" * 16, seed=0, lanes=LANES, lane_batch_size=SIZE) is None


@pytest.mark.parametrize("is_kept", [True, False])
def test_files_are_named_however_many_there_are(folder: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool) -> None:
    monkeypatch.setattr(fingerprint, "_MAX_LISTED_FILES", 1)
    job = job_on(folder)
    first = find_start(job, resume=False)
    store(job, first.stages, 6)
    write(folder / "data", "b", 500)
    write(folder / "data", "c", 700)
    place = kept(folder, first)
    with pytest.raises(DataError) as caught:
        find_start(job, resume=True, kept=place if is_kept else None)
    assert ("\n  c.parquet is new" in str(caught.value)) == is_kept
    assert ("too many files to keep a list" in str(caught.value)) != is_kept
    assert ("in 1 unchanged file(s)" in str(caught.value)) == is_kept


def test_what_was_to_be_skipped_is_left_behind_and_said(folder: Path) -> None:
    job = job_on(folder)
    skips = [Skip("a row", 3, 4, block=1), Skip("step 9", 8, 9, order=0)]
    stages = find_start(job, resume=False).stages
    store(job, stages, 4)
    store(job, find_start(job, resume=True, skips=skips).stages, 6)
    write(folder / "data", "b", 500)
    skips.append(Skip("another row", 0, 1, block=2))
    start = find_start(job, resume=True, skips=skips, changed="new_stage")
    last = start.stages[-1]
    assert (last.holes, last.jumps, last.skips) == ((), (), 3)
    assert start.notes[0][1]["skips_left"] == 3
    skips.append(Skip("of the new ones", 0, 1, block=2, data=last.data))
    later = find_start(job, resume=True, skips=skips, changed="new_stage").stages[-1]
    assert (later.holes, later.skips) == (((2, 0, 1, 0),), 4), "asked for when the change had been taken"


def mixture_on(folder: Path, names: str) -> Job:
    sources = {n: {"kind": "parquet", "path": str(folder / f"data/{n}.parquet"), "columns": ("x",)} for n in names}
    made = job_on(folder)
    data = Mixture.model_validate({"sources": sources, "weights": dict.fromkeys(names, 1)})
    return made.model_copy(update={"data": data})


def test_a_changed_source_of_a_mixture_becomes_a_new_one(folder: Path) -> None:
    job = mixture_on(folder, "ab")
    first = find_start(job, resume=False)
    store(job, first.stages, 6)
    old = samples(job, first.stages, range(1, 7))
    undisturbed = [x for x in old + samples(job, first.stages, range(7, 17)) if x < 100]
    beside = Beside(kept(folder, first), {name: one.identity for name, one in first.kept.items()})
    before = Auditor(first.stages, lambda stage: open_stage(job, stage))
    expected = [(before.hash_of(step), before.locations(step, 0)) for step in range(1, 7)]
    write(folder / "data", "b", 500, 40)
    with pytest.raises(DataError, match=r"source 'b': of the 32 samples .* 20 have not been used .*; none that was"):
        find_start(job, resume=True)
    wider = find_start(job.model_copy(update={"lanes": 4}), resume=True, changed="new_stage")
    start = find_start(job, resume=True, changed="new_stage")
    assert [(n["left"][0]["unused"]) for s in (start, wider) for kind, n in s.notes if kind == "data_changed"] == [
        20,
        20,
    ]
    assert [(s.lanes, s.from_step) for s in wider.stages] == [(LANES, 0), (4, 6)]
    assert [(s.index, s.from_step, s.continues, s.renamed) for s in start.stages] == [
        (0, 0, False, {"b": "b@1"}), (1, 6, True, {"b": "b@1"}),
    ]  # fmt: skip
    assert [kind for kind, _ in start.notes] == ["data_changed", "stage"]
    assert Stage.from_json(json.loads(json.dumps(start.stages[-1].as_json()))) == start.stages[-1]
    new = samples(job, start.stages, range(7, 17))
    assert [x for x in old + new if x < 100] == undisturbed, "what has not changed goes on where it was"
    of_b = [x for x in new if x >= 100]
    assert len(set(of_b)) == len(of_b) == 20
    assert min(of_b) >= 500
    with pytest.raises(DataError, match=r"step 0 used source 'b', which data.sources does not name any more"):
        LaneReader(open_stage(job, start.stages[0])).batch(0, 0)
    after = Auditor(start.stages, lambda stage: open_stage(job, stage, start.stages[: stage.index], beside=beside))
    assert [(after.hash_of(step), after.locations(step, 0)) for step in range(1, 7)] == expected
    assert {place.source for place in after.locations(7, 0)} == {"a", "b@1"}
    store(job, start.stages, 8)
    assert find_start(job, resume=True).notes == ()
    write(folder / "data", "b", 900, 40)
    third = find_start(job, resume=True, changed="new_stage")
    assert third.stages[-1].renamed == {"b": "b@2"}
    assert [s.from_step for s in third.stages] == [0, 6, 8]


def test_one_source_may_become_a_mixture_and_the_other_way_round(folder: Path) -> None:
    job, other = job_on(folder), mixture_on(folder, "ab")
    store(job, find_start(job, resume=False).stages, 6)
    start = find_start(other, resume=True, changed="new_stage")
    last = start.stages[-1]
    assert (last.from_step, last.continues, last.data) == (6, False, None)
    assert last.mixture is not None
    assert samples(other, start.stages, range(7, 9))
    store(other, start.stages, 8)
    assert find_start(other, resume=True).stages == start.stages
    back = find_start(job, resume=True, changed="new_stage").stages
    assert [(s.from_step, s.mixture is None) for s in back] == [(0, True), (6, False), (8, True)]
    assert back[0].data == back[2].data != back[1].data
    assert len(set(samples(job, back, range(9, 25)))) == 64


def test_live_sources_are_refused_with_the_reason(folder: Path) -> None:
    job = job_on(folder)
    place, other = Place(folder / "one"), Place(folder / "two")
    live = [job.model_copy(update={"data": one.data()}) for one in (place, other)]
    for one in (place, other):
        one.add(64)
    stages = find_start(live[0], resume=False).stages
    store(live[0], stages, 6)
    for now in (live[1], job):
        with pytest.raises(DataError, match=r"^data: a live source cannot become a new stage.*or start a new run$"):
            find_start(now, resume=True, changed="new_stage")
