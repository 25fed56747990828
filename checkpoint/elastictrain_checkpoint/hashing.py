"""Two hashes over the same bytes, for two questions.

*Are these the bytes that were written?* Each file has an xxh3-64 per block of 1 MiB, checked on every read.
*Is this the same state?* The digest does not depend on the layout: every tensor is cut on a fixed grid of
`DIGEST_BLOCK_ELEMENTS` elements from its first one, each cell is hashed (xxh3-128), and SHA-256 combines
the cells with names, types and shapes. Whoever holds whole cells can hash them, so the digest of a live,
spread out state equals that of its checkpoint, and no bytes need to meet. xxh3 guards against accidents,
not against an adversary.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    total = hashlib.sha256()

    def add(*fields: bytes) -> None:
        for field in fields:
            total.update(struct.pack("<Q", len(field)))
            total.update(field)

    add(DIGEST_ALGORITHM.encode())
    for name in sorted(tensors):
        dtype, shape, hashes = tensors[name]
        item_bytes(dtype)
        want = cells(num_elements(shape)) * CELL_HASH_BYTES
        if len(hashes) != want:
            raise InvalidPiece(f"{name}: {len(hashes)} bytes of cell hashes, expected {want} for shape {list(shape)}")
        add(b"tensor", name.encode(), dtype.encode(), struct.pack(f"<{len(shape)}Q", *shape), hashes)
    for alias, target in sorted((aliases or {}).items()):
        add(b"alias", alias.encode(), target.encode())
    return total.hexdigest()


def block_sum(block: Any) -> int:
    """xxh3-64 of one block of a file."""
    return xxhash.xxh3_64_intdigest(block)


def reblock(buffers: Iterable[memoryview], sums: list[int]) -> Iterator[memoryview]:
    """Turn a stream of byte buffers into blocks of `SUM_BLOCK_BYTES` (the last may be shorter), summing each.

    A block is hashed right before it is handed on. What lies aligned in its buffer is not copied; the rest
    goes
    through one block of memory, which is used again: the consumer must be done with a block when it asks
    for the next.
    """
    rest = memoryview(bytearray(SUM_BLOCK_BYTES))
    filled = 0
    for buffer in buffers:
        at = 0
        while at < len(buffer):
            if not filled and len(buffer) - at >= SUM_BLOCK_BYTES:
                block = buffer[at : at + SUM_BLOCK_BYTES]
                at += SUM_BLOCK_BYTES
            else:
                take = min(len(buffer) - at, SUM_BLOCK_BYTES - filled)
                rest[filled : filled + take] = buffer[at : at + take]
                filled += take
                at += take
                if filled < SUM_BLOCK_BYTES:
                    continue
                block, filled = rest, 0
            sums.append(block_sum(block))
            yield block
    if filled:
        sums.append(block_sum(rest[:filled]))
        yield rest[:filled]


def pack_sums(sums: Sequence[int]) -> str:
    """Base64 of the sums as little-endian 64-bit integers."""
    return base64.b64encode(np.asarray(sums, dtype="<u8").tobytes()).decode()


def unpack_sums(text: str) -> Sums:
    """Inverse of `pack_sums`.

    Raises:
        ValueError: the text is not base64 of whole 64-bit integers.

    """
    return np.frombuffer(unbase64(text), dtype="<u8").astype(np.uint64)


def to_base64(data: bytes) -> str:
    """Base64 as text."""
    return base64.b64encode(data).decode()


def unbase64(text: str) -> bytes:
    """Strict base64.

    Raises:
        ValueError: the text is not base64.

    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not base64: {error}") from None


def root_sum(sums: Sums) -> str:
    """One hash for a whole file: xxh3-128 over its block sums, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(sums.astype("<u8").tobytes())
