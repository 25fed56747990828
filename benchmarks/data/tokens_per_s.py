"""Tokens/s of shuffled, packed batches: against bare reading of row groups, torch's DataLoader.

Two cases. "text": documents are tokenised (bytes), packed to 1024 tokens and shuffled; one thread each for us and for
the bare `read_row_group` loop, which only decodes. "table": rows of 1025 int32 tokens, which are only shuffled; the
others read these, the DataLoader with two worker processes and in file order, its best case. All sides hand out
the samples of an epoch, page cache warm, interleaved; ratios are medians over rounds of ratios within a round.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import common
from elastictrain.data import LaneReader, open_source
from elastictrain.data.feeder import Feeder
from elastictrain.job import Data

LANES, SIZE, LENGTH = 8, 8, 1024
ROUNDS, MEGABYTES, GROUP_BYTES = 7, 256, 8 << 20


def documents(total_bytes: int) -> Iterator[str]:
    """Real text, repeated: the modules of Python's standard library."""
    table = pq.read_table(common.DATA, columns=["text"])
    texts = table.column("text").to_pylist()
    written, at = 0, 0
    while written < total_bytes:
        text = texts[at % len(texts)]
        yield text
        written, at = written + len(text.encode()), at + 1


def write_data(folder: Path, megabytes: int) -> dict[str, Path]:
    """Both cases, zstd, row groups of about 8 MB decoded, four files each."""
    texts = list(documents(megabytes << 20))
    group = max(1, len(texts) * GROUP_BYTES // (megabytes << 20))
    joined = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    rows = joined[: len(joined) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)[: (megabytes << 18) // LENGTH]
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1).astype(np.int32)), LENGTH + 1)
    sides = {"text": (pa.table({"text": texts}), group),
             "table": (pa.table({"tokens": tokens}), GROUP_BYTES // (4 * LENGTH))}  # fmt: skip
    for name, (table, size) in sides.items():
        (folder / name).mkdir()
        quarter = -(-table.num_rows // 4)
        for part in range(4):
            path = folder / name / f"{part}.parquet"
            pq.write_table(table.slice(part * quarter, quarter), path, row_group_size=size, compression="zstd")
    return {name: folder / name for name in sides}


def bare(folder: Path) -> int:
    """Decode every row group, one thread; the numbers in the arrays are not touched."""
    rows = 0
    for path in sorted(folder.iterdir()):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows += file.read_row_group(group, use_threads=False).num_rows
    return rows


def spec_of(folder: Path, *, warm: bool = False) -> Data:
    text = {"text_column": "text", "sequence_length": LENGTH} if folder.name == "text" else {}
    return Data(kind="parquet", path=str(folder), warm_cache_bytes=(8 << 30) if warm else 0, **text)


def ours(folder: Path, *, warm: bool = False, ahead: bool = False) -> int:
    """One epoch; returns its tokens."""
    source = open_source(spec_of(folder, warm=warm), seed=1, lanes=LANES, lane_batch_size=SIZE)
    steps = source.steps_per_epoch
    places = [(step, lane) for step in range(steps) for lane in range(LANES)]
    if ahead:
        with Feeder.of(source) as feeder:
            for at, place in enumerate(places):
                if at % (64 * LANES) == 0:
                    feeder.expect(places[at : at + 128 * LANES])
                feeder.batch(*place)
        source.close()
        return steps * LANES * SIZE * (LENGTH + 1)
    reader = LaneReader(source)
    for place in places:
        reader.batch(*place)
    if warm:
        print(f"   warm: {reader.facts}", flush=True)
    reader.close()
    return steps * LANES * SIZE * (LENGTH + 1)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows by number; a worker keeps the row group that it read last."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())
        self.groups = [
            (path, group, pq.ParquetFile(path).metadata.row_group(group).num_rows)
            for path in self.paths
            for group in range(pq.ParquetFile(path).num_row_groups)
        ]
        self.starts = np.cumsum([0, *(rows for _, _, rows in self.groups)])
        self.last: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        if self.last is None or self.last[0] != number:
            path, group, rows = self.groups[number]
            column = pq.ParquetFile(path).read_row_group(group, use_threads=False).column("tokens").combine_chunks()
            self.last = (number, torch.from_numpy(np.asarray(column.flatten()).reshape(rows, -1).copy()))
        return self.last[1][index - int(self.starts[number])]


def data_loader(folder: Path) -> int:
    loader = torch.utils.data.DataLoader(
        Rows(folder), batch_size=LANES * SIZE, num_workers=2, drop_last=True, multiprocessing_context="forkserver"
    )
    return sum(batch.numel() for batch in loader)


def timed(name: str, side: Callable[[], int], seconds: dict[str, list[float]], tokens: dict[str, int]) -> None:
    gc.collect()
    begun_s = time.perf_counter()
    tokens[name] = side()
    seconds.setdefault(name, []).append(time.perf_counter() - begun_s)


def speeds_of(seconds: dict[str, list[float]], tokens: dict[str, int]) -> dict[str, list[float]]:
    return {name: [tokens[name] / one for one in seconds[name]] for name in seconds}


def ratio(speeds: dict[str, list[float]], one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]


def main() -> None:
    options = common.arguments(__doc__)
    warnings.simplefilter("ignore")
    common.prepare_data()
    torch.set_num_threads(1)
    results = common.Results("data_throughput", "Data: tokens/s of shuffled, packed batches", options)
    rounds, megabytes = (3, 48) if options.quick else (ROUNDS, MEGABYTES)
    with common.scratch("data") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        folders = write_data(place, megabytes)
        for case, folder in folders.items():
            sides: dict[str, Callable[[], int]] = {
                "bare read_row_group": lambda folder=folder: bare(folder),
                "LaneReader": lambda folder=folder: ours(folder),
                "Feeder": lambda folder=folder: ours(folder, ahead=True),
                "LaneReader, warm cache": lambda folder=folder: ours(folder, warm=True),
            }
            if case == "table":
                sides["torch DataLoader, 2 workers"] = lambda folder=folder: data_loader(folder)
            ours(folder, warm=True)  # fills the warm cache
            measure(results, case, sides, rounds)
    results.notes.append("The bare loop's tokens are those that our epoch hands out of the same files.")
    results.write()


def measure(results: common.Results, case: str, sides: dict[str, Callable[[], int]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    for number in range(rounds):
        for name, side in sides.items():
            timed(name, side, seconds, tokens)
        print(f"{case}: round {number + 1} of {rounds}", flush=True)
    tokens["bare read_row_group"] = tokens["LaneReader"]
    speeds = speeds_of(seconds, tokens)
    for name in sides:
        against = common.median(ratio(speeds, name, "bare read_row_group"))
        results.row(case=case, side=name, tokens_per_s=common.median(speeds[name]), spread=common.spread(speeds[name]),
                    against_bare=against)  # fmt: skip
    results.raw[case] = speeds
    figures: list[tuple[str, str, str, float]] = [
        ("Feeder", "bare read_row_group", "packed and shuffled tokens/s against a bare read_row_group loop", 0.90),
        ("LaneReader, warm cache", "bare read_row_group", "from the warm cache against a bare Parquet loop", 5.0),
        ("Feeder", "torch DataLoader, 2 workers", "tokens/s against torch DataLoader", 5.0),
    ]
    for one, other, words, target in figures:
        if other in sides:
            value = common.median(ratio(speeds, one, other))
            results.figure(f"{words} ({case})", value, f">= {target}", common.verdict(value, target, at_most=False))


if __name__ == "__main__":
    main()
