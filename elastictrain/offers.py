"""Splits of the lanes that a generation's members are offered, and how a vote shows that all mean the same one. Pure.

Numbers alone could lie: a controller that lost the last line of its journal would give another split a number that has
been given away. So a ballot names the newest split that a worker has by its *mark*, a hash of the split itself, and a
split is switched in only after a vote in which all marks are equal. Two workers with different splits under one number
never agree, and all keep what they have until somebody offers them all the same.

What is newest: that of the newest controller (controllers are numbered, `epoch`), and of its splits the one with the
highest number. A controller that is back offers again what it believes to be in force, so what it knows and what the
workers do are the same once all have heard it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from elastictrain.layout import Layout

Lanes = tuple[tuple[int, ...], ...]


def mark_of(lanes: Lanes) -> int:
    """63 bits that name a split: equal ones have equal marks."""
    words = "|".join(" ".join(map(str, own)) for own in lanes)
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, slots=True)
class Split:
    """`lanes` by rank, as offered to the members of `generation` by controller `epoch` under `number`. The one that a
    generation begins with is that of its layout (`first_split`): any offer is newer.
    """

    generation: int
    lanes: Lanes
    mark: int
    epoch: int = -1
    number: int = 0

    def after(self, generation: int, number: int, lanes: Lanes, epoch: int = 0) -> Split:
        """The newer one of this and an offer. One of another generation does not count, nor one that does not deal out
        the same lanes to as many workers, nor another split under the number of one that is here.
        """
        if generation != self.generation or (epoch, number) <= (self.epoch, self.number):
            return self
        lanes = tuple(tuple(own) for own in lanes)
        dealt, here = (sorted(lane for own in split for lane in own) for split in (lanes, self.lanes))
        if len(lanes) != len(self.lanes) or not all(lanes) or dealt != here:
            return self
        return Split(generation, lanes, mark_of(lanes), epoch, number)


def first_split(layout: Layout) -> Split:
    """What a generation begins with."""
    return Split(layout.generation, layout.lanes, mark_of(layout.lanes))
