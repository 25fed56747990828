"""A store that stalls while something is read ahead keeps nobody from what is there already, nor from other blocks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import elastictrain as et
from elastictrain.data import LaneReader, open_source
from elastictrain.data.source import Source

WAIT_S = 30.0


class Stall:
    def __init__(self) -> None:
        self.begun, self.let = threading.Event(), threading.Event()


@pytest.fixture
def stall() -> Iterator[Stall]:
    made = Stall()
    yield made
    made.let.set()


def test_batches_come_while_reading_ahead_stalls(tmp_path: Path, stall: Stall, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"x": row}) + "\n" for row in range(64)))
    data = et.data.jsonl(str(file), rows_per_block=8, window_row_groups=1, shuffle="none")
    expected = LaneReader(open_source(data, seed=1, lanes=2, lane_batch_size=4))
    wanted = {(step, lane): expected.batch(step, lane)["x"].tolist() for step in range(8) for lane in range(2)}
    reading, read_block = threading.Lock(), Source.read_block

    def stalling(self: Source, block: int) -> Any:
        if threading.current_thread().name == "elastictrain-ahead" and reading.acquire(blocking=False):
            stall.begun.set()
            assert stall.let.wait(WAIT_S), "nobody lets it go on"
        return read_block(self, block)

    monkeypatch.setattr(Source, "read_block", stalling)
    reader = LaneReader(open_source(data, seed=1, lanes=2, lane_batch_size=4), ahead_bytes=1 << 20)
    found: dict[tuple[int, int], list[int]] = {}
    ended = threading.Event()

    def train() -> None:
        for place in ((0, 0), (1, 0), (0, 1), (1, 1), (4, 1), (5, 1)):  # windows of two steps each
            found[place] = reader.batch(*place)["x"].tolist()
            if place == (0, 0):  # the window that follows in lane 0 is being read, and does not come
                assert stall.begun.wait(WAIT_S)
        ended.set()

    threading.Thread(target=train, daemon=True).start()
    assert ended.wait(WAIT_S), "who needs nothing of the block that does not come waits for it"
    assert found == {place: wanted[place] for place in found}
    late: list[list[int]] = []
    waiting = threading.Thread(target=lambda: late.append(reader.batch(2, 0)["x"].tolist()), daemon=True)
    waiting.start()
    stall.let.set()
    waiting.join(WAIT_S)
    assert late == [wanted[2, 0]]
    reader.close()
