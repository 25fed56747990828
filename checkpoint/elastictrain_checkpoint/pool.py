"""Memory for copies of state, used again by every save."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from elastictrain_checkpoint import hashing
from elastictrain_checkpoint.units import Bytes


class Pool:
    """Memory for copies, in slots of one hash block. It is used again by every save, grows when one needs more, and
    never shrinks.

    Args:
        reserve_bytes: made, and touched, at once: memory that is new costs three times as much to fill.

    """

    def __init__(self, reserve_bytes: int = 0) -> None:
        self.slot_bytes = hashing.SUM_BLOCK_BYTES
        self._slots: list[Bytes] = []
        self._free: list[int] = []
        self._lock = threading.Lock()
        with self._lock:
            self._grow(-(-reserve_bytes // self.slot_bytes), touch=True)

    @property
    def size_bytes(self) -> int:
        """All memory of the pool."""
        return len(self._slots) * self.slot_bytes

    def lend(self, count: int, most_bytes: int | None = None) -> list[int]:
        """Numbers of `count` slots that nobody uses; fewer where the pool would grow beyond `most_bytes` for them."""
        with self._lock:
            more = count - len(self._free)
            if most_bytes is not None:
                more = min(more, most_bytes // self.slot_bytes - len(self._slots))
            self._grow(more, touch=False)
            lent, self._free = self._free[:count], self._free[count:]
            return lent

    def give_back(self, slots: Iterable[int]) -> None:
        """The bytes in these are not needed any more."""
        with self._lock:
            self._free.extend(slots)

    def slot(self, number: int) -> Bytes:
        """The memory of a slot."""
        return self._slots[number]

    def _grow(self, count: int, *, touch: bool) -> None:
        if count <= 0:
            return
        slab: Bytes = np.empty(count * self.slot_bytes, dtype=np.uint8)
        if touch:
            slab.fill(0)
        first = len(self._slots)
        self._slots += [slab[at : at + self.slot_bytes] for at in range(0, len(slab), self.slot_bytes)]
        self._free += range(first, len(self._slots))
