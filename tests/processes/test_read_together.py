"""Several processes restore one checkpoint together and read it once: over gloo, and through shared memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from elastictrain_checkpoint import CorruptData, Manifest, Reader, Store, load
from elastictrain_checkpoint.reshard import plan_reads
from elastictrain_checkpoint.rounds import most_sent_bytes
from elastictrain_checkpoint.together import read_together
from elastictrain_checkpoint.torch.exchange import GroupExchange, host_exchange
from elastictrain_checkpoint.wants import Want
from tests.unit.checkpoint.build import flip, make_state, save

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

WORKERS = 3
ROWS, COLUMNS = 600, 900
SPAN_BYTES, ROUND_BYTES = 60_000, 300_000
STATE = make_state({"model/a": ("F32", (ROWS, COLUMNS)), "model/b": ("BF16", (ROWS, COLUMNS)), "step": ("I64", ())})


def wants_of(worker: int) -> list[Want]:
    """A block of columns of everything, the whole of what is small: replicas of that."""
    wide = COLUMNS // WORKERS
    box = ((0, worker * wide), (ROWS, wide))
    return [Want("model/a", *box), Want("model/b", *box), Want("step", (), ())]


def expected(worker: int) -> list[bytes]:
    out = []
    for want in wants_of(worker):
        dtype, shape, raw = STATE[want.name]
        whole = np.frombuffer(raw, dtype={"F32": "u4", "BF16": "u2", "I64": "u8"}[dtype]).reshape(shape)
        part = tuple(slice(a, a + b) for a, b in zip(want.offsets, want.sizes, strict=True))
        out.append(np.ascontiguousarray(whole[part]).tobytes())
    return out


def restore(rank: int, folder: str, how: str, answers: Any) -> None:
    """One process: what it has read, or the error."""
    store = dist.FileStore(f"{folder}/meeting", WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS, timeout=timedelta(seconds=60))
    reader = Reader(Store(f"{folder}/store"), load(Store(f"{folder}/store"), 3))
    wants = [wants_of(worker) for worker in range(WORKERS)]
    plan = plan_reads(reader.manifest, wants, span_bytes=SPAN_BYTES)
    if how.startswith("host"):
        exchange: Any = host_exchange()
        exchange.make_room(most_sent_bytes(plan, ROUND_BYTES))
    else:
        exchange = GroupExchange()
    outs = [bytearray(len(data)) for data in expected(rank)]
    if how == "host, one dies" and rank == 1:
        reader = _DiesInItsSecondRound(reader)  # type: ignore[assignment]
    try:
        read_together(reader, plan, wants, outs, worker=rank, exchange=exchange, round_bytes=ROUND_BYTES)
        answers.put((rank, [bytes(out) for out in outs], reader.read_bytes))
    except (CorruptData, ConnectionError) as error:
        answers.put((rank, str(error), reader.read_bytes))
    if how != "host, one dies":
        dist.barrier()
    dist.destroy_process_group()


class _DiesInItsSecondRound:
    def __init__(self, reader: Reader) -> None:
        self._reader, self._rounds = reader, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read_spans(self, spans: Any) -> None:
        self._rounds += 1
        if self._rounds == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        self._reader.read_spans(spans)


def run(folder: Path, how: str, dead: int | None = None) -> dict[int, tuple[Any, int]]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=restore, args=(rank, str(folder), how, answers)) for rank in range(WORKERS)]
    for process in processes:
        process.start()
    try:
        found = [answers.get(timeout=90) for rank in range(WORKERS) if rank != dead]
        for process in processes:
            process.join(30)
        codes = [-signal.SIGKILL if rank == dead else 0 for rank in range(WORKERS)]
        assert [process.exitcode for process in processes] == codes
    finally:
        for process in processes:
            process.kill()
    return {rank: (what, read_bytes) for rank, what, read_bytes in found}


def stored(folder: Path) -> tuple[Store, Manifest]:
    store = Store(folder / "store")
    return store, save(store, STATE, (0.25, 0.5, 0.75), step=3)


@pytest.mark.parametrize("how", ["host", "gloo"])
def test_each_gets_its_columns_and_storage_is_read_once(tmp_path: Path, how: str) -> None:
    _, manifest = stored(tmp_path)
    found = run(tmp_path, how)
    assert {rank: what for rank, (what, _) in found.items()} == {rank: expected(rank) for rank in range(WORKERS)}
    # Packs are smaller than a block here, so a pack is read by all that own some of it: two at most, by the plan.
    assert sum(read for _, read in found.values()) <= manifest.size_bytes + (WORKERS - 1) * manifest.block_bytes


@pytest.mark.parametrize("how", ["host", "gloo"])
def test_damage_is_told_to_everybody(tmp_path: Path, how: str) -> None:
    store, manifest = stored(tmp_path)
    hit = max(range(len(manifest.files)), key=lambda number: manifest.files[number].size_bytes)
    flip(store, manifest.paths[hit], 100_000)
    found = run(tmp_path, how)
    for what, _ in found.values():
        assert isinstance(what, str)
        assert manifest.paths[hit] in what
        assert "its hash differs from the manifest's" in what
    assert any(what.startswith("worker ") for what, _ in found.values())


def test_a_worker_that_dies_in_the_middle_is_not_waited_for(tmp_path: Path) -> None:
    """Through shared memory; well before the group's deadline of 60 s, by the end of its pipe."""
    stored(tmp_path)
    begun = time.monotonic()
    found = run(tmp_path, "host, one dies", dead=1)
    assert time.monotonic() - begun < 50
    assert sorted(found) == [0, 2]
    told = [what for what, _ in found.values()]
    assert "worker 1 is gone, or has given up: what it was to read does not come" in told
    assert all(what.endswith("is gone, or has given up: what it was to read does not come") for what in told)
