"""Few pages that much passes through: a pipeline of copies in two stages, each page in one of them at a time. Pure.

A page is filled by something that works beside the caller (a device's copy engine) and emptied by the caller. While one
page is emptied the others are being filled, so both sides are busy, and no more memory is needed than the pages have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

ALIGNED_BYTES = 64
_Page = TypeVar("_Page")
_Chunk = TypeVar("_Chunk")
_Token = TypeVar("_Token")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes [start, stop) of the source with this number."""

    source: int
    start: int
    stop: int


def chunks(sizes: Iterable[int], page_bytes: int) -> Iterator[Chunk]:
    """Sources of these sizes, in their order, in pieces that fit a page; no piece has bytes of two sources."""
    for source, size in enumerate(sizes):
        for start in range(0, size, page_bytes):
            yield Chunk(source, start, min(start + page_bytes, size))


def lay_out(sizes: Sequence[int], slab_bytes: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Places for buffers of these sizes in few slabs, in their order, each on a multiple of `ALIGNED_BYTES`.

    Gives the sizes of the slabs, and (slab, start) for each buffer; (0, 0) for one of nothing. A slab is as large as it
    is used, which is `slab_bytes` at most; what is not smaller than that has a slab of its own.
    """
    slabs: list[int] = []
    places: list[tuple[int, int]] = []
    shared, at = 0, slab_bytes
    for size in sizes:
        if not size:
            places.append((0, 0))
        elif size >= slab_bytes:
            places.append((len(slabs), 0))
            slabs.append(size)
        else:
            if at + size > slab_bytes:
                shared, at = len(slabs), 0
                slabs.append(0)
            places.append((shared, at))
            slabs[shared] = at + size
            at += -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
    return slabs, places


def pass_through(
    pages: Sequence[_Page],
    pieces: Iterable[_Chunk],
    begin: Callable[[_Chunk, _Page], _Token],
    wait: Callable[[_Token], object],
    take_out: Callable[[_Chunk, _Page], object],
) -> None:
    """Bring every piece through a page, in order.

    Args:
        pages: at least one; nobody else uses them until this returns.
        pieces: what is to be brought.
        begin: begins to fill a page, and gives what `wait` waits for.
        wait: returns when the page is filled.
        take_out: empties it.

    What any of these raises is raised here, after what was begun has been waited for: no page is written to any more.

    Raises:
        ValueError: there is no page.

    """
    if not pages:
        raise ValueError("no page to bring anything through")
    free = deque(pages)
    filling: deque[tuple[_Chunk, _Page, _Token]] = deque()
    try:
        for piece in pieces:
            if not free:
                free.append(_emptied(filling, wait, take_out))
            page = free.popleft()
            filling.append((piece, page, begin(piece, page)))
        while filling:
            _emptied(filling, wait, take_out)
    except BaseException:
        for _, _, token in filling:
            try:
                wait(token)
            except Exception:  # the first error is the one that says what is wrong
                continue
        raise


def _emptied(
    filling: deque[tuple[_Chunk, _Page, _Token]],
    wait: Callable[[_Token], object],
    take_out: Callable[[_Chunk, _Page], object],
) -> _Page:
    """The page that was begun first, when it is filled and empty again."""
    piece, page, token = filling[0]
    wait(token)
    filling.popleft()
    take_out(piece, page)
    return page
