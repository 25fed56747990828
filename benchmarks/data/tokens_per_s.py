"""Tokens/s of shuffled, packed batches: against bare reading of row groups, torch's DataLoader and mosaicml-streaming.

Three cases. "text": documents are tokenised (bytes), packed to 1024 tokens and shuffled; one thread each for us and for
the bare `read_row_group` loop, which only decodes. "prepared": documents that are tokens already (uint16), as
`elastictrain data prepare` writes them, packed and shuffled. "table": rows of 1025 int32 tokens, which are only
shuffled; the others read these with two worker processes: the DataLoader in file order, its best case,
mosaicml-streaming from shards of its own, shuffled. "narrow": the same with `data.batch_dtype: narrow`, two bytes a
token here. The bare loop hands out what it decodes, in "text" one byte a token, in "prepared" two, in "table" four; our
batches without "narrow" are int64, of a table int32. All sides hand out the samples of an epoch, page cache warm,
interleaved; ratios are medians over rounds of ratios within a round.

"a copy of such batches": nothing is read, one batch that lies in the processor's cache is copied as often as an epoch
has batches. No reader of any kind hands out batches of these bytes faster than that.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mosaic
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import common
from elastictrain.data import LaneReader, open_source
from elastictrain.data.feeder import Feeder
from elastictrain.data.tokenizers import BytesTokenizer, tokens_record
from elastictrain.job import Data

LANES, SIZE, LENGTH = 8, 8, 1024
LARGE = 64
"""Samples of a lane and step in a second case of the Feeder: what time batches take that no token takes."""
CASES = ("text", "prepared", "table")
ROUNDS, MEGABYTES, GROUP_BYTES = 7, 256, 8 << 20
BARE, MOSAIC, COPY = "bare read_row_group", "mosaicml-streaming, 2 workers", "a copy of such batches"
NARROW = ", narrow"
"""Sides whose batches are as narrow as what the bare loop decodes, or nearly so: `data.batch_dtype: narrow`."""


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
    """All cases, zstd, row groups of about 8 MB decoded, four files each."""
    texts = list(documents(megabytes << 20))
    group = max(1, len(texts) * GROUP_BYTES // (megabytes << 20))
    joined = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    rows = joined[: len(joined) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)[: (megabytes << 18) // LENGTH]
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1).astype(np.int32)), LENGTH + 1)
    half = texts[: len(texts) // 2]  # two bytes a token
    documents_of_tokens, starts = BytesTokenizer().encode_with_offsets(pa.chunked_array([half]))
    prepared = pa.LargeListArray.from_arrays(pa.array(starts), pa.array(documents_of_tokens))
    (folder / "prepared.json").write_text(json.dumps(tokens_record(BytesTokenizer())))
    sides = {"text": (pa.table({"text": texts}), group),
             "prepared": (pa.table({"text": prepared}), max(1, group // 2)),
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
    return sum(bare_file(path) for path in sorted(folder.iterdir()))


def bare_file(path: Path) -> int:
    with pq.ParquetFile(path) as file:
        return sum(file.read_row_group(group, use_threads=False).num_rows for group in range(file.num_row_groups))


def spec_of(folder: Path, *, warm: bool = False, narrow: bool = False) -> Data:
    text = {} if folder.name == "table" else {"text_column": "text", "sequence_length": LENGTH}
    if narrow:
        text["batch_dtype"] = "narrow"
    if folder.name == "prepared":
        text["tokenizer"] = str(folder.parent / "prepared.json")
    return Data(kind="parquet", path=str(folder), warm_cache_bytes=(8 << 30) if warm else 0, **text)


def bare_in_threads(folder: Path) -> int:
    """As `bare`, two files at a time: as many threads as the Feeder has that read."""
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(bare_file, sorted(folder.iterdir())))


def ours(folder: Path, *, ahead: bool = False, size: int = SIZE, narrow: bool = False) -> int:
    """One epoch; returns its tokens."""
    source = open_source(spec_of(folder, narrow=narrow), seed=1, lanes=LANES, lane_batch_size=size)
    steps = source.steps_per_epoch
    places = [(step, lane) for step in range(steps) for lane in range(LANES)]
    if ahead:
        with Feeder.of(source) as feeder:
            for at, place in enumerate(places):
                if at % (64 * LANES) == 0:
                    feeder.expect(places[at : at + 128 * LANES], until=steps)
                feeder.batch(*place)
        source.close()
        return steps * LANES * size * (LENGTH + 1)
    reader = LaneReader(source)
    for place in places:
        reader.batch(*place)
    reader.close()
    return steps * LANES * size * (LENGTH + 1)


class WarmEpochs:
    """One epoch more of a reader with a warm cache, at every call; the first was read before."""

    def __init__(self, folder: Path, size: int = SIZE, *, narrow: bool = False) -> None:
        spec = spec_of(folder, warm=True, narrow=narrow)
        source = open_source(spec, seed=1, lanes=LANES, lane_batch_size=size)
        self.reader, self.steps, self.size, self.epochs = LaneReader(source), source.steps_per_epoch, size, 0
        self()

    def __call__(self) -> int:
        for step in range(self.epochs * self.steps, (self.epochs + 1) * self.steps):
            for lane in range(LANES):
                self.reader.batch(step, lane)
        self.epochs += 1
        return self.steps * LANES * self.size * (LENGTH + 1)

    def close(self) -> None:
        # What the first epoch left out at its end may hold a block that no window of it had.
        if self.reader.blocks_decoded > np.count_nonzero(self.reader.source.order.block_rows):
            raise RuntimeError(f"{self.reader.facts}: the second epoch and later ones must come from the cache")
        self.reader.close()


class Copies:
    """What no reader can be faster than: the bytes of an epoch's batches are written once, from the nearest cache."""

    def __init__(self, folder: Path, size: int = SIZE, *, narrow: bool = False) -> None:
        source = open_source(spec_of(folder, narrow=narrow), seed=1, lanes=LANES, lane_batch_size=size)
        reader = LaneReader(source)
        self.arrays, self.count = list(reader.batch(0, 0).values()), source.steps_per_epoch * LANES
        reader.close()
        self.tokens = self.count * size * (LENGTH + 1)

    def __call__(self) -> int:
        for _ in range(self.count):
            for array in self.arrays:
                array.copy()
        return self.tokens


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
    options = common.arguments(
        __doc__, lambda parser: parser.add_argument("--case", choices=CASES, help="only this one (default: all)")
    )
    warnings.simplefilter("ignore")
    common.prepare_data()
    torch.set_num_threads(1)
    results = common.Results("data_throughput", "Data: tokens/s of shuffled, packed batches", options)
    rounds, megabytes = (3, 48) if options.quick else (ROUNDS, MEGABYTES)
    with common.scratch("data") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        folders = write_data(place, megabytes)
        for case, folder in folders.items():
            if options.case not in (None, case):
                continue
            warm, warm_large = WarmEpochs(folder), WarmEpochs(folder, LARGE)
            sides: dict[str, Callable[[], int]] = {
                BARE: lambda folder=folder: bare(folder),
                f"{BARE}, 2 threads": lambda folder=folder: bare_in_threads(folder),
                "LaneReader": lambda folder=folder: ours(folder),
                "Feeder": lambda folder=folder: ours(folder, ahead=True),
                f"Feeder, {LARGE} a lane": lambda folder=folder: ours(folder, ahead=True, size=LARGE),
                "LaneReader, warm cache": warm,
                f"LaneReader, warm cache, {LARGE} a lane": warm_large,
                COPY: Copies(folder),
            }
            warm_narrow: list[WarmEpochs] = []
            if case != "table":  # a table comes as it is
                warm_narrow = [WarmEpochs(folder, size, narrow=True) for size in (SIZE, LARGE)]
                sides |= {
                    f"LaneReader{NARROW}": lambda folder=folder: ours(folder, narrow=True),
                    f"Feeder{NARROW}": lambda folder=folder: ours(folder, ahead=True, narrow=True),
                    f"Feeder{NARROW}, {LARGE} a lane": lambda folder=folder: ours(
                        folder, ahead=True, size=LARGE, narrow=True
                    ),
                    f"LaneReader{NARROW}, warm cache": warm_narrow[0],
                    f"LaneReader{NARROW}, warm cache, {LARGE} a lane": warm_narrow[1],
                    f"{COPY}{NARROW}": Copies(folder, narrow=True),
                }
            if case == "table":
                sides["torch DataLoader, 2 workers"] = lambda folder=folder: data_loader(folder)
                if mosaic.is_there():
                    shards = mosaic.write(folder, place / "mds")
                    sides[MOSAIC] = lambda shards=shards: mosaic.read(shards, LANES * SIZE)
                else:
                    results.notes.append("mosaicml-streaming is not installed, so it is not measured.")
            measure(results, case, sides, rounds)
            for one in (warm, warm_large, *warm_narrow):
                one.close()
    results.notes.append(
        "The bare loop's tokens are those that our epoch hands out of the same files. It is one thread, and so is the "
        "LaneReader; the Feeder has two: one decodes, the other makes batches, and decodes too where it would wait."
    )
    results.notes.append('In case "text" a batch has 8 bytes (int64) for every byte that the bare loop decodes.')
    results.write()


def measure(results: common.Results, case: str, sides: dict[str, Callable[[], int]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    for number in range(rounds):
        for name, side in sides.items():
            timed(name, side, seconds, tokens)
        print(f"{case}: round {number + 1} of {rounds}", flush=True)
    for name in sides:
        if name.startswith(BARE):
            tokens[name] = tokens["LaneReader"]
    speeds = speeds_of(seconds, tokens)
    for name in sides:
        against = common.median(ratio(speeds, name, BARE))
        results.row(case=case, side=name, tokens_per_s=common.median(speeds[name]), spread=common.spread(speeds[name]),
                    against_bare=against)  # fmt: skip
    results.raw[case] = speeds
    most = common.median(ratio(speeds, COPY, BARE))
    results.notes.append(
        f'Case "{case}": a copy of the same batches is {most:.1f} x a bare loop: no reader does better.'
    )
    figures: list[tuple[str, str, str, float]] = [
        ("Feeder", BARE, "packed and shuffled tokens/s against a bare read_row_group loop", 0.90),
        ("LaneReader, warm cache", BARE, "from the warm cache, second epoch on, against a bare Parquet loop", 5.0),
        (
            f"Feeder{NARROW}",
            BARE,
            "narrow batches, packed and shuffled tokens/s against a bare read_row_group loop",
            0.90,
        ),
        (
            f"LaneReader{NARROW}, warm cache",
            BARE,
            "narrow batches from the warm cache, against a bare Parquet loop",
            5.0,
        ),
        ("Feeder", "torch DataLoader, 2 workers", "tokens/s against torch DataLoader", 5.0),
        ("Feeder", MOSAIC, "tokens/s against mosaicml-streaming", 5.0),
    ]
    for one, other, words, target in figures:
        if one in sides and other in sides:
            value = common.median(ratio(speeds, one, other))
            results.figure(f"{words} ({case})", value, f">= {target}", common.verdict(value, target, at_most=False))


if __name__ == "__main__":
    main()
