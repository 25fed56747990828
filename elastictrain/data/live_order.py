"""The order of a live source, era by era. Pure: knows no files, no clock and no workers.

Segments arrive while training runs (`data.segments`). Now and then those that are there are made part of the order: an
*era*. An `Era` says from which step of the order it holds, for how many steps, and what it consists of; it is written
down once (`data.live_record`) and never changes. So which samples a step uses follows from the seed, the eras and the
segments, and from nothing else: not from when somebody asks, nor from who.

- A *fresh* era begins with what the one before it has left over and goes on with new segments, all of them. Within it
  the order is that of `data.order` (windows, lanes, keys), with its blocks for the blocks and a seed of its own. What
  fills no whole step of all lanes is left over for the next fresh era: nothing is lost, nothing is used twice.
- A *reservoir* era takes its steps once more from the last samples that fresh eras consisted of, in its own order.
- An *end* says that there is no further step.

The seed of era `k` is `derive_key("live-era", seed, k)` (see `data.order`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from elastictrain.data.order import LaneOrder, Piece, StrictOrder, Window, derive_key
from elastictrain.errors import DataError

LIVE_VERSION = 1


class Held(NamedTuple):
    """What a segment holds: samples, blocks (empty ones count), and the hash of its fingerprint ("" for nothing)."""

    samples: int
    blocks: int
    hash: str


@dataclass(frozen=True, slots=True)
class Era:
    """Steps `[from_step, from_step + steps)` of the order.

    `segments`: how many segments are part of the order now; the last `len(held)` of them are new. Blocks are numbered
    through all segments, those of the new ones from `first_block` on. `carry`: (block, start, stop) of the samples that
    are left over from before; they come first in a fresh era, and are passed on by others. `reservoir`: how many
    samples, the last ones of the order's segments, are taken from again. `before`: digest of the era before.
    """

    number: int
    kind: Literal["fresh", "reservoir", "end"]
    from_step: int
    steps: int
    segments: int
    first_block: int
    held: tuple[Held, ...] = ()
    carry: tuple[tuple[int, int, int], ...] = ()
    reservoir: int = 0
    schema: str = ""
    before: str = ""
    why: str = ""

    @property
    def stop(self) -> int:
        """The first step behind it."""
        return self.from_step + self.steps

    @property
    def first_segment(self) -> int:
        """The first of its new segments."""
        return self.segments - len(self.held)

    @property
    def next_block(self) -> int:
        """The number of the first block behind its segments."""
        return self.first_block + sum(one.blocks for one in self.held)

    def as_json(self) -> dict[str, Any]:
        """What the record of the order holds."""
        record: dict[str, Any] = {"v": LIVE_VERSION}
        for name in self.__slots__:
            value = getattr(self, name)
            record[name] = [list(one) for one in value] if name in ("held", "carry") else value
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Era:
        """Read an era back. Raises DataError."""
        if record.get("v") != LIVE_VERSION:
            raise DataError(f"an era of version {record.get('v')}; this version of elastictrain reads {LIVE_VERSION}")
        try:
            known = {name: record[name] for name in cls.__slots__}
            known["held"] = tuple(Held(int(s), int(b), str(h)) for s, b, h in known["held"])
            known["carry"] = tuple((int(b), int(first), int(end)) for b, first, end in known["carry"])
            return cls(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not an era of a live source ({error!r})") from error

    @property
    def digest(self) -> str:
        """Names this era and, through `before`, all before it; 32 hexadecimal digits."""
        text = json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


NOTHING = Era(-1, "fresh", 0, 0, 0, 0)
"""What is before the first era."""


class EraOrder:
    """The order within one era. `pieces`: what it consists of, in the order of arrival; for a fresh era the carry comes
    first.
    """

    def __init__(
        self,
        era: Era,
        pieces: Sequence[Piece],
        *,
        seed: int,
        lanes: int,
        lane_batch_size: int,
        shuffle: str,
        window_blocks: int,
    ) -> None:
        again = era.kind == "reservoir"
        self.era, self.pieces = era, tuple(pieces)
        self.lanes, self.lane_batch_size = lanes, lane_batch_size
        self._order = (StrictOrder if shuffle == "strict" and not again else LaneOrder)(
            [piece.stop - piece.start for piece in pieces],
            seed=derive_key("live-era", seed, era.number),
            lanes=lanes,
            lane_batch_size=lane_batch_size,
            window_blocks=window_blocks,
            shuffle=again or shuffle == "window",
            repeat=again,
        )
        if self._order.steps_per_epoch < era.steps:
            raise DataError(
                f"era {era.number} of the recorded order has {era.steps} steps, but its segments hold only "
                f"{self._order.steps_per_epoch}: they are not those that it was made from"
            )

    @property
    def counts_as(self) -> int:
        """The epoch within which no sample comes twice: one for all fresh eras, and each reservoir era is its own."""
        return self.era.number if self.era.kind == "reservoir" else 0

    @property
    def samples_per_lane(self) -> int:
        return self.era.steps * self.lane_batch_size

    @property
    def repeated_per_epoch(self) -> int:
        """Samples that are used twice on purpose: a reservoir that is smaller than a step."""
        return self._order.repeated_per_epoch

    def spans(self, step: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """As `LaneOrder.spans`, of a step of the order. The epoch of a window is the number of its era."""
        if not self.era.from_step <= step < self.era.stop:
            raise IndexError(
                f"step {step}: era {self.era.number} has steps {self.era.from_step} to {self.era.stop - 1}"
            )
        for window, start, stop in self._order.spans(step - self.era.from_step, lane):
            yield self._numbered(window), start, stop

    def spans_at(self, start: int, stop: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """As `spans`, for positions `[start, stop)` of a lane, counted through all eras, that are of this one."""
        first = self.era.from_step * self.lane_batch_size
        if not first <= start < stop <= first + self.samples_per_lane:
            raise IndexError(
                f"positions {start} to {stop - 1}: era {self.era.number} has {first} to "
                f"{first + self.samples_per_lane - 1}"
            )
        for window, begin, end in self._order.spans_at(start - first, stop - first, lane):
            yield self._numbered(window), begin, end

    def window_at(self, lane: int, position: int) -> Window:
        """Return the window that holds a position, below `samples_per_lane`, of a lane in this era."""
        return self._numbered(self._order.window_at(0, lane, position))

    def batches_in(self, window: Window, start: int) -> int:
        """Return how many batches of this era in a row, the first of them at place `start` of a window, it holds."""
        return (min(window.stop, self.samples_per_lane) - window.start - start) // self.lane_batch_size

    def _numbered(self, window: Window) -> Window:
        """A window of the pieces as one of the order's blocks."""
        pieces = tuple(
            Piece(self.pieces[p.block].block, *(self.pieces[p.block].start + place for place in (p.start, p.stop)))
            for p in window.pieces
        )
        return replace(window, pieces=pieces, epoch=self.era.number)

    def left_over(self) -> tuple[tuple[int, int, int], ...]:
        """(block, start, stop) of what no step of a fresh era uses, in the order of its stream."""
        used = self.era.steps * self.lane_batch_size * self.lanes
        stream = self._order._stream(0)
        found = []
        for i, number in enumerate(stream.blocks.tolist()):
            piece, end = self.pieces[number], int(stream.starts[i + 1])
            if end > used:
                first = max(used - int(stream.starts[i]), 0)
                found.append((piece.block, piece.start + first, piece.stop))
        return tuple(found)


def fresh_era(
    last: Era,
    carry: Sequence[tuple[int, int, int]],
    held: Sequence[Held],
    *,
    per_step: int,
    most: int,
    schema: str = "",
) -> Era | None:
    """The era that takes in new segments, or None while they and the carry fill no step.

    `held`: of the segments behind those of `last`, as far as they are there. `most`: take no more of them, but where
    they fill no step. `per_step`: samples of a step of all lanes.
    """
    count, samples = 0, sum(stop - start for _, start, stop in carry)
    while count < len(held) and (count < most or samples < per_step):
        samples += held[count].samples
        count += 1
    if samples < per_step or not count:
        return None
    taken = tuple(held[:count])
    return replace(
        _after(last, "fresh", samples // per_step, carry), segments=last.segments + count, held=taken, schema=schema
    )


def reservoir_era(
    last: Era, carry: Sequence[tuple[int, int, int]], *, samples: int, steps: int, decided: int, per_step: int
) -> Era | None:
    """The era that takes steps from the last `samples` of the `decided` samples of the order once more; None when there
    are none yet. At most `steps` of them, and no more than those samples fill.
    """
    size = min(samples, decided)
    if not size:
        return None
    return replace(_after(last, "reservoir", min(steps, -(-size // per_step)), carry), reservoir=size)


def end_of_order(last: Era, carry: Sequence[tuple[int, int, int]], why: str) -> Era:
    """The era that says that there is no further step, in words for people."""
    return replace(_after(last, "end", 0, carry), why=why)


def _after(
    last: Era, kind: Literal["fresh", "reservoir", "end"], steps: int, carry: Sequence[tuple[int, int, int]]
) -> Era:
    return Era(
        number=last.number + 1,
        kind=kind,
        from_step=last.stop,
        steps=steps,
        segments=last.segments,
        first_block=last.next_block,
        carry=tuple(carry),
        schema=last.schema,
        before=last.digest if last.number >= 0 else "",
    )
