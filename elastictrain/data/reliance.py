"""When a worker relies on the feeder of its node, and when it reads for itself. Pure: time enters as `now_s`.

Reading for itself is always right, only dearer, so there is little to weigh: a feeder that does not answer is left
alone for a while, which doubles each time, and so is one that answers but brings nothing in time, three times in a row.
It is asked again first for what is needed later, so nobody who waits for a batch waits for a feeder of which nothing
good is known. A new feeder (a higher number) is trusted at once.
"""

from __future__ import annotations

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
LATE_TIMES = 3


class Reliance:
    """One worker's view of its feeder. `number` 0 stands for none."""

    def __init__(self) -> None:
        self._number = 0
        self._usual_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._pause_s, self._alone_until_s, self._in_doubt, self._late = 0.0, float("-inf"), False, 0

    def may_ask(self, number: int, now_s: float, *, urgent: bool) -> bool:
        """Whether feeder `number` is to be asked for a block. `urgent`: somebody waits for it."""
        if number > self._number:
            self._number = number
            self._reset()
        return (
            number > 0 and number == self._number and now_s >= self._alone_until_s and not (urgent and self._in_doubt)
        )

    def patience_s(self, *, urgent: bool) -> float:
        """How long to wait for a block while the feeder answers that it is coming."""
        return min(10.0, max(0.5, 2 * self._usual_s)) if urgent else min(120.0, max(2.0, 4 * self._usual_s))

    def answered(self, number: int, usual_s: float) -> None:
        """It lives. `usual_s`: what reading a block takes it."""
        if number == self._number:
            self._usual_s = usual_s or self._usual_s
            self._in_doubt = False

    def brought(self, number: int) -> None:
        """It has brought a block."""
        if number == self._number:
            self._reset()

    def late(self, number: int, now_s: float) -> None:
        """It lives, but the block did not come in time."""
        if number == self._number:
            self._late += 1
            if self._late >= LATE_TIMES:
                self._late = 0
                self._pause(now_s)

    def lost(self, number: int, now_s: float) -> None:
        """It has not answered: it is dead, stopped or out of reach. Calls that fail together are one failure."""
        if number == self._number and now_s >= self._alone_until_s:
            self._in_doubt = True
            self._pause(now_s)

    def _pause(self, now_s: float) -> None:
        self._pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
        self._alone_until_s = now_s + self._pause_s
