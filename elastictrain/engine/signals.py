"""What a worker measures of its steps for the straggler watch. One thread; a few clock readings a step."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any

from elastictrain.engine.compiling import COMPILER
from elastictrain.stragglers.signals import (
    FLAG_CHECKPOINT,
    FLAG_COLLECTION,
    FLAG_COMPILE,
    FLAG_EVALUATION,
    Signal,
)

NOTICEABLE = 0.05
"""Share of a step's computation from which garbage collection excuses it."""


class _Collector:
    """Seconds that Python's garbage collector has taken in this process, since the first who asked."""

    def __init__(self) -> None:
        self.total_s, self._begun = 0.0, 0.0
        self._listens = False

    def listen(self) -> None:
        if not self._listens:
            self._listens = True
            gc.callbacks.append(self._heard)

    def _heard(self, phase: str, info: Mapping[str, Any]) -> None:
        del info
        if phase == "start":
            self._begun = time.perf_counter()
        else:
            self.total_s += time.perf_counter() - self._begun


COLLECTOR = _Collector()


class StepClock:
    """Of one worker in one generation. The order: `begin`, `arrive` (at the exchange), `signal` (for the vote),
    `voted`, `end`.
    """

    def __init__(self) -> None:
        COLLECTOR.listen()
        self._voted_at = self._begun_at = self._arrived_at = time.perf_counter()
        self._collected_s, self._compiled = COLLECTOR.total_s, COMPILER.count
        self._before: Mapping[str, float] = {}
        self._first = True

    def changed(self) -> None:
        """Another split of the lanes: the next step says little."""
        self._first = True

    def begin(self) -> None:
        COMPILER.listen()
        self._arrived_at = 0.0

    def arrive(self) -> None:
        """This worker comes to the exchange; of several in a step the first counts."""
        self._arrived_at = self._arrived_at or time.perf_counter()

    def signal(
        self, lanes: int, seconds: Mapping[str, float], data_wait: Mapping[str, float], tokens: int, squares: float,
        *, stores: bool, evaluates: bool, more: int = 0,
    ) -> Signal:  # fmt: skip
        """`lanes`: that it has computed, `more` than were dealt out to it. `seconds`: by phase; `data_wait`: of its
        computation, waited for batches. `stores`, `evaluates`: since the last vote, or beside this step.
        """
        data_s = sum(data_wait.values())
        compute_s = max(0.0, seconds.get("compute_s", 0.0) - data_s)
        collected_s, self._collected_s = COLLECTOR.total_s - self._collected_s, COLLECTOR.total_s
        compiles, self._compiled = COMPILER.count > self._compiled, COMPILER.count
        flags = FLAG_CHECKPOINT * stores | FLAG_EVALUATION * evaluates | FLAG_COMPILE * (self._first or compiles)
        if collected_s > NOTICEABLE * compute_s:
            flags |= FLAG_COLLECTION
        self._first = False
        return Signal(
            lanes=lanes,
            compute_s=compute_s,
            data_s=data_s,
            arrive_s=max(0.0, (self._arrived_at or time.perf_counter()) - self._voted_at),
            exchange_s=seconds.get("exchange_s", 0.0) + seconds.get("mirror_s", 0.0),
            mirror_s=seconds.get("mirror_s", 0.0),
            collected_s=collected_s,
            vote_s=self._before.get("vote_s", 0.0),
            gather_s=self._before.get("gather_s", 0.0),
            step_s=self._before.get("step_s", 0.0),
            tokens=float(tokens),
            squares=squares,
            flags=flags,
            more=more,
        )

    def voted(self) -> None:
        """The vote is complete: nearly the same moment for all workers."""
        self._voted_at = time.perf_counter()

    def end(self, seconds: Mapping[str, float]) -> None:
        """The step is over; some of its phases are told with the next vote."""
        self._before = dict(seconds)


class Timer:
    """Adds the seconds that its body takes to an entry of `into`."""

    def __init__(self, into: dict[str, float], key: str) -> None:
        self._into, self._key = into, key

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._into[self._key] = self._into.get(self._key, 0.0) + time.perf_counter() - self._start
