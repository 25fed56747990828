"""Ranges of bytes that are wanted of a file, the hash blocks that they lie in, and buffers for them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Copy = tuple[int, memoryview]
"""(first byte in a file, where the bytes from there on go)."""


def start_of(copy: Copy) -> int:
    """Its first byte."""
    return copy[0]


def copy_out(view: memoryview, begin: int, copies: Sequence[Copy]) -> list[Copy]:
    """Copy what lies in ``view``, the bytes of a file from ``begin`` on; gives the copies that are left to do."""
    left = []
    end = begin + len(view)
    for start, out in copies:
        take = max(0, min(start + len(out), end) - start)
        if take:
            out[:take] = view[start - begin : start - begin + take]
        if take < len(out):
            left.append((start + take, out[take:]))
    return left


def unwanted_from(copies: Sequence[Copy], begin: int, end: int) -> int:
    """From which byte on the last block, bytes [begin, end), is worth keeping: only what was not wanted of a block is
    likely to be asked for again. The end if it was wanted whole. The copies are sorted by start.
    """
    at = begin
    for start, out in copies:
        if start > at:
            break
        at = max(at, start + len(out))
    return min(at, end)


def tile(copies: Sequence[Copy], begin: int, end: int, last: memoryview | None) -> list[memoryview] | None:
    """Buffers that hold bytes [begin, end) one after the other: the copies', and others for what nobody wants, in
    ``last`` what lies among the last bytes, if it is given. None if two copies want the same byte.
    """
    border = end - len(last) if last is not None else end
    tiles = []
    at = begin
    for start, out in (*copies, (end, memoryview(b""))):
        if start < at:
            return None
        if at < min(start, border):
            tiles.append(np.empty(min(start, border) - at, dtype=np.uint8).data)
        if last is not None and max(at, border) < start:
            tiles.append(last[max(at, border) - border : start - border])
        if len(out):
            tiles.append(out)
        at = start + len(out)
    return tiles


def in_blocks(views: Sequence[memoryview], block: int) -> Iterator[list[memoryview]]:
    """The parts of each block, of views that follow one another from the start of a block on."""
    parts: list[memoryview] = []
    need = block
    for view in views:
        at = 0
        while at < len(view):
            take = min(need, len(view) - at)
            parts.append(view[at : at + take])
            at += take
            need -= take
            if not need:
                yield parts
                parts, need = [], block
    if parts:
        yield parts


def windows(copies: Iterable[Copy], block: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of blocks that the copies (sorted by start) touch: merged where they meet, up to ``most``."""
    low = high = 0
    for copy in copies:
        start, out = copy
        if not len(out):
            continue
        first, last = start // block, -(-(start + len(out)) // block)
        if first > high:
            yield from _split(low, high, most)
            low = first
        high = max(high, last)
    yield from _split(low, high, most)


def _split(low: int, high: int, most: int) -> Iterator[tuple[int, int]]:
    for at in range(low, high, most):
        yield at, min(at + most, high)
