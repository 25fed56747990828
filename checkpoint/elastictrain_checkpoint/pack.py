"""Packs: immutable safetensors files, streamed, one writer each.

A pack is a plain safetensors file, so any tool can open it. Three things are chosen within that format: the
header is padded to 4 KiB, tensors are ordered by the size of their elements (all stay aligned), and
``DCP_SHARDING_INFO`` says where each box lies, so that stock ``torch.distributed.checkpoint`` loads the
attempt's folder as it is; of a step with a base, which refers to packs of other steps, only what lies in this one
(see `pack_header`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elastictrain_checkpoint.boxes import Box, flat_range_to_boxes, strides
from elastictrain_checkpoint.collector import no_collections
from elastictrain_checkpoint.dtypes import as_bytes, item_bytes, num_elements
from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.hashing import (
    DIGEST_BLOCK_ELEMENTS,
    Blocks,
    Run,
    block_hashes,
    pack_sums,
    root_sum,
    to_base64,
    unpack_sums,
)
from elastictrain_checkpoint.header import pack_header
from elastictrain_checkpoint.incremental import Base, Held, check_base, split
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.part import FileRecord, Part, PartTensor, check_names, check_tensor_names
from elastictrain_checkpoint.paths import step_folder
from elastictrain_checkpoint.rope import Rope, as_rope, cut_rope, rope_bytes
from elastictrain_checkpoint.store import Store

DEFAULT_PACK_BYTES = 512 << 20


@dataclass(frozen=True)
class Piece:
    """A flat run of elements of one tensor.

    Attributes:
        name: the tensor's name, the same for every piece of it.
        dtype: safetensors name, "F32", "BF16", …
        shape: shape of the *whole* tensor, row-major.
        start: first element of the run; on the digest grid (`DIGEST_BLOCK_ELEMENTS`).
        data: C-contiguous buffer of the elements, or a list or tuple of buffers that hold them one after the other,
            each but the last a whole multiple of `DIGEST_BLOCK_ELEMENTS` elements. The run ends on the grid or with
            the tensor. Nothing is copied: the buffers must not change until the piece is written.

    The fewer pieces a tensor has, the fewer packs: a pack holds one box of a tensor at most.

    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    data: Any = field(repr=False)


@dataclass(slots=True)
class BoxData:
    """A box of one tensor and its bytes, row-major: what a pack holds under one key.

    Attributes:
        name, dtype, shape: as of the piece.
        box: where it lies in the tensor.
        rope: where its bytes lie.
        cells: takes up the hashes of the digest's cells when the box is written; None if the box is but a part of its
            piece, which ends inside of cells.
        size_bytes: bytes of the box; counted if not given.

    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    rope: Rope = field(repr=False)
    cells: list[bytes] | None = field(default=None, repr=False)
    size_bytes: int = -1

    def __post_init__(self) -> None:
        if self.size_bytes < 0:
            self.size_bytes = rope_bytes(self.rope)


@no_collections()
def cut_pieces(pieces: Sequence[Piece]) -> list[list[BoxData]]:
    """`cut_piece` for each. A state may have thousands of small tensors of a few shapes: what depends on these
    alone is worked out once.

    Raises:
        InvalidPiece: as from `cut_piece`.

    """
    check_tensor_names([piece.name for piece in pieces])
    kinds: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], Box, int]] = {}
    # (True, 2) is equal to (1, 2), and so are NumPy's numbers; only plain ones are looked up by what they are equal to.
    plain = set(map(type, itertools.chain.from_iterable(piece.shape for piece in pieces))) <= {int}
    out = []
    for piece in pieces:
        data = piece.data
        if not plain or piece.start or type(piece.shape) is not tuple or isinstance(data, list | tuple):
            out.append(cut_piece(piece))
            continue
        kind = kinds.get((piece.dtype, piece.shape))
        if kind is None:
            size = num_elements(piece.shape) * item_bytes(piece.dtype)
            kind = kinds[piece.dtype, piece.shape] = piece.shape, ((0,) * len(piece.shape), piece.shape), size
        view = as_bytes(data, piece.name)
        shape, box, size = kind
        if len(view) == size:  # the whole tensor, by far the most frequent
            out.append([BoxData(piece.name, piece.dtype, shape, box, (view,) if size else (), [], size)])
        else:
            out.append(cut_piece(piece))
    return out


def cut_piece(piece: Piece, runs: Sequence[tuple[int, int]] | None = None) -> list[BoxData]:
    """Check a piece and cut it, or only these runs [start, stop) of its elements, into boxes, without copying.

    Raises:
        InvalidPiece: unknown type, run outside the tensor, or an end or a break of the run off the digest grid.

    """
    check_tensor_names((piece.name,))
    size = item_bytes(piece.dtype)
    count = num_elements(piece.shape)
    rope = as_rope(piece.data, piece.name, DIGEST_BLOCK_ELEMENTS * size)
    run_bytes = rope_bytes(rope)
    elements, odd = divmod(run_bytes, size)
    start, stop = piece.start, piece.start + elements
    if runs is None and not start and elements == count and not odd:  # the whole tensor, by far the most frequent
        shape = tuple(piece.shape)
        return [BoxData(piece.name, piece.dtype, shape, ((0,) * len(shape), shape), rope, [])]
    if odd:
        raise InvalidPiece(f"{piece.name}: {run_bytes} bytes are not whole elements of {piece.dtype} ({size} bytes)")
    if not 0 <= start <= stop <= count:
        raise InvalidPiece(
            f"{piece.name}: elements [{start}, {stop}) do not lie in shape {list(piece.shape)} ({count} elements)"
        )
    off = [at for at in (start, stop) if at % DIGEST_BLOCK_ELEMENTS and at != count]
    if off and elements:
        raise InvalidPiece(
            f"{piece.name}: elements [{start}, {stop}) of {count}: {off[0]} is neither a multiple of "
            f"{DIGEST_BLOCK_ELEMENTS} nor the tensor's end; move the cut to the digest grid"
        )
    step = strides(piece.shape)
    out = []
    boxes = [
        box for run in ([(start, stop)] if runs is None else runs) for box in flat_range_to_boxes(piece.shape, *run)
    ]
    for offsets, sizes in boxes:
        at = (sum(o * s for o, s in zip(offsets, step, strict=True)) - start) * size if elements else 0
        run = cut_rope(rope, at, at + math.prod(sizes) * size)
        out.append(BoxData(piece.name, piece.dtype, tuple(piece.shape), (offsets, sizes), run))
    return [replace(out[0], cells=[])] if runs is None and len(out) == 1 else out


@no_collections()
def plan_packs(boxes: Sequence[BoxData], target_bytes: int, *, several: bool = False) -> list[list[BoxData]]:
    """Share boxes out to packs: at most one box of a tensor in each, filled up to about the target.

    ``several``: more boxes of a tensor may share a pack. Stock readers want one; a pack that holds only what has
    changed is nothing that they could load.

    First fit, in the order given; inside a pack, larger elements first. Pure and deterministic.
    """
    packs: list[list[BoxData]] = []
    names: list[set[str]] = []
    room: list[int] = []
    for box in boxes:
        size = box.size_bytes
        for number in range(len(packs)):
            if (several or box.name not in names[number]) and size <= room[number]:
                break
        else:
            number = len(packs)
            packs.append([])
            names.append(set())
            room.append(target_bytes)
        packs[number].append(box)
        names[number].add(box.name)
        room[number] -= size
    return [sorted(pack, key=lambda box: -item_bytes(box.dtype)) for pack in packs]


def write_pack(store: Store, path: str, boxes: Sequence[BoxData], *, rest_elsewhere: bool = False) -> FileRecord:
    """Stream one pack to ``path``; durable on return. The record's path is the last two segments. `rest_elsewhere`:
    see `pack_header`.

    Raises:
        FileExistsError: pack names are used once.
        OSError: storage failed.

    """
    header = pack_header(boxes, rest_elsewhere=rest_elsewhere)
    runs = [Run(memoryview(header))]
    for box in boxes:
        if box.cells is None:
            runs += [Run(view) for view in box.rope]
        else:
            step = DIGEST_BLOCK_ELEMENTS * item_bytes(box.dtype)
            for view in box.rope:
                runs.append(Run(view, step, box.cells))
    blocks = Blocks(runs, len(header) + sum(box.size_bytes for box in boxes))
    size = store.create(path, blocks)
    return record_of(path, size, len(header), blocks.sums)


def record_of(path: str, size_bytes: int, data_start: int, sums: Sequence[int]) -> FileRecord:
    """The record of a pack that was written to ``path`` in the store, with the sums of its blocks."""
    packed = pack_sums(sums)
    return FileRecord(
        path="/".join(path.split("/")[-2:]),
        size_bytes=size_bytes,
        data_start=data_start,
        sums=packed,
        root=root_sum(unpack_sums(packed)),
    )


class PackWriter:
    """Writes the packs of one writer in one attempt.

    Args:
        store: where.
        step: the step that the state belongs to.
        attempt: name that no other attempt at this step has, for example random digits.
        writer: name that no other writer in this attempt has.
        pack_bytes: packs are filled up to about this size; a single larger box makes a larger pack.
        base: an earlier step; what is as there is referred to and not written (see
            `elastictrain_checkpoint.incremental`). It must not be removed before this step is committed: whoever
            commits also prunes, or pins it meanwhile.

    Raises:
        InvalidPiece: a name that no path can have, or a base that is not an earlier step with cell hashes.
        CorruptData: the cell hashes of the base are damaged.

    """

    def __init__(
        self,
        store: Store,
        *,
        step: int,
        attempt: str,
        writer: str,
        pack_bytes: int = DEFAULT_PACK_BYTES,
        base: Base | Manifest | None = None,
    ) -> None:
        check_names(attempt=attempt, writer=writer)
        if base is not None:
            check_base(base, step)
        self._base = Base.read(store, base) if isinstance(base, Manifest) else base
        self._store = store
        self._step = step
        self._attempt = attempt
        self._writer = writer
        self._pack_bytes = pack_bytes
        self._next_pack = 0
        self._folder = f"{step_folder(step)}/{attempt}"

    def write(self, pieces: Sequence[Piece]) -> Part:
        """Write pieces into new packs, durable on return, and give the vote for them. May be called again.

        Raises:
            InvalidPiece: a piece that the format cannot hold; then nothing was written.
            FileExistsError: another writer of the same name is, or was, in this attempt.
            OSError: storage failed; packs that were finished before stay as garbage.

        """
        tensors, boxes, cells = _plan(pieces, hash_first=self._base is not None)
        if self._base is None:
            files = self._write_packs(plan_packs(boxes, self._pack_bytes), tensors, [])
        else:
            held = [(piece, b"".join(hashed)) for piece, hashed in zip(pieces, cells, strict=True)]
            files = self._write_changes(held, self._base, tensors)
        with no_collections():
            for piece, hashed in zip(pieces, cells, strict=True):
                if hashed:
                    first = piece.start // DIGEST_BLOCK_ELEMENTS
                    tensors[piece.name].cells.append((first, to_base64(b"".join(hashed))))
            return Part(step=self._step, attempt=self._attempt, writer=self._writer, files=files, tensors=tensors)

    def _write_changes(
        self, pieces: Sequence[tuple[Piece, bytes]], base: Base, tensors: Mapping[str, PartTensor]
    ) -> list[FileRecord]:
        """Write what is not as in the base; what is unchanged but must move goes into packs of its own."""
        splits = split([held_of(piece, hashes) for piece, hashes in pieces], base)
        used = sorted({ref.file for one in splits for ref in one.references})
        for (piece, _), one in zip(pieces, splits, strict=True):
            for ref in one.references:
                for file, *rest in ref.boxes(piece.shape, item_bytes(piece.dtype)):
                    tensors[piece.name].chunks.append((used.index(file), *rest))  # type: ignore[arg-type]
        files = [base.files[number] for number in used]
        for kind in ("cold", "hot"):
            runs = zip(pieces, (getattr(one, kind) for one in splits), strict=True)
            boxes = [box for (piece, _), wanted in runs for box in cut_piece(piece, wanted)]
            files = self._write_packs(plan_packs(boxes, self._pack_bytes, several=True), tensors, files)
        return files

    def _write_packs(
        self, packs: Sequence[Sequence[BoxData]], tensors: Mapping[str, PartTensor], files: list[FileRecord]
    ) -> list[FileRecord]:
        """Write packs and enter their chunks; gives ``files`` with theirs after them."""
        files = list(files)
        for pack in packs:
            name = f"{self._writer}-{self._next_pack:02d}.safetensors"
            self._next_pack += 1
            path, apart = f"{self._folder}/{name}", self._base is not None
            files.append(write_pack(self._store, path, pack, rest_elsewhere=apart))
            at = files[-1].data_start
            for box in pack:
                offsets, sizes = box.box
                tensors[box.name].chunks.append((len(files) - 1, at, list(offsets), list(sizes)))
                at += box.size_bytes
        return files


@no_collections()
def _plan(
    pieces: Sequence[Piece], *, hash_first: bool
) -> tuple[dict[str, PartTensor], list[BoxData], list[list[bytes]]]:
    """Tensors without chunks and cells; boxes; and for each piece the list that holds its cell hashes once all boxes
    are written. A piece that is one box is hashed while it is written, when it passes through the processor's cache;
    with ``hash_first`` all hashes are there at once, and nothing is hashed while it is written.
    """
    tensors: dict[str, PartTensor] = {}
    boxes: list[BoxData] = []
    cells: list[list[bytes]] = []
    for piece, found in zip(pieces, cut_pieces(pieces), strict=True):
        boxes += found
        hashed = found[0].cells if found else []
        if hashed is None or hash_first:
            hashed = [block_hashes(piece.data, item_bytes(piece.dtype))]
        cells.append(hashed)
        shape = list(piece.shape)
        record = tensors.get(piece.name)
        if record is None:
            tensors[piece.name] = PartTensor(piece.dtype, shape, [], [])
        elif (record.dtype, record.shape) != (piece.dtype, shape):
            raise InvalidPiece(
                f"{piece.name}: pieces disagree, {record.dtype} {record.shape} and {piece.dtype} {shape}"
            )
    return tensors, boxes, cells


def held_of(piece: Piece, hashes: bytes) -> Held:
    """What a writer holds of a tensor, as `incremental.split` asks for it."""
    size = item_bytes(piece.dtype)
    elements = rope_bytes(as_rope(piece.data, piece.name, DIGEST_BLOCK_ELEMENTS * size)) // size
    return Held(piece.name, piece.dtype, tuple(piece.shape), piece.start, piece.start + elements, hashes)
