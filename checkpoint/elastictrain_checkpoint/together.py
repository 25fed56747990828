"""Reading together: performs a `ReadPlan` with any way to exchange bytes between the workers of a job.

Works in rounds, so that no worker holds more than a round's bytes besides what it wants. Whoever finds damage keeps
taking part until the end, when everybody learns of it: nobody is left waiting for bytes that do not come.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from elastictrain_checkpoint.dtypes import item_bytes
from elastictrain_checkpoint.errors import CheckpointError, CorruptData, InvalidPiece
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.reshard import ReadPlan, plan_reads
from elastictrain_checkpoint.rounds import (
    MESSAGE_BYTES,
    ROUND_BYTES,
    SHARED_ROUND_BYTES,
    STATE_BYTES,
    rounds_of,
)
from elastictrain_checkpoint.slabs import Slab, slabs
from elastictrain_checkpoint.wants import Want

Exchange = Callable[[Sequence[Sequence[NDArray[Any]]], Sequence[int]], Sequence[memoryview]]
"""``exchange(sent, sizes)``: hands the arrays ``sent[w]``, row-major and one after the other, to worker ``w``, and
gives what each worker has sent here, to be used before the next call; ``sizes[w]`` bytes are expected from ``w``. All
workers call it equally often."""


@runtime_checkable
class Shares(Protocol):
    """An exchange between workers that see each other's memory: what one has read the others take from where it lies,
    and nothing is sent. See `elastictrain_checkpoint.host_exchange`.
    """

    def stream(
        self,
        sizes: Sequence[int],
        fill: Callable[[int, memoryview], object],
        take: Callable[[int, int, memoryview], object],
    ) -> None:
        """All workers call it with equally many sizes. ``fill(turn, memory)`` fills ``sizes[turn]`` bytes; in the order
        of turns. ``take(turn, worker, memory)`` is called for every turn and worker, this one too, when that one has
        filled its memory, and is done with it when it returns; in the order of turns for each worker.

        Raises:
            ConnectionError: a worker is gone, or has given up, on whom this one still depends.
            TimeoutError: a worker has not got on for long.

        """


@runtime_checkable
class Begins(Protocol):
    """An exchange that may be under way while this worker reads on and places what has come before."""

    def begin(self, sent: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]) -> Callable[[], Sequence[memoryview]]:
        """As a call of an `Exchange`, but what it gives is to be waited for: by a call of what this gives. It may be
        begun before the one before it has been waited for, and is to be used before the second next is begun. The
        arrays ``sent`` are not needed any more when this returns.
        """


_SOUND, _DAMAGED, _FAILED = range(3)
"""What a worker says at the end of its share."""
_ELEMENTS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


def read_boxes(reader: Reader, wants: Sequence[Want], outs: Sequence[Any]) -> None:
    """Fill buffers with boxes of tensors, row-major; one process by itself.

    Args:
        reader: of the checkpoint.
        wants: the boxes; none two of them need be of one tensor.
        outs: a writable C-contiguous buffer for each, of exactly its bytes.

    Raises:
        KeyError, CorruptData: as for `Reader.read_many`; then buffers may be partly filled.
        InvalidPiece: a box that does not lie in its tensor, or a buffer that does not fit.

    """
    plan = plan_reads(reader.manifest, [wants])
    read_together(reader, plan, [wants], outs, worker=0, exchange=_nobody)


def _nobody(sent: Sequence[Sequence[NDArray[Any]]], _: Sequence[int]) -> list[memoryview]:
    """The exchange of one worker with itself."""
    return [memoryview(b"".join([part.tobytes() for part in parts])) for parts in sent]


def lay_out(parts: Sequence[NDArray[Any]], out: memoryview) -> None:
    """Copy arrays, whatever their strides, one after the other into a flat buffer of exactly their bytes."""
    at = 0
    for part in parts:
        np.frombuffer(out[at : at + part.nbytes], dtype=part.dtype).reshape(part.shape)[...] = part
        at += part.nbytes


def read_together(
    reader: Reader,
    plan: ReadPlan,
    wants: Sequence[Sequence[Want]],
    outs: Sequence[Any],
    *,
    worker: int,
    exchange: Exchange,
    round_bytes: int | None = None,
) -> None:
    """Read this worker's spans, hand on what others want of them, and fill this worker's buffers.

    Every worker of the plan calls this with the same plan and wants.

    Args:
        reader: of the checkpoint that the plan is for.
        plan: from `plan_reads`.
        wants: what the plan was made for.
        outs: a writable C-contiguous buffer for each of this worker's wants, of exactly its bytes.
        worker: which of the workers this is.
        exchange: see `Exchange`. One that `Shares` memory needs room for `most_shared_bytes` of the plan.
        round_bytes: about what is read before it is exchanged; the same on every worker. `ROUND_BYTES` if not given, or
            `SHARED_ROUND_BYTES` where memory is shared; as much as makes messages of `MESSAGE_BYTES` where exchanges
            overlap, if that is less.

    Raises:
        CorruptData: somebody found damage; raised on every worker. Buffers may be partly filled.
        OSError: somebody's storage failed, which says nothing of what is stored; raised on every worker too.
        ConnectionError, TimeoutError: a worker is gone, or does not get on, where memory is shared. Other exchanges
            raise what they do.
        InvalidPiece: a buffer does not fit; raised before anything is exchanged.

    """
    job = _Job(reader, plan, wants, worker)
    targets = job.targets(outs)
    shared: Any = exchange
    if isinstance(shared, Shares):
        error = _in_shared_memory(job, plan, targets, shared, round_bytes or SHARED_ROUND_BYTES)
    else:
        most = min(ROUND_BYTES, MESSAGE_BYTES * plan.workers) if isinstance(shared, Begins) else ROUND_BYTES
        error = _by_sending(job, plan, targets, exchange, round_bytes or most)
    message = f"{error}".encode()[: STATE_BYTES - 1] if error else b""
    found_here = _SOUND if error is None else _FAILED if isinstance(error, OSError) else _DAMAGED
    state = np.frombuffer((bytes([found_here]) + message).ljust(STATE_BYTES), dtype=np.uint8)
    states = exchange([[state]] * plan.workers, [STATE_BYTES] * plan.workers)
    if error:
        raise error
    for owner, found_there in enumerate(states):
        if found_there[0] != _SOUND:
            said = bytes(found_there[1:]).rstrip().decode(errors="replace")
            kind = OSError if found_there[0] == _FAILED else CorruptData
            raise kind(f"worker {owner} could not read its share: {said}")


_Error = CheckpointError | OSError | None


def _by_sending(job: _Job, plan: ReadPlan, targets: Sequence[_Target], exchange: Exchange, round_bytes: int) -> _Error:
    """Round by round: read, hand on, place what comes. Gives what went wrong here; the others take part even so.

    Where an exchange can be begun, the next round is read meanwhile, and what came before is placed.
    """
    error: _Error = None
    overlaps: Any = exchange if isinstance(exchange, Begins) else None
    coming: deque[tuple[list[range], Callable[[], Sequence[memoryview]]]] = deque()

    def place() -> None:
        spans, come = coming.popleft()
        for owner, (theirs, data) in enumerate(zip(spans, come(), strict=True)):
            if owner != job.worker:
                job.place(theirs, data, targets)

    for spans in rounds_of(plan, round_bytes):
        sent: list[list[NDArray[Any]]] = [[] for _ in range(plan.workers)]
        mine = spans[job.worker]
        scratch = job.room(mine)
        try:
            job.read(mine, scratch, targets, damaged=error is not None)
        except (CheckpointError, OSError) as found:
            error = found
        job.hand_on(mine, scratch, targets, sent)
        sizes = [job.coming_bytes(theirs) if owner != job.worker else 0 for owner, theirs in enumerate(spans)]
        if overlaps is None:
            coming.append((spans, partial(_given, exchange(sent, sizes))))
            place()
        else:
            coming.append((spans, overlaps.begin(sent, sizes)))
            if len(coming) > 1:
                place()
    if coming:
        place()
    return error


def _given(came: Sequence[memoryview]) -> Sequence[memoryview]:
    return came


def _in_shared_memory(
    job: _Job, plan: ReadPlan, targets: Sequence[_Target], exchange: Shares, round_bytes: int
) -> _Error:
    """As `_by_sending`, but everybody reads into memory that all see, and takes what it wants from there."""
    rounds, errors = rounds_of(plan, round_bytes), list[CheckpointError | OSError]()

    def fill(number: int, memory: memoryview) -> None:
        scratch = np.frombuffer(memory, dtype=np.uint8)
        try:
            job.read(rounds[number][job.worker], scratch, targets, damaged=bool(errors))
        except (CheckpointError, OSError) as error:
            errors.append(error)

    def take(number: int, owner: int, memory: memoryview) -> None:
        job.take(rounds[number][owner], memory, targets)

    exchange.stream([job.size_bytes(spans[job.worker]) for spans in rounds], fill, take)
    return errors[0] if errors else None


@dataclass(frozen=True)
class _Target:
    """A buffer, as bytes and as elements in the shape of its box."""

    flat: memoryview
    box: NDArray[Any]


class _Job:
    """One worker's share of a plan: what it reads, and what it takes from others."""

    def __init__(self, reader: Reader, plan: ReadPlan, wants: Sequence[Sequence[Want]], worker: int) -> None:
        self._reader = reader
        self._plan = plan
        self._wants = wants
        self.worker = worker
        table = reader.manifest.table
        self._scratch = np.empty(0, dtype=np.uint8)
        self._ends: list[int] = [0, *np.cumsum(plan.size_bytes).tolist()]
        for_me = plan.worker == worker
        self._slabs = slabs(plan, table, wants, np.flatnonzero(for_me | (plan.owner[plan.span] == worker)))
        self._mine = np.flatnonzero(for_me)
        self._workers, self._bounds, self._spans = plan.worker.tolist(), plan.bounds.tolist(), plan.span.tolist()
        items = np.array([item_bytes(manifest_dtype) for manifest_dtype in _dtypes(reader)], dtype=np.int64)
        self._items = items[table.tensor[plan.row]].tolist()

    def targets(self, outs: Sequence[Any]) -> list[_Target]:
        """The buffers of this worker's wants."""
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
            made.append(_Target(flat, np.frombuffer(flat, dtype=_ELEMENTS[item]).reshape(want.sizes)))
        return made

    def room(self, spans: range) -> NDArray[np.uint8]:
        """Memory of this worker's own for spans; used again by the next ones."""
        need = self.size_bytes(spans)
        if len(self._scratch) < need:
            self._scratch = np.empty(need, dtype=np.uint8)
        return self._scratch

    def size_bytes(self, spans: range) -> int:
        """Bytes of spans."""
        return self._ends[spans.stop] - self._ends[spans.start]

    def read(self, spans: range, scratch: NDArray[np.uint8], targets: Sequence[_Target], *, damaged: bool) -> None:
        """Read this worker's spans to where they belong, or else into ``scratch``, each at its place among them.

        If ``damaged``, nothing is read: what lies there has its size and no meaning.
        """
        plan, reads, at = self._plan, [], 0
        for span in () if damaged else spans:
            size = int(plan.size_bytes[span])
            straight = self._straight(span, targets)
            into = scratch[at : at + size].data if straight is None else straight
            reads.append((int(plan.file[span]), int(plan.start[span]), into))
            at += size
        self._reader.read_spans(reads)

    def hand_on(
        self,
        spans: range,
        scratch: NDArray[np.uint8],
        targets: Sequence[_Target],
        sent: list[list[NDArray[Any]]],
    ) -> None:
        """Fill the targets that are here from this worker's spans; add what others want to ``sent``."""
        for span in spans:
            if self._straight(span, targets) is not None:
                continue
            for number in range(self._bounds[span], self._bounds[span + 1]):
                slab, part = self._part(number, scratch, spans.start)
                if self._workers[number] == self.worker:
                    targets[slab.want].box[slab.into] = part
                else:
                    sent[self._workers[number]].append(part)

    def take(self, spans: range, memory: memoryview, targets: Sequence[_Target]) -> None:
        """Fill the targets that are here from one worker's spans, which lie in its memory one after the other."""
        numbers = self._coming(spans)
        if not numbers:
            return
        scratch, own = np.frombuffer(memory, dtype=np.uint8), self._plan.owner[spans.start] == self.worker
        for number in numbers:
            if own and self._straight(self._spans[number], targets) is not None:
                continue  # it was read to where it belongs
            slab, part = self._part(number, scratch, spans.start)
            targets[slab.want].box[slab.into] = part

    def coming_bytes(self, spans: range) -> int:
        """Bytes that the owner of these spans sends here."""
        return sum(self._slab_bytes(number) for number in self._coming(spans))

    def place(self, spans: range, data: memoryview, targets: Sequence[_Target]) -> None:
        """Put what came from the owner of these spans where it belongs."""
        at = 0
        for number in self._coming(spans):
            slab, size = self._slabs[number], self._slab_bytes(number)
            part = np.frombuffer(data[at : at + size], dtype=_ELEMENTS[self._items[self._spans[number]]])
            targets[slab.want].box[slab.into] = part.reshape(slab.sizes)
            at += size

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

    def _slab_bytes(self, number: int) -> int:
        return math.prod(self._slabs[number].sizes) * int(self._items[self._spans[number]])

    def _straight(self, span: int, targets: Sequence[_Target]) -> memoryview | None:
        """Where the whole span can be read to without a copy, if only this worker wants it and it lies in one run."""
        number = self._bounds[span]
        if self._bounds[span + 1] != number + 1 or self._workers[number] != self.worker:
            return None
        slab, item = self._slabs[number], self._items[span]
        if slab.run < 0:
            return None
        return targets[slab.want].flat[slab.run * item : slab.run * item + math.prod(slab.sizes) * item]


def _dtypes(reader: Reader) -> list[str]:
    """Of each tensor of the manifest's table."""
    return [reader.manifest.tensors[name][0] for name in reader.manifest.table.names]
