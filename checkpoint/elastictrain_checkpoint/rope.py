"""Ropes: one run of bytes that lies in several buffers, one after the other. Pure, and nothing is copied.

Who holds a tensor in blocks, each in memory of its own, can hand over its whole run as one piece. What a pack stores,
and what the digest sees, does not depend on where the run is broken.
"""

from __future__ import annotations

from typing import Any

from elastictrain_checkpoint.dtypes import as_bytes
from elastictrain_checkpoint.errors import InvalidPiece

Rope = tuple[memoryview, ...]
"""Flat read-only views, none of them empty, in the order of their bytes."""


def as_rope(data: Any, what: str, step_bytes: int) -> Rope:
    """Views of one C-contiguous buffer, or of a list or tuple of them.

    Args:
        data: the buffer or buffers; empty ones are passed over.
        what: names the data in messages.
        step_bytes: the length of every buffer but the last is a multiple of this, so that no cell of the digest grid
            lies in two buffers.

    Raises:
        InvalidPiece: no buffer, not contiguous, or broken elsewhere than at a multiple of ``step_bytes``.

    """
    if not isinstance(data, list | tuple):
        view = as_bytes(data, what)
        return (view,) if len(view) else ()
    rope = tuple(view for number, one in enumerate(data) if len(view := as_bytes(one, f"{what}, buffer {number}")))
    for number, view in enumerate(rope[:-1]):
        if len(view) % step_bytes:
            raise InvalidPiece(
                f"{what}: buffer {number} of {len(rope)} that are not empty has {len(view)} bytes, expected a multiple "
                f"of {step_bytes} in all but the last; break the run on the digest grid"
            )
    return rope


def rope_bytes(rope: Rope) -> int:
    """Length of the run in bytes."""
    return len(rope[0]) if len(rope) == 1 else sum(map(len, rope))


def cut_rope(rope: Rope, start: int, stop: int) -> Rope:
    """Bytes [start, stop) of the run, which has at least ``stop``."""
    out = []
    at = 0
    for view in rope:
        low, high = max(start - at, 0), min(stop - at, len(view))
        if low < high:
            out.append(view[low:high])
        at += len(view)
    return tuple(out)
