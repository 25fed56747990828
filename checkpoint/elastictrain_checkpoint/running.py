"""One save that runs in the background: what the thread that writes shares with the one that trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from elastictrain_checkpoint import hashing
from elastictrain_checkpoint.errors import SaveTimeout, StateChanged
from elastictrain_checkpoint.handle import SaveHandle, SaveState
from elastictrain_checkpoint.ledger import Ledger
from elastictrain_checkpoint.pace import Course
from elastictrain_checkpoint.part import Part
from elastictrain_checkpoint.pool import Pool
from elastictrain_checkpoint.units import Bytes, Plan, Unit, gather

MAX_COPY = 0.2
"""With what else a save needs (threads, a block in hand), less than a quarter of a state of 100 MB."""
MIN_COPY_BYTES = 8 << 20


class Superseded(Exception):
    """The save was given up."""


class Job:
    """One save that runs. The lock stands between the writer taking a unit and the state being let go to change."""

    def __init__(
        self,
        handle: SaveHandle,
        pool: Pool,
        finish: Callable[[Part], Any] | None,
        intact: Callable[[], str],
        course: Course,
    ) -> None:
        self.handle, self.pool, self.finish, self.intact = handle, pool, finish, intact
        self.course = course
        self.seen = False
        self.lock = threading.Condition(threading.Lock())
        self.planned = threading.Event()
        self.plan: Plan | None = None
        self.ledger = Ledger([])
        self.units: list[Unit] = []
        self.cancelled = self.finishing = self.touched = False
        self.bounce: Bytes = np.empty(hashing.SUM_BLOCK_BYTES, dtype=np.uint8)

    def start(self, plan: Plan) -> None:
        with self.lock:
            self.plan, self.units = plan, plan.units
            self.ledger = Ledger([unit.live for unit in self.units])
            self.handle.total_bytes = sum(pack.size_bytes for pack in plan.packs)
        self.planned.set()

    def plan_anew(self) -> bool:
        """Nothing is written so far; may another plan take the place of this one? Not when the state has changed since
        the save began, or when it was given up. Until the other one starts, a change of live state waits.
        """
        with self.lock:
            if self.cancelled or self.touched:
                return False
            if self.ledger.live:
                self.planned.clear()
            return True

    def take(self, lent: memoryview | None = None) -> tuple[int, memoryview]:
        """The next unit's bytes, in memory that does not change with the state: in `lent`, if given, unless they have
        been copied before.
        """
        out = self.bounce if lent is None else np.frombuffer(lent, dtype=np.uint8)
        with self.lock:
            if self.cancelled:
                raise Superseded
            taken = self.ledger.take()
            assert taken is not None, "as many units are taken as were planned"
            number, slot = taken
            unit = self.units[number]
            if slot is not None:
                return number, self.pool.slot(slot).data[: unit.size]
            gather(unit, out)
            if unit.live and not self.ledger.live:
                self.check()  # nothing has announced a change, so until here there may have been none
                self.lock.notify_all()
        return number, (self.bounce.data if lent is None else lent)[: unit.size]

    def check(self) -> None:
        changed = self.intact()
        if changed:
            raise StateChanged(
                f"step {self.handle.step} was not saved: {changed} has changed while it was read. Call before_mutation "
                "(or attach the optimizer) before every change, name what changes in between (eager=…), or save a copy"
            )

    def wrote(self, number: int) -> None:
        with self.lock:
            slot = self.ledger.wrote(number)
            self.handle.written_bytes += self.units[number].size
        if slot is not None:
            self.pool.give_back([slot])

    def past_cache(self) -> bool:
        """Whether to go on past the page cache; who waits for the state, or for the outcome, hurries."""
        with self.lock:
            live_bytes = self.ledger.live * hashing.SUM_BLOCK_BYTES
            return self.course.past_cache(
                read_bytes=self.handle.written_bytes,
                live_bytes=live_bytes,
                now_s=time.perf_counter(),
                hurries=self.handle.awaited or (self.touched and live_bytes > 0),
            )

    def freeze(self, deadline_s: float, max_copy: float) -> None:
        """Copy what is still live: up to this fraction of the state. Wait until the writer has read what is beyond."""
        while True:
            if not self.planned.wait(deadline_s):
                raise SaveTimeout(f"{self.handle._progress()}; it was not even planned after {deadline_s:g} s")
            with self.lock:
                if self.planned.is_set():  # else it is being planned anew
                    self._freeze(deadline_s, max_copy)
                    return

    def _freeze(self, deadline_s: float, max_copy: float) -> None:
        if self.cancelled or not self.ledger.live:
            return
        self.touched = True
        try:
            self.check()
        except StateChanged as error:
            self.cancelled = True
            self.handle._end(SaveState.FAILED, error=error)
            return
        assert self.plan is not None
        most_bytes = copy_bytes(self.plan.state_bytes, max_copy)
        for number, slot in self.ledger.freeze(self.pool.lend(self.ledger.live, most_bytes), partly=True):
            gather(self.units[number], self.pool.slot(slot))
            self.handle.copied_bytes += self.units[number].size
        if not self.lock.wait_for(lambda: self.cancelled or not self.ledger.live, deadline_s):
            self.cancelled = True
            late = SaveTimeout(
                f"{self.handle._progress()}; the state was to change, and no more than {max_copy:g} of it may be "
                f"copied (max_copy): waited {deadline_s:g} s until the rest is written"
            )
            self.handle._end(SaveState.FAILED, error=late)

    def cancel(self) -> bool:
        """Give the save up, unless its commit has begun."""
        with self.lock:
            if self.finishing:
                return False
            self.cancelled = True
            self.lock.notify_all()
        self.handle._end(SaveState.SUPERSEDED)
        return True

    def close(self) -> None:
        """The thread is at its end: let go of the state and of the pool."""
        with self.lock:
            self.cancelled = True
            self.pool.give_back(self.ledger.slots)
            self.ledger, self.plan, self.units = Ledger([]), None, []
            self.finish, self.intact = None, lambda: ""
            self.lock.notify_all()
        self.planned.set()


def copy_bytes(state_bytes: int, max_copy: float) -> int | None:
    """How large the pool may grow for a state: small states may be copied whole. None: as large as it must. The whole
    state may need more than its size, since what is smaller than a slot has one to itself, and since a save that was
    given up while storage held it has not given its slots back.
    """
    if max_copy >= 1:
        return None
    return max(int(state_bytes * max_copy), MIN_COPY_BYTES) if max_copy else 0
