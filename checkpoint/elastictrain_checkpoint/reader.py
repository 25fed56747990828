"""Reading: any flat range of any tensor, whatever layout wrote it, every byte checked before it is handed
out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastictrain_checkpoint.boxes import box_runs
from elastictrain_checkpoint.collector import no_collections
from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.errors import CorruptData, InvalidPiece
from elastictrain_checkpoint.hashing import block_sum_of
from elastictrain_checkpoint.healing import Healed, good_block
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.threads import in_threads
from elastictrain_checkpoint.windows import Copy, copy_out, in_blocks, start_of, tile, unwanted_from, windows

Bytes = NDArray[np.uint8]
WINDOW_BYTES = 16 << 20
CACHED_BLOCKS = 8
PARALLEL_BYTES = 8 << 20
"""Less than this is read by the calling thread alone."""
SCATTERED_BYTES = 64 << 10
"""Ranges of less than this on average are read together and copied; larger ones are read where they belong."""


@dataclass(frozen=True)
class Request:
    """A flat range of elements of a tensor (or alias) and where its bytes shall go (made if None)."""

    name: str
    start: int
    stop: int
    out: Any = None


class Reader:
    """Reads one checkpoint.

    Ranges are read in whole hash blocks, straight into the buffers that they are for, and hashed there while they are
    in the processor's cache; small ranges that lie together are read at once and copied. A block that was wanted in
    part only is kept for a while, so that reading tensor after tensor reads each byte of storage once. Not for several
    threads at once: make a reader for each.

    Attributes:
        manifest: what is read.
        tensors: name → (dtype, shape), aliases included.
        tree: state that is not tensors.
        read_bytes: bytes read from storage so far.
        healed: blocks that were damaged in ``store`` and came from one of ``others``.

    Args:
        store: where to read.
        manifest: what to read.
        others: further stores that may hold the same packs; asked, in this order, for blocks that are damaged.
        threads: read and hash at the same time where `PARALLEL_BYTES` or more are asked for; the store's own number if
            not given.

    """

    def __init__(
        self, store: Store, manifest: Manifest, *, others: Sequence[Store] = (), threads: int | None = None
    ) -> None:
        self._store = store
        self._threads = max(1, store.read_threads if threads is None else threads)
        self._lock = threading.Lock()
        self.manifest = manifest
        self._number = {name: number for number, name in enumerate(manifest.table.names)}
        self._kept: OrderedDict[tuple[int, int], tuple[int, memoryview]] = OrderedDict()
        self._bounds = manifest.table.bounds.tolist()
        self.tensors = {
            **manifest.tensors,
            **{alias: manifest.tensors[target] for alias, target in manifest.alias.items()},
        }
        self.tree = manifest.tree
        self.read_bytes = 0
        self._others = tuple(others)
        self.healed: list[Healed] = []

    def read(self, name: str) -> Bytes:
        """Bytes of a whole tensor, row-major; shape [bytes], dtype uint8.

        Raises:
            KeyError: no such tensor.
            CorruptData: stored bytes are not those that were written; file, block and tensors are named.

        """
        _, shape = self.manifest.tensors[self.manifest.resolve(name)]
        return self.read_flat(name, 0, num_elements(shape))

    def read_flat(self, name: str, start: int, stop: int, out: Any = None) -> Bytes:
        """Bytes of the elements [start, stop) of a tensor.

        Args:
            name: tensor or alias.
            start: first element, row-major.
            stop: one past the last.
            out: writable C-contiguous buffer of exactly that many bytes; made if not given.

        Raises:
            KeyError, CorruptData: as for `read`.
            InvalidPiece: the range lies outside the tensor, or ``out`` does not fit.

        """
        return self.read_many([Request(name, start, stop, out)])[0]

    def read_many(self, requests: Sequence[Request]) -> list[Bytes]:
        """Several ranges at once, in the order asked for; read from storage in the order of the files.

        Raises:
            KeyError, CorruptData, InvalidPiece: as for `read_flat`; then outputs may be partly filled.

        """
        outputs, copies = self._plan(requests)
        self._read_files(copies)
        return outputs

    @no_collections()
    def _plan(self, requests: Sequence[Request]) -> tuple[list[Bytes], dict[int, list[Copy]]]:
        outputs: list[Bytes] = []
        copies: dict[int, list[Copy]] = {}
        for request in requests:
            outputs.append(self._output(request))
            for file, copy in self._copies(request, outputs[-1].data):
                copies.setdefault(file, []).append(copy)
        return outputs, copies

    def read_spans(self, spans: Iterable[tuple[int, int, memoryview]]) -> None:
        """Spans of bytes of packs, checked like any others; read in the order of the files.

        Args:
            spans: (number of the pack in the manifest, first byte, writable flat buffer of bytes to be filled); no span
                reaches beyond its pack.

        Raises:
            CorruptData: as for `read`; then buffers may be partly filled.

        """
        files: dict[int, list[Copy]] = {}
        for file, start, out in spans:
            files.setdefault(file, []).append((start, out))
        self._read_files(files)

    def _output(self, request: Request) -> Bytes:
        dtype, shape = self.manifest.tensors[self.manifest.resolve(request.name)]
        count = num_elements(shape)
        if not 0 <= request.start <= request.stop <= count:
            raise InvalidPiece(
                f"{request.name}: elements [{request.start}, {request.stop}) do not lie in shape {list(shape)}"
            )
        size = (request.stop - request.start) * item_bytes(dtype)
        if request.out is None:
            return np.empty(size, dtype=np.uint8)
        view = memoryview(request.out)
        if view.readonly or not view.c_contiguous or view.nbytes != size:
            raise InvalidPiece(
                f"{request.name}: out must be a writable contiguous buffer of {size} bytes, "
                f"got {view.nbytes} bytes{', read-only' if view.readonly else ''}"
            )
        return np.frombuffer(view.cast("B") if size else bytearray(), dtype=np.uint8)

    def _copies(self, request: Request, out: memoryview) -> Iterator[tuple[int, Copy]]:
        name = self.manifest.resolve(request.name)
        dtype, shape = self.manifest.tensors[name]
        item = item_bytes(dtype)
        table, number = self.manifest.table, self._number[name]
        first, last = self._bounds[number], self._bounds[number + 1]
        if not request.start < request.stop:
            return
        if last == first + 1 and table.dense[first]:  # the whole tensor is one run: by far the most frequent
            yield int(table.file[first]), (int(table.start[first]) + request.start * item, out)
            return
        near = (table.flat_start[first:last] < request.stop) & (table.flat_stop[first:last] > request.start)
        for row in (np.flatnonzero(near) + first).tolist():
            begin = int(table.start[row])
            if table.dense[row]:
                starts, run = table.flat_start[row : row + 1], int(table.flat_stop[row] - table.flat_start[row])
            else:
                starts, run = box_runs(shape, *table.boxes[int(row)])
            for at in np.flatnonzero((starts < request.stop) & (starts + run > request.start)).tolist():
                flat = int(starts[at])
                low, high = max(flat, request.start), min(flat + run, request.stop)
                piece = out[(low - request.start) * item : (high - request.start) * item]
                yield int(table.file[row]), (begin + (at * run + low - flat) * item, piece)

    def _read_files(self, files: Mapping[int, Sequence[Copy]]) -> None:
        """Fill the copies, in the order of the files: a window of blocks at a time, several at once if there are many.

        Reading and hashing let go of Python's lock, so while one thread waits for memory or storage others work.
        """
        everything = (
            window
            for file, copies in sorted(files.items())
            for window in self._windows_of(file, sorted(copies, key=start_of))
        )
        threads = 1
        if sum(len(out) for copies in files.values() for _, out in copies) >= PARALLEL_BYTES:
            threads = self._threads
        in_threads(threads, everything, lambda window: self._read_window(*window))

    def _windows_of(self, file: int, copies: Sequence[Copy]) -> Iterator[tuple[int, int, int, list[Copy]]]:
        """(file, first block, one past the last, what of the copies lies there); the copies are sorted by start."""
        block, size = self.manifest.block_bytes, self.manifest.files[file].size_bytes
        most = max(1, min(WINDOW_BYTES, self._store.read_window_bytes) // block)
        coming = 0
        open_: list[Copy] = []
        for low, high in windows(copies, block, most):
            begin, end = low * block, min(high * block, size)
            while coming < len(copies) and copies[coming][0] < end:
                open_.append(copies[coming])
                coming += 1
            inside = []
            for start, out in open_:
                left, right = max(start, begin), min(start + len(out), end)
                if left < right:
                    inside.append((left, out[left - start : right - start]))
            open_ = [copy for copy in open_ if copy[0] + len(copy[1]) > end]
            inside.sort(key=start_of)
            yield file, low, high, inside

    def _read_window(self, file: int, low: int, high: int, copies: Sequence[Copy]) -> None:
        """Fill the copies, all of which lie in blocks [low, high)."""
        block, size = self.manifest.block_bytes, self.manifest.files[file].size_bytes
        with self._lock:
            kept = self._kept.get((file, low))
        if kept is not None and kept[0] <= copies[0][0]:
            copies = copy_out(kept[1], kept[0], copies)
            low += 1
        if low == high:
            return
        begin, end = low * block, min(high * block, size)
        last = unwanted_from(copies, (high - 1) * block, end)
        rest = np.empty(end - last, dtype=np.uint8).data if last < end else None
        tiles = tile(copies, begin, end, rest) if len(copies) * SCATTERED_BYTES <= end - begin else None
        views = tiles or [np.empty(end - begin, dtype=np.uint8).data]
        blocks, sums = list(in_blocks(views, block)), self.manifest.sums[file][low:high].tolist()
        bad: list[int] = []
        checked = 0

        def check(count: int) -> None:
            """So many bytes are there: hash the blocks that are whole with them."""
            nonlocal checked
            while checked < len(blocks) and min((checked + 1) * block, end - begin) <= count:
                if block_sum_of(blocks[checked]) != sums[checked]:
                    bad.append(checked)
                checked += 1

        why = self._fetch(file, begin, views, check)
        for at in (*bad, *range(checked, len(blocks))):
            self._heal(file, low + at, blocks[at], why or "its hash differs from the manifest's")
        if tiles is None:
            copy_out(views[0], begin, copies)
        if rest is not None:
            for start, out in copies if tiles else [(begin, views[0])]:
                inside = max(start, last)
                if start + len(out) > inside:
                    rest[inside - last : start + len(out) - last] = out[inside - start :]
            self._keep(file, high - 1, last, rest)

    def _fetch(
        self, file: int, start: int, outs: Sequence[memoryview], arrived: Callable[[int], None]
    ) -> str | OSError | None:
        """Read; gives what is wrong, where blocks may still come from elsewhere."""
        got, number = 0, None
        why: str | OSError
        want = sum(len(out) for out in outs)
        try:
            got = self._store.read_parts(self.manifest.paths[file], start, outs, arrived)
            why = f"the file is cut short ({got} of {want} bytes from {start} on)"
            number = (start + got) // self.manifest.block_bytes
        except FileNotFoundError:
            why = "the file is missing"
        except OSError as error:  # says nothing of what is stored; there, or elsewhere, it may be whole
            if not self._others:
                raise
            why = error
        with self._lock:
            self.read_bytes += got
        if got == want:
            return None
        if not self._others:
            raise self._corrupt(file, number, str(why))
        return why

    def _heal(self, file: int, number: int, parts: Sequence[memoryview], why: str | OSError) -> None:
        """Take a damaged block from another store."""
        error = self._corrupt(file, number, str(why))
        block = memoryview(bytearray(sum(len(part) for part in parts)))
        source = good_block(self._others, self.manifest, file, number, block)
        if source is None:
            raise why if isinstance(why, OSError) else error
        at = 0
        for part in parts:
            part[:] = block[at : at + len(part)]
            at += len(part)
        self.healed.append(Healed(error.file, number, error.tensors, source.url, str(error)))

    def _keep(self, file: int, number: int, begin: int, data: memoryview) -> None:
        with self._lock:
            self._kept[file, number] = begin, data
            while len(self._kept) > CACHED_BLOCKS:
                self._kept.popitem(last=False)

    def _corrupt(self, file: int, number: int | None, why: str) -> CorruptData:
        return corrupt(self.manifest, file, number, why)


def corrupt(manifest: Manifest, file: int, number: int | None, why: str) -> CorruptData:
    """The error for a block (or a whole file, if ``number`` is None), naming the tensors in it."""
    block, size = manifest.block_bytes, manifest.files[file].size_bytes
    begin, end = (0, size) if number is None else (number * block, min((number + 1) * block, size))
    names = manifest.table.tensors_in(file, begin, end)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    where = "" if number is None else f", block {number} (bytes {begin} to {end})"
    return CorruptData(
        f"step {manifest.step}: {manifest.paths[file]}{where}: {why}; tensors in it: {shown or 'none (header)'}",
        file=manifest.paths[file],
        block=number,
        tensors=names,
    )
