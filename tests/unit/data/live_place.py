"""A live source to write to, for its tests."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import elastictrain as et
from elastictrain.data import LaneReader, open_mixture
from elastictrain.data.live import LiveSource, open_live
from elastictrain.data.mixed import MixedSource
from elastictrain.data.segments import SegmentWriter
from elastictrain.data.streaming import Stream
from elastictrain.job import Data, Mixture

OLD = 100_000
"""Rows of the source that was there from the beginning are numbered from here on."""
LANES, SIZE = 4, 2

FAST = {"poll_s": 0.01, "deadline_s": 30.0}


class Place:
    """A manifest of JSON lines, whose rows are numbered in the order of arrival, and a record of an order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, 0
        self.writer = SegmentWriter(folder / "stream")

    def add(self, *counts: int) -> None:
        for count in counts:
            file = self.folder / "stream" / f"part-{self.writer.log.count():03d}.jsonl"
            file.write_text("".join(json.dumps({"x": self.rows + row}) + "\n" for row in range(count)))
            self.rows += count
            self.writer.append(file)

    def data(self, record: str = "order", **live: Any) -> Data:
        settings = {key: live.pop(key) for key in ("shuffle", "on_corrupt", "retry_s") if key in live}
        return et.data.jsonl(
            str(self.folder / "stream"), rows_per_block=3, window_row_groups=2,
            live={**FAST, "record": str(self.folder / record), **live}, **settings,
        )  # fmt: skip

    def stream(self, record: str = "order", *, rank: int = 0, world: int = 1, **live: Any) -> Stream:
        return et.data.stream(self.data(record, **live), batch_size=8, lanes=4, seed=5, rank=rank, world=world)

    def source(self, record: str = "order", seed: int = 5, **live: Any) -> LiveSource:
        return open_live(self.data(record, **live), seed=seed, lanes=4, lane_batch_size=2)


class Mixed(Place):
    """A live source `new` and one of 60 rows, `old`, three to one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "old").mkdir()
        rows = (json.dumps({"x": OLD + row}) + "\n" for row in range(60))
        (folder / "old" / "rows.jsonl").write_text("".join(rows))

    def spec(self, record: str = "order", weights: dict[str, float] | None = None, **live: Any) -> Mixture:
        settings = {key: live.pop(key) for key in ("stages", "second") if key in live}
        old = et.data.jsonl(str(self.folder / "old"), rows_per_block=7)
        sources = {"new": self.data(record, **live), "old": old}
        if second := settings.pop("second", None):
            sources["second"] = second
        return et.data.mixture(sources, weights=weights or {"new": 3, "old": 1}, **settings)

    def opened(self, record: str = "order", **settings: Any) -> MixedSource:
        return open_mixture(self.spec(record, **settings), seed=5, lanes=LANES, lane_batch_size=SIZE)

    def mixed(self, record: str = "order", *, rank: int = 0, world: int = 1, **settings: Any) -> Stream:
        spec = self.spec(record, **settings)
        return et.data.stream(spec, batch_size=LANES * SIZE, lanes=LANES, seed=5, rank=rank, world=world)


def taken(stream: Stream, steps: int | None = None) -> list[list[int]]:
    iterator = iter(stream)
    found = [batch["x"].tolist() for batch in islice(iterator, steps)]
    iterator.close()  # type: ignore[attr-defined]
    return found


def flat(steps: list[list[int]]) -> list[int]:
    return [x for step in steps for x in step]


def open_rows(source: LiveSource, steps: int) -> None:
    while source.decided < steps and source.advance(needed=False):
        pass


def reading(source: LiveSource, steps: int) -> list[list[list[int]]]:
    reader = LaneReader(source)
    return [[reader.batch(step, lane)["x"].tolist() for lane in range(4)] for step in range(steps)]
