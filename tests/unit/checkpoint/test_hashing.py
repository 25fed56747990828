"""The digest's definition, written out; and pieces that contradict each other."""

from __future__ import annotations

import hashlib
import itertools
import struct

import numpy as np
import pytest

from elastictrain_checkpoint import InvalidPiece, PackWriter, Piece, combine_digest
from tests.unit.checkpoint.build import memory_store

Tensors = dict[str, tuple[str, list[int], bytes]]


def plain_digest(tensors: Tensors, aliases: dict[str, str]) -> str:
    """Field by field, each after its length: what every version must give, or stored digests mean nothing."""
    fields = [b"sha256/xxh3-128/4096"]
    for name, (dtype, shape, hashes) in sorted(tensors.items()):
        sizes = b"".join(struct.pack("<Q", size) for size in shape)
        fields += [b"tensor", name.encode(), dtype.encode(), sizes, hashes]
    for alias, target in sorted(aliases.items()):
        fields += [b"alias", alias.encode(), target.encode()]
    total = hashlib.sha256()
    for field in fields:
        total.update(struct.pack("<Q", len(field)) + field)
    return total.hexdigest()


def test_the_digest_is_as_it_is_defined_whatever_tensors_have_in_common() -> None:
    shapes = ([], [0], [7], [3, 5], [5, 3], [15], [70, 70], [1, 4900])
    tensors: Tensors = {}
    for number, (dtype, shape) in enumerate(itertools.product(("F32", "F64", "U8", "F32"), shapes)):
        cells = -(-int(np.prod(shape)) // 4096)
        tensors[f"{'long/' * (number % 4)}{number}"] = dtype, list(shape), bytes([number]) * 16 * cells
    aliases = {"b": "0", "a": "long/1"}
    assert combine_digest(tensors, aliases) == plain_digest(tensors, aliases)
    assert combine_digest(tensors) == plain_digest(tensors, {})
    tensors["0"] = "F32", [], b"only 8 b"
    with pytest.raises(InvalidPiece, match=r"^0: 8 bytes of cell hashes, expected 16 for shape \[\]$"):
        combine_digest(tensors)


def test_so_many_tensors_that_they_are_hashed_in_portions() -> None:
    tensors: Tensors = {f"t{number}": ("F32", [number % 3], b"h" * 16 * (number % 3 > 0)) for number in range(2000)}
    assert combine_digest(tensors) == plain_digest(tensors, {})


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (Piece("w", "I32", (8192,), 4096, bytes(16384)), r"F32 [8192] and I32 [8192]"),
        (Piece("w", "F32", (8192, 1), 4096, bytes(16384)), r"F32 [8192] and F32 [8192, 1]"),
    ],
)
def test_pieces_of_a_tensor_must_agree_on_it(second: Piece, said: str) -> None:
    writer = PackWriter(memory_store(), step=1, attempt="a", writer="w")
    with pytest.raises(InvalidPiece) as refused:
        writer.write([Piece("w", "F32", (8192,), 0, bytes(16384)), second])
    assert str(refused.value) == f"w: pieces disagree, {said}"
