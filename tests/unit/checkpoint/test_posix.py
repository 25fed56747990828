"""Reading into several buffers, room set aside, and blocks hashed while they pass."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from elastictrain_checkpoint import Store, disk, hashing, posix
from elastictrain_checkpoint.hashing import Blocks, Run, block_hashes, block_sum_of
from tests.unit.checkpoint.build import make_state, memory_store, save

DATA = np.random.default_rng(3).bytes(50_000)


def store_with(kind: str, folder: Path) -> Store:
    store = memory_store() if kind == "memory" else Store(folder)
    store.create("a/b", [memoryview(DATA)])
    return store


@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize("sizes", [[], [0, 0], [7], [5, 0, 3000, 1], [1] * 2500, [0] * 1500 + [9, 9]])
def test_one_run_of_bytes_fills_several_buffers(tmp_path: Path, kind: str, sizes: list[int]) -> None:
    outs = [memoryview(bytearray(size)) for size in sizes]
    assert store_with(kind, tmp_path).read_parts("a/b", 11, outs) == sum(sizes)
    assert b"".join(outs) == DATA[11 : 11 + sum(sizes)]


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_the_end_of_the_file_is_told(tmp_path: Path, kind: str) -> None:
    outs = [memoryview(bytearray(30)) for _ in range(4)]
    assert store_with(kind, tmp_path).read_parts("a/b", 50_000 - 70, outs) == 70
    assert b"".join(outs)[:70] == DATA[-70:]
    with pytest.raises(FileNotFoundError):
        store_with(kind, tmp_path / "other").read_parts("a/c", 0, outs)


def test_reads_that_come_in_bits_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def preadv(self, file: int, outs: list[memoryview], at: int) -> int:
            return os.preadv(file, [next(out for out in outs if len(out))[:13]], at)

    store = store_with("file", tmp_path)
    monkeypatch.setattr(posix, "os", Slow())
    outs = [memoryview(bytearray(size)) for size in (1, 40, 13, 200)]
    assert store.read_parts("a/b", 5, outs) == 254
    assert b"".join(outs) == DATA[5:259]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def full(file: int, size_bytes: int) -> None:
        asked.append(size_bytes)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    [file] = save(memory_store(), make_state(), ()).files
    monkeypatch.setattr(disk, "reserve", full)
    with pytest.raises(OSError, match="No space left"):
        save(Store(tmp_path), make_state(), ())
    assert asked == [file.size_bytes]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_room_leaves_the_size_alone_and_errors_are_errors(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        disk.reserve(file.fileno(), 100_000)
        assert os.fstat(file.fileno()).st_size == 0
        disk.reserve(file.fileno(), 0)
        disk.start_writing_back(file.fileno(), 0, 0)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        disk.reserve(999_999, 10)
    assert caught.value.errno == errno.EBADF


def test_a_file_system_that_knows_no_such_call_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    disk.reserve(write, 10)  # a pipe cannot be allocated
    disk.start_writing_back(write, 0, 10)
    os.close(read)
    os.close(write)
    monkeypatch.setattr(disk, "_fallocate", None)
    monkeypatch.setattr(disk, "_sync_range", None)
    disk.reserve(-1, 10)
    disk.start_writing_back(-1, 0, 10)


@pytest.mark.parametrize("seed", range(20))
def test_cells_and_blocks_are_hashed_while_they_pass(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(hashing, "SUM_BLOCK_BYTES", 5000)
    draw = np.random.default_rng(seed)
    runs, expected = [], []
    for _ in range(int(draw.integers(1, 9))):
        item = int(draw.choice([0, 1, 2]))
        data = draw.bytes(int(draw.choice([0, 1, 900, 8192, 30_000])) * max(item, 1))
        runs.append(Run(memoryview(data), item * hashing.DIGEST_BLOCK_ELEMENTS))
        expected.append(block_hashes(data, item) if item else b"")
    whole = b"".join(run.view for run in runs)
    blocks = Blocks(runs, len(whole))
    assert b"".join(bytes(block) for block in blocks) == whole
    assert blocks.sums == [xxhash.xxh3_64_intdigest(whole[at : at + 5000]) for at in range(0, len(whole), 5000)]
    assert [b"".join(run.cells) for run in runs] == expected
    parts = [memoryview(whole)[a:b] for a, b in ((0, 3), (3, 3), (3, 700))]
    assert block_sum_of(parts) == xxhash.xxh3_64_intdigest(whole[:700])


def test_a_block_is_hashed_when_it_has_been_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written a moment ago lies in the processor's cache; what is to be written mostly does not."""
    monkeypatch.setattr(hashing, "SUM_BLOCK_BYTES", 5000)
    run = Run(memoryview(bytes(12_000)), hashing.DIGEST_BLOCK_ELEMENTS)
    blocks = Blocks([run], 12_000)
    known = [(len(blocks.sums), len(run.cells)) for _ in blocks]
    assert known == [(0, 0), (1, 1), (2, 3)], "the rest is copied together, and its cells are hashed then"
    assert (len(blocks.sums), len(run.cells)) == (3, 3)


def test_a_write_that_fails_removes_its_own_file_and_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def failing(*, overtaken: bool) -> Iterator[memoryview]:
        yield memoryview(b"ours")
        if overtaken:
            store.replace("step/pack", [memoryview(b"theirs")])
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        store.create("step/pack", failing(overtaken=False))
    assert store.size("step/pack") is None
    with pytest.raises(OSError, match="Input/output error"):
        store.create("step/pack", failing(overtaken=True))
    assert store.read_all("step/pack") == b"theirs"
