"""The segments of a live source that are open: each is a small `Source` of its own, packed by itself."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from elastictrain.data.columns import show_schema
from elastictrain.data.live_order import Era, Held
from elastictrain.data.order import Piece
from elastictrain.data.segments import Closed, Segment, SegmentLog
from elastictrain.data.source import Source, open_source
from elastictrain.errors import DataError, NoSamples, StoreFailed

if TYPE_CHECKING:
    from elastictrain.data_settings import Data

_MOST_OPEN = 64
_LAYOUTS_KEPT = 1024
_READ_BYTES = 8 << 20


class OpenSegments:
    """Opens segments as they are needed and closes those that were longest idle. Thread-safe.

    A segment that is part of the order must be what it was when that was decided: `place` says what.
    """

    def __init__(self, spec: Data, log: SegmentLog) -> None:
        # What concerns the order of a source is said by the eras; a segment is only opened, packed and decoded.
        self._spec = spec.model_copy(update={"live": None, "shuffle": "none", "warm_cache_bytes": 0})
        self._log, self._lock = log, threading.RLock()
        self._open: OrderedDict[int, Source | None] = OrderedDict()
        self._pieces: OrderedDict[int, tuple[Piece, ...]] = OrderedDict()
        self._names: dict[int, str] = {}
        self._placed: dict[int, tuple[int, Held]] = {}  # by segment: its first block, what it held when it was decided
        self._first_blocks: list[int] = []  # of the segments in `_by_block` (those with blocks), ascending
        self._by_block: list[int] = []

    # --- segments that are not part of the order yet ---

    def examine(self, segment: Segment) -> tuple[Held, str]:
        """What a segment that has arrived holds, and its columns.

        Raises DataError that names it: it cannot be read, or is not what its writer has appended.
        """
        self._check_bytes(segment)
        source = self._opened(segment)
        if source is None:
            return Held(0, 0, ""), ""
        return _held(source), show_schema(source.columns)

    def _check_bytes(self, segment: Segment) -> None:
        """Compare a file on this machine with the checksum that its writer has recorded.

        Raises DataError: they differ; StoreFailed: it cannot be read.
        """
        path = Path(self._log.path_of(segment).removeprefix("file://")).expanduser()
        digest = xxhash.xxh3_64()
        try:
            if segment.checksum is None or not path.is_file():
                return
            with path.open("rb") as handle:
                while block := handle.read(_READ_BYTES):
                    digest.update(block)
        except OSError as error:
            raise StoreFailed(f"segment {segment.ordinal} ({path}): could not be read ({error})") from error
        if digest.hexdigest() != segment.checksum:
            raise DataError(
                f"segment {segment.ordinal} ({path}): its bytes are not those that were appended (XXH3 "
                f"{digest.hexdigest()}, expected {segment.checksum}). Write segments wholly before they are appended"
            )

    # --- segments of the order ---

    def place(self, era: Era) -> None:
        """The segments of a fresh era are part of the order."""
        with self._lock:
            first = era.first_block
            for ordinal, held in enumerate(era.held, start=era.first_segment):
                if ordinal not in self._placed:
                    self._placed[ordinal] = (first, held)
                    if held.blocks:
                        at = bisect_right(self._first_blocks, first)
                        self._first_blocks.insert(at, first)
                        self._by_block.insert(at, ordinal)
                first += held.blocks

    def of_block(self, block: int) -> tuple[int, int] | None:
        """(segment, number of the block in it); None for a block of no segment that was placed."""
        with self._lock:
            at = bisect_right(self._first_blocks, block) - 1
            if at < 0:
                return None
            ordinal = self._by_block[at]
            first, held = self._placed[ordinal]
            return (ordinal, block - first) if block < first + held.blocks else None

    def held(self, ordinal: int) -> tuple[int, Held] | None:
        """(first block, what it holds) of a segment; None for one that was not placed."""
        return self._placed.get(ordinal)

    def pieces(self, ordinal: int) -> tuple[Piece, ...]:
        """The blocks with samples of a placed segment, as the order numbers them."""
        with self._lock:
            known = self._pieces.get(ordinal)
            if known is None:
                first, held = self._placed[ordinal]
                source = self._source(ordinal) if held.samples else None
                rows = [] if source is None else source.order.block_rows.tolist()
                known = tuple(Piece(first + number, 0, count) for number, count in enumerate(rows) if count)
                self._pieces[ordinal] = known
                while len(self._pieces) > _LAYOUTS_KEPT:
                    self._pieces.popitem(last=False)
            return known

    @contextmanager
    def using(self, ordinal: int) -> Iterator[Source]:
        """A placed segment, open; nobody closes it meanwhile.

        Raises DataError: it is gone, or is not what it was when it became part of the order.
        """
        with self._lock:
            yield self._source(ordinal)

    def _source(self, ordinal: int) -> Source:
        with self._lock:
            segment = self._record(ordinal)
            source = self._opened(segment)
            expected = self._placed[ordinal][1]
            found = Held(0, 0, "") if source is None else _held(source)
            if found != expected or source is None:
                self._forget(ordinal)
                raise DataError(
                    f"segment {ordinal} ({self._log.path_of(segment)}) has changed since it became part of the order "
                    f"(it had {expected.samples} samples, and has {found.samples}"
                    f"{'; other content' if found.samples == expected.samples else ''}). Segments must stay as they "
                    "were appended: put the file back"
                )
            return source

    def name(self, ordinal: int) -> str:
        """The name of a placed segment in the manifest."""
        with self._lock:
            if ordinal not in self._names:
                self._record(ordinal)
            return self._names[ordinal]

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for ordinal in list(self._open):
                self._forget(ordinal)

    def _record(self, ordinal: int) -> Segment:
        segment = self._log.get(ordinal)
        if not isinstance(segment, Segment):
            what = "is closed before it" if isinstance(segment, Closed) else "has no record of it"
            raise DataError(
                f"segment {ordinal} is part of the order, but the manifest {self._log.url} {what}. Put it back"
            )
        self._names[ordinal] = segment.name
        return segment

    def _opened(self, segment: Segment) -> Source | None:
        """None for a segment without samples."""
        with self._lock:
            if segment.ordinal in self._open:
                self._open.move_to_end(segment.ordinal)
                return self._open[segment.ordinal]
        source = self._open_file(segment)
        with self._lock:
            if segment.ordinal in self._open:  # by another thread meanwhile
                if source is not None:
                    source.close()
                return self._open[segment.ordinal]
            self._open[segment.ordinal] = source
            while len(self._open) > _MOST_OPEN:
                self._forget(next(iter(self._open)))
            return source

    def _open_file(self, segment: Segment) -> Source | None:
        path = self._log.path_of(segment)
        spec = self._spec.model_copy(update={"path": path})
        try:
            source = open_source(spec, seed=0, lanes=1, lane_batch_size=1)
        except NoSamples:
            return None
        except DataError as error:
            kind = StoreFailed if isinstance(error, StoreFailed) else DataError
            raise kind(f"segment {segment.ordinal} ({path}): {error}") from error
        size_bytes = sum(file.size_bytes for file in source._files.files)
        if size_bytes != segment.size_bytes:
            source.close()
            raise DataError(
                f"segment {segment.ordinal} ({path}) has {size_bytes} bytes; it had {segment.size_bytes} when it was "
                "appended. Segments must stay as they were appended: put the file back"
            )
        return source

    def _forget(self, ordinal: int) -> None:
        source = self._open.pop(ordinal, None)
        if source is not None:
            source.close()


def _held(source: Source) -> Held:
    return Held(source.samples, len(source.order.block_rows), str(source.fingerprint["hash"])[:32])
