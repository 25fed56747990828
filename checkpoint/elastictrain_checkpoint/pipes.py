"""Pipes between all workers of a host, for messages of a byte; no names, no sockets. Linux only.

A pipe is opened through /proc by the one who writes to it, and by nobody else: when that process ends, however it does,
the reader sees the end of the pipe. (Unless it has forked without exec: then only a deadline helps.)
"""

from __future__ import annotations

import contextlib
import os
import select
import weakref
from collections.abc import Sequence

_MOST_BYTES = 4096


class Pipes:
    """One pipe from every other worker to this one, and the writing ends of theirs.

    Attributes:
        inboxes: files to read from, by worker; others need their numbers, and this process's, to `connect`. -1 for this
            worker itself.
        gone: workers that will say nothing more.

    """

    def __init__(self, worker: int, workers: int) -> None:
        self._worker = worker
        self._open: list[int] = []
        self.close = weakref.finalize(self, _close, self._open)
        """Close everything; the others see the end of their pipes. Also done when this object is gone."""
        self._poll = select.poll()
        self._from: dict[int, int] = {}
        self._to: dict[int, int] = {}
        self.gone: set[int] = set()
        self.inboxes = [-1] * workers
        for other in range(workers):
            if other != worker:
                self.inboxes[other], end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                os.close(end)
                self._open.append(self.inboxes[other])
                self._from[self.inboxes[other]] = other
                self._poll.register(self.inboxes[other], select.POLLIN)

    def connect(self, places: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Open what the others read from: their process and their `inboxes`, by worker. What is said may be listened
        for when all have returned from this.
        """
        for other, (process, inboxes) in enumerate(places):
            if other != self._worker:
                path = f"/proc/{process}/fd/{inboxes[self._worker]}"
                self._to[other] = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._open.append(self._to[other])

    def say(self, other: int, what: bytes) -> None:
        """A byte or a few to another worker, which may be gone.

        Raises:
            BlockingIOError: it has not listened for very many bytes.

        """
        with contextlib.suppress(BrokenPipeError):
            os.write(self._to[other], what)

    def listen(self, timeout_s: float) -> list[tuple[int, bytes]]:
        """What others have said; waits for the first. Who says b"" is gone. Empty if all are silent for so long."""
        heard = []
        for file, _ in self._poll.poll(1000 * timeout_s):
            other, said = self._from[file], os.read(file, _MOST_BYTES)
            if not said:
                self.gone.add(other)
                self._poll.unregister(file)
            heard.append((other, said))
        return heard


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
    files.clear()
