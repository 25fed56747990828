"""Files written past the page cache are the same files, whatever the disk and the stream do."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain_checkpoint import Store, direct_io, posix
from elastictrain_checkpoint.hashing import SUM_BLOCK_BYTES as BLOCK

DATA = memoryview(np.random.default_rng(5).bytes(5 * BLOCK + 777))


class Stream:
    """Blocks of these sizes, in memory that is used again; past the cache where `says` so."""

    def __init__(self, sizes: list[int], says: Callable[[int], bool]) -> None:
        self.sizes, self.says, self.number = sizes, says, 0
        self.size_bytes = sum(sizes)

    def __iter__(self) -> Iterator[memoryview]:
        memory, at = bytearray(BLOCK), 0
        for number, size in enumerate(self.sizes):
            self.number = number
            memory[:size] = DATA[at : at + size]
            yield memoryview(memory)[:size]
            memory[:] = bytes(BLOCK)
            at += size

    def past_cache(self) -> bool:
        return self.says(self.number)


WHOLE = [BLOCK] * 5 + [777]


def always(_: int) -> bool:
    return True


class Disk:
    """`os` for `direct_io`, with writes that can go wrong; counts those past the cache."""

    def __init__(self, at: Callable[[int], int | OSError | None]) -> None:
        self.at, self.past = at, 0
        self.direct: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, file: int, data: memoryview, start: int) -> int:
        if file not in self.direct:
            return os.pwrite(file, data, start)
        self.past += 1
        told = self.at(start)
        if isinstance(told, OSError):
            raise told
        if told is None:
            return os.pwrite(file, data, start)
        other = os.open(f"/proc/self/fd/{file}", os.O_WRONLY)  # takes odd lengths too
        try:
            return os.pwrite(other, data[:told], start)
        finally:
            os.close(other)

    def open(self, path: str, flags: int) -> int:
        file = os.open(path, flags)
        self.direct.add(file)
        return file


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    with (tmp_path / "probe").open("wb") as probe:
        opened = direct_io.open_direct(probe.fileno())
    if opened is None:
        pytest.skip("this file system is not written past the page cache")
    os.close(opened)
    made = Disk(lambda _: None)
    monkeypatch.setattr(direct_io, "os", made)
    monkeypatch.setattr(direct_io, "RUN_BLOCKS", 1)  # every block by itself
    return made


def written(folder: Path) -> bytes:
    return (folder / "a/b").read_bytes()


def test_all_whole_blocks_go_past_the_cache(tmp_path: Path, disk: Disk) -> None:
    assert Store(tmp_path).create("a/b", Stream(WHOLE, always)) == len(DATA)
    assert written(tmp_path) == DATA
    assert disk.past == 5
    assert "elastictrain-direct" not in {one.name for one in threading.enumerate()}


def test_nothing_is_synced_before_everything_is_written(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append(disk.past), sync(file)))
    Store(tmp_path).create("a/b", Stream(WHOLE, always))
    assert set(seen) == {5}


def test_who_is_not_asked_goes_through_the_cache(tmp_path: Path, disk: Disk) -> None:
    Store(tmp_path).create("a/b", iter(Stream(WHOLE, always)))
    Store(tmp_path).create("a/c", Stream(WHOLE, lambda _: False))
    assert written(tmp_path) == DATA
    assert disk.past == 0


@pytest.mark.parametrize("takes_it", [True, False])
def test_who_has_no_time_does_not_wait_for_room_in_the_queue_of_the_device(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, takes_it: bool
) -> None:
    """In a hurry for three blocks; then what they have left in the cache is the device's."""
    if not takes_it:
        monkeypatch.setattr(direct_io, "open_direct", lambda _: None)
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(posix, "WRITE_BACK_BYTES", BLOCK)
    monkeypatch.setattr(posix.disk, "start_writing_back", lambda _, start, size: begun.append((start, size)))
    Store(tmp_path).create("a/b", Stream(WHOLE, lambda number: number >= 3))
    assert begun[0] == (0, 3 * BLOCK if takes_it else 4 * BLOCK)
    assert written(tmp_path) == DATA


@given(
    sizes=st.lists(st.sampled_from([BLOCK, BLOCK, 4096, 8192, 1, 777, 0, 65536]), max_size=5),
    says=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_any_stream_any_advice(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], says: list[bool]) -> None:
    folder = tmp_path_factory.mktemp("any")
    assert Store(folder).create("a/b", Stream(sizes, says.__getitem__)) == sum(sizes)
    assert written(folder) == DATA[: sum(sizes)]


def test_a_file_system_that_cannot_is_written_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "open_direct", lambda _: None)
    Store(tmp_path).create("a/b", Stream(WHOLE, always))
    assert written(tmp_path) == DATA


def test_no_file_system_but_a_local_disk_is_written_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "a").open("wb") as file:
        monkeypatch.setattr(direct_io, "_file_system", lambda _: "nfs4")
        assert direct_io.open_direct(file.fileno()) is None
        monkeypatch.setattr(direct_io, "_file_system", lambda _: "ext4")
        monkeypatch.delattr(os, "O_DIRECT")
        assert direct_io.open_direct(file.fileno()) is None


def test_the_device_takes_bytes_from_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has none")
    memory = np.frombuffer(direct_io.huge_memory(8 << 20), dtype=np.uint8)
    areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8"), flags=re.M)[1:]
    borders = [[int(one, 16) for one in area.split(maxsplit=1)[0].split("-")] for area in areas]
    [own] = [area for area, (low, high) in zip(areas, borders, strict=True) if low <= memory.ctypes.data < high]
    assert "hg" in own.partition("VmFlags:")[2].split()


def test_a_kernel_without_huge_pages_gives_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io.mmap, "MADV_HUGEPAGE", 12345)  # no advice that any kernel knows
    assert len(direct_io.huge_memory(8 << 20)) == 8 << 20


@pytest.mark.parametrize("lacks", ["memory", "thread"])
def test_what_cannot_be_set_up_costs_no_file_and_leaks_none(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "no room") if lacks == "memory" else RuntimeError("can't start new thread")

    monkeypatch.setattr(*((direct_io.mmap, "mmap") if lacks == "memory" else (threading.Thread, "start")), refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    Store(tmp_path).create("a/b", Stream(WHOLE, always))
    assert written(tmp_path) == DATA
    assert disk.past == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_whatever_goes_wrong_in_the_thread_nobody_waits_for_it(tmp_path: Path, disk: Disk) -> None:
    def broken(start: int) -> None:
        raise MemoryError("in the thread")

    disk.at = broken
    with pytest.raises(MemoryError, match="in the thread"):
        Store(tmp_path).create("a/b", Stream(WHOLE, always))


def test_a_disk_that_refuses_is_asked_once(tmp_path: Path, disk: Disk) -> None:
    disk.at = lambda _: OSError(errno.EINVAL, "a coarser grid")
    Store(tmp_path).create("a/b", Stream(WHOLE, always))
    assert written(tmp_path) == DATA
    assert disk.past == 1


@pytest.mark.parametrize(("taken", "past"), [(4096, 6), (12345, 5)])
def test_what_a_short_write_leaves_is_written_too(tmp_path: Path, disk: Disk, taken: int, past: int) -> None:
    disk.at = lambda start: taken if start == BLOCK else None
    Store(tmp_path).create("a/b", Stream(WHOLE, always))
    assert written(tmp_path) == DATA
    assert disk.past == past, "what is left of an odd length goes through the cache, the other blocks do not"


@pytest.mark.parametrize("block", [0, 2, 4])
def test_an_error_of_the_disk_fails_the_file(tmp_path: Path, disk: Disk, block: int) -> None:
    disk.at = lambda start: OSError(errno.EIO, "broken") if start == block * BLOCK else None
    with pytest.raises(OSError, match="broken"):
        Store(tmp_path).create("a/b", Stream(WHOLE, always))
    assert not (tmp_path / "a/b").exists()
    assert "elastictrain-direct" not in {one.name for one in threading.enumerate()}


def test_a_stream_that_fails_leaves_no_thread_and_no_file(tmp_path: Path, disk: Disk) -> None:
    def says(number: int) -> bool:
        if number == 3:
            raise KeyError("given up")
        return True

    with pytest.raises(KeyError, match="given up"):
        Store(tmp_path).create("a/b", Stream(WHOLE, says))
    assert disk.past == 3
    assert not (tmp_path / "a/b").exists()
    assert "elastictrain-direct" not in {one.name for one in threading.enumerate()}


# --- a stream that puts its blocks where they are written from ---


class Lending(Stream):
    """Uses what it is lent, and nothing else of it than what it needs."""

    lent: memoryview | None = None
    used = 0

    def lend(self, memory: memoryview) -> None:
        self.lent = memory

    def __iter__(self) -> Iterator[memoryview]:
        own, at = memoryview(bytearray(BLOCK)), 0
        for number, size in enumerate(self.sizes):
            self.number = number
            memory = own if self.lent is None else self.lent
            self.used += self.lent is not None
            assert len(memory) == BLOCK
            memory[:size] = DATA[at : at + size]
            yield memory[:size]
            at += size


@given(
    sizes=st.lists(st.sampled_from([BLOCK, BLOCK, BLOCK, 4096, 8192, 1, 777, 0, 65536]), max_size=5),
    says=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_any_stream_that_is_lent_memory(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], says: list[bool]
) -> None:
    folder = tmp_path_factory.mktemp("lent")
    assert Store(folder).create("a/b", Lending(sizes, says.__getitem__)) == sum(sizes)
    assert written(folder) == DATA[: sum(sizes)]


@pytest.mark.parametrize("kind", [Stream, Lending])
@pytest.mark.parametrize("says", ["101101", "110100", "011011", "100001"])
def test_what_goes_through_the_cache_in_between_stays_where_it_belongs(
    tmp_path: Path, kind: type[Stream], says: str
) -> None:
    Store(tmp_path).create("a/b", kind(WHOLE, lambda number: says[number] == "1"))
    assert written(tmp_path) == DATA


def test_blocks_are_written_several_at_once_from_where_they_were_put(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "RUN_BLOCKS", 2)
    stream = Lending(WHOLE, always)
    Store(tmp_path).create("a/b", stream)
    assert written(tmp_path) == DATA
    assert stream.used == 5, "all but the first, before which there was no thread yet"
    assert disk.past == 3, "two, two and one; the odd end goes through the cache"


@pytest.mark.parametrize("block", [0, 2, 4])
def test_an_error_fails_a_stream_that_waits_for_memory(tmp_path: Path, disk: Disk, block: int) -> None:
    disk.at = lambda start: OSError(errno.EIO, "broken") if start == block * BLOCK else None
    with pytest.raises(OSError, match="broken"):
        Store(tmp_path).create("a/b", Lending(WHOLE, always))
    assert not (tmp_path / "a/b").exists()
    assert "elastictrain-direct" not in {one.name for one in threading.enumerate()}
