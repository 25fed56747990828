"""Sample ids and their hashes: how a run shows which samples a step used. Pure: NumPy and XXH3.

A sample id is `block << 32 | row`, unsigned 64 bits: a sample's block of the source and its row in that block.
**Specification** (`ID_HASH_VERSION` 1, held by golden values in the tests):

- in a mixture, block and row are those of the sample's own source, and the id is combined by exclusive or with the
  64-bit XXH3 of the name of the source: so ids stay as they are when other sources come or go;
- the hash of a lane's batch is the 64-bit XXH3 of the lane number and the sample ids in the order of the batch, all as
  little-endian 64-bit integers;
- the hash of a step is the sum of the hashes of its lanes modulo 2**64. A sum does not depend on who had which lane or
  who was added first, and as every lane's hash holds its number, two lanes that swap their batches change it;
- the running hash after step `t` is the XXH3 of the running hash before it (0 at the start), of `t` and of the hash of
  step `t`, in the same form. Equal running hashes mean the same samples, in the same order, at the same steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash

ID_HASH_VERSION = 1
_ROW_BITS = 32
_MODULUS = 1 << 64

SampleIds = npt.NDArray[np.uint64]


def sample_ids(blocks: npt.ArrayLike, rows: npt.ArrayLike) -> SampleIds:
    """Return the ids of samples; `blocks` and `rows` broadcast. Raises OverflowError for a row beyond 32 bits."""
    numbers, inside = np.asarray(blocks, dtype=np.int64), np.asarray(rows, dtype=np.int64)
    for what, values in (("block", numbers), ("row", inside)):
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 1 << _ROW_BITS:
            raise OverflowError(f"{what} {int(values.min())} to {int(values.max())}: a sample id has 32 bits for it")
    return np.asarray((numbers.astype(np.uint64) << np.uint64(_ROW_BITS)) | inside.astype(np.uint64))


def ids_in(source: str, ids: SampleIds) -> SampleIds:
    """Return the ids of samples of a mixture's source from those in the source, and the other way round."""
    return ids ^ np.uint64(xxhash.xxh3_64_intdigest(source.encode())) if source else ids


def split_ids(ids: SampleIds) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (block, row in the block) of sample ids."""
    low = np.uint64((1 << _ROW_BITS) - 1)
    return (ids >> np.uint64(_ROW_BITS)).astype(np.int64), (ids & low).astype(np.int64)


def lane_hash(lane: int, ids: SampleIds) -> int:
    """Return the hash of one lane's batch."""
    return xxhash.xxh3_64_intdigest(lane.to_bytes(8, "little") + ids.astype("<u8", copy=False).tobytes())


def step_hash(lane_hashes: Iterable[int]) -> int:
    """Combine the hashes of a step's lanes, or sums of some of them, in any order and grouping."""
    return sum(lane_hashes) % _MODULUS


def running_hash(before: int, step: int, of_step: int) -> int:
    """Return the running hash after `step`."""
    return xxhash.xxh3_64_intdigest(_words(before, step, of_step))


def show_hash(value: int) -> str:
    """Return a hash as metrics and reports hold it: 16 hexadecimal digits."""
    return f"{value:016x}"


def _words(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)
