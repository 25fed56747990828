"""Incremental saves: what is as in an earlier step is referred to, not written again. The decisions are pure.

A piece is compared with the base cell by cell of the digest's grid: equal hash, equal content. The stored bytes of the
base are not read again for it; whoever reads them checks them, and `commit` refuses a pack that is missing or has
another size. Hence what is damaged in a pack is damaged in every step that refers to it: save without a base from time
to time, or keep a copy in another tier.

The rule, per piece (one writer's run of one tensor):

1. Runs of unchanged cells are found, and cut where the base's chunks end. References lead to the pack that holds the
   bytes, never to another reference, so a chain has one link however long the history.
2. A run that is not the whole piece counts from `MIN_RUN_BYTES` on, shrunk to whole rows, so that it is one box; the
   largest `MAX_RUNS` of a piece count. What lies between is written again. So a tensor gets at most one chunk more per
   `MIN_RUN_BYTES`, however it is changed.
3. A pack of which less than `MIN_LIVE` would still be in use is given up: what is unchanged in it is written anew, into
   packs of its own, apart from what has changed. So a store holds about twice the live bytes at most, and frozen and
   changing tensors that once shared a pack are soon apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from elastictrain_checkpoint import sidecar
from elastictrain_checkpoint.boxes import flat_range_to_boxes
from elastictrain_checkpoint.dtypes import item_bytes
from elastictrain_checkpoint.errors import CorruptData, InvalidPiece
from elastictrain_checkpoint.hashing import DIGEST_BLOCK_ELEMENTS, SUM_BLOCK_BYTES, unbase64
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.part import Chunk, FileRecord, Part
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.table import ChunkTable

MIN_RUN_BYTES = 256 << 10
MAX_RUNS = 256
MIN_LIVE = 0.5

Run = tuple[int, int]
"""Elements [start, stop) of a tensor, row-major."""


@dataclass(frozen=True, eq=False)
class Base:
    """What a later save needs to know of an earlier step: where its elements lie, and the hashes of its cells.

    Attributes:
        step: the earlier step.
        files: its packs, as a later step refers to them.
        tensors: name → (dtype, shape).
        table: where every element lies.
        cells: name → hashes of the tensor's cells, 16 bytes each.

    """

    step: int
    files: tuple[FileRecord, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(repr=False)
    table: ChunkTable = field(repr=False)
    cells: dict[str, bytes] = field(repr=False)

    @classmethod
    def read(cls, store: Store, manifest: Manifest) -> Base:
        """The base that a committed step is, from the cell hashes stored beside it.

        Raises:
            InvalidPiece: the step was committed without them.
            CorruptData: they are missing or damaged.

        """
        if manifest.cells is None:
            raise InvalidPiece(
                f"step {manifest.step} was committed without its cell hashes and cannot be a base; "
                f"commit(..., cells=True) stores them"
            )
        path = sidecar.sidecar_path(sidecar.CELLS, manifest.step, manifest.cells)
        try:
            data = sidecar.check_sidecar(manifest.cells, store.read_all(path))
            cells = sidecar.decode_cells(manifest.tensors, data)
        except FileNotFoundError:
            raise CorruptData(f"step {manifest.step}: {path} is missing", file=path) from None
        except ValueError as error:
            raise CorruptData(f"step {manifest.step}: {path}: {error}", file=path) from None
        return cls._of(manifest, cells)

    @classmethod
    def of_parts(cls, manifest: Manifest, parts: Sequence[Part]) -> Base:
        """The same from the parts that were committed, without reading anything.

        Raises:
            InvalidPiece: these parts do not make that step.

        """
        found: dict[str, list[tuple[int, bytes]]] = {name: [] for name in manifest.tensors}
        for part in parts:
            for name, share in part.tensors.items():
                found.setdefault(name, []).extend((first, unbase64(text)) for first, text in share.cells)
        joined = b"".join(run for name in sorted(found) for _, run in sorted(found[name]))
        try:
            cells = sidecar.decode_cells(manifest.tensors, joined)
        except ValueError as error:
            raise InvalidPiece(f"these are not the parts of step {manifest.step}: {error}") from None
        return cls._of(manifest, cells)

    @classmethod
    def _of(cls, manifest: Manifest, cells: dict[str, bytes]) -> Base:
        if manifest.block_bytes != SUM_BLOCK_BYTES:
            raise InvalidPiece(
                f"step {manifest.step} has sums for blocks of {manifest.block_bytes} bytes, this library writes "
                f"{SUM_BLOCK_BYTES}: it cannot be a base; save without one"
            )
        files = zip(manifest.files, manifest.paths, strict=True)
        referred = tuple(file.model_copy(update={"path": f"../{path}"}) for file, path in files)
        return cls(manifest.step, referred, manifest.tensors, manifest.table, cells)


def check_base(base: Base | Manifest, step: int) -> None:
    """Whether it can be the base of a save of ``step``.

    Raises:
        InvalidPiece: it is not an earlier step.

    """
    if base.step >= step:
        raise InvalidPiece(f"base is step {base.step}, expected one before step {step}")


@dataclass(frozen=True)
class Held:
    """What a writer holds of one tensor: a run that starts on the digest grid, and the hashes of its cells."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    hashes: bytes = field(repr=False)


@dataclass(frozen=True)
class Reference:
    """Elements [start, stop) of a tensor lie in a pack of the base from byte ``at`` on."""

    start: int
    stop: int
    file: int
    at: int

    def boxes(self, shape: Sequence[int], itemsize: int) -> Iterator[Chunk]:
        """The boxes of the run, as chunks of the base's files."""
        at = self.at
        for offsets, sizes in flat_range_to_boxes(shape, self.start, self.stop):
            yield self.file, at, list(offsets), list(sizes)
            at += math.prod(sizes) * itemsize


@dataclass(frozen=True)
class Split:
    """What becomes of one `Held`: referred to, written anew though unchanged, written because it changed."""

    references: tuple[Reference, ...]
    cold: tuple[Run, ...]
    hot: tuple[Run, ...]


def split(held: Sequence[Held], base: Base) -> list[Split]:
    """Decide for all that one writer holds, by the rule above."""
    number = {name: i for i, name in enumerate(base.table.names)}
    covered, reused = np.zeros(len(base.files)), np.zeros(len(base.files))
    chosen = []
    for one in held:
        rows = _rows(one, base, number)
        for row in rows:
            low, high = max(one.start, int(base.table.flat_start[row])), min(one.stop, int(base.table.flat_stop[row]))
            covered[base.table.file[row]] += (high - low) * item_bytes(one.dtype)
        chosen.append(_references(one, base, rows))
        for ref in chosen[-1]:
            reused[ref.file] += (ref.stop - ref.start) * item_bytes(one.dtype)
    given_up = set(np.flatnonzero(_live(base) * reused < MIN_LIVE * covered).tolist())
    out = []
    for one, found in zip(held, chosen, strict=True):
        cold = _joined([(ref.start, ref.stop) for ref in found if ref.file in given_up])
        hot = _rest(one, [(ref.start, ref.stop) for ref in found])
        out.append(Split(tuple(ref for ref in found if ref.file not in given_up), cold, hot))
    return out


def _live(base: Base) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Which fraction of the tensors in each pack the base itself still uses."""
    used = np.bincount(base.table.file, weights=base.table.size_bytes, minlength=len(base.files))
    held = np.array([file.size_bytes - file.data_start for file in base.files], dtype=np.float64)
    live: np.ndarray[tuple[int], np.dtype[np.float64]] = used / np.maximum(held, 1.0)
    return live


def _rows(one: Held, base: Base, number: dict[str, int]) -> list[int]:
    """Chunks of the base that hold elements of ``one``, in flat order; boxes that are no flat run cannot be reused."""
    if base.tensors.get(one.name) != (one.dtype, one.shape):
        return []
    table = base.table
    first, last = (int(at) for at in table.bounds[number[one.name] : number[one.name] + 2])
    near = (table.flat_start[first:last] < one.stop) & (table.flat_stop[first:last] > one.start)
    return [int(row) for row in np.flatnonzero(near & table.dense[first:last]) + first]


def _references(one: Held, base: Base, rows: Sequence[int]) -> list[Reference]:
    if not rows:
        return []
    runs = _unchanged(one, base.cells[one.name])
    whole = runs == [(one.start, one.stop)]
    item = item_bytes(one.dtype)
    table = base.table
    found = []
    for row in rows:
        low, high = int(table.flat_start[row]), int(table.flat_stop[row])
        for start, stop in runs:
            if start < high and stop > low:
                start, stop = max(start, low), min(stop, high)
                if not whole:
                    start, stop = _whole_rows(one, start, stop)
                if stop > start and (whole or (stop - start) * item >= MIN_RUN_BYTES):
                    found.append(
                        Reference(start, stop, int(table.file[row]), int(table.start[row]) + (start - low) * item)
                    )
    if len(found) > MAX_RUNS:
        found = sorted(found, key=lambda ref: ref.start - ref.stop)[:MAX_RUNS]
    return sorted(found, key=lambda ref: ref.start)


def _unchanged(one: Held, before: bytes) -> list[Run]:
    """Longest runs of cells with the same hash as in the base."""
    first = one.start // DIGEST_BLOCK_ELEMENTS
    now = np.frombuffer(one.hashes, dtype=np.uint64).reshape(-1, 2)
    then = np.frombuffer(before, dtype=np.uint64).reshape(-1, 2)[first : first + len(now)]
    same = np.zeros(len(now) + 2, dtype=np.int8)
    same[1:-1] = (now == then).all(axis=1)
    edges = np.flatnonzero(np.diff(same))
    cell = DIGEST_BLOCK_ELEMENTS
    return [
        (one.start + int(a) * cell, min(one.start + int(b) * cell, one.stop))
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def _whole_rows(one: Held, start: int, stop: int) -> Run:
    """Shrink a run to whole rows of the outermost axis whose rows are short; where the piece itself ends, it ends."""
    row = 1
    for dim in reversed(one.shape[1:]):
        if row * dim * item_bytes(one.dtype) > MIN_RUN_BYTES:
            break
        row *= dim
    if start != one.start:
        start = -(-start // row) * row
    if stop != one.stop:
        stop = stop // row * row
    return start, stop


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    out: list[Run] = []
    for start, stop in runs:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def _rest(one: Held, runs: Sequence[Run]) -> tuple[Run, ...]:
    """What of ``one`` lies in none of these runs. An empty tensor is an empty run: it needs a place in a file."""
    if one.start == one.stop:
        return ((one.start, one.stop),)
    edges = [one.start, *(edge for run in runs for edge in run), one.stop]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, stop) for start, stop in pairs if start < stop)
