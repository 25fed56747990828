"""Writing past the page cache (O_DIRECT), for streams that have the time.

A write into the page cache costs the processor a copy, and where the kernel must first get the pages (a virtual machine
whose free memory has gone back to its host) ten times as much: time that the training beside it does not have. Past the
cache the device fetches the bytes by itself. It takes them no faster than it writes, though, so this is for whoever can
wait that long. DeepSpeed's FastPersist writes this way for throughput; here it is for the processor time.

Linux only, and only file systems of a local disk; durability is fsync's alone, as ever.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import queue
import threading
from pathlib import Path

import numpy as np

ALIGN_BYTES = 4096
"""Offsets, lengths and addresses are multiples of it: what every disk accepts."""
RUN_BLOCKS = 4
"""So many blocks are written at once: half the processor time, and more of what the device can do, than one by one."""
RUNS = 2
"""One is filled while one is written."""
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "f2fs", "overlay"}
"""Where a write past the cache is only that. A network file system would wait for its server, block by block."""


class DirectFile:
    """The same file as an open one, written past the cache by a thread of its own, some blocks ahead.

    Args:
        file: open for writing; what the device does not take past the cache is written through it.
        direct: the same file, opened with O_DIRECT (see `open_direct`); closed by `close`.
        block_bytes: no block is longer.

    """

    def __init__(self, file: int, direct: int, block_bytes: int) -> None:
        self._file, self._direct, self._block_bytes = file, direct, block_bytes
        self._run_bytes = RUN_BLOCKS * block_bytes
        self._memory = huge_memory(RUNS * self._run_bytes)
        self._whole = memoryview(self._memory)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for at in range(0, RUNS * self._run_bytes, self._run_bytes):
            self._free.put(at)
        self._coming: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._at: int | None = None
        self._start = self._filled = 0
        self._error: BaseException | None = None
        self._is_able = True
        self._thread = threading.Thread(target=self._work, name="elastictrain-direct", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, file: int, block_bytes: int) -> DirectFile | None:
        """For an open file; None where that cannot be, or memory or a thread is not to be had."""
        direct = open_direct(file)
        if direct is None:
            return None
        try:
            return cls(file, direct, block_bytes)
        except (OSError, RuntimeError, MemoryError):
            os.close(direct)
            return None

    def lend(self) -> memoryview:
        """Memory for the next block; waits until there is some.

        Raises:
            OSError: an earlier block could not be written.

        """
        if self._at is None:
            self._at, self._filled = self._free.get(), 0
        if self._error is not None:
            raise self._error
        place = self._at + self._filled
        return self._whole[place : place + self._block_bytes]

    def write(self, start: int, data: memoryview) -> None:
        """Take a block over: its memory may be used again on return, but not what was lent. What is not aligned goes
        through the cache.

        Raises:
            OSError: an earlier block could not be written.

        """
        is_odd = (start | len(data)) % ALIGN_BYTES
        if self._filled and (is_odd or start != self._start + self._filled):
            held = bytes(data) if data.obj is self._memory else data  # it has moved to the next run
            self._hand_on()
            data = memoryview(held)
        place = self.lend()
        if data.obj is not self._memory:
            np.copyto(np.frombuffer(place, dtype=np.uint8)[: len(data)], np.frombuffer(data, dtype=np.uint8))
        if not self._filled:
            self._start = start
        self._filled += len(data)
        if is_odd or len(data) < self._block_bytes or self._filled == self._run_bytes:
            self._hand_on()

    def _hand_on(self) -> None:
        if self._at is not None and self._filled:
            self._coming.put((self._start, self._at, self._filled))
            self._at, self._filled = None, 0

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: something could not be written.

        """
        self._hand_on()
        self._coming.put(None)
        self._thread.join()
        os.close(self._direct)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (coming := self._coming.get()) is not None:
            start, at, size = coming
            if self._error is None:  # else whoever gives the next block is told
                try:
                    self._write(start, self._whole[at : at + size])
                except BaseException as error:  # whatever it is: who gives the next block waits for this thread
                    self._error = error
            self._free.put(at)

    def _write(self, start: int, data: memoryview) -> None:
        while len(data):
            try:
                past = self._is_able and not (start | len(data)) % ALIGN_BYTES
                count = os.pwrite(self._direct if past else self._file, data, start)
            except OSError as error:
                if error.errno != errno.EINVAL or not past:
                    raise
                self._is_able = False  # the disk wants a coarser grid, or the file system promised too much
                continue
            start, data = start + count, data[count:]


def huge_memory(size_bytes: int) -> mmap.mmap:
    """New memory, in huge pages where the system has them. Of ordinary ones, each 4 KiB lie somewhere else, and the
    processor has to name, hold and let go of every one for the device: half of what a write past the cache costs it.

    Raises:
        OSError: there is not so much.

    """
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def open_direct(file: int) -> int | None:
    """The same file, opened to be written past the cache; None where that cannot be, or would not pay."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag or _file_system(os.fstat(file).st_dev) not in _LOCAL:
        return None
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC | flag)
    except OSError:
        return None


@functools.lru_cache(maxsize=64)
def _file_system(device: int) -> str:
    """Type of the file system on a device; empty if it is not known."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return ""
