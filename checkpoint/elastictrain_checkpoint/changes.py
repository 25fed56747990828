"""A background save with a base: read, hash, and then write only what has changed. Decides; the writing is `lazy`'s.

The hashes of all cells must be known before the first pack begins: the header of a pack says what is in it. So live
memory is read once to hash it, and what has changed a second time to write it. An update of the state that comes
meanwhile waits for the hashes (memory is read at memory speed; storage plays no part), and then copies, as ever, only
what is still to be written: of a save with little to write that is little. One that comes even before the base has been
read from its store finds the plan of a full save, and such a save it becomes.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from elastictrain_checkpoint.dtypes import item_bytes
from elastictrain_checkpoint.hashing import DIGEST_BLOCK_ELEMENTS, block_hashes, to_base64
from elastictrain_checkpoint.incremental import Base, Split, split
from elastictrain_checkpoint.pack import Piece, cut_piece, held_of
from elastictrain_checkpoint.part import Chunk, FileRecord, Part, PartTensor
from elastictrain_checkpoint.units import Plan, plan_boxes


@dataclass(frozen=True)
class Changes:
    """What a save with a base will write and what it refers to.

    Attributes:
        plan: the packs: what is unchanged but must move, then what has changed.
        splits: for every piece what becomes of it.
        used: the packs of the base that are referred to.
        cells: for every piece the hashes of its cells.

    """

    plan: Plan
    splits: list[Split]
    used: list[tuple[int, FileRecord]]
    cells: list[bytes]

    def part(self, files: Sequence[FileRecord], *, step: int, attempt: str, writer: str) -> Part:
        """The vote, when the packs are written: the same as `PackWriter` gives for these pieces and this base."""
        tensors: dict[str, PartTensor] = {}
        place = {number: at for at, (number, _) in enumerate(self.used)}
        for piece, found, hashes in zip(self.plan.pieces, self.splits, self.cells, strict=True):
            if piece.name not in tensors:
                tensors[piece.name] = PartTensor(dtype=piece.dtype, shape=list(piece.shape), chunks=[], cells=[])
            record = tensors[piece.name]
            record.cells.append((piece.start // DIGEST_BLOCK_ELEMENTS, to_base64(hashes)))
            for ref in found.references:
                record.chunks.extend(_moved(chunk, place) for chunk in ref.boxes(piece.shape, item_bytes(piece.dtype)))
        for number, pack in enumerate(self.plan.packs, len(self.used)):
            for name, at, offsets, sizes in pack.chunks:
                tensors[name].chunks.append((number, at, list(offsets), list(sizes)))
        every = [record for _, record in self.used] + list(files)
        return Part(step=step, attempt=attempt, writer=writer, files=every, tensors=tensors)


def _moved(chunk: Chunk, place: dict[int, int]) -> Chunk:
    file, at, offsets, sizes = chunk
    return place[file], at, offsets, sizes


def plan_changes(pieces: Sequence[Piece], base: Base, pack_bytes: int, stable: Container[int] = ()) -> Changes:
    """Read and hash the pieces, compare with the base, and decide which bytes go where. `stable`: as for `plan_units`.

    Raises:
        InvalidPiece: a piece that the format cannot hold, or pieces of one tensor that disagree.

    """
    for piece in pieces:
        cut_piece(piece)  # refused before anything is read
    cells = [block_hashes(piece.data, item_bytes(piece.dtype)) for piece in pieces]
    splits = split([held_of(piece, hashes) for piece, hashes in zip(pieces, cells, strict=True)], base)
    groups = [
        [
            (number, box)
            for number, (piece, runs) in enumerate(zip(pieces, kind, strict=True))
            for box in cut_piece(piece, runs)
        ]
        for kind in ([one.cold for one in splits], [one.hot for one in splits])
    ]
    used = sorted({ref.file for one in splits for ref in one.references})
    plan = plan_boxes(pieces, groups, pack_bytes, stable, several=True)
    return Changes(plan, splits, [(number, base.files[number]) for number in used], cells)
