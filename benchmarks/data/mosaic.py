"""The same rows through mosaicml-streaming: shards of its own format, written once, read by two worker processes.

It is no dependency: `pip install mosaicml-streaming` first, or it is left out.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq


def is_there() -> bool:
    return importlib.util.find_spec("streaming") is not None


def write(folder: Path, target: Path) -> Path:
    """The rows of the column "tokens" as MDS shards, not compressed: its fastest case."""
    from streaming import MDSWriter

    with MDSWriter(out=str(target), columns={"tokens": "ndarray:int32"}) as writer:
        for path in sorted(folder.iterdir()):
            column = pq.read_table(path).column("tokens").combine_chunks()
            for row in np.asarray(column.flatten(), dtype=np.int32).reshape(len(column), -1):
                writer.write({"tokens": row})
    return target


def read(shards: Path, batch_size: int) -> int:
    """One epoch; returns its tokens."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset: Any = StreamingDataset(local=str(shards), shuffle=True, batch_size=batch_size)
    loader: Any = StreamingDataLoader(dataset, batch_size=batch_size, num_workers=2, drop_last=True)
    return sum(batch["tokens"].numel() for batch in loader)
