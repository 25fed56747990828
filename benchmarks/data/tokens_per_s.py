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
has batches. No reader of any kind hands out batches of these bytes faster than that. "rows out of memory": all rows lie
decoded in memory and are taken from there in the order of windows, a hundred with one call of NumPy, and written in the
type of a batch: what a shuffle of rows takes that does nothing else. Both are floors, and no side of ours.

Lanes meet in row groups, which are decoded for both of them: in so small a corpus that counts, and "row groups decoded"
says how much.
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
from itertools import zip_longest
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
ROUNDS, GROUP_BYTES = 5, 8 << 20
MEGABYTES = {"text": 512, "prepared": 512, "table": 320}
"""Enough row groups that the beginning and the ends of lanes do not count for much; of the table the others, which are
slow, read less."""
BARE, MOSAIC, COPY = "bare read_row_group", "mosaicml-streaming, 2 workers", "a copy of such batches"
GATHER = "rows out of memory"
BARE_TWO = f"{BARE}, 2 threads"
DECODED: list[float] = []
"""How often the last LaneReader has decoded a row group in its epoch, on average."""
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


def write_data(folder: Path, case: str, megabytes: int) -> Path:
    """A case's files, zstd, row groups of about 8 MB decoded, four files."""
    texts = list(documents(megabytes << 20))
    group = max(1, len(texts) * GROUP_BYTES // (megabytes << 20))
    if case == "table":
        joined = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
        rows = joined[: (megabytes << 18) // (LENGTH + 1) * (LENGTH + 1)].astype(np.int32)
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows), LENGTH + 1)
        table, group = pa.table({"tokens": tokens}), GROUP_BYTES // (4 * LENGTH)
    elif case == "prepared":
        half = texts[: len(texts) // 2]  # two bytes a token
        encoded, starts = BytesTokenizer().encode_with_offsets(pa.chunked_array([half]))
        table, group = (
            pa.table({"text": pa.LargeListArray.from_arrays(pa.array(starts), pa.array(encoded))}),
            group // 2,
        )
        (folder / "prepared.json").write_text(json.dumps(tokens_record(BytesTokenizer())))
    else:
        table = pa.table({"text": texts})
    (folder / case).mkdir()
    quarter = -(-table.num_rows // 4)
    for part in range(4):
        path = folder / case / f"{part}.parquet"
        pq.write_table(table.slice(part * quarter, quarter), path, row_group_size=max(1, group), compression="zstd")
    return folder / case


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
    DECODED[:] = [reader.blocks_decoded / int(np.count_nonzero(source.order.block_rows))]
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


class Gathers:
    """All rows of an epoch, which lie decoded in memory, taken in the order of windows and written as batches are.

    `take` gives rows of one array, and here all blocks are one: our readers gather from several, and make more calls.
    """

    def __init__(self, folder: Path, *, narrow: bool = False) -> None:
        source = open_source(spec_of(folder, narrow=narrow), seed=1, lanes=LANES, lane_batch_size=SIZE)
        reader = LaneReader(source)
        self.kind = next(iter(reader.batch(0, 0).values())).dtype
        blocks = [next(iter(source.read_block(b).values())) for b in range(len(source.order.block_rows))]
        widest = np.result_type(*blocks)  # the tails' may be another one
        self.rows = np.concatenate([block.astype(widest, copy=False) for block in blocks])
        reader.close()
        window = 2 * max(map(len, blocks))
        starts = range(0, len(self.rows), window)
        orders = [np.random.default_rng(at).permutation(min(window, len(self.rows) - at)) + at for at in starts]
        self.tokens = self.rows.size
        at_once = (1 << 19) // self.rows[:1].nbytes
        parts = [[order[at : at + at_once] for at in range(0, len(order), at_once)] for order in orders]
        self.calls = [
            part  # lanes take turns, as they do in training
            for lanes in (parts[at : at + LANES] for at in range(0, len(parts), LANES))
            for turn in zip_longest(*lanes)
            for part in turn
            if part is not None
        ]
        width = self.rows.shape[1]
        self.taken = np.empty((at_once, width), self.rows.dtype)
        self.batches = [np.empty((at_once, width), self.kind) for _ in range(LANES)]

    def __call__(self) -> int:
        is_same = self.kind == self.rows.dtype
        for number, places in enumerate(self.calls):
            batch = self.batches[number % LANES][: len(places)]
            taken = batch if is_same else self.taken[: len(places)]
            self.rows.take(places, axis=0, out=taken, mode="clip")
            if not is_same:
                np.copyto(batch, taken, casting="unsafe")
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


def sides_of(
    folder: Path, place: Path, results: common.Results
) -> tuple[dict[str, Callable[[], int]], list[WarmEpochs]]:
    """All sides of a case, and of them those that are to be closed."""
    warm = [WarmEpochs(folder), WarmEpochs(folder, LARGE)]
    sides: dict[str, Callable[[], int]] = {
        BARE: lambda: bare(folder),
        BARE_TWO: lambda: bare_in_threads(folder),
        "LaneReader": lambda: ours(folder),
        "Feeder": lambda: ours(folder, ahead=True),
        f"Feeder, {LARGE} a lane": lambda: ours(folder, ahead=True, size=LARGE),
        "LaneReader, warm cache": warm[0],
        f"LaneReader, warm cache, {LARGE} a lane": warm[1],
        COPY: Copies(folder),
        GATHER: Gathers(folder),
    }
    if folder.name != "table":  # a table comes as it is
        warm += [WarmEpochs(folder, size, narrow=True) for size in (SIZE, LARGE)]
        sides |= {
            f"LaneReader{NARROW}": lambda: ours(folder, narrow=True),
            f"Feeder{NARROW}": lambda: ours(folder, ahead=True, narrow=True),
            f"Feeder{NARROW}, {LARGE} a lane": lambda: ours(folder, ahead=True, size=LARGE, narrow=True),
            f"LaneReader{NARROW}, warm cache": warm[2],
            f"LaneReader{NARROW}, warm cache, {LARGE} a lane": warm[3],
            f"{COPY}{NARROW}": Copies(folder, narrow=True),
            f"{GATHER}{NARROW}": Gathers(folder, narrow=True),
        }
        return sides, warm
    sides["torch DataLoader, 2 workers"] = lambda: data_loader(folder)
    if mosaic.is_there():
        shards = mosaic.write(folder, place / "mds")
        sides[MOSAIC] = lambda: mosaic.read(shards, LANES * SIZE)
    else:
        results.notes.append("mosaicml-streaming is not installed, so it is not measured.")
    return sides, warm


def main() -> None:
    options = common.arguments(
        __doc__, lambda parser: parser.add_argument("--case", choices=CASES, help="only this one (default: all)")
    )
    warnings.simplefilter("ignore")
    common.prepare_data()
    torch.set_num_threads(1)
    for case in [options.case] if options.case else CASES:
        results = common.Results(f"data_throughput_{case}", f"Data: tokens/s of shuffled batches, {case}", options)
        with common.scratch("data") as place:
            os.environ["XDG_CACHE_HOME"] = str(place / "cache")
            folder = write_data(place, case, 48 if options.quick else MEGABYTES[case])
            sides, warm = sides_of(folder, place, results)
            measure(results, case, sides, 3 if options.quick else ROUNDS)
            results.figure(f"times that a row group is decoded in an epoch ({case})", DECODED[0], "none", "beside it")
            for one in warm:
                one.close()
        results.notes.append(
            "The bare loop's tokens are those that our epoch hands out of the same files. It is one thread, and so is "
            "the LaneReader; the Feeder has two: one decodes, the other makes batches, and decodes too where it would "
            "wait."
        )
        if case == "text":
            results.notes.append("A batch has 8 bytes (int64) for every byte that the bare loop decodes.")
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
    for name in sides:
        if name.startswith((COPY, GATHER)):
            against = common.median(ratio(speeds, name, BARE))
            results.figure(f"floor: {name}, against a bare Parquet loop ({case})", against, "none", "beside it")
    loop = "packed and shuffled tokens/s against a bare read_row_group loop"
    figures: list[tuple[str, str, str, float | None]] = [
        ("LaneReader", BARE, f"{loop}, one thread each", 0.90),
        ("Feeder", BARE_TWO, f"{loop}, two threads each", 0.90),
        ("Feeder", BARE, f"{loop}, two threads against one", None),
        ("LaneReader, warm cache", BARE, "from the warm cache, second epoch on, against a bare Parquet loop", 5.0),
        (f"LaneReader{NARROW}", BARE, f"narrow batches, {loop}, one thread each", 0.90),
        (f"Feeder{NARROW}", BARE_TWO, f"narrow batches, {loop}, two threads each", 0.90),
        (f"Feeder{NARROW}", BARE, f"narrow batches, {loop}, two threads against one", None),
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
            judged = "beside it" if target is None else common.verdict(value, target, at_most=False)
            results.figure(f"{words} ({case})", value, "none" if target is None else f">= {target}", judged)


if __name__ == "__main__":
    main()
