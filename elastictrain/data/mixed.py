"""A mixture that is open: its sources, each in its own order, and the schedule that says whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from elastictrain.data.batch_types import batch_types
from elastictrain.data.fingerprint import seal_mixture
from elastictrain.data.growing import Growing, MixedGrowth, naming
from elastictrain.data.ids import SampleIds, ids_in, sample_ids
from elastictrain.data.index import Progress
from elastictrain.data.live import LiveSource, open_live
from elastictrain.data.live_order import EraOrder
from elastictrain.data.locate import Part, SampleLocation
from elastictrain.data.mixture import (
    MIXTURE_VERSION,
    Schedule,
    Segment,
    weights_from_amounts,
    weights_from_temperature,
)
from elastictrain.data.order import LaneOrder, Piece, StrictOrder, Window, derive_key
from elastictrain.data.packed import finish_rows
from elastictrain.data.source import Arrays, Source, open_source
from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.data_settings import Mixture, Proportions


OneSource = Source | LiveSource
"""What a source of a mixture may be."""
Past = Callable[[str, Mapping[str, Any]], Source | None]
"""Called as `past(name, how)`, `how` being what lays down its order; gives a source that is not there any more."""

_LIVE_BLOCKS = 1 << 40
"""The blocks of the live source with number i are numbered from (1 + i) times this on: there is no last one."""


class MixedSource:
    """Several sources as one; what `LaneReader` needs of it is what it needs of a `Source`.

    A source is cut into lanes by itself, one sample at a time, and the schedule says which of a lane's positions of
    which source are its next batch. Blocks are numbered through all sources.
    """

    def __init__(
        self, spec: Mixture, sources: Mapping[str, OneSource], segments: Sequence[Segment], *, lane_batch_size: int
    ) -> None:
        self.spec, self.sources = spec, dict(sorted(sources.items()))
        self.lanes = next(iter(self.sources.values())).lanes
        whole = {name: source for name, source in self.sources.items() if isinstance(source, Source)}
        live = {name: source for name, source in self.sources.items() if isinstance(source, LiveSource)}
        self.plan = resolve_plan(spec, {name: source.order.samples for name, source in whole.items()})
        self.schedule = Schedule(segments or self.plan, lanes=self.lanes, lane_batch_size=lane_batch_size)
        self._batch_types = batch_types(spec, self.vocabulary_size)
        self.growth: Growing | None = None
        """How the order grows, if it does: where a source that is live has a share at some time."""
        if live.keys() & set(self.schedule.names):
            self.growth = MixedGrowth(self.schedule, live)
        counts = [len(source.order.block_rows) for source in whole.values()]
        self._first_block = dict(zip(whole, np.cumsum([0, *counts]).tolist(), strict=False))  # ascending
        self._first_block |= {name: (1 + i) * _LIVE_BLOCKS for i, name in enumerate(live)}
        self.fingerprint: dict[str, Any] = seal_mixture(
            {name: source.fingerprint for name, source in self.sources.items()},
            {"mixture_version": MIXTURE_VERSION, "lanes": self.lanes, "lane_batch_size": lane_batch_size},
        )

    @property
    def samples(self) -> int:
        return sum(source.samples for source in self.sources.values())

    @property
    def vocabulary_size(self) -> int | None:
        """All tokens are below this; None in table mode."""
        return next(iter(self.sources.values())).vocabulary_size

    @property
    def end_of_document(self) -> int | None:
        """The token that follows every document; None in table mode."""
        return next(iter(self.sources.values())).end_of_document

    def spans(self, step: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """Yield the windows that batch `step` of `lane` touches, each with its `[start, stop)` in the window."""
        for run in self.schedule.runs(step, lane):
            source = self._source(self.schedule.names[run.source], step)
            for window, start, stop in source.spans_at(run.start, run.stop, lane):
                yield self._numbered(window, run.source), start, stop

    def _numbered(self, window: Window, number: int) -> Window:
        """A window of source `number` as one of the mixture."""
        first_block = self._first_block[self.schedule.names[number]]
        pieces = tuple(Piece(first_block + p.block, p.start, p.stop) for p in window.pieces)
        return replace(window, pieces=pieces, source=number)

    def batches_in(self, window: Window, start: int) -> int:
        """A batch has rows of several windows, so no more than one is known to be in a row."""
        del window, start
        return 1

    def after(self, window: Window) -> Window:
        """Return the window that follows in a window's lane and source."""
        following = self.sources[self.schedule.names[window.source]].after(window)
        return window if following is window else self._numbered(following, window.source)

    def rows_per_step(self, window: Window, step: int) -> float:
        """Return how many rows of the window's source a lane uses in a step, on average; 0 if it has none now."""
        weights = self.schedule.segments[self.schedule.segment_at(step)].weights
        share = weights.get(self.schedule.names[window.source], 0) / sum(weights.values())
        # Of a live source nothing may be known of what follows.
        known = self.sources[self.schedule.names[window.source]].rows_per_step(window, step) > 0
        return share * self.schedule.lane_batch_size if known else 0.0

    @property
    def content(self) -> dict[str, Any]:
        """What the content of decoded blocks follows from, and more: names a warm cache (see `data.warm`)."""
        return {**self.fingerprint, "sources": {name: source.content for name, source in self.sources.items()}}

    def order_of(self, window: Window) -> tuple[str, LaneOrder | StrictOrder | EraOrder]:
        """Return the name of the source that a window is of, and the order of that source (see its `order_of`)."""
        name = self.schedule.names[window.source]
        part, order = self.sources[name].order_of(window)
        return f"{name}/{part}" if part else name, order

    def ids_of(self, window: Window, blocks: npt.ArrayLike, rows: npt.ArrayLike) -> SampleIds:
        """Return the ids of samples of a window (see `data.ids`); `blocks` as the mixture numbers them."""
        name = self.schedule.names[window.source]
        return ids_in(name, sample_ids(np.asarray(blocks) - self._first_block[name], rows))

    def read_block(self, block: int) -> Arrays:
        """Decode a block, as `Source.read_block`."""
        name = self._name_of(block)
        return self.sources[name].read_block(block - self._first_block[name])

    def rows_in(self, block: int) -> int | None:
        """Return how many samples a block has; None of a live source, where the answer may need the store."""
        name = self._name_of(block)
        source = self.sources[name]
        return source.rows_in(block - self._first_block[name]) if isinstance(source, Source) else None

    def where(self, block: int, row: int) -> str:
        """Say where a sample comes from."""
        name = self._name_of(block)
        return f"source {name!r}: {self.sources[name].where(block - self._first_block[name], row)}"

    def finish(self, step: int, lane: int, batch: Arrays) -> Arrays:
        """Turn the gathered rows of a batch into what a recipe gets; rows are cut to the stage's length."""
        del lane
        if self.vocabulary_size is None:
            return batch
        length = self.schedule.segments[self.schedule.segment_at(step)].sequence_length
        return finish_rows(batch, None if length == self.spec.sequence_length else length, self._batch_types)

    def locate(self, step: int, lane: int) -> list[SampleLocation]:
        """Say where every sample of batch `step` of `lane` lies, in the batch's order. Reads no data.

        A stage with shorter sequences cuts every one of these into as many rows of the batch.
        """
        found = []
        for run in self.schedule.runs(step, lane):
            name = self.schedule.names[run.source]
            source = self._source(name, step)
            for position in range(run.start, run.stop):
                found += [_named(sample, name) for sample in source.locate(position, lane)]
        return found

    def location(self, block: int, row: int, epoch: int = 0) -> SampleLocation:
        """Say where sample `row` of `block` lies, `block` as the mixture numbers them; see `Source.location`."""
        name = self._name_of(block)
        return _named(self.sources[name].location(block - self._first_block[name], row, epoch), name)

    def rows_of(self, part: Part) -> tuple[int, int]:
        """Return the rows `[first, end)` of its row group that a part comes from; a packed one is read for it."""
        return self.sources[part.source].rows_of(part)

    def describe(self) -> dict[str, Any]:
        """Return what a user wants to know of the mixture; JSON."""
        segments = []
        for segment in self.schedule.segments:
            total = sum(segment.weights.values())
            shares = {name: weight / total for name, weight in segment.weights.items()}
            segments.append(segment.as_json() | {"shares": shares})
        return {
            "kind": "mixture",
            "samples": self.samples,
            "sources": {name: source.describe() for name, source in self.sources.items()},
            "segments": segments,
            "fingerprint": self.fingerprint["hash"],
        }

    def close(self) -> None:
        """Close all files."""
        for source in self.sources.values():
            source.close()

    def _name_of(self, block: int) -> str:
        return [name for name, first in self._first_block.items() if first <= block][-1]

    def _source(self, name: str, step: int) -> OneSource:
        if name not in self.sources:
            raise DataError(
                f"step {step} used source {name!r}, which data.sources does not name any more. "
                f"The sources are: {', '.join(self.sources)}"
            )
        return self.sources[name]


def _named(sample: SampleLocation, name: str) -> SampleLocation:
    return replace(sample, source=name, parts=tuple(replace(part, source=name) for part in sample.parts))


def resolve_plan(spec: Mixture, samples: Mapping[str, int]) -> list[Segment]:
    """Return the segments that the settings ask for, in integer weights; `samples` says how large each source is."""
    plan = [Segment(0, _weights(spec, samples) or {**samples}, spec.sequence_length)]
    for stage in spec.stages:
        weights = _weights(stage, samples) or plan[-1].weights
        plan.append(Segment(stage.from_step, weights, stage.sequence_length or plan[-1].sequence_length))
    return plan


def _weights(shares: Proportions, samples: Mapping[str, int]) -> dict[str, int] | None:
    if shares.weights is not None:
        return weights_from_amounts(shares.weights)
    if shares.epochs is not None:
        return weights_from_amounts(shares.epochs, samples)
    if shares.temperature is not None:
        return weights_from_temperature(samples, shares.temperature)
    return None


def open_mixture(
    spec: Mixture,
    *,
    seed: int,
    lanes: int,
    lane_batch_size: int,
    segments: Sequence[Segment] = (),
    progress: Progress | None = None,
    record: str | None = None,
    record_options: Mapping[str, Any] | None = None,
    past: Past | None = None,
) -> MixedSource:
    """Open all sources of a mixture. `segments`: the schedule of the run; none: the one that the settings ask for.
    `record`: the folder in which the orders of live sources are recorded that do not say it (see `open_live`).
    `past`: gives a source that the schedule names and the settings do not, if it can; for those who only look back.

    Every source has a seed of its own, by its name, so that a source that is added leaves the others as they are.
    Raises DataError as `open_source`, beginning with the name of the source; sources that do not fit together.
    """
    sources: dict[str, OneSource] = {}

    def columns_beside(mine: str) -> str:
        return next((source.schema for name, source in sources.items() if name != mine and source.schema), "")

    try:
        for name, data in spec.sources.items():
            how = order_of_source(name, seed, lanes)
            with naming(name):
                if data.live is None:
                    sources[name] = open_source(data, progress=progress, **how)
                    continue
                own = None if data.live.record or record is None else f"{record}/{record_folder(name)}"
                others = partial(columns_beside, name) if data.text_column is None else str
                sources[name] = open_live(
                    data,
                    record=own,
                    record_options=record_options,
                    batches_at_once=lane_batch_size,
                    others=others,
                    **how,
                )
        _check_that_they_fit(sources)
        if past is not None:
            gone = {name for segment in segments for name in segment.weights} - spec.sources.keys()
            found = {name: past(name, order_of_source(name, seed, lanes)) for name in sorted(gone)}
            sources |= {name: source for name, source in found.items() if source is not None}
        return MixedSource(spec, sources, segments, lane_batch_size=lane_batch_size)
    except BaseException:
        for source in sources.values():
            source.close()
        raise


def order_of_source(name: str, seed: int, lanes: int) -> dict[str, Any]:
    """What lays down the order of a source in a mixture of seed `seed`."""
    return {"seed": derive_key("source", seed, *name.encode()), "lanes": lanes, "lane_batch_size": 1}


def record_folder(name: str) -> str:
    """Where the order of a live source of a mixture is recorded, below the folder of the run's."""
    return f"source-{quote(name, safe='')}"


def _check_that_they_fit(sources: Mapping[str, OneSource]) -> None:
    (first_name, first), *others = sorted(sources.items(), key=lambda item: not item[1].schema)
    for name, other in others:
        if (first.tokenizer_fingerprint, first.spec.packing_of_rows) != (
            other.tokenizer_fingerprint,
            other.spec.packing_of_rows,
        ):
            raise DataError(
                f"data.sources.{name}: its tokenizer and packing ({other.spec.tokenizer}, "
                f"{other.spec.packing_of_rows or 'a table'}) differ from those of {first_name!r} "
                f"({first.spec.tokenizer}, {first.spec.packing_of_rows or 'a table'}). Samples of one batch must be of "
                "one kind: set the same tokenizer and packing for all sources, or text_column for all or none"
            )
        if first.tokenizer_fingerprint is None and other.schema and first.schema != other.schema:
            raise DataError(
                f"data.sources.{name}: its columns ({other.schema}) differ from those of {first_name!r} "
                f"({first.schema}). Rows of one batch must be alike: set data.sources.*.columns so that "
                "they agree"
            )
