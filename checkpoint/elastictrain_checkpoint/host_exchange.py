"""An exchange between workers of one host, through memory that they share: no socket, no copy by the kernel, and no
meeting of all in every round.

Every worker has one anonymous file in memory (memfd), which the others open through /proc, cut into slots that are
filled in turn. From every worker to every other a pipe says, by a byte each, which slots are filled and which are read.
Nothing has a name that could be left behind: it is gone with the last process that holds it, and a worker that dies
closes its pipes, so that those who wait for it learn of it at once. Linux only; all workers must be the same user's.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.pipes import Pipes
from elastictrain_checkpoint.together import lay_out

SLOTS = 2
"""So many turns of a worker's that others have not read yet: while one is read, the next is filled. More memory would
have to be made first, and would not stay in the processor's cache.
"""
_ALIGN = 4096
_FILLED, _READ = b"f", b"r"


class Offer(NamedTuple):
    """Memory of a worker's that others may open: its process, numbers of its file and pipes there, or why there is
    none.
    """

    process: int
    file: int
    room_bytes: int
    inboxes: list[int]
    why_not: str = ""


class HostExchange:
    """See `elastictrain_checkpoint.together.Exchange` and `Shares` for what the calls do.

    A call that fails on one worker ends those of all who depend on it; then `close`, or `make_room` anew.

    Args:
        worker, workers: which of how many this is.
        gather: gives everybody's object to everybody, in the order of the workers.
        timeout_s: how long to wait for a worker that is there and does not get on.

    """

    def __init__(
        self,
        worker: int,
        workers: int,
        gather: Callable[[Any], Sequence[Any]],
        timeout_s: float = 1800.0,
    ) -> None:
        self._worker = worker
        self._workers = workers
        self._others = [other for other in range(workers) if other != worker]
        self._gather = gather
        self._timeout_s = timeout_s
        self._room = self._joined = 0
        self._file = -1
        self._maps: list[mmap.mmap] = []
        self._pipes = Pipes(0, 1)
        self._begin()

    def _begin(self) -> None:
        self._turns = 0  # begun, of all calls
        self._filled = [0] * self._workers  # turns for which each worker has filled its memory, as known here
        self._read = [0] * self._workers  # turns of this worker's that each has read
        self._owed = False  # the last call has given memory of the others, which they may fill again after the next

    def make_room(self, most_bytes: int) -> None:
        """Share memory for calls in which no worker sends, or fills in a turn, more than ``most_bytes`` in all. All
        workers call this, and all get the same outcome.

        Raises:
            OSError: a worker has no such room in memory, or may not open that of the others.
            InvalidPiece: workers ask for different room.

        """
        try:
            said = self._gather(self.offer(most_bytes))
            self.settle(self._gather(self.join(said)))
        except BaseException:
            self.close()
            raise

    @property
    def room_bytes(self) -> int:
        """How much a worker may send, or fill in a turn: see `make_room`. 0 before it, and when a call has failed."""
        return max(0, self._room - 8 * self._workers)

    def offer(self, most_bytes: int) -> Offer:
        """The first part of `make_room`, for who gathers by other means: make this worker's memory. What it gives all
        others need, to `join`.
        """
        self.close()
        room = -(-(most_bytes + 8 * self._workers) // _ALIGN) * _ALIGN
        try:
            self._pipes = Pipes(self._worker, self._workers)
            self._file = os.memfd_create("exchange", os.MFD_CLOEXEC)
            # Full memory is an error here, not a signal at a page's touch.
            os.posix_fallocate(self._file, 0, SLOTS * room + _ALIGN)
        except OSError as error:
            return Offer(0, 0, room, [], str(error))
        return Offer(os.getpid(), self._file, room, self._pipes.inboxes)

    def join(self, offers: Sequence[Offer]) -> str:
        """The second part: open the memory of all. Gives why that is not possible, or nothing; all others need that, to
        `settle`.

        Raises:
            InvalidPiece: workers ask for different room.

        """
        room = offers[self._worker].room_bytes
        if any(one.room_bytes != room for one in offers):
            raise InvalidPiece(f"workers share {sorted({o.room_bytes for o in offers})} bytes, expected one size")
        for worker, one in enumerate(offers):
            if one.why_not:
                return f"worker {worker} cannot share memory with the others: {one.why_not}"
        try:
            self._maps = [self._map(one.process, one.file, SLOTS * room + _ALIGN) for one in offers]
            self._pipes.connect([(one.process, one.inboxes) for one in offers])
        except (OSError, ValueError) as error:  # mmap: a file that is too short
            return f"worker {self._worker} cannot share memory with the others: {error}"
        self._joined = room
        return ""

    def settle(self, whys: Sequence[str]) -> None:
        """The last part: what `join` has given to each worker.

        Raises:
            OSError: one of them could not.

        """
        failed = next(filter(None, whys), "")
        if failed:
            self.close()
            raise OSError(failed)
        self._close_file()  # all have opened it
        self._room = self._joined
        self._begin()

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __call__(self, sent: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]) -> list[memoryview]:
        """Exchange. What is given lies in the others' memory, and is to be used before the next call."""
        with self._or_give_up():
            starts = list(itertools.accumulate(map(_size_bytes, sent), initial=8 * self._workers))
            turn = self._next([starts[-1]], "exchange")
            while not self._may_fill(turn):
                self._wait(turn + 1)
            mine = self._slot(self._worker, turn)
            mine[: 8 * self._workers].cast("Q")[:] = array.array("Q", starts[:-1])
            lay_out([part for parts in sent for part in parts], mine[8 * self._workers : starts[-1]])
            self._say_filled()
            while min(self._filled) <= turn:
                self._wait(turn + 1)
            came = []
            for worker, size in enumerate(sizes):
                theirs = self._slot(worker, turn)
                begin = theirs[: 8 * self._workers].cast("Q")[self._worker]
                came.append(theirs[begin : begin + size])
            self._owed = True
            return came

    def stream(
        self,
        sizes: Sequence[int],
        fill: Callable[[int, memoryview], object],
        take: Callable[[int, int, memoryview], object],
    ) -> None:
        """Turns in a row, in each of which everybody fills memory that all see; see `together.Shares`."""
        with self._or_give_up():
            first = self._next(sizes, "share")
            end, taken = first + len(sizes), dict.fromkeys(self._others, first)
            while self._filled[self._worker] < end or min(taken.values(), default=end) < end:
                self._listen(0)  # before all decisions: what is heard between them and the waiting is not said again
                turn, idle = self._filled[self._worker], True
                if turn < end and self._may_fill(turn):
                    memory, idle = self._slot(self._worker, turn)[: sizes[turn - first]], False
                    fill(turn - first, memory)
                    self._say_filled()
                    take(turn - first, self._worker, memory)
                for other in self._others:
                    while taken[other] < min(self._filled[other], end):  # it may have filled memory for the next call
                        take(taken[other] - first, other, self._slot(other, taken[other]))
                        self._pipes.say(other, _READ)
                        taken[other], idle = taken[other] + 1, False
                if idle:
                    self._wait(end)

    @property
    def broken(self) -> bool:
        """Whether there is nothing shared: before `make_room`, and when a call has failed."""
        return not self._room

    def close(self) -> None:
        """Let go of the memory; it is gone when what was given by the last call is. Who depends on this worker learns
        that it has given up.
        """
        self._pipes.close()
        self._close_file()
        self._maps, self._room = [], 0

    @contextlib.contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._say_why(error)
            self.close()
            raise

    def _say_why(self, error: BaseException) -> None:
        """Where the others find it when this worker's pipes have ended."""
        with contextlib.suppress(Exception):
            name = "" if isinstance(error, ConnectionError | TimeoutError) else f"{type(error).__name__}: "
            words = f"{name}{error}".encode()[: _ALIGN - 1]
            end = SLOTS * self._room
            self._maps[self._worker][end : end + len(words)] = words

    def _why(self, other: int) -> str:
        """What another worker has said, if it has given up; nothing if it has died."""
        words = bytes(self._maps[other][SLOTS * self._room :])
        return words.partition(b"\0")[0].decode(errors="replace")

    def _next(self, sizes: Sequence[int], what: str) -> int:
        """Begin turns of so many bytes, done with what the last call gave; gives the number of the first."""
        need = max(sizes, default=0)
        if need > self._room or not self._room:
            raise InvalidPiece(f"{need} bytes to {what}, room for {self._room}: call make_room first")
        if self._owed:
            self._say_to_all(_READ)
            self._owed = False
        first, self._turns = self._turns, self._turns + len(sizes)
        return first

    def _slot(self, worker: int, turn: int) -> memoryview:
        begin = turn % SLOTS * self._room
        return memoryview(self._maps[worker])[begin : begin + self._room]

    def _may_fill(self, turn: int) -> bool:
        """Whether all others have read what lies where this worker fills memory in this turn."""
        return all(self._read[other] > turn - SLOTS for other in self._others)

    def _say_filled(self) -> None:
        self._filled[self._worker] += 1
        self._say_to_all(_FILLED)

    def _say_to_all(self, what: bytes) -> None:
        for other in self._others:
            self._pipes.say(other, what)

    def _listen(self, timeout_s: float) -> bool:
        """Take up what others say; whether one has said anything, or has gone, in this time."""
        heard = self._pipes.listen(timeout_s)
        for other, said in heard:
            self._filled[other] += said.count(_FILLED)
            self._read[other] += said.count(_READ)
        return bool(heard)

    def _wait(self, end: int) -> None:
        """Until one of those gets on on whom this worker depends, in turns before ``end``."""
        turn = self._filled[self._worker]
        needed = [
            other
            for other in self._others
            if self._filled[other] < end or (turn < end and self._read[other] <= turn - SLOTS)
        ]
        gone = [other for other in needed if other in self._pipes.gone]
        if gone:
            why = self._why(gone[0])
            said = f"has given up: {why}" if why else "is gone, or has given up: what it was to read does not come"
            raise ConnectionError(f"worker {gone[0]} {said}")
        if not self._listen(self._timeout_s):
            raise TimeoutError(f"workers {needed} have not got on for {self._timeout_s:g} s")

    def _map(self, pid: int, file: int, size_bytes: int) -> mmap.mmap:
        there = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return mmap.mmap(there, size_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        finally:
            os.close(there)


def _size_bytes(parts: Sequence[NDArray[Any]]) -> int:
    return sum(part.nbytes for part in parts)
