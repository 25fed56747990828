"""An exchange between workers of one host, through memory that they share: no socket, no copy by the kernel.

Every worker has one anonymous file in memory (memfd), which the others open through /proc. It has no name that could be
left behind: it is gone with the last process that holds it. Linux only, and all workers must be the same user's.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.together import lay_out

_ALIGN = 4096


class HostExchange:
    """See `elastictrain_checkpoint.together.Exchange` for what a call does.

    Args:
        worker, workers: which of how many this is.
        gather: gives everybody's object to everybody, in the order of the workers.
        barrier: returns when all workers have called it; its deadline is the deadline of an exchange.

    """

    def __init__(
        self, worker: int, workers: int, gather: Callable[[Any], Sequence[Any]], barrier: Callable[[], object]
    ) -> None:
        self._worker = worker
        self._workers = workers
        self._gather = gather
        self._barrier = barrier
        self._room = 0
        self._calls = 0
        self._maps: list[mmap.mmap] = []

    def make_room(self, most_bytes: int) -> None:
        """Share memory for calls in which no worker sends, or reads into `scratch`, more than ``most_bytes`` in all.
        All workers call this.

        Raises:
            OSError: no such room in memory.

        """
        # Two halves take turns: while one is filled the other may still be read, so a call needs one barrier only.
        room = -(-(most_bytes + 8 * self._workers) // _ALIGN) * _ALIGN
        file = os.memfd_create("exchange", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(file, 0, 2 * room)  # full memory is an error here, not a signal when a page is touched
            places = self._gather((os.getpid(), file, room))
            if any(place[2] != room for place in places):
                raise InvalidPiece(f"workers share {sorted({place[2] for place in places})} bytes, expected one size")
            maps = [self._map(pid, number, room) for pid, number, _ in places]
            self._barrier()
        finally:
            os.close(file)
        self.close()
        self._maps, self._room, self._calls = maps, room, 0

    def __call__(self, sent: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]) -> list[memoryview]:
        """Exchange. What is given lies in the others' memory, and is to be used before the next call."""
        half = self._room * (self._calls % 2)
        self._calls += 1
        mine = memoryview(self._maps[self._worker])[half : half + self._room]
        starts = mine[: 8 * self._workers].cast("Q")
        at = 8 * self._workers
        for worker, parts in enumerate(sent):
            size = sum(part.nbytes for part in parts)
            if at + size > self._room:
                raise InvalidPiece(f"{at + size} bytes to exchange, room for {self._room}: call make_room first")
            lay_out(parts, mine[at : at + size])
            starts[worker] = at
            at += size
        self._barrier()
        came = []
        for there, size in zip(self._maps, sizes, strict=True):
            theirs = memoryview(there)[half : half + self._room]
            begin = theirs[: 8 * self._workers].cast("Q")[self._worker]
            came.append(theirs[begin : begin + size])
        return came

    def scratch(self, size_bytes: int) -> memoryview:
        """Memory of this worker that the others see after the next `turn`; see `together.Shares`."""
        if size_bytes > self._room:
            raise InvalidPiece(f"{size_bytes} bytes to share, room for {self._room}: call make_room first")
        half = self._room * (self._calls % 2)
        return memoryview(self._maps[self._worker])[half : half + size_bytes]

    def turn(self) -> list[memoryview]:
        """Wait for all workers, and give what each of them has filled."""
        half = self._room * (self._calls % 2)
        self._calls += 1
        self._barrier()
        return [memoryview(there)[half : half + self._room] for there in self._maps]

    def close(self) -> None:
        """Let go of the memory; it is gone when what was given by the last call is."""
        self._maps = []

    def _map(self, pid: int, file: int, room: int) -> mmap.mmap:
        there = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return mmap.mmap(there, 2 * room, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        finally:
            os.close(there)
