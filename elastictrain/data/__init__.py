"""Data: any batch of any lane at any step, as a pure function of the seed and the source.

`open_source` lays down the order of a job's data, `LaneReader` reads batches of it as NumPy arrays, and
`elastictrain.data.feeder.Feeder` hands them out as torch tensors, read ahead in a thread. The position, a step
number, is the only state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastictrain.data.fingerprint import fingerprint_difference
from elastictrain.data.reader import LaneReader
from elastictrain.data.source import Source, open_source
from elastictrain.job import Data

__all__ = ["LaneReader", "Source", "fingerprint_difference", "jsonl", "open_source", "parquet"]


def parquet(path: str | Sequence[str], **settings: Any) -> Data:
    """`Job.data` from Parquet: a file, folder or glob (or several), local or any fsspec URL.

    `settings`: the other fields of `Data`. Raises ConfigError that names what is wrong.
    """
    return Data(kind="parquet", path=_places(path), **settings)


def jsonl(path: str | Sequence[str], **settings: Any) -> Data:
    """`Job.data` from JSON lines, one object a line; as `parquet`."""
    return Data(kind="jsonl", path=_places(path), **settings)


def _places(path: str | Sequence[str]) -> str | tuple[str, ...]:
    return path if isinstance(path, str) else tuple(path)
