"""The computation of a step in which the same lanes do not count as in another run (`redundancy.replay`): nothing is
decided, so nobody is asked, and a worker may be alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from elastictrain.engine.doing import Doing, Work
from elastictrain.errors import ConfigError
from elastictrain.layout import Layout
from elastictrain.redundancy import Lanes, droppable_lanes, most_of_rank


class ReplayedLanes:
    """Of one worker under one split of the lanes; stands where `SharedLanes` does. `dropped`: by step. `counters`: the
    model has integer buffers.
    """

    drops = True

    def __init__(self, dropped: Mapping[int, tuple[int, ...]], layout: Layout, rank: int, *, counters: bool) -> None:
        self._dropped, self._lanes, self._rank, self._counters = dropped, layout.lanes, rank, counters
        self.sharing = droppable_lanes(layout.lanes, layout.lane_count, firsts=True)
        self.sums, _ = most_of_rank(self.sharing, rank, "drop_slowest", layout.lane_count)
        self.doing: Doing | None = None

    @property
    def ahead(self) -> tuple[int, ...]:
        """The lanes that it may compute."""
        return self._lanes[self._rank]

    def counts(self, step: int, lane: int) -> bool:
        """Whether `lane` counts in `step`."""
        return lane not in self._dropped.get(step, ())

    def compute(self, step: int, work: Work, *, closed: frozenset[int], stays: bool) -> Doing:
        """Compute those lanes of this worker that count.

        Raises ConfigError where none does and the model has integer buffers: their new values come from a lane.
        """
        del closed
        self.doing = doing = Doing(step, work, frozenset(), stays)
        for lane in self.ahead:
            if not self.counts(step, lane):
                doing.dropped.append(lane)
                continue
            doing.begun.add(lane)
            begun_at = time.perf_counter()
            result = work.compute(lane, first=not doing.computed, merge=True)
            doing.computed += 1
            doing.lanes_s += time.perf_counter() - begun_at
            doing.mine.append(lane)
            work.count(lane, result)
        if self._counters and not doing.mine:
            raise ConfigError(
                f"redundancy.replay: in step {step} no lane of worker rank {self._rank} counts (it has {self.ahead}), "
                "and the model's integer buffers come from a lane; repeat the run with fewer workers"
            )
        return doing

    def agree(self) -> tuple[Lanes, frozenset[int]]:
        """Who has which lane in this step, and which do not count."""
        assert self.doing is not None
        dropped = frozenset(self._dropped.get(self.doing.step, ()))
        return tuple(tuple(lane for lane in own if lane not in dropped) for own in self._lanes), dropped
