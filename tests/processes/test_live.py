"""Runs on a live source: segments arrive while workers train, are killed and go on; the bits are those of a replay."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data.audit import Auditor, Verdict
from elastictrain.data.live_feeder import LiveFeeder
from elastictrain.data.segments import SegmentWriter
from elastictrain.data.stages import first_stage, open_stage
from elastictrain.engine.resume import find_start
from elastictrain.errors import ConfigError, DataError
from elastictrain.faults import add, drain, kill
from elastictrain.job import Job
from elastictrain_checkpoint import Store, list_steps, load
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


class Stream:
    """A manifest that gets one more segment, of about two steps, for every step of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.writer, self.rows = folder, SegmentWriter(folder / "stream"), 0

    def add(self, documents: int = 14) -> None:
        texts = [f"document {self.rows + n}: " + "lorem ipsum " * (5 + n % 7) for n in range(documents)]
        self.rows += documents
        name = f"{self.writer.log.count():04d}.parquet"
        pq.write_table(pa.table({"text": texts}), self.folder / "stream" / name, row_group_size=8)
        self.writer.append(name)

    def on_row(self, driver: Any, values: Any) -> None:
        del driver, values
        self.add()

    def job(self, folder: Path, *, record: str | None = None, checkpoint: str = "ckpt", **settings: Any) -> Job:
        live: dict[str, Any] = {"poll_s": 0.05, "deadline_s": 60.0, "segments_at_once": 1}
        if record is not None:
            live["record"] = str(self.folder / record)
        stored = {"path": str(self.folder / checkpoint), "every_steps": 2, "keep": 10, "at_end": True}
        job = byte_job(folder, checkpoint=stored, **settings)
        data = job.data.model_dump() | {"path": str(self.folder / "stream"), "live": live}
        return Job.model_validate({**dict(job), "data": data})


def mixed(stream: Stream, folder: Path, **settings: Any) -> Job:
    """The job with the stream as one of two sources, two to one; the other is what is there from the beginning."""
    job, files = stream.job(folder, **settings), byte_job(folder).data
    sources = {"stream": job.data.model_dump(), "files": files.model_dump()}
    data = {"sources": sources, "weights": {"stream": 2, "files": 1}, "sequence_length": files.sequence_length}
    return Job.model_validate({**dict(job), "data": data})


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    made = Stream(tmp_path)
    made.add()
    return made


def audited(job: Job, run: Run) -> Verdict:
    auditor = Auditor([first_stage(job)], lambda stage: open_stage(job, stage))
    verdict = Verdict()
    for step in auditor.audit([(row["step"], row["samples_hash"]) for row in run.record.rows]):
        verdict.add(step)
    auditor.close()
    return verdict


def replayed(stream: Stream, folder: Path, record: Path) -> Run:
    """The same order on one worker, undisturbed, with all segments there from the beginning."""
    run = run_job(stream.job(folder, record=str(record), checkpoint="replay", workers=1))
    assert run.outcome.outcome == "finished"
    return run


def test_segments_arrive_while_workers_are_killed_join_and_leave(folder, tmp_path, stream):
    job = stream.job(folder, workers={"max": 4, "start": 3, "min": 1, "replace": True})
    run = run_job(job, [kill(1, 3, "exchange"), add(4), kill(0, 5, "compute"), drain(2, 6)], on_row=stream.on_row)
    assert run.outcome.outcome == "finished"
    verdict = audited(job, run)
    assert verdict.agrees
    assert (verdict.steps, verdict.unrecorded) == (8, 0)
    assert run.digest == replayed(stream, folder, tmp_path / "ckpt" / "order").digest


def test_a_live_source_of_a_mixture_gives_the_same_bits_after_kills_and_when_taken_up(folder, tmp_path, stream):
    job = mixed(stream, folder, workers={"max": 3, "start": 3, "min": 1, "replace": True})
    first = run_job(job.model_copy(update={"steps": 5}), [kill(1, 3, "exchange")], on_row=stream.on_row)
    assert first.outcome.outcome == "finished"
    tree = load(Store(job.checkpoint.path), 4).tree
    assert tree["live"].keys() == {"stream"}
    stream.add(200)  # what has arrived since does not change what was decided before
    start = find_start(job, resume=True, step=2)
    again = run_job(job, [kill(0, 6, "vote")], restore=start.restore, base_generation=start.generation)
    assert again.outcome.outcome == "finished"
    assert [again.losses[step] for step in (3, 4, 5)] == [first.losses[step] for step in (3, 4, 5)]
    assert audited(job, again).agrees
    record = tmp_path / "ckpt" / "order" / "source-stream"
    replay = run_job(mixed(stream, folder, record=str(record), checkpoint="replay", workers=1))
    assert replay.digest == again.digest
    assert replay.losses == {**first.losses, **again.losses}
    with pytest.raises(DataError, match="one order for the life of a run"):
        find_start(job.model_copy(update={"lane_batch_size": 1}), resume=True)
    era = record / "eras" / "0000000000.json"
    era.unlink()
    with pytest.raises(DataError, match=r"data\.sources\.stream: .*era 0 of the recorded order is missing"):
        find_start(job, resume=True, step=2)


def test_a_run_that_is_stopped_and_taken_up_uses_what_was_decided(folder, tmp_path, stream):
    whole = stream.job(folder, workers=2)
    first = run_job(whole.model_copy(update={"steps": 4}), on_row=stream.on_row)
    assert first.outcome.outcome == "finished"
    stream.add(200)  # what has arrived since does not change what was decided before
    start = find_start(whole, resume=True, step=2)
    tree = load(Store(whole.checkpoint.path), 4).tree
    assert tree["live"]["segments"] >= 2
    again = run_job(whole, [kill(1, 5, "vote")], restore=start.restore, base_generation=start.generation)
    assert again.outcome.outcome == "finished"
    both = {**first.losses, **again.losses}
    assert again.losses[3] == first.losses[3]
    assert again.losses[4] == first.losses[4]
    replay = replayed(stream, folder, tmp_path / "ckpt" / "order")
    assert replay.losses == both
    assert replay.digest == again.digest
    assert audited(whole, again).agrees


def say_that_it_waits(folder: Path, worker: int) -> None:
    """In a worker: leave a file when a step waits for a segment."""
    wait_for = LiveFeeder._wait_for

    def saying(self: LiveFeeder, step: int, turn: Callable[[], None]) -> None:
        (folder / f"waits-{worker}-{step}").touch()
        wait_for(self, step, turn)

    LiveFeeder._wait_for = saying  # type: ignore[method-assign]


def test_workers_that_are_faster_than_the_stream_wait_for_it(folder, tmp_path, stream):
    """The second segment comes when both have used up the first."""
    said = tmp_path / "said"
    said.mkdir()

    def on_row(driver: Any, values: Any) -> None:
        del driver
        deadline = time.monotonic() + 60
        while values["step"] == 1 and {path.name[:7] for path in said.glob("waits-?-[1-9]")} != {"waits-0", "waits-1"}:
            assert time.monotonic() < deadline, "nobody waits"
            time.sleep(0.01)
        stream.add()

    run = run_job(stream.job(folder, workers=2), on_row=on_row, patch=partial(say_that_it_waits, said))
    assert run.outcome.outcome == "finished"
    waited = {row["step"]: row["data_wait"].get("arrival", 0.0) for row in run.record.rows}
    assert max(waited.values()) > 0
    assert waited[2] == 0
    assert run.record.of("went_back") == []
    assert run.digest == replayed(stream, folder, tmp_path / "ckpt" / "order").digest


def test_the_end_of_the_stream_is_said(folder, stream):
    stream.writer.close()
    run = run_job(stream.job(folder, workers=2))
    assert run.outcome.outcome == "failed"
    assert "DataEnded" in run.outcome.error
    assert "the manifest is closed" in run.outcome.error


def test_what_was_decided_must_be_there_when_a_run_is_taken_up(folder, tmp_path, stream):
    job = stream.job(folder, workers=1).model_copy(update={"steps": 2})
    assert run_job(job, on_row=stream.on_row).outcome.outcome == "finished"
    assert list_steps(Store(job.checkpoint.path)) == [2]
    era = tmp_path / "ckpt" / "order" / "eras" / "0000000000.json"
    kept = era.read_bytes()
    era.unlink()
    with pytest.raises(DataError, match=r"era 0 of the recorded order is missing, but the checkpoint has used it"):
        find_start(job, resume=True)
    era.write_bytes(kept)
    with pytest.raises(DataError, match="one order for the life of a run"):
        find_start(job.model_copy(update={"lane_batch_size": 1}), resume=True)
    find_start(job, resume=True)


def test_an_order_needs_a_place(folder, stream):
    job = stream.job(folder, workers=1)
    with pytest.raises((ConfigError, ValueError), match=r"data\.live\.record is not set"):
        Job.model_validate({**dict(job), "checkpoint": None})
