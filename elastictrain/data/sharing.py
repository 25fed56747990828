"""What a node's feeder reads for the workers of that node, in which order, and how long it keeps it. Pure: time enters
as `now_s`, and nothing is read here.

The feeder hands out decoded blocks (row groups that are decoded, tokenised and packed), and not batches: a block is the
same whatever the order, the stage and the lanes, so a lane that moves, a resize and a step that is computed again find
it where it is, and what is in a batch cannot depend on who has read its blocks.

A block stays while a worker holds it, and `KEEP_S` longer: a lane that moves leaves one worker a moment before the
other asks. What all of them hold together, in the object store, never takes more than the ledger's limit: a worker that
asks for more is told to read for itself.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

KEEP_S = 2.0
WANT_S = 2.0
"""A block that nobody has asked for again for so long is wanted no more: workers ask again several times a second."""

_SIZES = 64
"""Of so many blocks the last sizes are kept: the next one will be no larger."""
NO_BLOCK = -1
"""Of a question that asks for nothing, and only says what its worker holds."""


class Look(Enum):
    """What a worker hears of a block that it has asked for."""

    HERE = "here"
    COMING = "coming"
    FULL = "full"  # there is no room for it
    NONE = "none"  # it could not be read, or this feeder has other data


@dataclass(frozen=True, slots=True)
class Ask:
    """A worker's question for a block.

    `serial`: rises with every question of this worker; those below `settled` have been answered or given up. `key`:
    which data it means. `due`: the step that needs it. `held`: the blocks of this feeder that the worker holds now;
    `other_bytes`: what it still holds of feeders before. `wait_s`: answer within that time, with or without the block.
    """

    worker: int
    serial: int
    settled: int
    key: str
    block: int
    due: float
    held: frozenset[int]
    other_bytes: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """`item`: where the block is, if it is here. `workers`: how many this feeder serves, among whom the budget of the
    node is divided. `usual_s`: what reading a block has taken it lately; 0: nothing is known of that.
    """

    look: Look
    workers: int
    usual_s: float
    item: object = None


@dataclass(slots=True)
class _Wanted:
    due: float
    order: int
    asked_s: float


@dataclass(slots=True)
class _Here:
    size: int
    until_s: float


@dataclass(slots=True)
class _Worker:
    serial: int = -1
    settled: int = 0
    held: dict[int, int] = field(default_factory=dict)  # by block: the question that it answered
    other_bytes: int = 0


class Ledger:
    """The blocks of one feeder. A block is wanted, being read, or here; never two of these."""

    def __init__(self, limit_bytes: int) -> None:
        """`limit_bytes`: what blocks may take, held and kept together."""
        if limit_bytes < 1:
            raise ValueError(f"limit_bytes is {limit_bytes}; expected at least 1")
        self.limit_bytes = limit_bytes
        self._wanted: dict[int, _Wanted] = {}
        self._reading: dict[int, int] = {}  # and its bytes, 0 until they are known
        self._here: dict[int, _Here] = {}
        self._workers: dict[int, _Worker] = {}
        self._gone: set[int] = set()  # a question of theirs may still be on its way
        self._sizes: deque[int] = deque(maxlen=_SIZES)
        self._too_large: set[int] = set()
        self._asked = 0

    @property
    def workers(self) -> int:
        """How many workers are served."""
        return len(self._workers)

    @property
    def waiting(self) -> int:
        """How many blocks are wanted that nobody reads yet."""
        return len(self._wanted)

    @property
    def live_bytes(self) -> int:
        """What is in the store: blocks that are here or being put there, and what is held of feeders before."""
        here = sum(one.size for one in self._here.values()) + sum(self._reading.values())
        return here + sum(worker.other_bytes for worker in self._workers.values())

    def tell(self, ask: Ask) -> None:
        """A worker says what it holds; one that is not known yet is served from now on. What is older than what it has
        said before is left out; what answered a question that it has not settled yet it may hold without saying so.
        """
        facts = _Worker() if ask.worker in self._gone else self._workers.setdefault(ask.worker, _Worker())
        if ask.serial > facts.serial:
            facts.serial, facts.settled, facts.other_bytes = ask.serial, ask.settled, ask.other_bytes
            facts.held = {
                block: serial for block, serial in facts.held.items() if serial >= ask.settled or block in ask.held
            }

    def forget(self, worker: int) -> None:
        """A worker is gone for good, and holds nothing any more."""
        self._gone.add(worker)
        self._workers.pop(worker, None)

    def ask(self, block: int, due: float, now_s: float) -> Look:
        """A worker asks for a block, for the first time or again."""
        if (look := self.look(block)) is Look.HERE or block in self._reading:
            return look
        if block in self._too_large or (not self._has_room() and not self._make_room(now_s)):
            self._wanted.pop(block, None)
            return Look.FULL
        wanted = self._wanted.setdefault(block, _Wanted(due, self._asked, now_s))
        self._asked += 1
        wanted.due, wanted.asked_s = min(wanted.due, due), now_s
        return Look.COMING

    def look(self, block: int) -> Look:
        """How a block stands that has been asked for; NONE: it does not come."""
        if block in self._here:
            return Look.HERE
        return Look.COMING if block in self._reading or block in self._wanted else Look.NONE

    def next(self, now_s: float) -> int | None:
        """The block to read now: of those that somebody still wants the one that is needed first, and of several the
        one that was asked for first. It counts as being read until `done` or `failed`.
        """
        for block in [block for block, wanted in self._wanted.items() if wanted.asked_s < now_s - WANT_S]:
            del self._wanted[block]
        if not self._wanted or not self._has_room():
            return None
        first = min(self._wanted, key=lambda block: (self._wanted[block].due, self._wanted[block].order))
        del self._wanted[first]
        self._reading[first] = 0
        return first

    def sized(self, block: int, size: int) -> bool:
        """A block that is being read will take `size` bytes: whether there is room. If not, it is not kept."""
        if size > self.limit_bytes:
            self._too_large.add(block)  # it never fits, which says nothing of others
        else:
            self._sizes.append(size)
        if self.live_bytes + size > self.limit_bytes:
            del self._reading[block]
            return False
        self._reading[block] = size
        return True

    def done(self, block: int, now_s: float) -> None:
        """A block that was `sized` is here."""
        self._here[block] = _Here(self._reading.pop(block), now_s + KEEP_S)

    def failed(self, block: int) -> None:
        """A block could not be read."""
        self._reading.pop(block, None)

    def take(self, ask: Ask) -> None:
        """A block that is here has been handed out as an answer: the worker holds it until it says otherwise; unless it
        has given the question up meanwhile.
        """
        facts = self._workers.get(ask.worker)
        if facts is not None and ask.serial >= facts.settled:
            facts.held[ask.block] = max(ask.serial, facts.held.get(ask.block, 0))

    def let_go(self, now_s: float) -> list[int]:
        """Blocks that nobody holds and nobody has come for: the caller drops what it has of them."""
        held = self._held()
        gone = [block for block, one in self._here.items() if block not in held and now_s >= one.until_s]
        for block in gone:
            del self._here[block]
        return gone

    def _held(self) -> set[int]:
        return {block for worker in self._workers.values() for block in worker.held}

    def _has_room(self) -> bool:
        """For one more block, as large as the largest of late, beside those being read that are not measured yet."""
        unmeasured = sum(size == 0 for size in self._reading.values())
        return self.live_bytes + (unmeasured + 1) * max(self._sizes, default=0) <= self.limit_bytes

    def _make_room(self, now_s: float) -> bool:
        """Let what is only kept go before its time. Whether that is enough is seen when it has gone."""
        held = self._held()
        kept = [one for block, one in self._here.items() if block not in held]
        for one in kept:
            one.until_s = min(one.until_s, now_s)
        return bool(kept)


def readers_wanted(workers: int, cpus: int) -> int:
    """How many threads shall read: as many as would if every worker read for itself, but no more than processors."""
    return max(1, min(workers, cpus))


def share_bytes(budget_bytes: int, workers: int) -> int:
    """What one of `workers` may have read ahead of the budget of their node."""
    return max(1, budget_bytes // max(1, workers))
