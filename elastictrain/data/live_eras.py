"""The eras of a live source that are known here, and the orders within them; others are looked up in the record."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from elastictrain.data.live_order import NOTHING, Era, EraOrder, Held
from elastictrain.data.live_record import OrderRecord
from elastictrain.data.live_segments import OpenSegments
from elastictrain.data.order import Piece
from elastictrain.errors import DataError

_ORDERS_KEPT = 4


class KnownEras:
    """Begins with the last era that is recorded; of those before it only what is asked for is read, a number of them
    that grows with the logarithm of how many there are. Thread-safe, and nothing is held while a store is asked. `how`:
    the settings of an `EraOrder`.
    """

    def __init__(self, record: OrderRecord, segments: OpenSegments, **how: Any) -> None:
        self._record, self._segments, self._how = record, segments, how
        self._lock = threading.RLock()
        self._eras: dict[int, Era] = {}
        self._orders: OrderedDict[int, EraOrder] = OrderedDict()
        self.last = record.last() or NOTHING
        if self.last.number >= 0:
            self._admit(self.last)

    def append(self, era: Era) -> None:
        """Take the era behind the last one. Raises DataError when it does not follow that."""
        with self._lock:
            self._admit(era)
            self.last = era

    def get(self, number: int) -> Era:
        """The era with this number, of those that are recorded. Raises DataError when it has gone or was changed."""
        with self._lock:
            known = self._eras.get(number)
        if known is not None:
            return known
        era = self._record.get(number)
        if era is None:
            raise DataError(f"{self._record.url}: era {number} of the recorded order is missing. Restore it")
        with self._lock:
            self._admit(era)
        return era

    def at_step(self, step: int) -> Era:
        """The era that a step belongs to. Raises DataError for one that is not decided."""
        if not 0 <= step < self.last.stop:
            raise DataError(
                f"step {step} of the order that is recorded in {self._record.url} is not decided: {self.last.stop} "
                "steps are so far"
            )
        with self._lock:
            for number in self._orders:  # most often the step is in an era that is in use
                if self._eras[number].from_step <= step < self._eras[number].stop:
                    return self._eras[number]
        return self._first(lambda era: step < era.stop)

    def order(self, era: Era) -> EraOrder:
        """The order within an era. Opens its segments. Raises DataError when they are not what they were."""
        with self._lock:
            order = self._orders.get(era.number)
            if order is not None:
                self._orders.move_to_end(era.number)
                return order
        order = EraOrder(era, self._pieces_of(era), **self._how)  # of two that make it at once, both are the same
        with self._lock:
            self._orders[era.number] = order
            self._orders.move_to_end(era.number)
            while len(self._orders) > _ORDERS_KEPT:
                self._orders.popitem(last=False)
            return order

    def prepare(self, step: int) -> None:
        """Open what the order at a step consists of, which may take long, so that `following` knows it. What cannot be
        opened is left to whoever needs it.
        """
        with suppress(DataError):
            self.order(self.at_step(step))

    def following(self, era: Era) -> Era | None:
        """The era behind one, if its order can be given without asking a store; None otherwise."""
        with self._lock:
            after = self._eras.get(era.number + 1)
            if after is None or not after.steps:
                return None
            if after.number in self._orders:
                return after
        first = after.first_segment if after.kind == "fresh" else 0
        return after if all(self._segments.is_at_hand(n) for n in self._consists_of(after, first)) else None

    def carry_after(self, era: Era) -> tuple[tuple[int, int, int], ...]:
        """(block, start, stop) of what is left over behind an era, for the next fresh one."""
        return self.order(era).left_over() if era.kind == "fresh" and era.number >= 0 else era.carry

    def samples_of(self, era: Era, most: int) -> int:
        """How many samples the segments of the order hold at an era, counted no further back than `most`."""
        samples, ordinal = 0, era.segments
        while samples < most and ordinal > 0:
            ordinal -= 1
            samples += self._held(ordinal).samples
        return samples

    def home(self, block: int) -> tuple[int, int]:
        """(segment, block in it) of a block of the order. Raises IndexError for one that is in none."""
        home = self._segments.of_block(block)
        if home is None and self.last.number >= 0:
            self._first(lambda era: block < era.next_block)
            home = self._segments.of_block(block)
        if home is None:
            raise IndexError(f"block {block}: no segment of the order holds it")
        return home

    def _admit(self, era: Era) -> None:
        """Each era names the one before it by its digest; that is looked at where both are known."""
        for one, other in ((era.number - 1, era.number), (era.number, era.number + 1)):
            before = era if one == era.number else self._eras.get(one)
            after = era if other == era.number else self._eras.get(other)
            if before is not None and after is not None and after.before != before.digest:
                raise DataError(
                    f"{self._record.url}: era {other} does not follow era {one}; eras of the recorded order were "
                    "changed. Restore them"
                )
        self._eras[era.number] = era
        self._segments.place(era)

    def _first(self, fits: Callable[[Era], bool]) -> Era:
        """The first era that fits, where all behind one that fits do so too; the last one if none before it does."""
        low, high = 0, self.last.number
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self.get(middle)) else (middle + 1, high)
        return self.get(low)

    def _pieces_of(self, era: Era) -> list[Piece]:
        if era.kind == "reservoir":
            return self._last_samples(era)
        pieces = [Piece(*carried) for carried in era.carry]
        for ordinal in range(era.first_segment, era.segments):
            pieces += self._segments.pieces(ordinal)
        return pieces

    def _last_samples(self, era: Era) -> list[Piece]:
        found: list[Piece] = []
        missing, ordinal = era.reservoir, era.segments
        while missing > 0:
            ordinal -= 1
            self._held(ordinal)
            for piece in reversed(self._segments.pieces(ordinal)):
                if missing > 0:
                    start = max(piece.start, piece.stop - missing)
                    found.append(Piece(piece.block, start, piece.stop))
                    missing -= piece.stop - start
        return found[::-1]

    def _consists_of(self, era: Era, first: int) -> Iterator[int]:
        """Yield the segments of an era's order from the last one back to `first`, or as far as its reservoir goes."""
        missing, ordinal = era.reservoir if era.kind == "reservoir" else 1, era.segments
        while ordinal > first and missing > 0:
            ordinal -= 1
            yield ordinal
            known = self._segments.held(ordinal)
            if era.kind == "reservoir" and known is not None:
                missing -= known[1].samples

    def _held(self, ordinal: int) -> Held:
        """Of a segment of the order; its era is looked up for it."""
        if self._segments.held(ordinal) is None:
            self._first(lambda era: ordinal < era.segments)
        placed = self._segments.held(ordinal)
        if placed is None:
            raise IndexError(f"segment {ordinal} is not part of the order")
        return placed[1]
