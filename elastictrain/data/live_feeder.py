"""Batches of a live source: waits for segments, and reads ahead as far as the order is decided."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch

from elastictrain.data.block_client import BlockClient
from elastictrain.data.feeder import Feeder, Place, Tensors
from elastictrain.data.growing import Growing
from elastictrain.data.sources import AnySource
from elastictrain.errors import DataEnded, DataError

SAY_AFTER_S = 1.0
_LOOK_S = 0.2
_CLOSE_S = 600.0


def open_feeder(
    source: AnySource, device: torch.device | str, client: BlockClient | None = None, *, widen: bool = False
) -> Feeder | LiveFeeder:
    """A feeder of any source, with the budget that its settings say; it must be closed. `client`: of the node's feeder;
    live data do without, since their segments, and with them their blocks, become known one by one. `widen`: batches of
    text are handed out in int64, whatever `data.batch_dtype` says.
    """
    growth = source.growth
    if growth is None:
        return Feeder.of(source, device, client, widen=widen)
    return LiveFeeder(Feeder.of(source, device, widen=widen), growth)


class LiveFeeder:
    """A `Feeder` whose source grows. Steps that are not decided yet are not read ahead, so nothing that can be read
    waits behind something that cannot.

    A thread of its own looks for segments whenever steps are expected that are not decided, once in `data.live.poll_s`
    and as soon as somebody begins to wait, and opens what is decided before its turn comes.
    """

    def __init__(self, feeder: Feeder, source: Growing) -> None:
        """Start the thread. The feeder belongs to this one now."""
        self._feeder, self._source = feeder, source
        self.while_waiting: Callable[[], None] = lambda: None
        """Called again and again by a `batch` that waits for a segment, and may raise."""
        self.say: Callable[[str | None], None] = lambda _: None
        """Called with what a `batch` waits for, once it has waited for `SAY_AFTER_S`, and with None when it is over."""
        self._handing = threading.Lock()  # of `_upcoming`: nothing is handed on while one of them is taken
        self._changed = threading.Condition()
        self._upcoming: dict[Place, None] = {}
        self._expected = self._needed = 0
        self._prepared = 0  # steps before this one are, as far as they are expected
        self._looks = self._waits = 0  # for segments: how often it was looked, and how often somebody began to wait
        self._answered = 0  # `_waits` at the begin of the last look
        self._rests_until_s = 0.0  # when nothing was there
        self._error: tuple[int, BaseException] | None = None  # of the last look: its number, and what it raised
        self._closed = False
        self._thread = threading.Thread(target=self._look_out, name="elastictrain-segments", daemon=True)
        self._thread.start()

    def expect(self, upcoming: Iterable[Place], until: float = math.inf) -> None:
        """Say which batches come next, as `Feeder.expect`; what is live ends where its order does, not at `until`."""
        del until
        places = dict.fromkeys(upcoming)
        with self._handing:
            self._upcoming = places
            self._feeder.expect(self._decided_places())
        with self._changed:
            self._expected = max((step + 1 for step, _ in places), default=0)
            first = min((step for step, _ in places), default=0)
            # Those that are at hand cost nothing to prepare again, so it does not matter how far it was before.
            self._prepared = max(first, min(self._prepared, self._expected))
            self._changed.notify_all()

    def forget(self, places: Iterable[Place]) -> None:
        """See `Feeder.forget`."""
        gone = tuple(places)
        with self._handing:
            for place in gone:
                self._upcoming.pop(place, None)
            self._feeder.forget(gone)

    def ready(self, step: int, lane: int) -> bool:
        """See `Feeder.ready`."""
        return self._feeder.ready(step, lane)

    def batch(self, step: int, lane: int) -> Tensors:
        """As `Feeder.batch`, after waiting for the segments that the step is made of.

        Raises DataEnded: there is no such step; DataError: no segment within `data.live.deadline_s`, or one that cannot
        be read; and what `while_waiting` raises.
        """
        begun_s = time.monotonic()
        waited = step >= self._source.decided
        if waited:
            self._wait_and_say(step)
        arrival_s = time.monotonic() - begun_s
        with self._handing:
            self._upcoming.pop((step, lane), None)
            result = self._feeder.batch(step, lane)
        if waited:
            result.waited["arrival"] = result.waited.get("arrival", 0.0) + arrival_s
        return result

    def mark_of(self, step: int) -> dict[str, Any]:
        """See `Growing.mark_of`."""
        return self._source.mark_of(step)

    def close(self) -> None:
        """Stop both threads and wait for them; may be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)
        self._feeder.close()
        if self._thread.is_alive():
            raise DataError(
                f"looking for segments did not end within {_CLOSE_S:g} s. Look at the store behind data.path"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_and_say(self, step: int) -> None:
        say_at_s, said = time.monotonic() + SAY_AFTER_S, False

        def turn() -> None:
            nonlocal said
            if not said and time.monotonic() >= say_at_s:
                said = True
                self.say(f"step {step + 1}: {self._source.waiting_for or 'the first look for segments'}")
            self.while_waiting()

        try:
            self._wait_for(step, turn)
        finally:
            if said:
                self.say(None)

    def _wait_for(self, step: int, turn: Callable[[], None]) -> None:
        begun_s = time.monotonic()
        with self._changed:
            self._waits += 1
            before = self._looks  # what those found was not asked for by this step, and may not be so any more
        while True:
            with self._changed:
                if self._needed != step + 1 or self._answered != self._waits:
                    self._needed = step + 1
                    self._changed.notify_all()
                if step < self._source.decided:
                    return
                if self._error is not None and self._error[0] > before:
                    (_, error), self._error, self._needed = self._error, None, 0
                    raise error
                if (why := self._source.ended) is not None:
                    raise DataEnded(
                        f"{self._source.place} has no step {step + 1}: {self._source.decided} are "
                        f"all ({why}). Set steps to that, or data.live.policy to reservoir"
                    )
                if self._closed:
                    raise RuntimeError("the LiveFeeder is closed")
                setting, deadline_s = self._source.deadline
                remaining_s = begun_s + deadline_s - time.monotonic()
                if remaining_s <= 0:
                    raise DataError(
                        f"step {step + 1}: nothing new within {setting}={deadline_s:g} s ({self._source.waiting_for}). "
                        f"Look at what writes the segments, raise {setting}, or set data.live.policy"
                    )
                self._changed.wait(min(_LOOK_S, remaining_s))
            turn()

    def _decided_places(self) -> list[Place]:
        decided = self._source.decided
        return [place for place in self._upcoming if place[0] < decided]

    def _look_out(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._is_due() and self._unprepared() is None:
                    self._changed.wait(self._rest_s())  # or until expect, batch or close
                if self._closed:
                    return
                is_due, step = self._is_due(), self._unprepared()
            if is_due:
                self._look()
            elif step is not None:
                with suppress(BaseException):  # who needs that step gets it
                    self._source.prepare(step)
                with self._changed:
                    self._prepared = max(self._prepared, step + 1)

    def _look(self) -> None:
        with self._changed:
            needed = self._needed > self._source.decided
            self._looks, self._answered = self._looks + 1, self._waits
        grown = False
        failed: BaseException | None = None
        try:
            grown = self._source.advance(needed=needed)
        except BaseException as error:  # also a panic in Rust, which is no Exception: somebody waits for this look
            failed = error
        if grown:
            with self._handing:
                self._feeder.expect(self._decided_places())
        with self._changed:
            self._error = None if failed is None else (self._looks, failed)
            self._rests_until_s = 0.0 if grown else time.monotonic() + self._source.poll_s
            self._changed.notify_all()

    def _is_due(self) -> bool:
        """Whether to look for more now: it is wanted, and the last look was `poll_s` ago or not for who waits."""
        decided = self._source.decided
        if self._source.ended is not None or max(self._expected, self._needed) <= decided:
            return False
        return time.monotonic() >= self._rests_until_s or (self._needed > decided and self._answered != self._waits)

    def _rest_s(self) -> float | None:
        """How long there is nothing to do, as far as is known; None: until somebody says so."""
        wanted = self._source.ended is None and max(self._expected, self._needed) > self._source.decided
        return max(0.0, self._rests_until_s - time.monotonic()) if wanted else None

    def _unprepared(self) -> int | None:
        """The next step that is expected and decided, and was not prepared yet; None while somebody waits for more."""
        decided = self._source.decided
        return self._prepared if self._prepared < min(self._expected, decided) and self._needed <= decided else None
