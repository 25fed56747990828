"""Batches of a live source: waits for segments, and reads ahead as far as the order is decided."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch

from elastictrain.data.feeder import Feeder, Place, Tensors
from elastictrain.data.live import LiveSource
from elastictrain.data.sources import AnySource
from elastictrain.errors import DataEnded, DataError

SAY_AFTER_S = 1.0
_LOOK_S = 0.2
_CLOSE_S = 600.0


def open_feeder(source: AnySource, device: torch.device | str) -> Feeder | LiveFeeder:
    """A feeder of any source, with the budget that its settings say; it must be closed."""
    feeder = Feeder.of(source, device)
    return LiveFeeder(feeder, source) if isinstance(source, LiveSource) else feeder


class LiveFeeder:
    """A `Feeder` whose source grows. Steps that are not decided yet are not read ahead, so nothing that can be read
    waits behind something that cannot.

    A thread of its own looks for segments (`data.live.poll_s`) whenever steps are expected that are not decided.
    """

    def __init__(self, feeder: Feeder, source: LiveSource) -> None:
        """Start the thread. The feeder belongs to this one now."""
        self._feeder, self._source, self._live = feeder, source, source.live
        self.while_waiting: Callable[[], None] = lambda: None
        """Called again and again by a `batch` that waits for a segment, and may raise."""
        self.say: Callable[[str | None], None] = lambda _: None
        """Called with what a `batch` waits for, once it has waited for `SAY_AFTER_S`, and with None when it is over."""
        self._handing = threading.Lock()  # of `_upcoming`: nothing is handed on while one of them is taken
        self._changed = threading.Condition()
        self._upcoming: dict[Place, None] = {}
        self._expected = self._needed = 0
        self._error: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._look_out, name="elastictrain-segments", daemon=True)
        self._thread.start()

    def expect(self, upcoming: Iterable[Place]) -> None:
        """Say which batches come next, as `Feeder.expect`."""
        places = dict.fromkeys(upcoming)
        with self._handing:
            self._upcoming = places
            self._feeder.expect(self._decided_places())
        with self._changed:
            self._expected = max((step + 1 for step, _ in places), default=0)
            self._changed.notify_all()

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
        """See `LiveSource.mark_of`."""
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
        deadline_s = time.monotonic() + self._live.deadline_s
        while True:
            with self._changed:
                if self._needed != step + 1:
                    self._needed = step + 1
                    self._changed.notify_all()
                if self._error is not None:
                    error, self._error, self._needed = self._error, None, 0
                    raise error
                if step < self._source.decided:
                    return
                if (why := self._source.ended) is not None:
                    raise DataEnded(
                        f"the live source {self._source.spec.path} has no step {step + 1}: {self._source.decided} are "
                        f"all ({why}). Set steps to that, or data.live.policy to reservoir"
                    )
                if self._closed:
                    raise RuntimeError("the LiveFeeder is closed")
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    raise DataError(
                        f"step {step + 1}: nothing new within data.live.deadline_s={self._live.deadline_s:g} s "
                        f"({self._source.waiting_for}). Look at what writes the segments, raise data.live.deadline_s, "
                        "or set data.live.policy"
                    )
                self._changed.wait(min(_LOOK_S, remaining_s))
            turn()

    def _decided_places(self) -> list[Place]:
        decided = self._source.decided
        return [place for place in self._upcoming if place[0] < decided]

    def _look_out(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._wants_more():
                    self._changed.wait()  # ended by expect, batch or close
                if self._closed:
                    return
                needed = self._needed > self._source.decided
            grown, failed = False, None
            try:
                grown = self._source.advance(needed=needed)
            except Exception as error:
                failed = error
            if grown:
                with self._handing:
                    self._feeder.expect(self._decided_places())
            with self._changed:
                self._error = failed  # one that went by was nobody's
                self._changed.notify_all()
                if not grown and not self._closed:
                    self._changed.wait(self._live.poll_s)

    def _wants_more(self) -> bool:
        decided = self._source.decided
        return self._source.ended is None and max(self._expected, self._needed) > decided
