"""One worker's part of a `ReadPlan`: what it reads, what it hands on, and where what comes is put."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastictrain_checkpoint.dtypes import item_bytes
from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.reshard import ReadPlan
from elastictrain_checkpoint.slabs import Slab, slabs
from elastictrain_checkpoint.wants import Want

_ELEMENTS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
_NOTHING = np.uint8(0)


@dataclass(frozen=True)
class Target:
    """A buffer, as bytes and as elements in the shape of its box."""

    flat: memoryview
    box: NDArray[Any]


class WorkerShare:
    """One worker's share of a plan: what it reads, and what it takes from others.

    Attributes:
        worker: which one.
        targets: the buffers of its wants.
        scratch: where it reads to what does not belong here, or not in one run; see `make_room`.

    """

    def __init__(
        self, reader: Reader, plan: ReadPlan, wants: Sequence[Sequence[Want]], outs: Sequence[Any], worker: int
    ) -> None:
        self._reader = reader
        self._plan = plan
        self._wants = wants
        self.worker = worker
        table = reader.manifest.table
        self.scratch = np.empty(0, dtype=np.uint8)
        self._ends: list[int] = [0, *np.cumsum(plan.size_bytes).tolist()]
        for_me = plan.worker == worker
        self._slabs = slabs(plan, table, wants, np.flatnonzero(for_me | (plan.owner[plan.span] == worker)))
        self._mine = np.flatnonzero(for_me)
        self._workers, self._bounds, self._spans = plan.worker.tolist(), plan.bounds.tolist(), plan.span.tolist()
        items = np.array([item_bytes(manifest_dtype) for manifest_dtype in _dtypes(reader)], dtype=np.int64)
        self._items = items[table.tensor[plan.row]].tolist()
        self._sizes = [0] * len(plan.span)  # of what is handed on, in bytes
        for number, slab in self._slabs.items():
            self._sizes[number] = math.prod(slab.sizes) * self._items[self._spans[number]]
        self.targets = self._targets(outs)

    def _targets(self, outs: Sequence[Any]) -> list[Target]:
        mine = self._wants[self.worker]
        if len(outs) != len(mine):
            raise InvalidPiece(f"{len(outs)} buffers for {len(mine)} wants")
        made = []
        for want, out in zip(mine, outs, strict=True):
            view = memoryview(out)
            item = item_bytes(self._reader.tensors[want.name][0])
            size = math.prod(want.sizes) * item
            if view.readonly or not view.c_contiguous or view.nbytes != size:
                raise InvalidPiece(
                    f"{want.name}: out must be a writable contiguous buffer of {size} bytes, "
                    f"got {view.nbytes} bytes{', read-only' if view.readonly else ''}"
                )
            flat = view.cast("B") if size else memoryview(bytearray())
            made.append(Target(flat, np.frombuffer(flat, dtype=_ELEMENTS[item]).reshape(want.sizes)))
        return made

    def make_room(self, rounds: Sequence[Sequence[range]]) -> None:
        """Make memory for what this worker reads in a round, which is used again by the next."""
        most = max((self.size_bytes(spans[self.worker]) for spans in rounds), default=0)
        self.scratch = np.empty(most, dtype=np.uint8)

    def most_handed_on_bytes(self, rounds: Sequence[Sequence[range]]) -> tuple[int, int]:
        """The most that this worker hands on to others in a round, and that others hand on to it."""
        plan = self._plan
        reads = plan.owner[plan.span]
        leaves, comes = reads == self.worker, plan.worker == self.worker
        sent, come = (np.cumsum([0, *np.where(which, self._sizes, 0)]) for which in (leaves & ~comes, comes & ~leaves))
        most = [0, 0]
        for spans in rounds:
            for at, ends in enumerate((sent, come)):
                here = sum(int(ends[self._bounds[s.stop]] - ends[self._bounds[s.start]]) for s in spans)
                most[at] = max(most[at], here)
        return most[0], most[1]

    def size_bytes(self, spans: range) -> int:
        """Bytes of spans."""
        return self._ends[spans.stop] - self._ends[spans.start]

    def read(self, spans: range, into: NDArray[np.uint8], *, damaged: bool) -> None:
        """Read this worker's spans to where they belong, or else to ``into``, each at its place among them.

        If ``damaged``, nothing is read: what lies there has its size and no meaning.
        """
        plan, reads, at = self._plan, [], 0
        for span in () if damaged else spans:
            size = int(plan.size_bytes[span])
            straight = self._straight(span)
            out = into[at : at + size].data if straight is None else straight
            reads.append((int(plan.file[span]), int(plan.start[span]), out))
            at += size
        self._reader.read_spans(reads)

    def keep(self, spans: range) -> None:
        """Fill the targets that are here from this worker's spans, which lie in ``scratch`` one after the other."""
        self._fill(spans, self.scratch)

    def leaving(self, spans: range, *, damaged: bool) -> list[list[NDArray[Any]]]:
        """What others want of this worker's spans, for each of them; if ``damaged``, bytes without meaning."""
        sent: list[list[NDArray[Any]]] = [[] for _ in range(self._plan.workers)]
        for span in spans:
            for number in range(self._bounds[span], self._bounds[span + 1]):
                to = self._workers[number]
                if to != self.worker:
                    part = np.broadcast_to(_NOTHING, self._sizes[number]) if damaged else None
                    sent[to].append(self._part(number, self.scratch, spans.start)[1] if part is None else part)
        return sent

    def coming(self, spans: range) -> list[NDArray[Any]]:
        """Where that belongs which the owner of these spans hands on to this worker."""
        numbers = self._coming(spans)
        slabs_here = [self._slabs[number] for number in numbers]
        # Where there is no axis, an empty index would give a number instead of its place.
        return [box[slab.into] if slab.into else box for slab in slabs_here for box in (self.targets[slab.want].box,)]

    def take(self, spans: range, memory: memoryview) -> None:
        """Fill the targets that are here from one worker's spans, which lie in its memory one after the other."""
        self._fill(spans, np.frombuffer(memory, dtype=np.uint8))

    def _fill(self, spans: range, memory: NDArray[np.uint8]) -> None:
        numbers = self._coming(spans)
        own = bool(numbers) and self._plan.owner[spans.start] == self.worker
        for number in numbers:
            if own and self._straight(self._spans[number]) is not None:
                continue  # it was read to where it belongs
            slab, part = self._part(number, memory, spans.start)
            self.targets[slab.want].box[slab.into] = part

    def _part(self, number: int, memory: NDArray[np.uint8], first: int) -> tuple[Slab, NDArray[Any]]:
        """What a delivery hands on, from memory in which spans lie from ``first`` on."""
        slab, span = self._slabs[number], self._spans[number]
        begin, end = self._ends[span] - self._ends[first], self._ends[span + 1] - self._ends[first]
        return slab, memory[begin:end].view(_ELEMENTS[self._items[span]]).reshape(slab.shape)[slab.inside]

    def _coming(self, spans: range) -> list[int]:
        """Deliveries that these spans have for this worker."""
        if not spans:
            return []
        low, high = np.searchsorted(self._mine, [self._bounds[spans.start], self._bounds[spans.stop]]).tolist()
        numbers: list[int] = self._mine[low:high].tolist()
        return numbers

    def _straight(self, span: int) -> memoryview | None:
        """Where the whole span can be read to without a copy, if only this worker wants it and it lies in one run."""
        number = self._bounds[span]
        if self._bounds[span + 1] != number + 1 or self._workers[number] != self.worker:
            return None
        slab, item = self._slabs[number], self._items[span]
        if slab.run < 0:
            return None
        return self.targets[slab.want].flat[slab.run * item : slab.run * item + self._sizes[number]]


def _dtypes(reader: Reader) -> list[str]:
    """Of each tensor of the manifest's table."""
    return [reader.manifest.tensors[name][0] for name in reader.manifest.table.names]
