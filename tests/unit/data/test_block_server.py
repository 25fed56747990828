"""Reading threads of a node's feeder that come late, when the data are others by then or cannot be opened; and blocks
that are not what the worker counts with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, MixedSource, Source, open_data
from elastictrain.data.block_client import BlockClient
from elastictrain.data.block_server import BlockServer
from elastictrain.data.sharing import Answer, Ask, Look
from elastictrain.data.warm import Arrays, cache_key
from elastictrain.data_settings import Mixture
from tests.support.panic import Panic
from tests.unit.data.test_node_feeding import PLENTY, Wire, bits, read_only, source_of, wait_until, write

READ_S = 30.0
HURRY_S = 5.0


class Slow:
    """Opens `folders` one after the other, the last one again and again; reads nothing before `gate` is open."""

    def __init__(self, *folders: Path) -> None:
        self.folders, self.gate = list(folders), threading.Event()
        self.opened: list[Source] = []
        self.closed: list[Source] = []
        self.tries = 0

    def __call__(self) -> Source:
        self.tries += 1
        source = source_of(self.folders.pop(0) if len(self.folders) > 1 else self.folders[0])
        self.opened.append(source)
        read, close = source.read_block, source.close

        def slowly(block: int) -> Arrays:
            assert self.gate.wait(READ_S)
            return read(block)

        def closing() -> None:
            self.closed.append(source)
            close()

        source.read_block = slowly  # type: ignore[method-assign]
        source.close = closing  # type: ignore[method-assign]
        return source


class Asker:
    """Two workers' questions, so that a second thread is wanted."""

    def __init__(self, server: BlockServer, key: str) -> None:
        self.server, self.key, self.serial = server, key, 0

    def __call__(self, block: int, worker: int = 0, wait_s: float = 0.0) -> Answer:
        self.serial += 1
        return self.server.ask(Ask(worker, self.serial, self.serial, self.key, block, 0.0, frozenset(), 0, wait_s))

    def want_second_reader(self) -> None:
        """One block is being read, two are wanted."""
        for block in (0, 1, 2, 1, 2):
            self(block, worker=block % 2)


def started(opener: Callable[[], Source], **more: Any) -> BlockServer:
    server = BlockServer(opener, read_only, limit_bytes=PLENTY, cpus=2, **more)
    assert server.opened(READ_S) is None
    return server


def test_a_thread_that_finds_other_files_than_the_first_reads_nothing(tmp_path: Path) -> None:
    folder, grown = write(tmp_path / "data"), write(tmp_path / "grown")
    more = [f"another document {i} " * 7 for i in range(240)]
    pq.write_table(pa.table({"text": more}), grown / "A.parquet", row_group_size=30)  # before the others: numbers shift
    now_s = [0.0]
    opener = Slow(folder, grown)
    server = started(opener, clock=lambda: now_s[0])
    try:
        source = source_of(folder)
        ask = Asker(server, cache_key(source.content))
        ask.want_second_reader()
        wait_until(lambda: len(opener.opened) == 2)
        wait_until(lambda: opener.closed == opener.opened[1:] and server.stats()["readers"] == 1)
        ask.want_second_reader()
        assert opener.tries == 2, "not at once again"
        now_s[0] += 1.0
        ask.want_second_reader()
        wait_until(lambda: opener.tries == 3)
        wait_until(lambda: server.stats()["readers"] == 1)
        now_s[0] += 1.0
        ask.want_second_reader()
        assert opener.tries == 3, "the pause has grown"
        opener.gate.set()
        for block in range(3):
            answer = ask(block, wait_s=READ_S)
            ((name, expected),) = source.read_block(block).items()
            assert answer.look is Look.HERE
            assert answer.item[0][name].tobytes() == expected.tobytes()  # type: ignore[index]
    finally:
        opener.gate.set()
        server.close()


def test_a_block_that_is_here_is_not_that_of_other_data(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    server = started(lambda: source_of(folder))
    try:
        mine = Asker(server, cache_key(source_of(folder).content))
        assert mine(1, wait_s=READ_S).look is Look.HERE
        assert Asker(server, "other data")(1, worker=1, wait_s=READ_S).look is Look.NONE
    finally:
        server.close()


def test_a_block_of_python_objects_cannot_be_shared(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")

    def opener() -> Source:
        source = source_of(folder)
        read = source.read_block
        source.read_block = lambda block: {**read(block), "odd": np.array([{}], dtype=object)}  # type: ignore[method-assign]
        return source

    server = started(opener)
    try:
        ask = Asker(server, cache_key(source_of(folder).content))
        assert ask(1, wait_s=READ_S).look is Look.NONE, "at once, and not when nobody waits any more"
        assert server.stats()["live_bytes"] == 0
    finally:
        server.close()


def test_a_thread_that_cannot_open_the_data_is_tried_again_and_the_others_go_on(tmp_path: Path) -> None:
    folder, now_s = write(tmp_path / "data"), [0.0]
    opener = Slow(folder, tmp_path / "nothing", folder)
    server = started(opener, clock=lambda: now_s[0])
    try:
        ask = Asker(server, cache_key(source_of(folder).content))
        ask.want_second_reader()
        wait_until(lambda: opener.tries == 2 and server.stats()["readers"] == 1)
        assert server.opened(0) is None, "the feeder lives"
        now_s[0] += 1.0
        ask.want_second_reader()
        wait_until(lambda: len(opener.opened) == 2)
        assert server.stats()["readers"] == 2
        opener.gate.set()
        assert ask(0, wait_s=READ_S).look is Look.HERE
    finally:
        opener.gate.set()
        server.close()


def panic() -> Source:
    raise Panic("unwrap on None")


def test_a_panic_while_the_data_are_opened_is_said() -> None:
    server = BlockServer(panic, read_only, limit_bytes=PLENTY, cpus=2)
    try:
        assert server.opened(READ_S) == "Panic: unwrap on None"
        assert not server.is_opening
    finally:
        server.close()


def test_a_block_whose_reading_panics_is_left_to_the_worker_and_the_next_one_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    opener, broken = Slow(folder), {0}

    def opening() -> Source:
        source = opener()
        read = source.read_block

        def panicking(block: int) -> Arrays:
            if block in broken:
                raise Panic
            return read(block)

        source.read_block = panicking  # type: ignore[method-assign]
        return source

    opener.gate.set()
    server = started(opening)
    try:
        ask = Asker(server, cache_key(source_of(folder).content))
        assert ask(0, wait_s=READ_S).look is Look.NONE
        assert ask(1, wait_s=READ_S).look is Look.HERE
    finally:
        server.close()


def shorter(block: Arrays) -> Arrays:
    return {name: array[:-1] for name, array in block.items()}


def longer(block: Arrays) -> Arrays:
    return {name: array.repeat(2, axis=0) for name, array in block.items()}


@pytest.mark.parametrize("other", [shorter, longer])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_block_with_other_rows_than_counted_with_is_read_by_the_worker_itself(
    tmp_path: Path, other: Callable[[Arrays], Arrays], *, mixed: bool
) -> None:
    def opened() -> Source | MixedSource:
        if not mixed:
            return source_of(tmp_path / "a")
        one = {"kind": "parquet", "text_column": "text"}
        spec = Mixture(
            sources={name: {**one, "path": str(tmp_path / name)} for name in "ab"}, sequence_length=16, feeder="node"
        )
        source = open_data(spec, seed=1, lanes=2, lane_batch_size=2)
        assert isinstance(source, MixedSource)
        return source

    for name, rows in (("a", 60), ("b", 90)):
        write(tmp_path / name, rows=rows, group=15)
    plain = LaneReader(opened())
    server = BlockServer(opened, lambda arrays: [other(arrays)], limit_bytes=PLENTY, cpus=1)
    try:
        assert server.opened(READ_S) is None
        client, source = BlockClient(Wire(server), 0, workers=1), opened()
        reader = LaneReader(source, shared=client.of(source))
        for step in range(8):
            assert bits(reader.batch(step, 0)) == bits(plain.batch(step, 0))
        assert client.taken == reader.blocks_decoded > 0, "every one was given up"
    finally:
        server.close()


def test_blocks_of_a_mixture_are_counted_rightly(tmp_path: Path) -> None:
    for name, rows in (("a", 60), ("b", 90)):
        write(tmp_path / name, rows=rows, group=20)
    one = {"kind": "parquet", "text_column": "text"}
    spec = Mixture(sources={name: {**one, "path": str(tmp_path / name)} for name in "ab"}, sequence_length=16)
    mixture = open_data(spec, seed=1, lanes=2, lane_batch_size=2)
    assert isinstance(mixture, MixedSource)
    counted = [mixture.rows_in(block) for block in range(mixture._first_block["b"] + 5)]
    assert counted == [len(next(iter(mixture.read_block(block).values()))) for block in range(len(counted))]


def test_what_idle_workers_held_goes_although_nobody_asks_for_anything_any_more(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    server = started(lambda: source_of(folder))
    try:
        wire = Wire(server)
        readers = [
            LaneReader(source_of(folder), shared=BlockClient(wire, worker, workers=2).of(source_of(folder)))
            for worker in range(2)
        ]
        for reader in readers:
            reader.batch(0, 0)
        assert server.stats()["live_bytes"] > 0
        asked = len(wire.asked)
        readers[0].close()  # its client lives on, as that of a worker does whose stage has ended
        readers[1].close()
        wait_until(lambda: server.stats()["live_bytes"] == 0)
        assert len(wire.asked) == asked
        assert server.stats()["workers"] == 2, "they are still there, and may ask again"
    finally:
        server.close()


class Waiting:
    """A feeder that keeps a worker waiting until it is in a hurry, and then brings nothing."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], bool]] = []
        self.in_time: list[bool] = []

    def take(self, number: int, due: float, *, urgent: Callable[[], bool]) -> None:
        del number, due
        self.asked.append(urgent)
        until_s = time.monotonic() + HURRY_S
        while not urgent() and time.monotonic() < until_s:
            threading.Event().wait(0.01)
        self.in_time.append(urgent())


def test_who_reads_ahead_hurries_as_soon_as_somebody_waits_for_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", rows=60, group=60)
    shared: Any = Waiting()
    expected = bits(LaneReader(source_of(folder)).batch(0, 0))
    reader = LaneReader(source_of(folder), ahead_bytes=PLENTY, shared=shared)
    try:
        reader.expect([(0, 0)])
        wait_until(lambda: bool(shared.asked))
        assert not shared.asked[0](), "nobody waits yet"
        assert bits(reader.batch(0, 0)) == expected
        assert shared.in_time[0], "the thread that reads ahead has heard of it"
        assert not shared.asked[0](), "it is over"
    finally:
        reader.close()
