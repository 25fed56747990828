"""Two hashes over the same bytes, for two questions.

*Are these the bytes that were written?* Each file has an xxh3-64 per block of 1 MiB, checked on every read.
*Is this the same state?* The digest does not depend on the layout: every tensor is cut on a fixed grid of
`DIGEST_BLOCK_ELEMENTS` elements from its first one, each cell is hashed (xxh3-128), and SHA-256 combines
the cells with names, types and shapes. Whoever holds whole cells can hash them, so the digest of a live,
spread out state equals that of its checkpoint, and no bytes need to meet. xxh3 guards against accidents,
not against an adversary.
"""

from __future__ import annotations

import binascii
import hashlib
import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.rope import as_rope, rope_bytes

DIGEST_BLOCK_ELEMENTS = 4096
CELL_HASH_BYTES = 16
SUM_BLOCK_BYTES = 1 << 20
DIGEST_ALGORITHM = f"sha256/xxh3-128/{DIGEST_BLOCK_ELEMENTS}"

Sums = NDArray[np.uint64]
_cell_hash = xxhash.xxh3_128_digest


def cells(num: int) -> int:
    """Cells of the digest grid that ``num`` elements fill or begin."""
    return -(-num // DIGEST_BLOCK_ELEMENTS)


def block_hashes(data: Any, itemsize: int) -> bytes:
    """Hashes of the grid cells of a run of elements that starts on the grid, 16 bytes per cell, in order.

    Args:
        data: C-contiguous buffer, or a list or tuple of them (see `elastictrain_checkpoint.Piece`); only the last
            cell of a tensor may be shorter than the grid.
        itemsize: bytes of one element.

    Runs of one tensor can be hashed apart and their results concatenated.

    Raises:
        InvalidPiece: ``data`` is no contiguous buffer of whole elements, or buffers that are broken off the grid.

    """
    step = DIGEST_BLOCK_ELEMENTS * itemsize
    rope = as_rope(data, "block_hashes", step)
    if rope_bytes(rope) % itemsize:
        raise InvalidPiece(f"{rope_bytes(rope)} bytes are not a whole number of elements of {itemsize} bytes")
    hashed = xxhash.xxh3_128_digest
    return b"".join([hashed(view[at : at + step]) for view in rope for at in range(0, len(view), step)])


def combine_digest(
    tensors: Mapping[str, tuple[str, Sequence[int], bytes]], aliases: Mapping[str, str] | None = None
) -> str:
    """Digest of a state, as 64 hexadecimal digits.

    Args:
        tensors: name → (dtype, shape, cell hashes of the whole tensor as from `block_hashes`).
        aliases: further name → name of the tensor that it is tied to.

    Every field is preceded by its length, so no two states give the same input to SHA-256.

    Raises:
        InvalidPiece: the hashes of a tensor do not cover it exactly.

    """
    fields = [DIGEST_ALGORITHM.encode()]
    known: dict[tuple[str, tuple[int, ...]], tuple[int, bytes, bytes]] = {}  # most tensors have a shape of many
    for name in sorted(tensors):
        dtype, shape, hashes = tensors[name]
        facts = known.get((dtype, tuple(shape)))
        if facts is None:
            item_bytes(dtype)
            want = cells(num_elements(shape)) * CELL_HASH_BYTES
            facts = want, dtype.encode(), struct.pack(f"<{len(shape)}Q", *shape)
            known[dtype, tuple(shape)] = facts
        want, type_bytes, shape_bytes = facts
        if len(hashes) != want:
            raise InvalidPiece(f"{name}: {len(hashes)} bytes of cell hashes, expected {want} for shape {list(shape)}")
        fields += (b"tensor", name.encode(), type_bytes, shape_bytes, hashes)
    for alias, target in sorted((aliases or {}).items()):
        fields += (b"alias", alias.encode(), target.encode())
    sizes = list(map(len, fields))
    packed = {size: struct.pack("<Q", size) for size in set(sizes)}
    total = hashlib.sha256()
    for at in range(0, len(fields), 4096):  # few large updates: a state may have very many small tensors
        before = map(packed.__getitem__, sizes[at : at + 4096])
        total.update(b"".join(itertools.chain.from_iterable(zip(before, fields[at : at + 4096], strict=True))))
    return total.hexdigest()


def block_sum(block: Any) -> int:
    """xxh3-64 of one block of a file."""
    return xxhash.xxh3_64_intdigest(block)


def block_sum_of(parts: Sequence[memoryview]) -> int:
    """`block_sum` of a block that lies in several buffers."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    total = xxhash.xxh3_64()
    for part in parts:
        total.update(part)
    return total.intdigest()


@dataclass(slots=True)
class Run:
    """Bytes of a stream, and the grid on which they are hashed for the digest while they pass.

    Attributes:
        view: flat bytes.
        cell_bytes: length of a cell of the digest grid; 0 if these bytes are in no cell. Cells begin with the view.
        cells: takes up the hashes of the view's cells, in order.

    """

    view: memoryview
    cell_bytes: int = 0
    cells: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Blocks:
    """A stream of blocks as `reblock` makes it, for `Store.create`.

    Attributes:
        runs: what the file shall hold.
        size_bytes: bytes of all of it.
        sums: the block sums; filled as the stream is consumed.

    """

    runs: Sequence[Run]
    size_bytes: int
    sums: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[memoryview]:
        return reblock(self.runs, self.sums)


def reblock(runs: Iterable[Run], sums: list[int]) -> Iterator[memoryview]:
    """Turn runs of bytes into blocks of `SUM_BLOCK_BYTES` (the last may be shorter), summing each.

    A block is hashed when the next one is asked for: whoever writes it reads memory that is far away anyway, and leaves
    in the processor's cache what is hashed then (a third less work than the other way round). What lies aligned in its
    run is not copied; the rest goes through one block of memory, which is used again: the consumer must be done with a
    block when it asks for the next, must not have changed it, and ``sums`` and the cells are whole when it was told
    that there is none.
    """
    rest = memoryview(bytearray(SUM_BLOCK_BYTES))
    filled = 0
    for run in runs:
        view, length = run.view, len(run.view)
        if filled + length < SUM_BLOCK_BYTES and length <= run.cell_bytes:  # one cell of a small tensor, in one block
            if length:
                run.cells.append(_cell_hash(view))
                rest[filled : filled + length] = view
                filled += length
            continue
        at = hashed = 0
        while at < length:
            take = min(length - at, SUM_BLOCK_BYTES - filled)
            if take == SUM_BLOCK_BYTES:
                block = view[at : at + take]
            else:
                rest[filled : filled + take] = view[at : at + take]
                filled += take
                if filled < SUM_BLOCK_BYTES:
                    _hash_cells(run, hashed, at + take)
                    break
                block, filled = rest, 0
            yield block
            sums.append(block_sum(block))
            at += take
            hashed = _hash_cells(run, hashed, at)
    if filled:
        yield rest[:filled]
        sums.append(block_sum(rest[:filled]))


def _hash_cells(run: Run, start: int, stop: int) -> int:
    """Hash the cells from ``start`` (a border of cells) that are whole at ``stop``; gives where the next begins."""
    step, view = run.cell_bytes, run.view
    if not step:
        return 0
    if stop < len(view):
        stop -= stop % step
    hashed = xxhash.xxh3_128_digest
    run.cells.extend([hashed(view[at : at + step]) for at in range(start, stop, step)])
    return stop


def pack_sums(sums: Sequence[int]) -> str:
    """Base64 of the sums as little-endian 64-bit integers."""
    return to_base64(np.asarray(sums, dtype="<u8").tobytes())


def unpack_sums(text: str) -> Sums:
    """Inverse of `pack_sums`.

    Raises:
        ValueError: the text is not base64 of whole 64-bit integers.

    """
    return np.frombuffer(unbase64(text), dtype="<u8").astype(np.uint64)


def to_base64(data: bytes) -> str:
    """Base64 as text."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def unbase64(text: str) -> bytes:
    """Strict base64.

    Raises:
        ValueError: the text is not base64.

    """
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:  # also `binascii.Error`
        raise ValueError(f"not base64: {error}") from None


def root_sum(sums: Sums) -> str:
    """One hash for a whole file: xxh3-128 over its block sums, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(sums.astype("<u8").tobytes())
