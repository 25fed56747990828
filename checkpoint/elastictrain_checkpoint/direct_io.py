"""Writing past the page cache (O_DIRECT), for streams that have the time.

A write into the page cache costs the processor a copy, and where the kernel must first get the pages (a virtual machine
whose free memory has gone back to its host) ten times as much: time that the training beside it does not have. Past the
cache the device fetches the bytes by itself. It takes them no faster than it writes, though, so this is for whoever can
wait that long. DeepSpeed's FastPersist writes this way for throughput; here it is for the processor time.

Linux only, and only file systems of a local disk; durability is fsync's alone, as ever.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import queue
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ALIGN_BYTES = 4096
"""Offsets, lengths and addresses are multiples of it: what every disk accepts."""
BUFFERS = 3
"""One is filled, one is written, one waits."""
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
        self._file, self._direct = file, direct
        self._memory = mmap.mmap(-1, BUFFERS * block_bytes)
        self._free: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        for at in range(0, BUFFERS * block_bytes, block_bytes):
            self._free.put(np.frombuffer(self._memory, dtype=np.uint8, count=block_bytes, offset=at))
        self._coming: queue.SimpleQueue[tuple[int, NDArray[np.uint8], int] | None] = queue.SimpleQueue()
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

    def write(self, start: int, data: memoryview) -> None:
        """Take a block over: its memory may be used again on return. What is not aligned goes through the cache.

        Raises:
            OSError: an earlier block could not be written.

        """
        buffer = self._free.get()
        if self._error is not None:
            raise self._error
        np.copyto(buffer[: len(data)], np.frombuffer(data, dtype=np.uint8))
        self._coming.put((start, buffer, len(data)))

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: something could not be written.

        """
        self._coming.put(None)
        self._thread.join()
        os.close(self._direct)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (coming := self._coming.get()) is not None:
            start, buffer, size = coming
            if self._error is None:  # else whoever gives the next block is told
                try:
                    self._write(start, buffer.data[:size])
                except BaseException as error:  # whatever it is: who gives the next block waits for this thread
                    self._error = error
            self._free.put(buffer)

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
