"""A node's feeder without Ray: the same bits as from a worker's own, one decoding for all workers, and what happens
when it is gone, stopped, slow, full or wrong.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastictrain.data import LaneReader, Source, open_source
from elastictrain.data.block_client import BlockClient
from elastictrain.data.block_server import BlockServer
from elastictrain.data.feeder import Feeder
from elastictrain.data.reliance import Reliance
from elastictrain.data.sharing import Answer, Ask, Look
from elastictrain.data.warm import Arrays, cache_key
from elastictrain.data_settings import Mixture
from elastictrain.errors import ConfigError, DataError
from elastictrain.job import Data
from elastictrain.settings import Settings
from tests.unit.data.test_block_client import no, yes

LANES, SIZE, STEPS, WORKERS = 4, 2, 12, 2
PLENTY = 1 << 30


def write(folder: Path, rows: int = 240, group: int = 30) -> Path:
    folder.mkdir(exist_ok=True)
    words = [f"document {i} " * (1 + i % 5) for i in range(rows)]
    pq.write_table(pa.table({"text": words}), folder / "a.parquet", row_group_size=group)
    return folder


def source_of(folder: Path, **more: Any) -> Source:
    spec = Data(kind="parquet", path=str(folder), text_column="text", sequence_length=16, feeder="node", **more)
    return open_source(spec, seed=1, lanes=LANES, lane_batch_size=SIZE)


def read_only(arrays: Arrays) -> list[Arrays]:
    """What the object store does to arrays."""
    copies = {name: array.copy() for name, array in arrays.items()}
    for array in copies.values():
        array.flags.writeable = False
    return [copies]


class Wire:
    """A `Line` to a server in this process. `fault` is called before every question and may raise, wait or answer."""

    def __init__(self, server: BlockServer, fault: Callable[[Ask], Answer | None] = lambda _: None) -> None:
        self.server, self.number, self.fault = server, 1, fault
        self.asked: list[Ask] = []

    def tell(self, number: int, ask: Ask) -> None:
        self.server.tell(ask)

    def call(self, number: int, ask: Ask, deadline_s: float) -> tuple[Answer, Arrays | None]:
        assert number == self.number
        assert ask.wait_s < deadline_s
        self.asked.append(ask)
        answer = self.fault(ask) or self.server.ask(ask)
        return answer, answer.item[0] if answer.item is not None else None  # type: ignore[index]


@contextmanager
def server_of(folder: Path, limit_bytes: int = PLENTY, cpus: int = 2, **more: Any) -> Iterator[BlockServer]:
    server = BlockServer(lambda: source_of(folder, **more), read_only, limit_bytes=limit_bytes, cpus=cpus)
    try:
        assert server.opened(30) is None
        yield server
    finally:
        server.close()


def bits(batch: Any) -> bytes:
    return b"".join(np.asarray(array).tobytes() for array in batch.values())


def alone(folder: Path, **more: Any) -> dict[tuple[int, int], bytes]:
    reader = LaneReader(source_of(folder, **more))
    return {(step, lane): bits(reader.batch(step, lane)) for step in range(STEPS) for lane in range(LANES)}


def take_all(
    folder: Path, wires: list[Wire], between: Callable[[int], None] = lambda _: None, **more: Any
) -> tuple[dict[tuple[int, int], bytes], list[BlockClient]]:
    """Workers in lockstep: worker w has every `len(wires)`-th lane, and half-way they change lanes."""
    clients = [BlockClient(wire, worker, workers=len(wires)) for worker, wire in enumerate(wires)]
    feeders = [Feeder.of(source_of(folder, **more), client=client) for client in clients]
    found = {}
    try:
        for step in range(STEPS):
            between(step)
            for worker, feeder in enumerate(feeders):
                turned = (worker + step // (STEPS // 2)) % len(feeders)
                lanes = range(turned, LANES, len(feeders))
                feeder.expect([(s, lane) for s in range(step, min(STEPS, step + 4)) for lane in lanes])
                for lane in lanes:
                    found[step, lane] = bits(feeder.batch(step, lane))
    finally:
        for feeder in feeders:
            feeder.close()
    return found, clients


def test_two_workers_get_the_same_bits_and_every_block_is_decoded_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", rows=60)  # a few blocks, in which all lanes are at the same time
    with server_of(folder) as server:
        found, clients = take_all(folder, [Wire(server), Wire(server)])
        stats = server.stats()
    assert found == alone(folder)
    blocks = len(source_of(folder).order.block_rows)
    assert stats["decoded"] == blocks, "by whoever came first, and never again"
    assert stats["handed_out"] > blocks
    assert all(client.taken for client in clients)
    assert stats["workers"] == WORKERS
    assert [client.workers for client in clients] == [WORKERS, WORKERS]


def test_a_worker_reads_nothing_itself_while_the_feeder_brings_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    with server_of(folder) as server:
        client = BlockClient(Wire(server), 0, workers=1)
        source = source_of(folder)
        reader = LaneReader(source, shared=client.of(source))
        got = {(s, lane): bits(reader.batch(s, lane)) for s in range(STEPS) for lane in range(LANES)}
        assert got == alone(folder)
        assert reader.blocks_decoded == 0
        assert server.stats()["decoded"] > 0
        assert reader.meter.read()["feeder"] > 0, "what was waited for is shown"
        assert reader.meter.read()["decode"] == 0
        batch = reader.batch(0, 0)
        assert all(array.flags.writeable for array in batch.values()), "a batch is its caller's"


def test_what_no_worker_holds_any_more_is_let_go(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    with server_of(folder) as server:
        wire = Wire(server)
        client = BlockClient(wire, 0, workers=1)
        key = cache_key(source_of(folder).content)
        first = client.take(key, 0, 0.0, urgent=yes)
        second = client.take(key, 1, 0.0, urgent=yes)
        assert first is not None
        assert second is not None
        assert wire.asked[-1].held == {0}
        assert not any(array.flags.writeable for array in first.arrays.values())
        del first
        gc.collect()
        third = client.take(key, 2, 0.0, urgent=yes)
        assert third is not None
        assert wire.asked[-1].held == {1}, "the first is held no more"
        wait_until(lambda: server.stats()["live_bytes"] == second.bytes + third.bytes)
        server.forget(0)
        wait_until(lambda: server.stats()["live_bytes"] == 0)


def wait_until(reached: Callable[[], bool], timeout_s: float = 30.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < until_s
        threading.Event().wait(0.01)


def test_a_store_that_is_full_makes_workers_read_for_themselves(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    source = source_of(folder)
    largest = max(sum(a.nbytes for a in source.read_block(b).values()) for b in range(len(source.order.block_rows)))
    for limit_bytes in (1, int(1.5 * largest)):
        with server_of(folder, limit_bytes=limit_bytes) as server:
            found, clients = take_all(folder, [Wire(server), Wire(server)])
            stats = server.stats()
        assert found == alone(folder)
        assert stats["peak_bytes"] <= limit_bytes
        assert sum(client.taken for client in clients) == stats["handed_out"]
        assert bool(stats["handed_out"]) == (limit_bytes > 1)
        assert limit_bytes == 1 or stats["refused"]


def test_a_feeder_that_dies_in_the_middle_and_another_that_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With patience: on a busy machine they would rather read for themselves than wait for either."""
    monkeypatch.setattr(Reliance, "patience_s", lambda *_, **__: 30.0)
    folder = write(tmp_path / "data", rows=60, group=4)
    with server_of(folder) as first, server_of(folder) as second:
        wires = [Wire(first), Wire(first)]

        def gone(_: Ask) -> None:
            raise ConnectionError("the actor died")

        def between(step: int) -> None:
            for wire in wires:
                if step == 3:
                    wire.fault = gone
                if step == 8:
                    wire.fault, wire.server, wire.number = lambda _: None, second, 2

        found, _ = take_all(folder, wires, between, prefetch_bytes=1)  # so that windows are needed all the time
        assert found == alone(folder)
        assert first.stats()["handed_out"]
        assert second.stats()["handed_out"], "they have come back"


def test_a_feeder_that_stands_in_hears_what_is_still_held_of_the_one_before(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    key = cache_key(source_of(folder).content)
    with server_of(folder) as first, server_of(folder) as second:
        wire = Wire(first)
        client = BlockClient(wire, 0, workers=1)
        old = client.take(key, 0, 0.0, urgent=yes)
        wire.server, wire.number = second, 2
        new = client.take(key, 1, 0.0, urgent=yes)
        assert old is not None
        assert new is not None
        client.take(key, 2, 0.0, urgent=yes)
        assert (wire.asked[-1].held, wire.asked[-1].other_bytes) == ({1}, old.bytes)
        assert second.stats()["live_bytes"] >= old.bytes + new.bytes


def test_another_feeders_data_are_not_taken(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "data"), write(tmp_path / "other", rows=120)
    with server_of(other) as server:
        found, clients = take_all(folder, [Wire(server)])
        assert found == alone(folder)
        assert clients[0].taken == 0
        assert server.stats()["decoded"] == 0


def test_a_feeder_that_cannot_open_its_data_says_why_and_harms_nobody(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    server = BlockServer(lambda: source_of(tmp_path / "nothing"), read_only, limit_bytes=PLENTY, cpus=1)
    try:
        assert str(server.opened(30)).startswith("DataError: data.path")
        found, clients = take_all(folder, [Wire(server)])
        assert found == alone(folder)
        assert clients[0].taken == 0
    finally:
        server.close()


def test_a_corrupt_row_group_is_the_workers_own_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    sources = [source_of(folder), source_of(folder)]
    file = folder / "a.parquet"
    raw = bytearray(file.read_bytes())
    raw[4:2000] = b"\xff" * 1996
    stat = file.stat()
    with server_of(folder) as server:
        file.write_bytes(raw)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        client = BlockClient(Wire(server), 0, workers=1)
        shared = LaneReader(sources[0], shared=client.of(sources[0]))
        own = LaneReader(sources[1])
        said = [first_error(reader) for reader in (shared, own)]
        assert said[0] == said[1]
        assert "a.parquet" in said[0]


def test_a_block_that_cannot_be_read_is_said_at_once_and_tried_again_when_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    fails = [True]

    def opened() -> Source:
        source = source_of(folder)
        read = source.read_block

        def once(block: int) -> Arrays:
            if fails:
                raise OSError(f"no block {fails.pop()}")
            return read(block)

        source.read_block = once  # type: ignore[method-assign]
        return source

    server = BlockServer(opened, read_only, limit_bytes=PLENTY, cpus=1)
    try:
        assert server.opened(30) is None
        key = cache_key(source_of(folder).content)

        def ask(serial: int) -> Answer:
            return server.ask(Ask(0, serial, serial, key, 0, 0.0, frozenset(), 0, 30.0))

        assert ask(1).look is Look.NONE
        assert ask(2).look is Look.HERE
    finally:
        server.close()


def first_error(reader: LaneReader) -> str:
    for step in range(STEPS):
        for lane in range(LANES):
            try:
                reader.batch(step, lane)
            except DataError as error:
                return str(error)
    return ""


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(st.sampled_from(["", "", "dead", "full", "none", "new"]), min_size=1, max_size=30))
def test_the_same_bits_whatever_the_feeder_does(tmp_path: Path, faults: list[str]) -> None:
    folder = write(tmp_path / "data")
    expected = alone(folder)
    with server_of(folder) as server:
        wire = Wire(server)
        script = iter(faults)

        def fault(_: Ask) -> Answer | None:
            what = next(script, "")
            if what == "dead":
                raise RuntimeError("dead")
            if what == "new":
                wire.number += 1
            return Answer(Look(what), 3, 0.0) if what in ("full", "none") else None

        wire.fault = fault
        client = BlockClient(wire, 0, workers=1)
        source = source_of(folder)
        with Feeder.of(source, client=client) as feeder:
            feeder.expect(list(expected))
            assert {place: bits(feeder.batch(*place)) for place in expected} == expected


def test_workers_share_the_budget_of_their_node(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    with server_of(folder) as server:
        client = BlockClient(Wire(server), 0, workers=4)
        with Feeder.of(source_of(folder, prefetch_bytes=4000), client=client) as feeder:
            assert feeder._reader._ahead is not None
            assert (feeder._budget_bytes, feeder._reader._ahead._budget_bytes) == (250, 750), (
                "of four, until it is told"
            )
            server.ask(Ask(7, 1, 1, "", 0, 0.0, frozenset(), 0, 0.0))  # another worker of the node
            feeder.batch(0, 0)
            assert (feeder._budget_bytes, feeder._reader._ahead._budget_bytes) == (500, 1500)
            server.forget(7)
            wait_until(lambda: bool(feeder.batch(STEPS, 0)) and server.stats()["workers"] == 1)
            client.take("", 0, 0.0, urgent=no)
            assert (feeder._budget_bytes, feeder._reader._ahead._budget_bytes) == (1000, 3000)


def test_what_is_needed_first_is_read_first_and_readers_come_with_workers(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    gate, order = threading.Event(), list[int]()

    def opened() -> Source:
        source = source_of(folder)
        read = source.read_block

        def slowly(block: int) -> Arrays:
            order.append(block)
            assert gate.wait(30)
            return read(block)

        source.read_block = slowly  # type: ignore[method-assign]
        return source

    server = BlockServer(opened, read_only, limit_bytes=PLENTY, cpus=1)
    try:
        assert server.opened(30) is None
        key = cache_key(source_of(folder).content)

        def ask(block: int, due: float) -> Answer:
            return server.ask(Ask(0, 1, 1, key, block, due, frozenset(), 0, 0.0))

        ask(5, 100.0)
        wait_until(lambda: order == [5])
        for block, due in ((1, 30.0), (2, 10.0), (3, 20.0), (3, 5.0), (0, 10.0)):
            assert ask(block, due).look is Look.COMING
        gate.set()
        wait_until(lambda: len(order) == 5)
        assert order == [5, 3, 2, 0, 1]
        assert server.stats()["readers"] == 1, "of one processor"
    finally:
        gate.set()
        server.close()


def test_the_setting_is_refused_where_it_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"data.feeder=node: segments of a live source are read by each worker"):
        Data(kind="parquet", path="x", feeder="node", live={})
    with pytest.raises(ConfigError, match=r"data.feeder=node: segments of a live source are read by each worker"):
        Mixture(sources={"a": {"kind": "parquet", "path": "x", "live": {}}}, feeder="node")
    with pytest.raises(ConfigError, match="worker"):
        Data(kind="parquet", path="x", feeder="host")
    assert issubclass(Data, Settings)
