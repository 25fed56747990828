"""Packs cut into units: what the background writer takes at a time, and what a copy saves. Pure.

A unit is one hash block of a pack file, so its sum is one call, and small tensors share one. The digest's cells are
hashed from the same bytes, in the same pass: live memory is read once.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from elastictrain_checkpoint import hashing
from elastictrain_checkpoint.boxes import strides
from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.hashing import CELL_HASH_BYTES, DIGEST_BLOCK_ELEMENTS, cells, to_base64
from elastictrain_checkpoint.header import pack_header
from elastictrain_checkpoint.pack import BoxData, Piece, cut_pieces, plan_packs
from elastictrain_checkpoint.part import FileRecord, Part, PartTensor
from elastictrain_checkpoint.rope import rope_bytes

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of a unit that lie together in memory.

    Attributes:
        source: where they are.
        at: their place in the unit.
        piece: number of the piece that they belong to; -1 for the header of a pack.
        flat: their place in the tensor, in bytes.

    """

    source: Bytes
    at: int
    piece: int
    flat: int


@dataclass(frozen=True, slots=True)
class Unit:
    """One hash block of a pack: its size in bytes, where its bytes come from, and whether any of them may change."""

    size: int
    runs: tuple[Run, ...]
    live: bool


@dataclass(frozen=True)
class PlannedPack:
    """A pack as it will be: number of its first unit, its units, its length and where its tensors begin."""

    first: int
    units: list[Unit]
    size_bytes: int
    data_start: int
    chunks: list[tuple[str, int, tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Plan:
    """Everything that a save will write. `state_bytes`: of the pieces, without headers."""

    pieces: list[Piece]
    packs: list[PlannedPack]
    state_bytes: int

    @property
    def units(self) -> list[Unit]:
        """All units, in the order in which they are written."""
        return [unit for pack in self.packs for unit in pack.units]


def plan_units(pieces: Sequence[Piece], pack_bytes: int, stable: Container[int] = ()) -> Plan:
    """Decide which bytes go where; nothing is read. `stable`: numbers of the pieces whose bytes never change.

    Raises:
        InvalidPiece: a piece that the format cannot hold, or pieces of one tensor that disagree.

    """
    facts: dict[str, tuple[str, tuple[int, ...]]] = {}
    for piece in pieces:
        seen = facts.setdefault(piece.name, (piece.dtype, tuple(piece.shape)))
        if seen != (piece.dtype, tuple(piece.shape)):
            raise InvalidPiece(
                f"{piece.name}: pieces disagree, {seen[0]} {list(seen[1])} and {piece.dtype} {list(piece.shape)}"
            )
    boxes = [(number, box) for number, found in enumerate(cut_pieces(pieces)) for box in found]
    return plan_boxes(pieces, [boxes], pack_bytes, stable)


def plan_boxes(
    pieces: Sequence[Piece],
    groups: Sequence[Sequence[tuple[int, BoxData]]],
    pack_bytes: int,
    stable: Container[int] = (),
    *,
    several: bool = False,
) -> Plan:
    """The same for boxes of the pieces, each with the number of its piece. No pack holds boxes of two groups.
    `several`: the save has a base: see `plan_packs` and, for what a base means to stock readers, `pack_header`.
    """
    place: dict[int, tuple[int, int]] = {}
    for number, box in (one for group in groups for one in group):
        step, item = strides(pieces[number].shape), item_bytes(pieces[number].dtype)
        place[id(box)] = number, sum(o * s for o, s in zip(box.box[0], step, strict=True)) * item
    packs: list[PlannedPack] = []
    first = 0
    for group in groups:
        for planned in plan_packs([box for _, box in group], pack_bytes, several=several):
            pack = _plan_pack(planned, place, first, stable, rest_elsewhere=several)
            first += len(pack.units)
            packs.append(pack)
    return Plan(list(pieces), packs, sum(rope_bytes(box.rope) for group in groups for _, box in group))


def _plan_pack(
    boxes: Sequence[BoxData],
    place: Mapping[int, tuple[int, int]],
    first: int,
    stable: Container[int],
    *,
    rest_elsewhere: bool,
) -> PlannedPack:
    header = pack_header(boxes, rest_elsewhere=rest_elsewhere)
    runs: list[tuple[Bytes, int, int]] = [(np.frombuffer(header, dtype=np.uint8), -1, 0)]
    chunks = []
    at = len(header)
    for box in boxes:
        number, flat = place[id(box)]
        chunks.append((box.name, at, *box.box))
        for view in box.rope:
            runs.append((np.frombuffer(view, dtype=np.uint8), number, flat))
            flat += len(view)
        at += box.size_bytes
    return PlannedPack(first, cut_units(runs, stable), at, len(header), chunks)


def cut_units(runs: Sequence[tuple[Bytes, int, int]], stable: Container[int] = ()) -> list[Unit]:
    """Cut a stream of runs (source, piece, flat byte) into units of one hash block; the last may be shorter."""
    units: list[Unit] = []
    gathered: list[Run] = []
    filled = 0
    block = hashing.SUM_BLOCK_BYTES
    for source, piece, flat in runs:
        at = 0
        while at < len(source):
            size = min(len(source) - at, block - filled)
            gathered.append(Run(source[at : at + size], filled, piece, flat + at))
            at, filled = at + size, filled + size
            if filled == block:
                units.append(_unit(filled, gathered, stable))
                gathered, filled = [], 0
    if filled:
        units.append(_unit(filled, gathered, stable))
    return units


def _unit(size: int, runs: Sequence[Run], stable: Container[int]) -> Unit:
    return Unit(size, tuple(runs), any(run.piece >= 0 and run.piece not in stable for run in runs))


def gather(unit: Unit, out: Bytes) -> None:
    """Copy the bytes of a unit together, into the first `unit.size` bytes of `out`."""
    for run in unit.runs:
        out[run.at : run.at + len(run.source)] = run.source


@dataclass(slots=True)
class _Cells:
    item_step: int
    first: int
    total: int
    hashes: bytearray
    started: dict[int, dict[int, bytes]] = field(default_factory=dict)


class CellHashes:
    """The cell hashes of pieces whose bytes come unit by unit, in any order: a cell that is broken is kept until all of
    it is there (at most one cell at each end of a run).
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._of: list[_Cells] = []
        for piece in pieces:
            item = item_bytes(piece.dtype)
            views = piece.data if isinstance(piece.data, list | tuple) else [piece.data]
            count = cells(sum(memoryview(view).nbytes for view in views) // item)
            total = num_elements(piece.shape) * item
            first = piece.start // DIGEST_BLOCK_ELEMENTS
            self._of.append(_Cells(DIGEST_BLOCK_ELEMENTS * item, first, total, bytearray(count * CELL_HASH_BYTES)))

    def add(self, unit: Unit, data: memoryview) -> None:
        """Hash what the unit holds; `data` are its bytes."""
        for run in unit.runs:
            if run.piece >= 0:
                self._run(self._of[run.piece], run.flat, data[run.at : run.at + len(run.source)])

    def _run(self, of: _Cells, flat: int, data: memoryview) -> None:
        hashed, step, end = xxhash.xxh3_128_digest, of.item_step, flat + len(data)
        low, high = -(-flat // step) * step, end if end == of.total else end // step * step
        if low >= high:
            self._broken(of, flat, data)
            return
        if flat < low:
            self._broken(of, flat, data[: low - flat])
        whole = b"".join([hashed(data[at : at + step]) for at in range(low - flat, high - flat, step)])
        at = (low // step - of.first) * CELL_HASH_BYTES
        of.hashes[at : at + len(whole)] = whole
        if high < end:
            self._broken(of, high, data[high - flat :])

    def _broken(self, of: _Cells, flat: int, data: memoryview) -> None:
        """Bytes of cells that do not lie whole in these."""
        hashed, step = xxhash.xxh3_128_digest, of.item_step
        at = 0
        while at < len(data):
            cell, inside = divmod(flat + at, step)
            whole = min(step, of.total - cell * step)
            take = min(whole - inside, len(data) - at)
            parts = of.started.setdefault(cell, {})
            parts[inside] = bytes(data[at : at + take])
            if sum(map(len, parts.values())) == whole:
                value = hashed(b"".join(parts[key] for key in sorted(of.started.pop(cell))))
                place = (cell - of.first) * CELL_HASH_BYTES
                of.hashes[place : place + CELL_HASH_BYTES] = value
            at += take

    def of_piece(self, number: int) -> tuple[int, str] | None:
        """(first cell, base64 of the hashes) as a part has them; None for a piece without elements.

        Raises:
            ValueError: bytes of the piece have not come yet.

        """
        of = self._of[number]
        if of.started:
            raise ValueError(f"{self._pieces[number].name}: cells {sorted(of.started)} are not whole")
        return (of.first, to_base64(bytes(of.hashes))) if of.hashes else None


def make_part(
    plan: Plan, files: Sequence[FileRecord], hashes: CellHashes, *, step: int, attempt: str, writer: str
) -> Part:
    """The vote for a plan whose packs are written: the same as `PackWriter` gives for these pieces."""
    tensors: dict[str, PartTensor] = {}
    for number, piece in enumerate(plan.pieces):
        record = tensors.get(piece.name)
        if record is None:
            record = tensors[piece.name] = PartTensor(piece.dtype, list(piece.shape), [], [])
        found = hashes.of_piece(number)
        if found is not None:
            record.cells.append(found)
    for number, pack in enumerate(plan.packs):
        for name, at, offsets, sizes in pack.chunks:
            tensors[name].chunks.append((number, at, list(offsets), list(sizes)))
    return Part(step=step, attempt=attempt, writer=writer, files=list(files), tensors=tensors)
