"""A worker's side of its node's feeder: asks it for decoded blocks, holds them as long as they are used, and says "read
for yourself" when nothing good can be had of it.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from elastictrain.data.reliance import Reliance
from elastictrain.data.sharing import NO_BLOCK, Answer, Ask, Look
from elastictrain.data.sources import AnySource
from elastictrain.data.warm import Arrays, cache_key
from elastictrain.data.windows import Block

WAIT_S = 0.25
"""A feeder that lives answers a question within this time."""
GRACE_S = 1.0
"""For the way there and back, and a busy machine."""
TELL_S = 0.5
"""A question says what the worker holds. Where none has come for so long since it let go of something, that is told in
a message of its own: a worker that computes, or has come to its end, asks nothing."""


class Line(Protocol):
    """How a feeder is reached."""

    @property
    def number(self) -> int:
        """Of the feeder that is there now, 0 for none; a later one has a higher number."""

    def call(self, number: int, ask: Ask, deadline_s: float) -> tuple[Answer, Arrays | None]:
        """Ask feeder `number`; the block's arrays, read-only, if it is here. Raises an exception of any kind when there
        is no answer within `deadline_s`.
        """

    def tell(self, number: int, ask: Ask) -> None:
        """Send feeder `number` what the worker holds, and wait for nothing; `ask` asks for no block (NO_BLOCK)."""


@dataclass(slots=True)
class _Held:
    count: int
    size: int


class BlockClient:
    """Of one worker; thread-safe. `workers`: how many share the node's budget as far as is known; before the feeder has
    said it, as many as there may be.
    """

    def __init__(self, line: Line, worker: int, *, workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.workers = workers
        self._line, self._worker, self._clock = line, worker, clock
        self._lock = threading.Lock()
        self._telling = threading.RLock()  # of calls to listeners; taken before what they take, never within `_lock`
        self._reliance = Reliance()
        self._serial = 0
        self._open: set[int] = set()  # questions that are under way
        self._held: dict[tuple[int, int], _Held] = {}  # by feeder and block
        # A block may end in any thread, in the middle of anything: its end is only noted, and no lock is taken for it.
        # (This queue is made for that: its `put` may be interrupted by another one of the same thread.)
        self._ended: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._untold = False
        self._teller: threading.Thread | None = None
        self._listeners: list[Callable[[int], None]] = []
        self.taken = 0

    def of(self, source: AnySource) -> SharedBlocks:
        """The blocks of one source."""
        return SharedBlocks(self, cache_key(source.content))

    def listen(self, to: Callable[[int], None]) -> None:
        """Call `to` with the number of workers that share the node's budget, now and whenever it changes."""
        with self._lock:
            self._listeners.append(to)
        with self._telling:
            to(self.workers)

    def take(self, key: str, block: int, due: float, *, urgent: Callable[[], bool]) -> Block | None:
        """A block from the feeder, read-only, or None: then the caller reads it. Raises nothing. `urgent`: whether
        somebody waits for it, looked at again every turn, as that may begin meanwhile.
        """
        begun_s = self._clock()
        while True:
            with self._lock:
                number, now_s = self._line.number, self._clock()
                if not self._reliance.may_ask(number, now_s, urgent=urgent()):
                    return None
                ask = self._ask(number, key, block, due)
            try:
                answer, arrays = self._line.call(number, ask, WAIT_S + GRACE_S)
            except Exception:
                with self._lock:
                    self._open.discard(ask.serial)
                    self._reliance.lost(number, self._clock())
                return None
            if answer.look is Look.HERE and arrays is not None:
                made = self._hold(number, ask, arrays)
                self._heard(number, answer)
                return made
            self._heard(number, answer)
            with self._lock:
                self._open.discard(ask.serial)
                if answer.look is not Look.COMING:
                    return None
                if self._clock() - begun_s >= self._reliance.patience_s(urgent=urgent()):
                    self._reliance.late(number, self._clock())
                    return None

    def _tell(self) -> None:
        """Say what is held, if no question has said it since something ended."""
        with self._lock:
            number = self._line.number
            if not self._untold or not number:
                return
            ask = self._ask(number, "", NO_BLOCK, math.inf)
            self._open.discard(ask.serial)
        with suppress(Exception):  # the next question says it
            self._line.tell(number, ask)

    def _note_end(self, place: tuple[int, int]) -> None:
        held = self._held[place]
        held.count -= 1
        if not held.count:
            del self._held[place]
            self._untold = True

    def _ask(self, number: int, key: str, block: int, due: float) -> Ask:
        with suppress(Empty):
            while (place := self._ended.get_nowait()) is not None:
                self._note_end(place)
        self._untold = False
        self._serial += 1
        self._open.add(self._serial)
        mine = frozenset(there for feeder, there in self._held if feeder == number)
        others = sum(held.size for (feeder, _), held in self._held.items() if feeder != number)
        return Ask(self._worker, self._serial, min(self._open), key, block, due, mine, others, WAIT_S)

    def _heard(self, number: int, answer: Answer) -> None:
        with self._lock:
            self._reliance.answered(number, answer.usual_s)
            changed = answer.workers != self.workers
            self.workers = answer.workers
            listeners = list(self._listeners) if changed else []
        for tell in listeners:
            with self._telling:  # another thread may have heard otherwise: whoever tells last tells what holds
                tell(self.workers)

    def _hold(self, number: int, ask: Ask, arrays: Arrays) -> Block:
        block, made = ask.block, Block(ask.block, arrays)
        with self._lock:
            self._open.discard(ask.serial)
            self._reliance.brought(number)
            self.taken += 1
            held = self._held.setdefault((number, block), _Held(0, made.bytes))
            held.count += 1
            if self._teller is None:
                self._teller = threading.Thread(
                    target=_tell_what_ends, args=(weakref.ref(self), self._ended), name="elastictrain-tell", daemon=True
                )
                self._teller.start()
                weakref.finalize(self, self._ended.put, None).atexit = False
        weakref.finalize(made, self._ended.put, (number, block)).atexit = False
        return made


def _tell_what_ends(client_of: Callable[[], BlockClient | None], ended: SimpleQueue[tuple[int, int] | None]) -> None:
    """Until the client itself ends: have it tell what has ended, once nothing more does."""
    place = ended.get()
    while place is not None and (client := client_of()) is not None:
        with client._lock:
            client._note_end(place)
        del client  # waiting keeps nobody alive
        try:
            place = ended.get(timeout=TELL_S)
        except Empty:
            if (client := client_of()) is not None:
                client._tell()
            del client
            place = ended.get()


@dataclass(frozen=True, slots=True)
class SharedBlocks:
    """The blocks of one source, from whoever reads them for this node."""

    client: BlockClient
    key: str

    def take(self, number: int, due: float, *, urgent: Callable[[], bool]) -> Block | None:
        """See `BlockClient.take`."""
        return self.client.take(self.key, number, due, urgent=urgent)
