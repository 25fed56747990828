"""Stores that fail now and then: asked again with limits; what is final is said at once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from elastictrain.data import LaneReader, open_source
from elastictrain.data.files import find_files
from elastictrain.data.meter import Meter
from elastictrain.data.retry import Retry, RetryingFile, backoff_s
from elastictrain.data.segments import SegmentWriter
from elastictrain.errors import DataError, StoreFailed
from elastictrain.job import Data


class Unreliable(MemoryFileSystem):
    """Every third request fails."""

    protocol = "unreliable"
    find = fsspec.AbstractFileSystem.find  # by way of `ls`, as most file systems have it; memory has its own
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    calls = 0
    failed = 0
    every = 3
    error: type[Exception] = ConnectionError

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("unreliable://").strip("/")

    def _maybe(self) -> None:
        Unreliable.calls += 1
        if Unreliable.every and Unreliable.calls % Unreliable.every == 0:
            Unreliable.failed += 1
            raise Unreliable.error("503, slow down")

    def info(self, path: str, **kwargs: Any) -> Any:
        self._maybe()
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._maybe()
        return super().ls(path, detail=detail, **kwargs)

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._maybe()
        handle = super().open(path, mode, **kwargs)
        if mode != "rb":
            return handle
        read, system = handle.read, self

        class Handle:
            def __getattr__(self, name: str) -> Any:
                return getattr(handle, name)

            def read(self, *size: int) -> bytes:
                system._maybe()
                return bytes(read(*size))

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                handle.close()

        return Handle()

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._maybe()
        return super().cat_file(path, *args, **kwargs)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Unreliable]]:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    monkeypatch.setattr("elastictrain.data.retry._pause", lambda _: None)
    Unreliable.store, Unreliable.pseudo_dirs = {}, [""]
    Unreliable.calls, Unreliable.failed, Unreliable.every, Unreliable.error = 0, 0, 0, ConnectionError
    yield Unreliable
    Unreliable.store = {}


def filled(rows: int = 40) -> str:
    system = Unreliable()
    for number in range(4):
        lines = "".join(json.dumps({"x": number * rows + row}) + "\n" for row in range(rows))
        system.pipe_file(f"/data/{number % 2}/{number}.jsonl", lines.encode())
    return "unreliable://data"


def values(place: str, **settings: Any) -> list[list[int]]:
    spec = Data(kind="jsonl", path=place, rows_per_block=7, **settings)
    reader = LaneReader(open_source(spec, seed=1, lanes=2, lane_batch_size=4))
    found = [reader.batch(step, lane)["x"].tolist() for step in range(20) for lane in range(2)]
    reader.close()
    return found


def test_a_store_that_fails_every_third_time_gives_what_a_sound_one_gives(store: type[Unreliable]) -> None:
    place = filled()
    sound = values(place)
    assert store.failed == 0
    store.every = 3
    assert values(place) == sound
    assert store.failed > 20


def test_a_folder_is_listed_wholly_or_not_at_all(store: type[Unreliable]) -> None:
    place = filled()
    store.every, store.calls = 1, 0  # fsspec's own `find` would say that there is nothing
    with pytest.raises(DataError, match=r"cannot be listed .*given up after \d+ tries within 0 s"):
        find_files(place, "jsonl", retry_s=0)
    store.every = 3
    for before in range(3):  # whichever request it is that fails
        store.calls = before
        assert len(find_files(place, "jsonl").files) == 4
    assert [file.name for file in find_files(place, "jsonl").files] == [
        "0/0.jsonl",
        "0/2.jsonl",
        "1/1.jsonl",
        "1/3.jsonl",
    ]


def test_what_another_try_cannot_change_is_said_at_once(store: type[Unreliable]) -> None:
    place = filled()
    store.every, store.error = 3, PermissionError
    before = store.calls
    with pytest.raises(DataError, match="503"):
        values(place)
    assert store.failed == 1
    assert store.calls == before + 3 - before % 3


def test_a_manifest_on_such_a_store(store: type[Unreliable], tmp_path: Path) -> None:
    store.every = 3
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    writer = SegmentWriter("unreliable://stream")
    with fsspec.open("unreliable://stream/b.jsonl", "wb") as handle:
        handle.write(b'{"x": 2}\n')
    assert [writer.append("unreliable://stream/b.jsonl").ordinal for _ in range(5)] == list(range(5))
    assert [s.ordinal for s in writer.log.segments()] == list(range(5))
    assert store.failed > 3


def test_the_pauses_grow_to_a_limit() -> None:
    assert list(itertools.islice(backoff_s(0.1, 1.0), 6)) == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow", "csv"])
@pytest.mark.parametrize("error", [PermissionError, ConnectionError])
def test_a_store_that_goes_away_leaves_no_holes(
    store: type[Unreliable], monkeypatch: pytest.MonkeyPatch, kind: str, error: type[Exception]
) -> None:
    system, table = Unreliable(), pa.table({"x": range(40)})
    for number in range(2):
        with system.open(f"/outage/{number}.{kind}", "wb") as handle:
            if kind == "parquet":
                pq.write_table(table, handle, row_group_size=20)
            elif kind == "arrow":
                pyarrow.feather.write_feather(table, handle, compression="uncompressed", chunksize=20)
            else:
                line = '{"x": %d}\n' if kind == "jsonl" else "%d\n"
                handle.write((("x\n" if kind == "csv" else "") + "".join(line % row for row in range(40))).encode())
    spec = Data(kind=kind, path="unreliable://outage", on_corrupt="skip", retry_s=0)
    fails_from, raised = 0, []

    def maybe(_: Unreliable) -> None:
        store.calls += 1
        if store.calls > fails_from:
            raise error("gone")

    monkeypatch.setattr(Unreliable, "_maybe", maybe)
    while True:
        store.calls = 0
        try:
            source = open_source(spec, seed=1, lanes=2, lane_batch_size=4)
            break
        except DataError as failed:
            raised.append(type(failed))
        fails_from += 1
        assert fails_from < 300
    assert source.samples == 80
    assert "holes" not in source.describe()
    assert raised.count(StoreFailed) > 4
    source.close()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def failing(times: int, error: Exception) -> Any:
    left = [times]

    def action() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "done"

    return action


def test_the_limit_is_of_time() -> None:
    clock = Clock()
    retry = Retry(limit_s=10, first_s=1, longest_s=4, clock=clock, sleep=clock.sleep)
    assert retry.call(failing(3, OSError("busy")), "f") == "done"
    assert clock.slept == [1, 2, 4]
    with pytest.raises(OSError, match=r"busy; given up after 4 tries within 10 s \(data\.retry_s\)"):
        retry.call(failing(99, OSError("busy")), "f")
    assert clock.slept == [1, 2, 4] * 2
    with pytest.raises(PermissionError):
        retry.call(failing(99, PermissionError("no")), "f")
    with pytest.raises(ValueError, match="ours"):
        retry.call(failing(1, ValueError("ours")), "f")
    assert len(clock.slept) == 6


def of_a_library(module: str, name: str, **facts: Any) -> Exception:
    made: Exception = type(name, (Exception,), {"__module__": module, **facts})("no answer")
    return made


def test_what_network_libraries_raise_is_of_the_store_too() -> None:
    """Their exceptions come through fsspec as they are, and are no OSErrors."""
    clock = Clock()
    retry = Retry(limit_s=10, first_s=1, longest_s=4, clock=clock, sleep=clock.sleep)
    gone = of_a_library("botocore.exceptions", "EndpointConnectionError")
    assert retry.call(failing(2, gone), "f") == "done"
    assert retry.call(failing(1, of_a_library("aiohttp.client_exceptions", "Cut", status=503)), "f") == "done"
    assert clock.slept == [1, 2, 1]
    with pytest.raises(OSError, match=r"EndpointConnectionError: no answer; given up after 4 tries"):
        retry.call(failing(99, gone), "f")
    with pytest.raises(PermissionError, match=r"^Refused: no answer$"):
        retry.call(failing(1, of_a_library("aiohttp.client_exceptions", "Refused", status=403)), "f")
    with pytest.raises(FileNotFoundError):
        retry.call(failing(1, of_a_library("gcsfs.retry", "HttpError", status=404)), "f")
    with pytest.raises(Exception, match=r"^no answer$") as ours:
        retry.call(failing(1, of_a_library("recipe", "Wrong")), "f")
    assert type(ours.value).__name__ == "Wrong"


def test_the_meter_says_how_long_a_store_was_asked_again() -> None:
    clock = Clock()
    meter = Meter(clock)
    retry = Retry(limit_s=10, first_s=1, longest_s=4, clock=clock, sleep=clock.sleep)
    with meter.stage("decode"):
        retry.call(failing(2, TimeoutError("slow")), "f")
    assert {name: s for name, s in meter.read().items() if s} == {"retry": 3.0}


class Torn:
    """A file of which every read but the first of a handle fails, leaving the handle anywhere."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at, self.reads, self.closed = content, 0, 0, False

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset if whence == 0 else self.at + offset if whence == 1 else len(self.content) + offset
        return self.at

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.reads > 1:
            self.at += 3
            raise ConnectionError("reset")
        data = self.content[self.at :] if size < 0 else self.content[self.at : self.at + size]
        self.at += len(data)
        return data

    def close(self) -> None:
        self.closed = True


def test_a_read_goes_on_where_it_was_on_a_new_handle() -> None:
    opened: list[Torn] = []

    def reopen() -> Torn:
        opened.append(Torn(bytes(range(50))))
        return opened[-1]

    file = RetryingFile(reopen, Retry(10, sleep=lambda _: None), "f")
    assert file.read(10) == bytes(range(10))
    assert file.read(5) == bytes(range(10, 15))
    assert file.tell() == 15
    assert file.seek(-10, 1) == 5
    assert file.read(3) == bytes(range(5, 8))
    assert file.seek(-2, 2) == 48
    assert file.read() == bytes([48, 49])
    assert len(opened) == 4
    file.close()
    assert all(handle.closed for handle in opened)
