"""When to save, from what saving costs and what a loss would cost: a state machine without a clock of its own.

Two promises, either or both:

* ``max_overhead``: of the run's time at most this fraction goes to saving. A save of ``c`` seconds of stall is paid for
  by the time after it: the next one is due ``c / max_overhead`` later.
* ``max_loss``: if everything died at once, no more than this would have to be computed again. Until a new save is
  durable the old one counts, so one is due ``max_loss`` after the last, less the time that it takes to become durable,
  less a step.

With both, the earlier of the two moments counts: the budget is used up if it allows more than ``max_loss`` asks for,
and where they contradict each other ``max_loss`` wins, which `Cadence.conflict` says. One save is under way at a time.
Time between failures does not enter: whoever knows it finds the best interval after Young and Daly, and sets
``max_loss`` to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from elastictrain_checkpoint.errors import InvalidPiece


@dataclass(frozen=True)
class Measured:
    """What one save cost. ``stall_s``: by which the training was longer for it; ``durable_s``: from the moment whose
    state it holds until it was committed.
    """

    stall_s: float
    durable_s: float


class Cadence:
    """Says when to save. All times are seconds of one clock that never goes back; the caller reads it.

    Args:
        now_s: now; nothing before it can be lost.
        max_overhead: fraction of time, above 0 and at most 1.
        max_loss: time that may have to be computed again.

    Raises:
        InvalidPiece: neither is given, or one is out of its range.

    """

    def __init__(self, now_s: float, *, max_overhead: float | None = None, max_loss: timedelta | None = None) -> None:
        if max_overhead is None and max_loss is None:
            raise InvalidPiece("a cadence needs max_overhead, max_loss or both")
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise InvalidPiece(
                f"max_overhead={max_overhead}: expected a fraction above 0 and at most 1, as 0.01 for 1 %"
            )
        if max_loss is not None and max_loss <= timedelta(0):
            raise InvalidPiece(f"max_loss={max_loss}: expected a time above 0")
        self._max_overhead = max_overhead
        self._max_loss_s = None if max_loss is None else max_loss.total_seconds()
        self._safe_s = now_s
        self._began_s: float | None = None
        self._last_began_s: float | None = None
        self._stall_s = 0.0
        self._step_s = 0.0
        self.measured: Measured | None = None

    def stepped(self, step_s: float) -> None:
        """A step without a save took so long."""
        self._step_s = max(step_s, 0.9 * self._step_s)

    def began(self, now_s: float) -> None:
        """A save of the state as it is now has begun."""
        self._began_s = self._last_began_s = now_s
        self._stall_s = 0.0

    def stalled(self, stall_s: float) -> None:
        """The save under way has cost so much more time of the training; may be called several times."""
        self._stall_s += stall_s

    def durable(self, now_s: float) -> None:
        """The save under way is committed. Without one under way nothing changes."""
        if self._began_s is not None:
            self.measured = Measured(self._stall_s, now_s - self._began_s)
            self._safe_s, self._began_s = self._began_s, None

    def failed(self) -> None:
        """The save under way came to nothing; what it cost is paid for like any other."""
        if self._began_s is not None:
            durable_s = self._stall_s if self.measured is None else self.measured.durable_s
            self.measured = Measured(self._stall_s, durable_s)
        self._began_s = None

    def due(self, now_s: float) -> bool:
        """Whether to save the state as it is now. The first save is due at once: it measures."""
        if self._began_s is not None:
            return False
        if self.measured is None or self._last_began_s is None:
            return True
        paid_s = self._last_began_s + self._paid_s(self.measured)
        return now_s >= min(paid_s, self._safe_s + self._latest_s(self.measured))

    @property
    def interval_s(self) -> float:
        """Seconds from the beginning of one save to that of the next if all goes well; 0 before one is measured."""
        if self.measured is None:
            return 0.0
        return max(self.measured.durable_s, min(self._paid_s(self.measured), self._latest_s(self.measured)))

    def _paid_s(self, cost: Measured) -> float:
        return float("inf") if self._max_overhead is None else cost.stall_s / self._max_overhead

    def _latest_s(self, cost: Measured) -> float:
        return float("inf") if self._max_loss_s is None else self._max_loss_s - cost.durable_s - self._step_s

    def exposure_s(self, now_s: float) -> float:
        """If everything died now, so many seconds of training would have to be done again."""
        return max(0.0, now_s - self._safe_s)

    def conflict(self) -> str | None:
        """Which promise cannot be kept, in a sentence; None while all can."""
        cost = self.measured
        if cost is None or self._max_loss_s is None:
            return None
        latest_s = self._latest_s(cost)
        if latest_s <= 0 or latest_s < cost.durable_s:
            all_s = 2 * cost.durable_s + self._step_s
            return (
                f"max_loss of {self._max_loss_s:.1f} s cannot be kept: a save takes {cost.durable_s:.1f} s until it is "
                f"durable, the next one begins after that, and a step takes {self._step_s:.1f} s: {all_s:.1f} s in "
                f"all. Saves follow one another without a pause. Raise max_loss, or store faster"
            )
        if self._max_overhead is not None and latest_s < self._paid_s(cost):
            return (
                f"max_loss of {self._max_loss_s:.1f} s asks for a save every {latest_s:.1f} s, which costs "
                f"{cost.stall_s / latest_s:.2%} and not {self._max_overhead:.2%} of the time (max_overhead); "
                f"max_loss is kept. Raise one of them"
            )
        return None
