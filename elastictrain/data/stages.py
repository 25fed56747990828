"""The stages of a run: which order its data are in, step by step, and what has been taken out of it.

What `elastictrain data skip` is asked for is kept beside the run as a list of `Skip`s. When the run is taken up, those
that its stages do not hold yet become a new stage, so that everything after, a resumption and an audit alike, follows
from the stages alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from elastictrain.data import AnySource, LiveSource, open_data
from elastictrain.data.fingerprint import identity
from elastictrain.data.holes import Hole, HoledOrder
from elastictrain.data.kept import Beside, recall
from elastictrain.data.mixed import MixedSource
from elastictrain.data.mixture import Segment, join_plans, with_new_names
from elastictrain.data.order import LaneOrder
from elastictrain.data.seeds import stage_seed
from elastictrain.errors import DataError
from elastictrain.protocol import Stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from elastictrain.data.index import Progress
    from elastictrain.job import Job

ORDER_FOLDER = "order"
"""Below checkpoint.path: the recorded order of a live source."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A request to take something out: steps `[start, stop)` of the order of stage `order`, in the words of that order,
    or, with a `block`, its samples `[start, stop)`, whatever the order. `words`: what was asked for, for people.
    `data`: names the data that it is about, in a run whose data have changed.
    """

    words: str
    start: int
    stop: int
    order: int | None = None
    block: int | None = None
    data: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Skip:
        """Read a request back from JSON."""
        return cls(**{name: record[name] for name in cls.__slots__ if name in record})


def first_stage(job: Job) -> Stage:
    """The stage that a new run starts with."""
    return Stage(0, 0, job.lanes, job.lane_batch_size)


def order_begins(stages: Sequence[Stage]) -> Stage:
    """The stage whose order the last one goes on with."""
    return next((stage for stage in reversed(stages) if not stage.continues), stages[0])


def open_stage(
    job: Job,
    stage: Stage,
    before: Sequence[Stage] = (),
    progress: Progress | None = None,
    beside: Beside | None = None,
) -> AnySource:
    """The job's data in the order of a stage. `before`: the stages that it follows on, for its mixture. `beside`: what
    the run has kept of data that were its own once, for those who only look back.

    Raises DataError as `open_source`, for samples that are taken out of an order that cannot do without them, and where
    the data are not those of the stage.
    """
    how: dict[str, Any] = {
        "seed": stage_seed(job.seed, stage.order),
        "lanes": stage.lanes or job.lanes,
        "lane_batch_size": stage.lane_batch_size or job.lane_batch_size,
    }
    source: AnySource | None = None
    if beside is not None and stage.data not in (None, beside.now):
        source = recall(beside.folder, str(stage.data), **how)
    if source is None:
        source = _open(job, stage, how, _schedule([*before, stage]), progress, beside)
    try:
        if stage.data is not None and identity(source.fingerprint) != stage.data:
            raise DataError(
                f"the steps after step {stage.from_step} (stage {stage.index}) used data that are not there any more: "
                f"data.path holds {identity(source.fingerprint)}, and those were {stage.data}. Put them back, or go "
                "on from a later checkpoint, or from an earlier one with --data-changed new_stage"
            )
        take_out(source, stage)
    except BaseException:
        source.close()
        raise
    return source


def _open(
    job: Job,
    stage: Stage,
    how: Mapping[str, Any],
    schedule: Sequence[Segment],
    progress: Progress | None,
    beside: Beside | None,
) -> AnySource:
    if job.data.is_live and stage.order:
        raise DataError(
            "a live source has one order for the life of a run: lanes and lane_batch_size cannot be changed. Set them "
            "to what they were, or start a new run"
        )
    record, options = _record_of(job)
    return open_data(
        job.data.renamed(stage.renamed or {}),
        **how,
        segments=schedule,
        progress=progress,
        record=record,
        record_options=options,
        past=None if beside is None else beside.past,
    )


def _record_of(job: Job) -> tuple[str | None, Mapping[str, Any] | None]:
    """Where the orders of live sources are recorded whose settings do not say: beside the run's checkpoints."""
    if not job.data.lacks_record or job.checkpoint is None:
        return None, None
    return f"{job.checkpoint.path.rstrip('/')}/{ORDER_FOLDER}", job.checkpoint.storage_options


def _schedule(stages: Sequence[Stage]) -> list[Segment]:
    """The mixture's schedule of the last stage's order. Where steps of the order are passed over, a segment begins at
    the step of the order that the planned step of the run uses.
    """
    begin = order_begins(stages)

    def place(stage: Stage, from_step: int) -> int:
        return begin.from_step + stage.position(from_step + 1)

    plans = []
    for stage in stages:
        if stage.index >= begin.index and stage.mixture:
            planned = [Segment.from_json(shown) for shown in stage.mixture]
            placed = [replace(segment, from_step=place(stage, segment.from_step)) for segment in planned]
            plans.append((place(stage, stage.from_step), placed))
    return join_plans(plans)


def take_out(source: AnySource, stage: Stage) -> None:
    """Take the holes of a stage out of its order. Raises DataError for an order that cannot do without them."""
    if not stage.holes:
        return
    if isinstance(source, MixedSource):
        raise DataError(
            "single samples cannot be taken out of a mixture. Skip the steps that would use them (--steps), or take "
            "the file out of data.sources"
        )
    if isinstance(source, LiveSource):
        raise DataError(
            "single samples cannot be taken out of a live source. Skip the steps that would use them (--steps)"
        )
    source.order = cast("LaneOrder", holed(source.order, stage))  # it reads like one


def holed(order: Any, stage: Stage) -> HoledOrder:
    """The order of a stage without the samples of its holes. Raises DataError for an order that cannot do without."""
    if not isinstance(order, LaneOrder):
        raise DataError(
            f"samples of single row groups cannot be taken out of this order ({type(order).__name__}). Skip the steps "
            "that would use them (--steps), or take the file out of data.path"
        )
    if order.repeated_per_epoch:
        raise DataError(
            "single samples cannot be taken out where an epoch is filled up with its first samples (data.ragged: "
            "repeat). Skip the steps that would use them (--steps), or take the file out of data.path"
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


def with_mixture(stages: Sequence[Stage], plan: Sequence[Segment] | None, step: int) -> tuple[Stage, ...]:
    """The stages of a run that goes on after `step` with this plan of a mixture, which from now on says, and not the
    settings, what is read. None: no mixture. Another plan than that of the last stage is a stage that continues its
    order; a last stage that has none yet, because it is new, gets it.
    """
    last, shown = stages[-1], None if plan is None else tuple(segment.as_json() for segment in plan)
    if last.mixture is None or shown is None:
        return (*stages[:-1], replace(last, mixture=shown))
    if shown == last.mixture:
        return tuple(stages)
    at = last.position(step + 1)
    jumps = tuple((first, end) for first, end in last.jumps if end > at)
    new = replace(
        last, index=last.index + 1, from_step=step, continues=True, begun=last.order, at=at, jumps=jumps, mixture=shown
    )
    return (*stages, new)


def with_lanes(stages: Sequence[Stage], lanes: int, lane_batch_size: int, step: int) -> tuple[Stage, ...]:
    """The stages of a run that goes on after `step` with another number of lanes: a new order. Holes stay holes."""
    last = stages[-1]
    if (last.lanes, last.lane_batch_size) == (lanes, lane_batch_size):
        return tuple(stages)
    holes = tuple((block, start, stop, 0) for block, start, stop, _ in last.holes)
    new = Stage(last.index + 1, step, lanes, lane_batch_size, holes=holes, skips=last.skips, data=last.data,
                renamed=last.renamed)  # fmt: skip
    return (*stages, new)


def with_other_data(
    stages: Sequence[Stage], was: str, now: str | None, step: int, skips: Sequence[Skip] = ()
) -> tuple[Stage, ...]:
    """The stages of a run that goes on after `step` on other data: a new order, from its first step. Holes are left
    behind, for they are places in the old files; so are requests among `skips` that are about these. `was` and `now`:
    the identity of the data before and from now on (None: a mixture, whose sources tell themselves apart by names).
    """
    last = stages[-1]
    before = tuple(stage if stage.data is not None else replace(stage, data=was) for stage in stages)
    about_old = next((i for i, skip in enumerate(skips) if now is not None and skip.data == now), len(skips))
    new = Stage(last.index + 1, step, last.lanes, last.lane_batch_size, skips=max(about_old, last.skips), data=now)
    return (*before, new)


def with_other_sources(stages: Sequence[Stage], changed: Sequence[str], known: Collection[str]) -> tuple[Stage, ...]:
    """The stages, with new names for sources of a mixture whose data have changed, so that they count as new sources
    and those before as gone. `changed`: as the order calls them now; `known`: names that the settings use.
    """
    planned = {name for stage in stages for segment in stage.mixture or () for name in segment["weights"]}
    renamed = with_new_names(stages[-1].renamed or {}, changed, {*known, *planned})
    return tuple(replace(stage, renamed=renamed) for stage in stages)


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges that overlap or touch become one: a place is passed over once."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return tuple(found)
