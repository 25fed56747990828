"""Live sources: appending a segment, how soon it is trained on, reading against the same files as a plain source, and
finding a place far into the order.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import common
from elastictrain.data import LaneReader, open_live, open_source
from elastictrain.data.feeder import Feeder
from elastictrain.data.live import LiveSource
from elastictrain.data.live_feeder import LiveFeeder
from elastictrain.data.segments import SegmentWriter
from elastictrain.job import Data

LANES, SIZE, WIDTH = 8, 8, 512
ROWS = 2048
"""Of a segment: 2 MB, 32 steps."""


def write_segment(folder: Path, number: int) -> str:
    """Name of a Parquet file with `ROWS` lists of `WIDTH` integers."""
    values = np.random.default_rng(number).integers(0, 50_000, ROWS * WIDTH, dtype=np.int32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), WIDTH)
    pq.write_table(pa.table({"x": column}), folder / f"{number:05d}.parquet", row_group_size=256)
    return f"{number:05d}.parquet"


def live_data(folder: Path, record: Path, **settings: Any) -> Data:
    live = {"record": str(record), "poll_s": 0.1, "segments_at_once": 1, **settings}
    return Data(kind="parquet", path=str(folder), live=live)  # type: ignore[arg-type]


def opened(folder: Path, record: Path, **settings: Any) -> LiveSource:
    return open_live(live_data(folder, record, **settings), seed=1, lanes=LANES, lane_batch_size=SIZE)


def seconds_to_read(source: Any, steps: int) -> float:
    reader = LaneReader(source)
    begun_s = time.perf_counter()
    for step in range(steps):
        for lane in range(LANES):
            reader.batch(step, lane)
    seconds = time.perf_counter() - begun_s
    reader.close()
    return seconds


def decide_all(source: LiveSource) -> list[float]:
    """Seconds of each decision."""
    took = []
    while True:
        begun_s = time.perf_counter()
        if not source.advance(needed=False):
            return took
        took.append(time.perf_counter() - begun_s)


def seconds_to_arrive(folder: Path, record: Path, numbers: list[int]) -> list[float]:
    """From `append` until the first batch that needs the segment is there, while training waits for it."""
    writer, source = SegmentWriter(folder), opened(folder, record)
    decide_all(source)
    found = []
    with LiveFeeder(Feeder(LaneReader(source)), source) as feeder:
        for number in numbers:
            step, name, appended_s = source.decided, write_segment(folder, number), [0.0]
            waits = threading.Event()
            feeder.while_waiting = waits.set

            def append(name: str = name, at: list[float] = appended_s, waits: threading.Event = waits) -> None:
                waits.wait(30)
                at[0] = time.perf_counter()
                writer.append(name)

            thread = threading.Thread(target=append)
            thread.start()
            feeder.batch(step, 0)
            found.append(time.perf_counter() - appended_s[0])
            thread.join()
    return found


def first_step(folder: Path, record: Path, share: float) -> float:
    """Seconds from a source that is not open to the batches of all lanes of one step."""
    begun_s = time.perf_counter()
    source = opened(folder, record)
    reader, step = LaneReader(source), int(share * (source.decided - 1))
    for lane in range(LANES):
        reader.batch(step, lane)
    seconds = time.perf_counter() - begun_s
    reader.close()
    return seconds


def main() -> None:
    options = common.arguments(__doc__)
    results = common.Results("data_live", "Data: live sources", options)
    count, rounds = (24, 3) if options.quick else (200, 9)
    with common.scratch("live") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        folder = place / "stream"
        folder.mkdir()
        writer, appended = SegmentWriter(folder), []
        for number in range(count):
            name = write_segment(folder, number)
            begun_s = time.perf_counter()
            writer.append(name)
            appended.append(time.perf_counter() - begun_s)
        results.row(what="append, file in place", seconds=common.median(appended), spread=common.spread(appended))
        decided = decide_all(opened(folder, place / "order"))
        results.row(what="decide an era of one segment", seconds=common.median(decided), spread=common.spread(decided))
        plain = Data(kind="parquet", path=str(folder))
        steps = count * ROWS // (LANES * SIZE)
        times: dict[str, list[float]] = {"live": [], "plain": []}
        for _ in range(rounds):
            source = open_source(plain, seed=1, lanes=LANES, lane_batch_size=SIZE)
            times["plain"].append(seconds_to_read(source, steps))
            times["live"].append(seconds_to_read(opened(folder, place / "order"), steps))
        for name, seconds in times.items():
            results.row(what=f"read all, {name}", seconds=common.median(seconds), spread=common.spread(seconds))
        value = common.median(a / b for a, b in zip(times["plain"], times["live"], strict=True))
        results.row(what="samples/s against the same files as a plain source", times=value)
        starts: dict[float, list[float]] = {0.0: [], 0.5: [], 1.0: []}
        for _ in range(rounds):
            for share, seconds in starts.items():
                seconds.append(first_step(folder, place / "order", share))
        for share, seconds in starts.items():
            results.row(what=f"open, and the first step at {share:.0%} of {count} eras",
                        seconds=common.median(seconds), spread=common.spread(seconds))  # fmt: skip
        value = common.median(b / a for a, b in zip(starts[0.0], starts[0.5], strict=True))
        results.row(what="opening in the middle against at step 0", times=value)
        arrived = seconds_to_arrive(folder, place / "order", list(range(count, count + 5 * rounds)))
        results.row(what="from append to its first batch", seconds=common.median(arrived),
                    spread=common.spread(arrived))  # fmt: skip
        results.notes.append("Segments of 2 MB on a local disk, in the page cache; `live.poll_s` is 0.1.")
    results.write()


if __name__ == "__main__":
    main()
