"""The same rows through mosaicml-streaming: shards of its own format, written once, read by two worker processes. And
its set-up of the order of an epoch, of which no sample is read.

It is no dependency: `pip install mosaicml-streaming` first, or it is left out.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import tempfile
import time
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


def set_up(samples: int, rows: int, algorithm: str) -> dict[str, float]:
    """Seconds until a worker has its sample ids of an epoch, and how much the process's peak grows by meanwhile; in a
    process of its own. `rows`: of a shard. It is all that a StreamingDataset does when an iterator is asked for, before
    it reads anything: partition, shuffle, share. The shards are in its index only.
    """
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Timed(StreamingDataset):  # type: ignore[misc]
        def _get_work(self, epoch: int, sample_in_epoch: int) -> Any:
            begun_s, before = time.perf_counter(), _peak_mib()
            found = super()._get_work(epoch, sample_in_epoch)
            self.took = {"set_up_s": time.perf_counter() - begun_s, "peak_mib": _peak_mib() - before}
            return found[:0]  # the epoch is over then

    shard = {"column_names": ["n"], "column_encodings": ["int"], "column_sizes": [8], "compression": None,
             "format": "mds", "hashes": [], "samples": rows, "size_limit": 1 << 26, "version": 2,
             "zip_data": None}  # fmt: skip
    shards = [
        shard | {"raw_data": {"basename": f"shard.{number:05d}.mds", "bytes": 20 * rows, "hashes": {}}}
        for number in range(samples // rows)
    ]
    clean_stale_shared_memory()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "index.json").write_text(json.dumps({"shards": shards, "version": 2}), encoding="utf-8")
        dataset = Timed(local=folder, shuffle=True, shuffle_algo=algorithm, batch_size=512)
        assert list(dataset) == []
        return dict(dataset.took)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(set_up(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
