"""Data: any batch of any lane at any step, as a pure function of the seed and the source.

`open_source` lays down the order of a job's data, `LaneReader` reads batches of it as NumPy arrays, and
`elastictrain.data.feeder.Feeder` hands them out as torch tensors, read ahead in a thread. The position, a step
number, is the only state. `stream` is all of that as a plain torch iterable, for training without a job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elastictrain.data.fingerprint import fingerprint_difference
from elastictrain.data.index import Progress
from elastictrain.data.live import LiveSource, open_live
from elastictrain.data.mixed import MixedSource, Past, open_mixture
from elastictrain.data.mixture import Segment
from elastictrain.data.reader import LaneReader
from elastictrain.data.source import Source, open_source
from elastictrain.data.sources import AnySource
from elastictrain.data_settings import Data, Mixture

if TYPE_CHECKING:
    from elastictrain.data.streaming import Stream

__all__ = [
    "AnySource",
    "LaneReader",
    "LiveSource",
    "MixedSource",
    "Segment",
    "Source",
    "arrow",
    "csv",
    "fingerprint_difference",
    "huggingface",
    "jsonl",
    "mixture",
    "open_data",
    "open_live",
    "open_mixture",
    "open_source",
    "parquet",
    "stream",
    "text",
    "webdataset",
]


def open_data(
    spec: Data | Mixture,
    *,
    seed: int,
    lanes: int,
    lane_batch_size: int,
    segments: Sequence[Segment] = (),
    progress: Progress | None = None,
    record: str | None = None,
    record_options: Mapping[str, Any] | None = None,
    past: Past | None = None,
) -> AnySource:
    """Open whatever `Job.data` holds; `segments` and `past` belong to a mixture, `record` to live sources (see
    `open_mixture`, `open_live`).

    Raises DataError, as `open_source`.
    """
    if isinstance(spec, Mixture):
        return open_mixture(
            spec, seed=seed, lanes=lanes, lane_batch_size=lane_batch_size, segments=segments, progress=progress,
            record=record, record_options=record_options, past=past,
        )  # fmt: skip
    if spec.live is not None:
        return open_live(
            spec, seed=seed, lanes=lanes, lane_batch_size=lane_batch_size, record=record, record_options=record_options
        )
    return open_source(spec, seed=seed, lanes=lanes, lane_batch_size=lane_batch_size, progress=progress)


def mixture(sources: Mapping[str, Data | Mapping[str, Any]], **settings: Any) -> Mixture:
    """`Job.data` from several sources by name: what `parquet` and the others return, or settings as in a job file, to
    which the mixture's `sequence_length` is handed down.

    `settings`: `weights`, `epochs` or `temperature`, `sequence_length`, `stages`. Raises ConfigError.
    """
    return Mixture(sources=dict(sources), **settings)


def stream(data: Data | Mixture, **settings: Any) -> Stream:
    """A plain torch iterable over `data`, without a job.

    `settings`: `batch_size` (of all ranks together), and where they differ from what is usual `lanes`, `seed`, `rank`,
    `world`, `epochs` and `device`. Raises ConfigError and DataError.
    """
    from elastictrain.data.streaming import Stream  # imports torch

    return Stream(data, **settings)


def parquet(path: str | Sequence[str], **settings: Any) -> Data:
    """`Job.data` from Parquet: a file, folder or glob (or several), local or any fsspec URL.

    `settings`: the other fields of `Data`. Raises ConfigError that names what is wrong.
    """
    return Data(kind="parquet", path=_places(path), **settings)


def jsonl(path: str | Sequence[str], **settings: Any) -> Data:
    """`Job.data` from JSON lines, one object a line, plain or compressed; as `parquet`."""
    return Data(kind="jsonl", path=_places(path), **settings)


def arrow(path: str | Sequence[str], **settings: Any) -> Data:
    """`Job.data` from Arrow IPC files and streams (Feather too); as `parquet`."""
    return Data(kind="arrow", path=_places(path), **settings)


def csv(path: str | Sequence[str], **settings: Any) -> Data:
    """`Job.data` from CSV files whose first record names the columns, plain or compressed; as `parquet`."""
    return Data(kind="csv", path=_places(path), **settings)


def webdataset(path: str | Sequence[str], **settings: Any) -> Data:
    """`Job.data` from WebDataset tar shards; columns are called by what follows a sample's key; as `parquet`."""
    return Data(kind="webdataset", path=_places(path), **settings)


def text(path: str | Sequence[str], **settings: Any) -> Data:
    """`Job.data` from raw text, a document a line (or a file: `document="file"`); as `parquet`."""
    return Data(kind="text", path=_places(path), text_column="text", **settings)


def huggingface(path: str | Sequence[str], **settings: Any) -> Data:
    """`Job.data` from the folder of a dataset that was saved with `Dataset.save_to_disk`; as `parquet`."""
    return Data(kind="huggingface", path=_places(path), **settings)


def _places(path: str | Sequence[str]) -> str | tuple[str, ...]:
    return path if isinstance(path, str) else tuple(path)
