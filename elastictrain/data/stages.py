"""The stages of a run: which order its data are in, step by step, and what has been taken out of it.

What `elastictrain data skip` is asked for is kept beside the run as a list of `Skip`s. When the run is taken up, those
that its stages do not hold yet become a new stage, so that everything after, a resumption and an audit alike, follows
from the stages alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from elastictrain.data.holes import Hole, HoledOrder
from elastictrain.data.order import LaneOrder
from elastictrain.data.seeds import stage_seed
from elastictrain.data.source import Source, open_source
from elastictrain.errors import DataError
from elastictrain.protocol import Stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from elastictrain.data.index import Progress
    from elastictrain.job import Job


@dataclass(frozen=True, slots=True)
class Skip:
    """A request to take something out: steps `[start, stop)` of the order of stage `order`, in the words of that order,
    or, with a `block`, its samples `[start, stop)`, whatever the order. `words`: what was asked for, for people.
    """

    words: str
    start: int
    stop: int
    order: int | None = None
    block: int | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Skip:
        """Read a request back from JSON."""
        return cls(**{name: record[name] for name in cls.__slots__ if name in record})


def first_stage(job: Job) -> Stage:
    """The stage that a new run starts with."""
    return Stage(0, 0, job.lanes, job.lane_batch_size)


def open_stage(job: Job, stage: Stage, progress: Progress | None = None) -> Source:
    """The job's data in the order of a stage. Raises DataError as `open_source`."""
    source = open_source(
        job.data,
        seed=stage_seed(job.seed, stage.order),
        lanes=stage.lanes or job.lanes,
        lane_batch_size=stage.lane_batch_size or job.lane_batch_size,
        progress=progress,
    )
    if stage.holes:
        source.order = cast("LaneOrder", holed(source.order, stage))  # it reads like one
    return source


def holed(order: Any, stage: Stage) -> HoledOrder:
    """The order of a stage without the samples of its holes. Raises DataError for an order that knows no blocks."""
    if not isinstance(order, LaneOrder):
        raise DataError(
            f"samples of single row groups cannot be taken out of this order ({type(order).__name__}). Skip the steps "
            "that would use them (--steps), or take the file out of data.path"
        )
    return HoledOrder(order, [Hole(*hole) for hole in stage.holes])


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that step `step` (from 1) belongs to."""
    return next(stage for stage in reversed(stages) if stage.from_step < step or stage.from_step == 0)


def with_skips(stages: Sequence[Stage], skips: Sequence[Skip], step: int) -> tuple[Stage, ...]:
    """The stages of a run that goes on after `step`, once `skips` hold: a new one if there are any it does not know.

    The steps of a request that are over are left as they were, and so are those of an order that is not in force any
    more. Samples are taken out from here on; once taken out, they are so in every later order too.
    """
    last = stages[-1]
    new = skips[last.skips :]
    if not new:
        return tuple(stages)
    at = last.position(step + 1)
    jumps = [(first, end) for first, end in last.jumps if end > at]
    holes = list(last.holes)
    for skip in new:
        if skip.block is not None:
            holes.append((skip.block, skip.start, skip.stop, at))
        elif skip.order == last.order and skip.stop > at:
            jumps.append((max(skip.start, at), skip.stop))
    begun = replace(
        last, index=last.index + 1, from_step=step, continues=True, begun=last.order, at=at, jumps=_joined(jumps),
        holes=tuple(holes), skips=len(skips),
    )  # fmt: skip
    return (*stages, begun)


def with_lanes(stages: Sequence[Stage], lanes: int, lane_batch_size: int, step: int) -> tuple[Stage, ...]:
    """The stages of a run that goes on after `step` with another number of lanes: a new order. Holes stay holes."""
    last = stages[-1]
    if (last.lanes, last.lane_batch_size) == (lanes, lane_batch_size):
        return tuple(stages)
    holes = tuple((block, start, stop, 0) for block, start, stop, _ in last.holes)
    return (*stages, Stage(last.index + 1, step, lanes, lane_batch_size, holes=holes, skips=last.skips))


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges that overlap or touch become one: a place is passed over once."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return tuple(found)
