"""Near-duplicates, between the passes: which documents share a band, and which of them go (see `near`)."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from elastictrain.data.preparing.near import pairs_of, those_that_go
from elastictrain.data.preparing.part import WORK, Work, begin_unit, published, record_path
from elastictrain.data.preparing.plan import Range
from elastictrain.data.preparing.rows import Words
from elastictrain.data.preparing.runs import read_slots
from elastictrain.data.preparing.transform import KEY, PLACE
from elastictrain.errors import DataError
from elastictrain_checkpoint.store import Store

GONE = record_path("gone", 0)
_CHUNK_BYTES = 8 << 20


class PairMaker:
    """Makes the pairs of ranges of slots, one after the other."""

    def __init__(self, work: Work, runs: Sequence[str], ranges: Sequence[Range]) -> None:
        """`runs`: those that hold the keys of bands."""
        work.check()
        self._work, self._store, self._runs, self._ranges = work, work.store(), runs, ranges

    def make(self, number: int) -> dict[str, Any]:
        """Write the pairs of a range and their record, and return the record. Raises DataError for a damaged run."""
        begin_unit(self._store, "pairs", number)
        first, end = self._ranges[number]
        found: list[pa.Table] = []
        for run in self._runs:
            found += read_slots(self._store, run, self._work.plan.slots, first, end)
        keys, places = (
            np.concatenate([np.zeros(0, dtype=np.uint64), *(np.asarray(table.column(name)) for table in found)])
            for name in (KEY, PLACE)
        )
        del found
        noted = write_words(self._store, f"{WORK}/pairs-{number:06d}-{uuid.uuid4().hex}.u64", pairs_of(keys, places))
        return published(self._store, record_path("pairs", number), {"pairs": number, **noted})

    def close(self) -> None:
        """Nothing stays open."""


def settle(store: Store, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Write which places go, by the pairs of all ranges, and return the record. Raises DataError for a damaged file."""
    pairs = np.concatenate([read_words(store, record).reshape(-1, 2) for record in records])
    noted = write_words(store, f"{WORK}/gone-{uuid.uuid4().hex}.u64", those_that_go(pairs))
    return published(store, GONE, noted)


def write_words(store: Store, path: str, words: Words) -> dict[str, Any]:
    """Write words into a file of their own; returns what `read_words` takes."""
    content = memoryview(np.ascontiguousarray(words, dtype="<u8").tobytes())

    def blocks() -> Iterator[memoryview]:
        for start in range(0, len(content), _CHUNK_BYTES):
            yield content[start : start + _CHUNK_BYTES]

    store.create(path, blocks())
    return {"words": path, "bytes": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}


def read_words(store: Store, record: Mapping[str, Any]) -> Words:
    """Read a file that `write_words` has written. Raises DataError if it is missing or damaged."""
    path = str(record["words"])
    try:
        content = store.read_all(path)
        if xxhash.xxh3_64_hexdigest(content) != record["xxh3"]:
            raise ValueError("it differs from its checksum")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{store.url}/{path}: an intermediate file is missing or damaged ({error}). Remove "
            f"{WORK}/{path.rpartition('/')[2].rpartition('-')[0]}*.json and go on with --resume: it is then made again"
        ) from error
    return np.frombuffer(content, dtype="<u8").astype(np.uint64)


def is_whole(store: Store, record: Mapping[str, Any] | None) -> bool:
    """Whether the file of a record is there, as large as it was."""
    return record is not None and store.size(str(record["words"])) == record["bytes"]
