"""A live source: segments that arrive while training runs, as one source whose order grows by eras.

`LiveSource` is what `Source` is to `LaneReader` and to the audit. Its order is known as far as it is recorded
(`decided`); `advance` makes the next era part of it where the policy of `data.live` allows that. Nothing here waits:
`elastictrain.data.live_feeder` does, and reads ahead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from elastictrain.data.batch_types import batch_types
from elastictrain.data.ids import SampleIds, sample_ids
from elastictrain.data.live_eras import KnownEras
from elastictrain.data.live_fingerprint import check_alike, live_fingerprint
from elastictrain.data.live_order import Era, EraOrder, Held, end_of_order, fresh_era, reservoir_era
from elastictrain.data.live_record import OrderRecord
from elastictrain.data.live_segments import OpenSegments
from elastictrain.data.locate import Part, SampleLocation
from elastictrain.data.order import Window
from elastictrain.data.packed import Arrays, finish_rows
from elastictrain.data.retry import Retry
from elastictrain.data.segments import Closed, SegmentLog
from elastictrain.data.tokenizers import load_tokenizer
from elastictrain.errors import DataError, StoreFailed

if TYPE_CHECKING:
    from elastictrain.data.growing import Growing
    from elastictrain.data_settings import Data

RESERVOIR = "reservoir"


class LiveSource:
    """Made by `open_live`. `advance`, `decided` and `waiting_for` may be used by any thread; the rest as of a `Source`.

    Steps are those of the order, from 0. A step at or beyond `decided` raises DataError.
    """

    def __init__(
        self,
        spec: Data,
        log: SegmentLog,
        manifest: str,
        *,
        seed: int,
        lanes: int,
        lane_batch_size: int,
        record: str,
        record_options: Mapping[str, Any],
        batches_at_once: int = 1,
        others: Callable[[], str] = lambda: "",
    ) -> None:
        assert spec.live is not None, "open_live has seen to it"
        self.spec, self.live, self.lanes, self.lane_batch_size = spec, spec.live, lanes, lane_batch_size
        self._batches_at_once, self._others = batches_at_once, others
        self._tokenizer = load_tokenizer(spec.tokenizer, spec.storage_options) if spec.text_column else None
        self._batch_types = batch_types(spec, self.vocabulary_size)
        self._log, self._segments = log, OpenSegments(spec, log, self._tokenizer)
        self.fingerprint: dict[str, Any] = live_fingerprint(
            spec, manifest, self._tokenizer, lanes=lanes, lane_batch_size=lane_batch_size
        )
        header = {"manifest": manifest, "seed": seed, "content": self.fingerprint["hash"]}
        self._record = OrderRecord(record, header, storage_options=record_options, retry=Retry(spec.retry_s))
        self._eras = KnownEras(
            self._record,
            self._segments,
            seed=seed,
            lanes=lanes,
            lane_batch_size=lane_batch_size,
            shuffle=spec.shuffle,
            window_blocks=spec.window_row_groups,
        )
        self._advancing = threading.Lock()
        self._waiting_for = ""
        self._seen: dict[int, tuple[Held, str]] = {}  # segments behind those of the order: what they hold, columns

    # --- how far the order is known, and how it grows (see `growing.Growing`) ---

    @property
    def growth(self) -> Growing:
        """Itself."""
        return self

    @property
    def decided(self) -> int:
        """How many steps of the order are decided."""
        return self._eras.last.stop

    @property
    def ended(self) -> str | None:
        """Why there is no step beyond `decided`; None while there may be."""
        return self._eras.last.why if self._eras.last.kind == "end" else None

    @property
    def waiting_for(self) -> str:
        """What the last `advance` that found nothing to do waits for, in words."""
        return self._waiting_for

    @property
    def place(self) -> str:
        """Where its segments come from."""
        return f"the live source {self._log.url}"

    @property
    def poll_s(self) -> float:
        """How often to look for segments."""
        return self.live.poll_s

    @property
    def deadline(self) -> tuple[str, float]:
        """The setting that says how long to wait for a segment, and the seconds."""
        return "data.live.deadline_s", self.live.deadline_s

    def advance(self, *, needed: bool) -> bool:
        """Take the next era: the one that is recorded, or else one that the segments that are there allow for. False
        when there is none.

        `needed`: somebody waits for it; only then the order is ended or goes on from the reservoir. Raises DataError:
        a segment that cannot be read (it names it), or the store.
        """
        with self._advancing:
            last = self._eras.last
            if last.kind == "end":
                return False
            era = self._record.get(last.number + 1)
            if era is None:
                wanted = self._next_era(last, needed=needed)
                era = None if wanted is None else self._record.decide(wanted)
            if era is None:
                return False
            check_alike(self._record.url, era.schema, "" if self._tokenizer else self._others())
            self._eras.append(era)
            self._seen = {ordinal: found for ordinal, found in self._seen.items() if ordinal >= era.segments}
            return True

    def prepare(self, step: int) -> None:
        """Open the segments that a decided step is made of; may take long, and fails silently."""
        self._eras.prepare(step)

    def check(self, mark: Mapping[str, Any]) -> None:
        """Raise DataError when the recorded order is not that of `mark` (see `mark_of`), which a checkpoint keeps."""
        number = int(mark["era"])
        era = self._record.get(number)
        if era is None or era.digest != mark["digest"]:
            what = "is missing" if era is None else "is another one"
            raise DataError(
                f"{self._record.url}: era {number} of the recorded order {what}, but the checkpoint has used it. "
                "Restore that folder, or start a new run (another checkpoint.path and data.live.record)"
            )

    def mark_of(self, step: int) -> dict[str, Any]:
        """What names the order up to step `step`, which somebody has decided; JSON."""
        while step >= self.decided and self.advance(needed=False):
            pass
        era = self._eras.at_step(step)
        return {"era": era.number, "digest": era.digest, "segments": era.segments}

    def _next_era(self, last: Era, *, needed: bool) -> Era | None:
        per_step, live = self.lanes * self.lane_batch_size, self.live
        carry = self._eras.carry_after(last)
        held, schema, closed = self._arrived(last, sum(stop - start for _, start, stop in carry))
        found = fresh_era(last, carry, held, per_step=per_step, most=live.segments_at_once, schema=schema)
        if found is not None:
            return found
        pending = sum(stop - start for _, start, stop in carry) + sum(one.samples for one in held)
        state = f"{last.segments + len(held)} segments are there, {pending} of {per_step} samples for the next step"
        self._waiting_for = f"{self._log.url}: {state}"
        if not needed:
            return None
        if live.policy == "reservoir":
            assert live.reservoir is not None, "checked with the settings"
            size, steps = live.reservoir.samples, live.reservoir.steps * self._batches_at_once
            return reservoir_era(
                last, carry, samples=size, steps=steps, decided=self._eras.samples_of(last, size), per_step=per_step
            )
        if closed or live.policy == "stop":
            why = "the manifest is closed" if closed else "data.live.policy: stop, and no new segment is there"
            return end_of_order(last, carry, f"{why}; {state}, which stay unused")
        return None

    def _arrived(self, last: Era, carried: int) -> tuple[list[Held], str, bool]:
        """What the segments behind those of `last` hold, as many as an era takes; their columns; whether the manifest
        is closed behind them.
        """
        held: list[Held] = []
        samples, schema = carried, last.schema or ("" if self._tokenizer else self._others())
        while len(held) < self.live.segments_at_once or samples < self.lanes * self.lane_batch_size:
            ordinal = last.segments + len(held)
            if ordinal not in self._seen:  # each is looked for until it is there, and looked at once
                segment = self._log.get(ordinal)
                if segment is None or isinstance(segment, Closed):
                    return held, schema, segment is not None
                self._seen[ordinal] = self._segments.examine(segment)
            found, columns = self._seen[ordinal]
            if columns and schema and columns != schema:
                those = "segments before it" if last.schema or any(one.samples for one in held) else "other sources"
                raise DataError(
                    f"segment {ordinal} ({self._segments.name(ordinal)}): its columns are {columns}; those of the "
                    f"{those} are {schema}. All segments must be alike; write others to a new manifest"
                )
            schema = schema or columns
            held.append(found)
            samples += found.samples
        return held, schema, False

    # --- what a reader and the audit ask ---

    @property
    def samples(self) -> int:
        """Samples of the segments that are part of the order."""
        return self._eras.samples_of(self._eras.last, 1 << 62)

    @property
    def schema(self) -> str:
        """The columns in words; "" before the first segment is part of the order."""
        return self._eras.last.schema

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Says which tokens a text becomes; None in table mode."""
        return self._tokenizer.fingerprint if self._tokenizer else None

    @property
    def vocabulary_size(self) -> int | None:
        """All tokens are below this; None in table mode."""
        return self._tokenizer.vocabulary_size if self._tokenizer else None

    @property
    def end_of_document(self) -> int | None:
        """The token that follows every document; None in table mode."""
        return self._tokenizer.end_of_document if self._tokenizer else None

    @property
    def content(self) -> dict[str, Any]:
        """What the content of decoded blocks follows from, and more: names a warm cache (see `data.warm`)."""
        return {**self.fingerprint, "document_ids": self.spec.document_ids, "record": self._record.url}

    def spans(self, step: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """Yield the windows that batch `step` of `lane` touches, each with its `[start, stop)` in the window."""
        yield from self._eras.order(self._eras.at_step(step)).spans(step, lane)

    def spans_at(self, start: int, stop: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """As `spans`, for positions `[start, stop)` of a lane counted from the beginning."""
        while start < stop:
            era = self._eras.at_step(start // self.lane_batch_size)
            end = min(stop, era.stop * self.lane_batch_size)
            yield from self._eras.order(era).spans_at(start, end, lane)
            start = end

    def order_of(self, window: Window) -> tuple[str, EraOrder]:
        """Return "" or "reservoir", and the order of the window's era."""
        era = self._eras.get(window.epoch)
        return RESERVOIR if era.kind == "reservoir" else "", self._eras.order(era)

    def batches_in(self, window: Window, start: int) -> int:
        """Return how many batches in a row, the first of them at place `start` of a window, it surely holds."""
        return self._eras.order(self._eras.get(window.epoch)).batches_in(window, start)

    def after(self, window: Window) -> Window:
        """Return the window that follows in a window's lane; the last one that is at hand (see `prepare`) by itself."""
        era = self._eras.get(window.epoch)
        order = self._eras.order(era)
        if window.stop < order.samples_per_lane:
            return order.window_at(window.lane, window.stop)
        following = self._eras.following(era)
        return window if following is None else self._eras.order(following).window_at(window.lane, 0)

    def rows_per_step(self, window: Window, step: int) -> float:
        """Return how many rows of a window a lane uses in a step; 0 when nothing is known of what follows it."""
        del step
        era = self._eras.get(window.epoch)
        is_last = window.stop >= era.steps * self.lane_batch_size and self._eras.following(era) is None
        return 0.0 if is_last else float(self.lane_batch_size)

    def ids_of(self, window: Window, blocks: npt.ArrayLike, rows: npt.ArrayLike) -> SampleIds:
        """Return the ids of samples of a window (see `data.ids`)."""
        del window
        return sample_ids(blocks, rows)

    def read_block(self, block: int) -> Arrays:
        """Decode a block, as `Source.read_block`. Raises DataError that names the segment."""
        ordinal, inside = self._eras.home(block)
        with self._segments.using(ordinal) as source:
            try:
                return source.read_block(inside)
            except DataError as error:
                kind = StoreFailed if isinstance(error, StoreFailed) else DataError
                raise kind(f"segment {ordinal} ({self._segments.name(ordinal)}): {error}") from error

    def finish(self, step: int, lane: int, batch: Arrays) -> Arrays:
        """Turn the gathered rows of a batch into what a recipe gets."""
        del step, lane
        return finish_rows(batch, types=self._batch_types) if self._tokenizer is not None else batch

    def location(self, block: int, row: int, epoch: int = 0) -> SampleLocation:
        """Say where sample `row` of `block` lies; `epoch` is the number of its era."""
        ordinal, inside = self._eras.home(block)
        with self._segments.using(ordinal) as source:
            found = source.location(inside, row, epoch)
        name, first = self._segments.name(ordinal), block - inside
        parts = tuple(replace(part, file=name, block=first + part.block) for part in found.parts)
        return replace(found, block=block, parts=parts)

    def locate(self, step: int, lane: int) -> list[SampleLocation]:
        """Say where every sample of batch `step` of `lane` lies, in the batch's order."""
        from elastictrain.data.holes import samples_of_run

        found = []
        for window, start, stop in self.spans(step, lane):
            blocks, rows = samples_of_run(window, start, stop)
            found += [self.location(b, r, window.epoch) for b, r in zip(blocks.tolist(), rows.tolist(), strict=True)]
        return found

    def rows_of(self, part: Part) -> tuple[int, int]:
        """Return the rows `[first, end)` of its row group that a part comes from; a packed one is read for it."""
        ordinal, inside = self._eras.home(part.block)
        with self._segments.using(ordinal) as source:
            return source.rows_of(replace(part, block=inside))

    def where(self, block: int, row: int) -> str:
        """Say where a sample comes from."""
        ordinal, inside = self._eras.home(block)
        with self._segments.using(ordinal) as source:
            return f"segment {ordinal}: {source.where(inside, row)}"

    def describe(self) -> dict[str, Any]:
        """Return what a user wants to know of the source; JSON."""
        last = self._eras.last
        there = self._log.count(last.segments)
        closed = there > last.segments and isinstance(self._log.get(there - 1), Closed)
        return {
            "kind": self.spec.kind,
            "live": self.live.policy,
            "segments_of_the_order": last.segments,
            "segments_that_wait": there - last.segments - closed,
            "closed": closed,
            "samples": self.samples,
            "eras": last.number + 1,
            "steps_decided": self.decided,
            "ended": self.ended,
            "columns": last.schema,
            "fingerprint": self.fingerprint["hash"],
        }

    def close(self) -> None:
        """Close all files."""
        self._segments.close()


def open_live(
    spec: Data,
    *,
    seed: int,
    lanes: int,
    lane_batch_size: int,
    record: str | None = None,
    record_options: Mapping[str, Any] | None = None,
    batches_at_once: int = 1,
    others: Callable[[], str] = lambda: "",
) -> LiveSource:
    """Open a manifest of segments as a source. `record`: where its order is recorded, in place of `data.live.record`,
    and what fsspec needs for that.

    In a mixture, `batches_at_once`: how many of its steps, which have one sample for each lane there, count as one of
    `data.live.reservoir.steps`; `others`: the columns of the other sources in words, as far as they are known ("").

    Raises DataError: no manifest there, a tokenizer that cannot be loaded, or an order that another run has recorded.
    """
    assert spec.live is not None, "the caller has looked"
    place = record or spec.live.record
    if place is None:
        raise DataError(
            "data.live.record is not set: say in which folder, that all workers can write to, the order of a live "
            "source is recorded (a run with checkpoints keeps it in checkpoint.path)"
        )
    log = SegmentLog(str(spec.path), storage_options=spec.storage_options, retry=Retry(spec.retry_s))
    manifest = log.identity()
    if manifest is None:
        raise DataError(
            f"data.path: {spec.path!r} holds no manifest of segments. Make it, before training begins, with "
            "elastictrain.data.segments.SegmentWriter, or leave data.live out to read the files that are there"
        )
    return LiveSource(
        spec,
        log,
        manifest,
        seed=seed,
        lanes=lanes,
        lane_batch_size=lane_batch_size,
        record=place,
        record_options=spec.storage_options if record is None else record_options or {},
        batches_at_once=batches_at_once,
        others=others,
    )
