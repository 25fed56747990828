"""Byte ranges of a file, fetched with few requests: what a remote store is asked for is about what is used.

fsspec's own caches read ahead (s3fs 50 MB behind every seek), which is right for one pass over a file and wrong for
single row groups of many files, so `data.files` opens remote files without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from elastictrain.data.retry import DecodedFile

HOLE_BYTES = 256 << 10
"""A hole between two ranges that is fetched too: it takes less time than another request (some 20 ms at 100 MB/s)."""

Range = tuple[int, int]


def coalesced(ranges: Iterable[Range], hole_bytes: int = HOLE_BYTES, most_bytes: int | None = None) -> list[Range]:
    """Join ranges `[start, stop)` with no more than `hole_bytes` between them; ascending. Pure.

    `most_bytes`: a joined range is no longer than this, unless a single one is.
    """
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= hole_bytes:
            whole = (joined[-1][0], max(stop, joined[-1][1]))
            if most_bytes is None or whole[1] - whole[0] <= most_bytes:
                joined[-1] = whole
                continue
        joined.append((start, stop))
    return joined


class FetchedFile(DecodedFile):
    """A file for a decoder, of which some ranges are fetched beforehand, in the thread that asks for them.

    What lies elsewhere is read when it is asked for. Not thread-safe.
    """

    def __init__(self, handle: Any) -> None:
        """`handle`: seeks and reads, without a cache of its own."""
        self._handle = handle
        self._parts: list[tuple[int, bytes]] = []
        self._at = 0

    def fetch(self, ranges: Sequence[Range]) -> None:
        """Read these ranges and forget those before."""
        self._parts = []
        for start, stop in ranges:
            self._handle.seek(start)
            self._parts.append((start, self._handle.read(stop - start)))

    def forget(self) -> None:
        """Give back the memory of what was fetched."""
        self._parts = []

    def read(self, size: int = -1) -> bytes | memoryview:
        """Read up to `size` bytes, all for -1."""
        for start, content in self._parts:
            if size >= 0 and start <= self._at and self._at + size <= start + len(content):
                place = self._at - start
                self._at += size
                whole = place == 0 and size == len(content)
                return content if whole else memoryview(content)[place : place + size]
        self._handle.seek(self._at)
        found: bytes = self._handle.read(size)
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the position; returns it. Asks for nothing."""
        self._at = offset + self._at if whence == 1 else int(self._handle.seek(offset, 2)) if whence == 2 else offset
        return self._at

    def close(self) -> None:
        self.forget()
        super().close()
