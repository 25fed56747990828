"""Reading: any flat range of any tensor, whatever layout wrote it, every byte checked before it is handed
out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastictrain_checkpoint.boxes import box_runs
from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.errors import CorruptData, InvalidPiece
from elastictrain_checkpoint.hashing import block_sum
from elastictrain_checkpoint.healing import Healed, good_block
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.store import Store

Bytes = NDArray[np.uint8]
WINDOW_BYTES = 16 << 20
CACHED_BLOCKS = 8


@dataclass(frozen=True)
class Request:
    """A flat range of elements of a tensor (or alias) and where its bytes shall go (made if None)."""

    name: str
    start: int
    stop: int
    out: Any = None


@dataclass
class _Copy:
    """Bytes [start, start + len(out)) of a file go to ``out``."""

    start: int
    out: memoryview


class Reader:
    """Reads one checkpoint.

    Ranges are read in whole hash blocks; blocks that follow one another are read together, up to 16 MiB,
    and the last few are kept, so that reading tensor after tensor reads each byte of storage once. Not for
    several threads at once: make a reader for each.

    Attributes:
        tensors: name → (dtype, shape), aliases included.
        tree: state that is not tensors.
        read_bytes: bytes read from storage so far.
        healed: blocks that were damaged in ``store`` and came from one of ``others``.

    Args:
        store: where to read.
        manifest: what to read.
        others: further stores that may hold the same packs; asked, in this order, for blocks that are damaged.

    """

    def __init__(self, store: Store, manifest: Manifest, *, others: Sequence[Store] = ()) -> None:
        self._store = store
        self._manifest = manifest
        self._number = {name: number for number, name in enumerate(manifest.table.names)}
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
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
        _, shape = self._manifest.tensors[self._manifest.resolve(name)]
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
        outputs: list[Bytes] = []
        copies: dict[int, list[_Copy]] = {}
        for request in requests:
            outputs.append(self._output(request))
            for file, copy in self._copies(request, outputs[-1].data):
                copies.setdefault(file, []).append(copy)
        for file, wanted in sorted(copies.items()):
            self._read_file(file, sorted(wanted, key=lambda copy: copy.start))
        return outputs

    def _output(self, request: Request) -> Bytes:
        dtype, shape = self._manifest.tensors[self._manifest.resolve(request.name)]
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

    def _copies(self, request: Request, out: memoryview) -> Iterator[tuple[int, _Copy]]:
        name = self._manifest.resolve(request.name)
        dtype, shape = self._manifest.tensors[name]
        item = item_bytes(dtype)
        table, number = self._manifest.table, self._number[name]
        first, last = int(table.bounds[number]), int(table.bounds[number + 1])
        near = (table.flat_start[first:last] < request.stop) & (table.flat_stop[first:last] > request.start)
        for row in np.flatnonzero(near) + first:
            begin = int(table.start[row])
            starts, run = box_runs(shape, *table.boxes[int(row)])
            for at in np.flatnonzero((starts < request.stop) & (starts + run > request.start)):
                flat = int(starts[at])
                low, high = max(flat, request.start), min(flat + run, request.stop)
                yield (
                    int(table.file[row]),
                    _Copy(
                        begin + (int(at) * run + low - flat) * item,
                        out[(low - request.start) * item : (high - request.start) * item],
                    ),
                )

    def _read_file(self, file: int, copies: list[_Copy]) -> None:
        block = self._manifest.block_bytes
        for low, high in _windows(copies, block, max(1, WINDOW_BYTES // block)):
            data = memoryview(self._blocks(file, low, high))
            begin, end = low * block, low * block + len(data)
            for copy in copies:
                if copy.start >= end:
                    break
                left, right = max(copy.start, begin), min(copy.start + len(copy.out), end)
                if left < right:
                    copy.out[left - copy.start : right - copy.start] = data[left - begin : right - begin]
            copies = [copy for copy in copies if copy.start + len(copy.out) > end]

    def _blocks(self, file: int, low: int, high: int) -> bytes | bytearray:
        """Blocks [low, high) of a file, read and checked; the first may come from those kept."""
        block, size = self._manifest.block_bytes, self._manifest.files[file].size_bytes
        kept = self._kept.get((file, low))
        if kept is not None and high == low + 1:
            return kept
        data = bytearray(min(high * block, size) - low * block)
        skip = 0
        if kept is not None:
            skip = len(kept)
            data[:skip] = kept
        view = memoryview(data)[skip:]
        why = self._fetch(file, low * block + skip, view) or "its hash differs from the manifest's"
        for number in range(low + (1 if skip else 0), high):
            at = (number - low) * block
            if block_sum(memoryview(data)[at : at + block]) != int(self._manifest.sums[file][number]):
                self._heal(file, number, memoryview(data)[at : at + block], why)
        self._keep(file, high - 1, bytes(memoryview(data)[(high - 1 - low) * block :]))
        return data

    def _fetch(self, file: int, start: int, out: memoryview) -> str | None:
        """Read; gives what is wrong, where blocks may still come from elsewhere."""
        got, number = 0, None
        try:
            got = self._store.read_into(self._manifest.paths[file], start, out)
            why = f"the file is cut short ({got} of {len(out)} bytes from {start} on)"
            number = (start + got) // self._manifest.block_bytes
        except FileNotFoundError:
            why = "the file is missing"
        self.read_bytes += got
        if got == len(out):
            return None
        if not self._others:
            raise self._corrupt(file, number, why)
        return why

    def _heal(self, file: int, number: int, out: memoryview, why: str) -> None:
        """Take a damaged block from another store."""
        error = self._corrupt(file, number, why)
        source = good_block(self._others, self._manifest, file, number, out)
        if source is None:
            raise error
        self.healed.append(Healed(error.file, number, error.tensors, source.url, str(error)))

    def _keep(self, file: int, number: int, data: bytes) -> None:
        self._kept[file, number] = data
        while len(self._kept) > CACHED_BLOCKS:
            self._kept.popitem(last=False)

    def _corrupt(self, file: int, number: int | None, why: str) -> CorruptData:
        return corrupt(self._manifest, file, number, why)


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


def _windows(copies: Iterable[_Copy], block: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of blocks that the copies (sorted by start) touch: merged where they meet, up to ``most``."""
    low = high = 0
    for copy in copies:
        if not len(copy.out):
            continue
        first, last = copy.start // block, -(-(copy.start + len(copy.out)) // block)
        if first > high:
            yield from _split(low, high, most)
            low = first
        high = max(high, last)
    yield from _split(low, high, most)


def _split(low: int, high: int, most: int) -> Iterator[tuple[int, int]]:
    for at in range(low, high, most):
        yield at, min(at + most, high)
