"""New processes wait for those that recover: what they import takes the cores on which the others form."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

AFTER_RECOVERY_S = 1.0
"""So long at most: a recovery that takes longer needs the new process perhaps."""


class Starts:
    """Workers that are to be started, and when it is time. `clock`: any that only goes forward. `others_step`: whether
    the run goes on without them, as far as is known.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wanted: dict[int, Sequence[str]] = {}
        self._not_before_s = float("-inf")
        self.others_step = False

    def want(self, worker: int, avoid: Sequence[str]) -> None:
        """`worker` is to be started, on none of the nodes in `avoid`."""
        self._wanted[worker] = avoid

    def drop(self, worker: int) -> None:
        """It is needed no more."""
        self._wanted.pop(worker, None)

    def parking(self) -> None:
        """A generation is being taken down."""
        self._not_before_s = self._clock() + AFTER_RECOVERY_S
        self.others_step = False

    def sealed(self) -> None:
        """The next one steps."""
        self._not_before_s = float("-inf")
        self.others_step = True

    def due(self) -> dict[int, Sequence[str]]:
        """{worker: nodes to avoid} of all that may be started now; they are forgotten here."""
        if not self._wanted or self._clock() < self._not_before_s:
            return {}
        wanted, self._wanted = self._wanted, {}
        return wanted
