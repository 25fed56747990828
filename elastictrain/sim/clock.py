"""A virtual clock: what is to happen, in order of time. A day passes as fast as its events can be handled."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

Act = Callable[..., None]


class Clock:
    """Acts at the same time happen in the order in which they were asked for, so that a run is repeated exactly."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._acts: list[tuple[float, int, Act, tuple[Any, ...]]] = []
        self._order = count()

    def at(self, when_s: float, act: Act, *args: Any) -> None:
        """Call `act(*args)` at `when_s`, or now if that has passed."""
        heapq.heappush(self._acts, (max(when_s, self.now_s), next(self._order), act, args))

    def after(self, delay_s: float, act: Act, *args: Any) -> None:
        self.at(self.now_s + delay_s, act, *args)

    def run(self, until_s: float, ended: Callable[[], bool]) -> None:
        """Let time pass until `ended()`, or until `until_s`, or until nothing is left to happen."""
        while self._acts and self._acts[0][0] <= until_s and not ended():
            self.now_s, _, act, args = heapq.heappop(self._acts)
            act(*args)
