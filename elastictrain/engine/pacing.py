"""When the state is stored: every so many steps, or by a budget of time (`Checkpoint.max_overhead`, `max_loss`).

By steps, everybody knows by himself. By a budget, one worker decides (the one that publishes) and says so in the vote
of the step (FLAG_DUE). Everybody reads the same vote, so everybody stores the same step; which one it is may depend on
the clock, what is in it does not. Everybody watches what storing costs, so whoever publishes next goes on from there. A
step that is sealed without its vote is not stored by the budget: it is due at the next vote as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from elastictrain.engine.vote import FLAG_DUE
from elastictrain.job import Checkpoint
from elastictrain_checkpoint.cadence import Cadence


class Pacing:
    """Of one worker, over all its generations. `clock`: seconds that never go back."""

    def __init__(self, settings: Checkpoint | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._cadence: Cadence | None = None
        self._storing: int | None = None
        if settings is not None and settings.every_steps is None:
            self._cadence = Cadence(clock(), max_overhead=settings.max_overhead, max_loss=settings.max_loss)

    def flags(self, *, is_publisher: bool) -> int:
        """What this worker's next vote says about storing the commit that it decides."""
        return FLAG_DUE if is_publisher and self._cadence is not None and self._cadence.due(self._clock()) else 0

    def stores(self, step: int, flags: int, *, last: bool) -> bool:
        """Whether the commit of `step` is stored; the same on all workers. `flags`: of the vote that made the commit, 0
        where it was sealed without one.
        """
        if self._settings is None or step == 0:
            return False
        if last:
            at_end = self._settings.at_end
            return at_end or (self._settings.every_steps is not None and step % self._settings.every_steps == 0)
        if self._settings.every_steps is not None:
            return step % self._settings.every_steps == 0
        return bool(flags & FLAG_DUE)

    @contextmanager
    def storing(self, step: int) -> Iterator[None]:
        """Around the time for which this worker's steps stand still to store `step`; the save is under way from there
        on, until `durable`.
        """
        self._storing = step
        began_s = self._clock()
        if self._cadence is not None:
            self._cadence.began(began_s)
        yield
        self.stalled(self._clock() - began_s)

    def stalled(self, seconds: float) -> None:
        """Storing has held up the steps for so long."""
        if self._cadence is not None:
            self._cadence.stalled(seconds)

    def durable(self, step: int) -> None:
        """The checkpoint of `step` is committed, as far as this worker knows."""
        if self._cadence is not None and self._storing == step:
            self._cadence.durable(self._clock())

    def given_up(self) -> None:
        """A generation has ended: what was under way in it comes to nothing."""
        if self._cadence is not None:
            self._cadence.failed()
        self._storing = None

    def stepped(self, seconds: float) -> None:
        """A step has taken so long, without storing."""
        if self._cadence is not None:
            self._cadence.stepped(seconds)
