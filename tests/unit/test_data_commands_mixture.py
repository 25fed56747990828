"""`elastictrain data` on a run on a mixture: audited and explained as any other; whole steps can be skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.data import LaneReader, MixedSource
from elastictrain.data.audit import Auditor, Verdict
from elastictrain.data.ids import lane_hash, show_hash, step_hash
from elastictrain.data.stages import Skip, first_stage, open_stage, with_mixture, with_skips
from elastictrain.job import Job, dump_job, parse_job
from elastictrain.observe import RunDirectory
from elastictrain.protocol import Stage

SIZES = {"a": 96, "b": 40, "c": 24}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for who, (name, size) in enumerate(SIZES.items()):
        (tmp_path / name).mkdir()
        table = pa.table({"x": np.arange(size), "who": np.full(size, who)})
        pq.write_table(table, tmp_path / name / "t.parquet", row_group_size=8)
    return tmp_path


def job_of(folder: Path, names: str = "ab", **settings: Any) -> Job:
    sources = {name: {"kind": "parquet", "path": str(folder / name)} for name in names}
    return parse_job({"recipe": "a:B", "data": {"sources": sources, **settings}, "lanes": 2, "lane_batch_size": 4,
                      "steps": 40, "checkpoint": {"path": str(folder / "ckpt"), "every_steps": 4}})  # fmt: skip


def opened(job: Job, stages: Sequence[Stage], stage: Stage) -> MixedSource:
    source = open_stage(job, stage, [one for one in stages if one.index < stage.index])
    assert isinstance(source, MixedSource)
    return source


def planned(job: Job, stages: tuple[Stage, ...] = (), step: int = 0) -> tuple[Stage, ...]:
    """The stages of a run that starts, or goes on after `step`, with the job's mixture."""
    stages = stages or (first_stage(job),)
    source = opened(job, stages, stages[-1])
    source.close()
    return with_mixture(stages, source.plan, step)


class Worker:
    """What a worker is given and records, by the reader."""

    def __init__(self, job: Job, stages: tuple[Stage, ...]) -> None:
        self.job, self.stages = job, stages
        self.readers = {stage.index: LaneReader(opened(job, stages, stage)) for stage in stages}

    def batches(self, step: int) -> list[Any]:
        stage = next(one for one in reversed(self.stages) if one.from_step < step or one.from_step == 0)
        return [self.readers[stage.index].batch(stage.position(step), lane) for lane in range(self.job.lanes)]

    def rows(self, step: int) -> list[tuple[str, int]]:
        return [
            ("abc"[who], x)
            for batch in self.batches(step)
            for who, x in zip(batch["who"].tolist(), batch["x"].tolist(), strict=True)
        ]

    def recorded(self, step: int) -> str:
        return show_hash(step_hash(lane_hash(lane, batch.ids) for lane, batch in enumerate(self.batches(step))))


def write_run(folder: Path, job: Job, stages: tuple[Stage, ...], steps: range = range(1, 25)) -> RunDirectory:
    worker = Worker(job, stages)
    source = opened(job, stages, stages[-1])
    with RunDirectory.create(folder / "runs" / "one", job) as run:
        run.write_data([stage.as_json() for stage in stages], source.fingerprint)
        for step in steps:
            run.row({"step": step, "world": 2, "samples": 8, "samples_hash": worker.recorded(step)})
    return RunDirectory.open(folder / "runs" / "one")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", *arguments])


def test_audit_of_a_mixture_agrees_over_all_epochs_of_its_sources(folder: Path) -> None:
    job = job_of(folder, "abc", weights={"a": 1, "b": 2, "c": 1})
    write_run(folder, job, planned(job))
    result = call("audit", "one")
    assert result.exit_code == 0, result.output
    assert "steps 1 to 24: 192 samples, 0 of them twice in an epoch" in result.output
    assert "agree at 24 of 24 steps" in result.output


def test_explain_names_source_and_row(folder: Path) -> None:
    job = job_of(folder, weights={"a": 1, "b": 1})
    stages = planned(job)
    write_run(folder, job, stages)
    got = Worker(job, stages).rows(7)
    lanes = json.loads(call("explain", "one", "--step", "7", "--json").output)["lanes"]
    told = [sample for lane in ("0", "1") for sample in lanes[lane]]
    assert [(s["source"], 8 * s["parts"][0]["row_group"] + s["parts"][0]["rows"][0]) for s in told] == got
    assert "sample 0: epoch 0, a: t.parquet, row group" in call("explain", "one", "--step", "1").output


def audited(job: Job, stages: tuple[Stage, ...], recorded: list[tuple[int, str | None]]) -> Verdict:
    auditor, verdict = Auditor(stages, lambda stage: opened(job, stages, stage)), Verdict()
    for step in auditor.audit(recorded):
        verdict.add(step)
    return verdict


def test_what_was_recorded_before_a_source_came_still_agrees(folder: Path) -> None:
    """`c` becomes the first in the order of names as `0`: the numbers of all other blocks change, ids do not."""
    (folder / "c").rename(folder / "0")
    before = job_of(folder, weights={"a": 1, "b": 1})
    stages = planned(before)
    worker = Worker(before, stages)
    recorded: list[tuple[int, str | None]] = [(step, worker.recorded(step)) for step in range(1, 7)]
    after = job_of(folder, "0ab", weights={"a": 1, "b": 1, "0": 2})
    stages = planned(after, stages, 6)
    assert [(stage.index, stage.order, stage.position(7)) for stage in stages] == [(0, 0, 6), (1, 0, 6)]
    worker = Worker(after, stages)
    recorded += [(step, worker.recorded(step)) for step in range(7, 12)]
    verdict = audited(after, stages, recorded)
    assert (verdict.differing, verdict.repeated, verdict.steps) == ([], 0, 11)
    recorded[2] = (3, recorded[3][1])
    assert audited(after, stages, recorded[:3]).differing == [3]


def test_an_epoch_that_is_filled_up_repeats_no_more_than_that(folder: Path) -> None:
    data = {"kind": "parquet", "path": str(folder / "b"), "ragged": "repeat"}
    job = job_of(folder).model_copy(update={"data": job_of(folder).data.sources["b"].model_copy(update=data)})  # type: ignore[union-attr]
    job = job.model_copy(update={"lanes": 3})  # 40 rows, 48 places
    stages = (first_stage(job),)
    auditor = Auditor(stages, lambda stage: open_stage(job, stage))
    steps = list(auditor.audit([(step, None) for step in range(1, 13)]))
    assert {step.epoch for step in steps} == {0, 1, 2}
    assert sum(step.repeated for step in steps) == 0
    twice = Auditor(stages, lambda stage: open_stage(job, stage))
    assert sum(step.repeated for step in twice.audit([(1, None), (2, None), (1, None)])) > 0


def test_steps_that_are_skipped_are_passed_over_and_planned_changes_come_when_they_were_planned(folder: Path) -> None:
    job = job_of(folder, weights={"a": 1}, stages=[{"from_step": 12, "weights": {"b": 1}}])
    first = planned(job)
    undisturbed = Worker(job, first)
    write_run(folder, job, first, range(1, 6))
    assert call("skip", "one", "--steps", "7:9").exit_code == 0
    skips = [Skip.of(record) for record in RunDirectory.open(folder / "runs" / "one").read_skips()]
    stages = with_skips(first, skips, 5)
    worker = Worker(job, stages)
    assert [worker.rows(step) for step in (4, 6)] == [undisturbed.rows(step) for step in (4, 6)]
    assert [worker.rows(step) for step in (7, 8, 9)] == [undisturbed.rows(step) for step in (9, 10, 11)]
    assert [{who for who, _ in worker.rows(step)} for step in (12, 13, 14)] == [{"a"}, {"b"}, {"b"}]
    recorded: list[tuple[int, str | None]] = [(step, worker.recorded(step)) for step in range(1, 15)]
    assert audited(job, stages, recorded).agrees
    skipped = {row for step in (7, 8) for row in undisturbed.rows(step)}
    assert not skipped & {row for step in range(1, 10) for row in worker.rows(step)}


def test_another_mixture_after_a_skip_goes_on_where_every_source_was(folder: Path) -> None:
    job = job_of(folder, weights={"a": 1, "b": 1})
    first = planned(job)
    stages = with_skips(first, [Skip("steps 3 to 4", 2, 4, order=0), Skip("steps 11 to 12", 10, 12, order=0)], 2)
    changed = job_of(folder, "abc", weights={"a": 1, "b": 1, "c": 2})
    later = planned(changed, stages, 6)
    assert (later[-1].order, later[-1].at, later[-1].jumps, later[-1].skips) == (0, 8, ((10, 12),), 2)
    before, after = Worker(job, stages), Worker(changed, later)
    for name in "ab":
        whole = [x for step in range(1, 9) for who, x in before.rows(step) if who == name]
        mine = [x for step in range(1, 9) for who, x in after.rows(step) if who == name]
        assert len(mine) == len(set(mine))
        assert set(mine) <= set(whole)
    assert sum(who == "c" for step in (7, 8) for who, _ in after.rows(step)) == 8
    recorded: list[tuple[int, str | None]] = [(step, after.recorded(step)) for step in range(1, 12)]
    assert audited(changed, later, recorded).agrees


@pytest.mark.parametrize("what", [("--steps", "3", "--lane", "0"), ("--file", "t.parquet", "--row-group", "0")])
def test_single_samples_of_a_mixture_are_not_skipped(folder: Path, what: tuple[str, ...]) -> None:
    job = job_of(folder)
    run = write_run(folder, job, planned(job), range(1, 4))
    result = call("skip", "one", *what)
    assert result.exit_code == 2
    assert "the data are a mixture, of which only whole steps can be skipped" in result.output
    assert run.read_skips() == []


def test_single_samples_are_not_taken_out_of_a_filled_up_epoch(folder: Path) -> None:
    raw = {"kind": "parquet", "path": str(folder / "b"), "ragged": "repeat"}
    job = parse_job({"recipe": "a:B", "data": raw, "lanes": 3, "lane_batch_size": 4, "steps": 9,
                     "checkpoint": {"path": str(folder / "ckpt")}})  # fmt: skip
    with RunDirectory.create(folder / "runs" / "one", job):
        pass
    result = call("skip", "one", "--file", "t.parquet", "--row-group", "1")
    assert result.exit_code == 2
    assert "data.ragged: repeat" in result.output


def test_inspect_looks_at_one_source_of_a_mixture(folder: Path) -> None:
    (folder / "job.yaml").write_text(dump_job(job_of(folder)))
    result = call("inspect", "job.yaml")
    assert result.exit_code == 2
    assert "look at one of it: --source a or b" in result.output
    assert "not x" in call("inspect", "job.yaml", "--source", "x").output
    record = json.loads(call("inspect", "job.yaml", "--source", "b", "--json").output)
    assert (record["rows"], record["blocks"], record["estimate"]) == (40, 5, None)
    assert "only a job with a mixture" in call("inspect", str(folder / "a"), "--source", "b").output


def test_feeding_is_set_for_the_whole_mixture(folder: Path) -> None:
    from elastictrain.errors import ConfigError

    assert job_of(folder, warm_cache_bytes=5).data.warm_cache_bytes == 5
    sources = {"a": {"kind": "parquet", "path": "x", "prefetch_bytes": 7}}
    with pytest.raises(ConfigError, match=r"data.sources.a.prefetch_bytes is one for all sources: set data"):
        parse_job({"recipe": "a:B", "data": {"sources": sources}, "steps": 4})
