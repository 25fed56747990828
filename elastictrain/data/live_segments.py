"""The segments of a live source that are open: each is a small `Source` of its own, packed by itself."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from elastictrain.data.columns import show_schema
from elastictrain.data.live_order import Era, Held
from elastictrain.data.order import Piece
from elastictrain.data.segments import Closed, Segment, SegmentLog
from elastictrain.data.source import Source, open_source
from elastictrain.data.tokenizers import Tokenizer
from elastictrain.errors import DataError, NoSamples, StoreFailed

if TYPE_CHECKING:
    from elastictrain.data_settings import Data

_MOST_OPEN = 64
_LAYOUTS_KEPT = 1024
_READ_BYTES = 8 << 20
_LOOK_S = 1.0


class _Opened:
    """A segment that is open, None for one without samples. `lock`: whoever reads it; a `Source` is not thread-safe."""

    __slots__ = ("is_dropped", "lock", "source", "users")

    def __init__(self, source: Source | None) -> None:
        self.source, self.lock, self.users, self.is_dropped = source, threading.Lock(), 0, False

    def close(self) -> None:
        if self.source is not None:
            self.source.close()


class OpenSegments:
    """Opens segments as they are needed and closes those that were longest idle. Thread-safe: who waits for a segment
    that cannot be read just now keeps nobody from the others.

    A segment that is part of the order must be what it was when that was decided: `place` says what. The manifest is
    asked for its record whenever it is opened, and not while it stays so: records never change.
    """

    def __init__(self, spec: Data, log: SegmentLog, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: that of all segments, if they are text."""
        # What concerns the order of a source is said by the eras; a segment is only opened, packed and decoded.
        self._spec = spec.model_copy(update={"live": None, "shuffle": "none", "warm_cache_bytes": 0})
        self._log, self._tokenizer = log, tokenizer
        self._changed = threading.Condition()  # of all that follows; not held while something is read
        self._open: OrderedDict[int, _Opened] = OrderedDict()
        self._opening: set[int] = set()
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
        with self._lent(segment.ordinal, lambda: segment) as source:
            return _held(source), "" if source is None else show_schema(source.columns)

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
        with self._changed:
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
        with self._changed:
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
        with self._changed:
            known = self._pieces.get(ordinal)
            first, held = self._placed[ordinal]
        if known is not None:
            return known
        rows: list[int] = []
        if held.samples:
            with self.using(ordinal) as source:
                rows = source.order.block_rows.tolist()
        found = tuple(Piece(first + number, 0, count) for number, count in enumerate(rows) if count)
        with self._changed:
            self._pieces[ordinal] = found
            while len(self._pieces) > _LAYOUTS_KEPT:
                self._pieces.popitem(last=False)
        return found

    def is_at_hand(self, ordinal: int) -> bool:
        """Whether `pieces` of a segment gives an answer without asking a store."""
        with self._changed:
            placed = self._placed.get(ordinal)
            at_hand = ordinal in self._pieces or ordinal in self._open
            return placed is not None and (at_hand or not placed[1].samples)

    @contextmanager
    def using(self, ordinal: int) -> Iterator[Source]:
        """A placed segment, open; nobody else reads or closes it meanwhile.

        Raises DataError: it is gone, or is not what it was when it became part of the order.
        """
        with self._lent(ordinal, lambda: self._record(ordinal)) as source:
            expected = self._placed[ordinal][1]
            found = _held(source)
            if found != expected or source is None:
                self._drop(ordinal)
                raise DataError(
                    f"segment {ordinal} ({self._log.path_of(self._record(ordinal))}) has changed since it became part "
                    f"of the order (it had {expected.samples} samples, and has {found.samples}"
                    f"{'; other content' if found.samples == expected.samples else ''}). Segments must stay as they "
                    "were appended: put the file back"
                )
            yield source

    def name(self, ordinal: int) -> str:
        """The name of a segment in the manifest."""
        return self._names.get(ordinal) or self._record(ordinal).name

    def close(self) -> None:
        """Close all files; one that is being read is closed after that."""
        with self._changed:
            ordinals = list(self._open)
        for ordinal in ordinals:
            self._drop(ordinal)

    def _record(self, ordinal: int) -> Segment:
        segment = self._log.get(ordinal)
        if not isinstance(segment, Segment):
            what = "is closed before it" if isinstance(segment, Closed) else "has no record of it"
            raise DataError(
                f"segment {ordinal} is part of the order, but the manifest {self._log.url} {what}. Put it back"
            )
        self._names[ordinal] = segment.name
        return segment

    @contextmanager
    def _lent(self, ordinal: int, record: Callable[[], Segment]) -> Iterator[Source | None]:
        one = self._take(ordinal, record)
        try:
            with one.lock:
                yield one.source
        finally:
            with self._changed:
                one.users -= 1
                is_last = one.is_dropped and not one.users
            if is_last:
                one.close()

    def _take(self, ordinal: int, record: Callable[[], Segment]) -> _Opened:
        """A segment that stays open until its `users` are as many as before; `record` is asked for where it is not."""
        with self._changed:
            while ordinal in self._opening:
                self._changed.wait(_LOOK_S)  # its opening ends, in an error at the latest
            one = self._open.get(ordinal)
            if one is not None:
                self._open.move_to_end(ordinal)
                one.users += 1
                return one
            self._opening.add(ordinal)
        try:
            one = _Opened(self._open_file(record()))
            with self._changed:
                self._open[ordinal] = one
                one.users = 1
                surplus = list(self._open)[:-_MOST_OPEN]
        finally:
            with self._changed:
                self._opening.discard(ordinal)
                self._changed.notify_all()
        for idle in surplus:
            self._drop(idle)
        return one

    def _drop(self, ordinal: int) -> None:
        """Forget a segment; it is closed when nobody reads it any more."""
        with self._changed:
            one = self._open.pop(ordinal, None)
            if one is None:
                return
            one.is_dropped = True
            in_use = one.users > 0
        if not in_use:
            one.close()

    def _open_file(self, segment: Segment) -> Source | None:
        path = self._log.path_of(segment)
        spec = self._spec.model_copy(update={"path": path})
        try:
            source = open_source(spec, seed=0, lanes=1, lane_batch_size=1, tokenizer=self._tokenizer)
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


def _held(source: Source | None) -> Held:
    if source is None:
        return Held(0, 0, "")
    return Held(source.samples, len(source.order.block_rows), str(source.fingerprint["hash"])[:32])
