"""Manifests of segments: numbers without gaps, created once, whatever happens to who writes them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.live_record import OrderRecord
from elastictrain.data.retry import Retry
from elastictrain.data.segments import Closed, Segment, SegmentLog, SegmentWriter, count_records
from elastictrain.errors import DataError, StoreFailed
from elastictrain_checkpoint import Store

WRITER = Path(__file__).parents[2] / "support" / "segment_writer.py"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "made.jsonl"
    path.write_text('{"x": 1}\n')
    return path


def test_a_file_from_elsewhere_is_copied_and_one_from_there_stays(tmp_path: Path, file: Path) -> None:
    writer = SegmentWriter(tmp_path / "s")
    copied = writer.append(file, about={"run": 7})
    inside = tmp_path / "s" / "part" / "0.jsonl"
    inside.parent.mkdir()
    inside.write_text('{"x": 2}\n')
    assert writer.append("part/0.jsonl").name == writer.append(inside).name == "part/0.jsonl"
    checksum = xxhash.xxh3_64_hexdigest(file.read_bytes())
    assert copied == Segment(0, copied.name, 9, checksum, {"run": 7})
    assert Path(writer.log.path_of(copied)).read_bytes() == file.read_bytes()
    assert copied.name.startswith("data/")
    assert [s.ordinal for s in writer.log.segments()] == [0, 1, 2]
    assert writer.log.get(0) == copied
    assert writer.log.get(3) is None
    assert writer.log.identity() == SegmentWriter(tmp_path / "s").log.identity() != None  # noqa: E711


def test_nothing_comes_behind_the_end(tmp_path: Path, file: Path) -> None:
    writer, other = SegmentWriter(tmp_path / "s"), SegmentWriter(tmp_path / "s")
    writer.append(file)
    assert writer.close() == other.close() == writer.close() == 1
    with pytest.raises(DataError, match="closed after 1 segments"):
        other.append(file)
    assert writer.log.get(1) == Closed(1)
    assert [s.ordinal for s in writer.log.segments()] == [0]
    assert writer.log.count() == 2


@pytest.mark.parametrize("url", ["{tmp}/s", "memory://segments-{tmp}"])
def test_many_writers_at_once(tmp_path: Path, file: Path, url: str) -> None:
    place = url.format(tmp=tmp_path)
    got: list[int] = []

    def work() -> None:
        writer = SegmentWriter(place)
        got.extend(writer.append(file).ordinal for _ in range(8))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(got) == list(range(32))
    log = SegmentLog(place)
    assert len({s.name for s in log.segments()}) == 32
    assert log.count() == log.count(17) == log.count(32) == 32


@pytest.mark.timeout(120)
def test_writers_in_processes_of_their_own_one_of_which_is_killed(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    writers = [
        subprocess.Popen([sys.executable, str(WRITER), url, str(tmp_path), str(n)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
        writer.stdin.write("3\n" * 20)
        writer.stdin.flush()
    assert writers[1].stdout is not None
    for _ in range(3):
        writers[1].stdout.readline()
    writers[1].kill()
    out, _ = writers[0].communicate("\n", timeout=60)
    writers[1].communicate(timeout=60)
    log = SegmentLog(url)
    segments = list(log.segments())
    assert isinstance(log.get(len(segments)), Closed)
    mine = [int(line) for line in out.split()]
    assert sorted(mine) == mine
    assert len(mine) == 20
    assert len(segments) >= 23
    for segment in segments:  # whole, every one of them
        assert Path(log.path_of(segment)).stat().st_size == segment.size_bytes
        assert len(Path(log.path_of(segment)).read_text().splitlines()) == 3


class Flaky:
    """A store whose `publish` fails: before it has done anything, or when it has."""

    def __init__(self, store: Any, failures: list[str]) -> None:
        self.store, self.failures = store, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def publish(self, path: str, data: bytes) -> None:
        failure = self.failures.pop(0) if self.failures else ""
        if failure == "before":
            raise ConnectionError("reset")
        self.store.publish(path, data)
        if failure == "after":
            raise ConnectionError("reset")


@pytest.mark.parametrize("failures", [["before"], ["after"], ["before", "before", "after"]])
def test_an_answer_that_is_lost_appends_nothing_twice(tmp_path: Path, file: Path, failures: list[str]) -> None:
    writer = SegmentWriter(tmp_path / "s", retry=Retry(10, sleep=lambda _: None))
    writer.append(file)
    writer.log.store = Flaky(writer.log.store, failures)  # type: ignore[assignment]
    assert writer.append(file).ordinal == 1
    assert not failures
    assert writer.append(file).ordinal == 2
    assert writer.log.count() == 3


def test_a_store_that_fails_is_said_to_whoever_counts(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SegmentWriter(tmp_path / "s").append(file)
    log = SegmentLog(tmp_path / "s", retry=Retry(0))

    def fail(self: Store, path: str) -> None:
        raise ConnectionError("reset")

    monkeypatch.setattr(Store, "size", fail)
    with pytest.raises(StoreFailed, match=r"s/_segments/0000000000\.json: cannot be read \(reset.* behind data\.path"):
        log.count()
    record = OrderRecord(str(tmp_path / "order"), {}, storage_options=None, retry=Retry(0))
    with pytest.raises(StoreFailed, match=r"eras/0000000000\.json: cannot be read \(reset.* behind data\.live\.record"):
        record.last()
    monkeypatch.setattr(Store, "read_all", fail)
    with pytest.raises(StoreFailed, match=r"eras/0000000000\.json: cannot be read"):
        record.get(0)
    with pytest.raises(StoreFailed, match=r"_segments/0000000000\.json: cannot be read"):
        log.get(0)


def test_what_cannot_be_appended(tmp_path: Path, file: Path) -> None:
    writer = SegmentWriter(tmp_path / "s")
    for wrong in (tmp_path / "nothing.jsonl", "nothing.jsonl"):
        with pytest.raises(DataError, match=r"nothing\.jsonl: cannot be appended"):
            writer.append(wrong)
    assert writer.log.count() == 0
    record = tmp_path / "s" / "_segments" / "0000000000.json"
    for text, match in (("{", "not a record"), ('{"v": 2}', "version 2"), ('{"v": 1}', "not a segment's record")):
        record.write_text(text)
        with pytest.raises(DataError, match=match):
            writer.log.get(0)
    with pytest.raises(DataError, match="expected a number from 0"):
        writer.log.get(-1)
    with pytest.raises(DataError, match="cannot be opened"):
        SegmentWriter("nosuchprotocol://x")


def test_a_record_that_says_other_things_than_json_of_ours_is_no_surprise(tmp_path: Path, file: Path) -> None:
    writer = SegmentWriter(tmp_path / "s")
    writer.append(file)
    record = tmp_path / "s" / "_segments" / "0000000000.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"later": "more"}))
    found = writer.log.get(0)
    assert isinstance(found, Segment)
    assert found.size_bytes == 9


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_counting_asks_a_logarithm_of_times(there: int, known: int) -> None:
    asked: list[int] = []

    def is_there(number: int) -> bool:
        asked.append(number)
        return number < there

    known = min(there, known)
    assert count_records(is_there, known) == there
    assert len(asked) <= 2 * (there - known + 1).bit_length() + 2


def test_a_manifest_on_s3(tmp_path: Path, file: Path, bucket: str, options: dict[str, Any]) -> None:
    url = f"s3://{bucket}/stream"
    writer, other = (SegmentWriter(url, storage_options=options) for _ in range(2))
    segments = [writer.append(file), other.append(file), writer.append(file)]
    assert [s.ordinal for s in segments] == [0, 1, 2]
    assert other.close() == 3
    log = SegmentLog(url, storage_options=options)
    assert list(log.segments()) == segments
    with pytest.raises(DataError, match="closed"):
        writer.append(file)
