"""Blocks that are damaged in one store, taken from another: every copy is checked against the same sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastictrain_checkpoint.hashing import block_sum
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.store import Store


@dataclass(frozen=True)
class Healed:
    """A block that was damaged where it was looked for first, and whole elsewhere.

    Attributes:
        file: path in the store.
        block: number of the block in the file.
        tensors: names of the tensors with bytes in it; none if only the header is hit.
        source: URL of the store that had it.
        message: what was wrong, in a sentence.

    """

    file: str
    block: int
    tensors: tuple[str, ...]
    source: str
    message: str


def good_block(stores: Sequence[Store], manifest: Manifest, file: int, number: int, out: memoryview) -> Store | None:
    """Fill ``out`` with block ``number`` of a pack from the first store that has it whole; None if none has.

    A store that fails is passed over like one that has no such file: there may be others.
    """
    for store in stores:
        try:
            got = store.read_into(manifest.paths[file], number * manifest.block_bytes, out)
        except Exception:  # whatever a file system raises: fsspec's do not keep to OSError
            continue
        if got == len(out) and block_sum(out) == int(manifest.sums[file][number]):
            return store
    return None
