"""`elastictrain data audit`, `explain` and `skip`, on runs of paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.data.audit import Auditor
from elastictrain.data.ids import lane_hash, show_hash, step_hash
from elastictrain.data.stages import Skip, first_stage, open_stage, with_skips
from elastictrain.data_commands import NOT_COUNTED
from elastictrain.job import Job, parse_job
from elastictrain.observe import RunDirectory
from elastictrain.protocol import Stage


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", *arguments])


def text_job(folder: Path) -> Job:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for number in range(2):
        texts = [f"document {number}-{i} " + "word " * (i % 7) for i in range(60)]
        pq.write_table(pa.table({"text": texts}), data / f"{number}.parquet", row_group_size=20)
    settings = {"kind": "parquet", "path": str(data), "text_column": "text", "sequence_length": 31}
    return parse_job({"recipe": "a:B", "data": settings, "lanes": 4, "lane_batch_size": 2, "steps": 20,
                      "checkpoint": {"path": str(folder / "ckpt"), "every_steps": 4}})  # fmt: skip


def table_job(folder: Path) -> Job:
    (folder / "table").mkdir()
    pq.write_table(pa.table({"n": np.arange(120)}), folder / "table" / "a.parquet", row_group_size=20)
    data = {"kind": "parquet", "path": str(folder / "table")}
    return parse_job({"recipe": "a:B", "data": data, "lanes": 4, "lane_batch_size": 2, "steps": 20,
                      "checkpoint": {"path": "s3://x/y"}})  # fmt: skip


def write_run(folder: Path, job: Job, stages: tuple[Stage, ...] = (), *, wrong: int | None = None,
              dropped: Mapping[int, Sequence[int]] | None = None) -> RunDirectory:  # fmt: skip
    stages = stages or (first_stage(job),)
    auditor = Auditor(stages, lambda stage: open_stage(job, stage))
    with RunDirectory.create(folder / "runs" / "one", job) as run:
        run.write_data([asdict(stage) for stage in stages], auditor.source(1)[0].fingerprint)
        for step in range(1, 11):
            left_out = (dropped or {}).get(step, ())
            lanes = [lane for lane in range(auditor.source(step)[0].lanes) if lane not in left_out]
            recorded = step_hash(lane_hash(lane, auditor.ids(step, lane)) for lane in lanes) ^ (step == wrong)
            said = {} if dropped is None else {"lanes_dropped": list(left_out)}
            run.row({"step": step, "world": 2, "samples": 8, "samples_hash": show_hash(recorded), **said})
            if step % 4 == 0:
                run.event("checkpoint", {"step": step, "path": "x"})
    return RunDirectory.open(folder / "runs" / "one")


def test_audit_agrees_and_shows_where_samples_lie(folder: Path) -> None:
    write_run(folder, text_job(folder))
    result = call("audit", "one")
    assert result.exit_code == 0, result.output
    assert "steps 1 to 10: 80 samples, 0 of them twice in an epoch" in result.output
    assert "recorded and computed agree at 10 of 10 steps\n" in result.output
    shown = call("audit", "one", "--steps", "3", "--samples").output
    assert "step 3: 8 samples, agrees" in shown
    assert "lane 0, sample 0: epoch 0, " in shown
    assert ".parquet, row group " in shown
    assert ", tokens " in shown


def test_audit_for_programs(folder: Path) -> None:
    write_run(folder, text_job(folder))
    lines = [
        json.loads(line) for line in call("audit", "one", "--steps", "2:4", "--samples", "--json").output.splitlines()
    ]
    assert [line.get("step") for line in lines] == [2, 3, None]
    assert all(line["agrees"] and line["recorded"] == line["computed"] for line in lines[:2])
    assert sorted(lines[0]["lanes"]) == ["0", "1", "2", "3"]
    assert set(lines[0]["lanes"]["0"][0]["parts"][0]) == {"file", "row_group", "block", "rows", "tokens"}
    assert lines[2]["verdict"]["steps"] == 2


def test_audit_of_a_wrong_record_names_the_step_and_ends_with_2(folder: Path) -> None:
    write_run(folder, text_job(folder), wrong=6)
    result = call("audit", "one")
    assert result.exit_code == 2
    assert "agree at 9 of 10 steps" in result.output
    assert "steps 6 used other samples than the order says" in result.output


def test_audit_of_other_data_says_what_has_changed(folder: Path) -> None:
    job = text_job(folder)
    write_run(folder, job)
    pq.write_table(pa.table({"text": ["other"] * 99}), folder / "data" / "1.parquet", row_group_size=20)
    result = call("audit", "one")
    assert result.exit_code == 2
    assert "the data are not those that the run has used:" in result.output
    assert "1.parquet has changed" in result.output


def test_audit_of_a_run_without_records_says_so(folder: Path) -> None:
    job = text_job(folder)
    with RunDirectory.create(folder / "runs" / "old", job) as run:
        run.row({"step": 1, "world": 2})
    result = call("audit", "old")
    assert result.exit_code == 0
    assert "agree at 0 of 1 steps; 1 have no record" in result.output
    with RunDirectory.create(folder / "runs" / "empty", job):
        pass
    assert "nothing to audit" in call("audit", "empty").output


def test_explain_names_the_row(folder: Path) -> None:
    job = table_job(folder)
    run = write_run(folder, job)
    auditor = Auditor((first_stage(job),), lambda stage: open_stage(job, stage))
    first = int(auditor.ids(5, 3)[0])
    block, row = first >> 32, first & 0xFFFFFFFF
    result = call("explain", str(run.path), "--step", "5", "--lane", "3")
    assert "step 5: step 4 of the order of stage 0" in result.output
    assert f"lane 3, sample 0: epoch 0, a.parquet, row group {block}, row {row}" in result.output
    assert "lane 2" not in result.output
    record = json.loads(call("explain", str(run.path), "--step", "5", "--json").output)
    assert record["lanes"]["3"][0]["parts"][0]["rows"] == [row, row + 1]
    assert call("explain", str(run.path), "--step", "5", "--lane", "4").exit_code == 2


def test_lanes_that_did_not_count_are_named(folder: Path) -> None:
    write_run(folder, table_job(folder), dropped={3: [1], 7: [0, 2]})
    result = call("audit", "one")
    assert result.exit_code == 0, result.output
    assert "steps 1 to 10: 74 samples, 0 of them twice in an epoch" in result.output
    assert "recorded and computed agree at 10 of 10 steps\n" in result.output
    words = "3 lane(s) did not count (redundancy.lanes: drop_slowest), in steps 3, 7: their samples were not used"
    assert words in result.output
    shown = call("audit", "one", "--steps", "3", "--samples").output
    assert [line.endswith(NOT_COUNTED) for line in shown.splitlines() if " lane " in line and "sample" in line] == [
        False, False, True, True, False, False, False, False,
    ]  # fmt: skip
    lines = [json.loads(line) for line in call("audit", "one", "--json").output.splitlines()]
    assert (lines[6]["dropped"], lines[6]["samples"]) == ([0, 2], 4)
    assert lines[-1]["verdict"]["dropped_in"] == [3, 7]
    explained = call("explain", "one", "--step", "7").output
    assert explained.count(NOT_COUNTED) == 4
    assert json.loads(call("explain", "one", "--step", "7", "--json").output)["dropped"] == [0, 2]
    assert NOT_COUNTED not in call("explain", "one", "--step", "8").output
    assert json.loads(call("explain", "one", "--step", "99", "--json").output)["dropped"] == []


def test_explain_reads_a_job_file_and_names_documents(folder: Path) -> None:
    from elastictrain.job import dump_job

    (folder / "job.yaml").write_text(dump_job(text_job(folder)))
    result = call("explain", "job.yaml", "--step", "1", "--lane", "0", "--rows")
    assert result.exit_code == 0, result.output
    assert ", row" in result.output.split("row group", 1)[1]


def test_skip_is_written_down_and_becomes_a_stage(folder: Path) -> None:
    run = write_run(folder, text_job(folder))
    result = call("skip", "one", "--steps", "6:9")
    assert result.exit_code == 0, result.output
    assert "will be left out: steps 6 to 8" in result.output
    assert (
        "Step 6 has been trained already: to pass over it, go on from a checkpoint before it, such as " in result.output
    )
    assert "--resume-step 4" in result.output
    (skip,) = [Skip.of(record) for record in run.read_skips()]
    assert skip == Skip("steps 6 to 8", 5, 8, order=0)
    assert call("skip", "one", "--steps", "40:50").output.rstrip().endswith("(run --resume)")
    assert len(run.read_skips()) == 2


def test_skip_of_one_lane_takes_exactly_its_samples(folder: Path) -> None:
    job = text_job(folder)
    run = write_run(folder, job)
    assert call("skip", "one", "--steps", "6", "--lane", "3").exit_code == 0
    skips = [Skip.of(record) for record in run.read_skips()]
    auditor = Auditor((first_stage(job),), lambda stage: open_stage(job, stage))
    wanted = {(int(i) >> 32, int(i) & 0xFFFFFFFF) for i in auditor.ids(6, 3)}
    assert {(skip.block, skip.start) for skip in skips} == wanted
    assert all(skip.stop == skip.start + 1 for skip in skips)


def test_skip_of_documents_takes_every_sample_that_holds_a_piece_of_them(folder: Path) -> None:
    job = text_job(folder)
    run = write_run(folder, job)
    assert call("skip", "one", "--file", "1.parquet", "--row-group", "2", "--rows", "17:20").exit_code == 0
    skips = tuple(Skip.of(record) for record in run.read_skips())
    source = open_stage(job, first_stage(job))
    with_poison = set()
    for block in range(len(source.order.block_rows)):
        for row in range(int(source.order.block_rows[block])):
            parts = source.location(block, row).parts
            if any(p.block == 5 and set(range(*source.rows_of(p))) & {17, 18, 19} for p in parts):
                with_poison.add((block, row))
    assert {(s.block, row) for s in skips for row in range(s.start, s.stop)} == with_poison
    stage = with_skips((first_stage(job),), skips, 0)[-1]
    after = Auditor((stage,), lambda stage: open_stage(job, stage))
    used = {
        (int(i) >> 32, int(i) & 0xFFFFFFFF) for step in range(1, 9) for lane in range(4) for i in after.ids(step, lane)
    }
    assert not used & with_poison


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say what to skip"),
        (("--lane", "1"), "say what to skip"),
        (("--file", "0.parquet"), "say what to skip"),
        (("--steps", "3", "--rows", "1:2"), "--rows needs --file"),
        (("--steps", "9:3"), "expected A:B with A below B"),
        (("--steps", "three"), "expected A:B (from A up to, not including, B), or a single number"),
        (("--steps", "3:5", "--lane", "1"), "expected one step"),
        (("--steps", "3", "--lane", "9"), "the step has lanes 0 to 3"),
        (("--file", "0.parket", "--row-group", "0"), "did you mean '0.parquet'?"),
        (("--file", "0.parquet", "--row-group", "3"), "no row group 3; it has 3"),
        (("--file", "0.parquet", "--row-group", "0", "--rows", "5:21"), "it has rows 0 to 19"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_skipped_is_refused(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    run = write_run(folder, text_job(folder))
    result = call("skip", "one", *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert run.read_skips() == []


def test_skip_refuses_what_leaves_too_little_and_a_run_that_is_written_to(folder: Path) -> None:
    (folder / "few").mkdir()
    pq.write_table(pa.table({"n": np.arange(20)}), folder / "few" / "a.parquet", row_group_size=10)
    job = table_job(folder)
    few = job.model_copy(update={"data": job.data.model_copy(update={"path": str(folder / "few")})})
    write_run(folder, few)
    result = call("skip", "one", "--file", "a.parquet", "--row-group", "1")
    assert result.exit_code == 2
    assert "cannot all be skipped" in result.output
    with RunDirectory.resume(folder / "runs" / "one", few):
        result = call("skip", "one", "--steps", "30:40")
    assert result.exit_code == 2
    assert "is in use by process" in result.output
    bare = job.model_copy(update={"checkpoint": None})
    with RunDirectory.create(folder / "runs" / "bare", bare):
        pass
    assert "stores no checkpoints" in call("skip", "bare", "--steps", "3").output


def test_a_broken_record_is_said(folder: Path) -> None:
    run = write_run(folder, text_job(folder))
    (run.path / "data.json").write_text("{")
    result = call("audit", "one")
    assert result.exit_code == 3
    assert "data.json: not JSON" in result.output
