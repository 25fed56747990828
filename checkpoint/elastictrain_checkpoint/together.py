"""Reading together: performs a `ReadPlan` with any way to exchange bytes between the workers of a job.

Works in rounds, so that no worker holds more than a round's bytes besides what it wants. Whoever finds damage keeps
taking part until the end, when everybody learns of it: nobody is left waiting for bytes that do not come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from elastictrain_checkpoint.errors import CheckpointError, CorruptData, LoadFailed
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.reshard import ReadPlan, plan_reads
from elastictrain_checkpoint.rounds import (
    MESSAGE_BYTES,
    ROUND_BYTES,
    SHARED_ROUND_BYTES,
    STATE_BYTES,
    rounds_of,
)
from elastictrain_checkpoint.wants import Want
from elastictrain_checkpoint.worker_share import WorkerShare

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
class Posts(Protocol):
    """An exchange that is under way while this worker reads on, and brings what comes to where it belongs."""

    def make_room(self, sent_bytes: int, come_bytes: int) -> None:
        """Make the memory for turns in which no more than this is sent to, and comes from, all others together."""

    def expect(self, come: Sequence[Sequence[NDArray[Any]]]) -> Callable[[], None]:
        """Begin a turn: the arrays ``come[w]`` are for what worker ``w`` sends in it, and are filled when a call of
        what this gives returns. No more than `TURNS` may be expected and not waited for.
        """

    def send(self, sent: Sequence[Sequence[NDArray[Any]]]) -> None:
        """Hand the arrays ``sent[w]`` to worker ``w``, which expects as many of these shapes and types in this turn.
        They are not needed any more when this returns.
        """


TURNS = 2
"""Of an exchange that `Posts`: one that is read, and the one before, which is under way."""
_SOUND, _DAMAGED, _FAILED, _OTHER = range(4)
"""What a worker says at the end of its share."""


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


def take_out(data: memoryview, parts: Sequence[NDArray[Any]]) -> None:
    """Inverse of `lay_out`: fill arrays, whatever their strides, from a flat buffer of exactly their bytes."""
    at = 0
    for part in parts:
        part[...] = np.frombuffer(data[at : at + part.nbytes], dtype=part.dtype).reshape(part.shape)
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
        LoadFailed: another worker could not read for any other reason (no memory), which it raises itself.
        ConnectionError, TimeoutError: a worker is gone, or does not get on, where memory is shared. Other exchanges
            raise what they do.
        InvalidPiece: a buffer does not fit; raised before anything is exchanged.

    """
    Together(reader, plan, wants, outs, worker=worker, round_bytes=round_bytes).read(exchange)


class Together:
    """As `read_together`, in two parts: what can be refused, or needs memory, is done by the first, alone.

    Args:
        reader, plan, wants, outs, worker, round_bytes: see `read_together`.

    Raises:
        InvalidPiece: a buffer does not fit.

    """

    def __init__(
        self,
        reader: Reader,
        plan: ReadPlan,
        wants: Sequence[Sequence[Want]],
        outs: Sequence[Any],
        *,
        worker: int,
        round_bytes: int | None = None,
    ) -> None:
        self._share = WorkerShare(reader, plan, wants, outs, worker)
        self._plan = plan
        self._round_bytes = round_bytes
        self._ready_for: Any = None
        self._rounds: list[list[range]] = []
        self._error: Exception | None = None

    def get_ready(self, exchange: Exchange) -> None:
        """Cut the plan into rounds, and make all the memory that this exchange needs; nothing is exchanged."""
        if self._ready_for is exchange:
            return
        other: Any = exchange
        most = SHARED_ROUND_BYTES if isinstance(other, Shares) else ROUND_BYTES
        if isinstance(other, Posts):
            most = min(ROUND_BYTES, MESSAGE_BYTES * self._plan.workers)
        self._rounds = rounds_of(self._plan, self._round_bytes or most)
        if not isinstance(other, Shares):
            self._share.make_room(self._rounds)
        if isinstance(other, Posts):
            other.make_room(*self._share.most_handed_on_bytes(self._rounds))
        self._ready_for = exchange

    def read(self, exchange: Exchange) -> None:
        """Read, hand on and fill; see `read_together` for what is raised."""
        self.get_ready(exchange)
        other: Any = exchange
        if isinstance(other, Shares):
            self._in_shared_memory(other)
        elif isinstance(other, Posts):
            self._by_posting(other)
        else:
            self._by_sending(exchange)
        self._agree(exchange)

    def _agree(self, exchange: Exchange) -> None:
        """Raise what went wrong, here or elsewhere."""
        error, workers = self._error, self._plan.workers
        name = "" if isinstance(error, CheckpointError | OSError) else f"{type(error).__name__}: "
        message = f"{name}{error}".encode()[: STATE_BYTES - 1] if error else b""
        state = np.frombuffer((bytes([_kind(error)]) + message).ljust(STATE_BYTES), dtype=np.uint8)
        states = exchange([[state]] * workers, [STATE_BYTES] * workers)
        if error:
            raise error
        for owner, found in enumerate(states):
            if found[0] != _SOUND:
                said = bytes(found[1:]).rstrip().decode(errors="replace")
                raise _KINDS[found[0]](f"worker {owner} could not read its share: {said}")

    def _read(self, spans: range, into: NDArray[np.uint8]) -> None:
        """Read this worker's spans. What goes wrong is kept until all hear of it: whatever it is, others wait here."""
        try:
            self._share.read(spans, into, damaged=self._error is not None)
        except Exception as error:
            self._error = error

    def _by_sending(self, exchange: Exchange) -> None:
        """Round by round: read, hand on, place what comes."""
        share = self._share
        for spans in self._rounds:
            self._read(spans[share.worker], share.scratch)
            share.keep(spans[share.worker])
            sent = share.leaving(spans[share.worker], damaged=self._error is not None)
            coming = self._coming(spans)
            came = exchange(sent, [sum(part.nbytes for part in parts) for parts in coming])
            for parts, data in zip(coming, came, strict=True):
                take_out(data, parts)

    def _by_posting(self, exchange: Posts) -> None:
        """The same; the next round is read while one is under way, and what comes is expected before it is sent."""
        share, coming = self._share, deque[Callable[[], None]]()
        for number, spans in enumerate(self._rounds):
            coming.append(exchange.expect(self._coming(spans)))
            self._read(spans[share.worker], share.scratch)
            exchange.send(share.leaving(spans[share.worker], damaged=self._error is not None))
            share.keep(spans[share.worker])
            if number:
                coming.popleft()()
        while coming:
            coming.popleft()()

    def _coming(self, spans: Sequence[range]) -> list[list[NDArray[Any]]]:
        """Where what each of the others hands on belongs."""
        worker = self._share.worker
        return [self._share.coming(theirs) if owner != worker else [] for owner, theirs in enumerate(spans)]

    def _in_shared_memory(self, exchange: Shares) -> None:
        """Everybody reads into memory that all see, and takes what it wants from there."""
        rounds, share = self._rounds, self._share

        def fill(number: int, memory: memoryview) -> None:
            self._read(rounds[number][share.worker], np.frombuffer(memory, dtype=np.uint8))

        def take(number: int, owner: int, memory: memoryview) -> None:
            try:
                share.take(rounds[number][owner], memory)
            except Exception as error:  # the others still depend on this worker's turns
                self._error = error

        exchange.stream([share.size_bytes(spans[share.worker]) for spans in rounds], fill, take)


_KINDS: dict[int, type[Exception]] = {_DAMAGED: CorruptData, _FAILED: OSError, _OTHER: LoadFailed}


def _kind(error: Exception | None) -> int:
    if error is None:
        return _SOUND
    return _DAMAGED if isinstance(error, CheckpointError) else _FAILED if isinstance(error, OSError) else _OTHER
