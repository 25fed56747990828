"""One feeder for each worker against one for all workers of a node: tokens/s, decoded bytes, memory.

Text in zstd Parquet, tokenised to bytes and packed, page cache warm, no warm cache. One, two and four processes share a
node and take the same epochs together, each some of the lanes: as workers whose data are decoded by themselves
(`data.feeder: worker`), or by one actor for all of them (`node`), from which they map row groups out of Ray's object
store. Two sets of data: many row groups, so that lanes are in different ones (nothing to share), and few, so that all
lanes are in the same ones. Processes are started and data are opened before the clock is, once for all rounds of a
case; a round is an epoch, which goes on where the last one ended. Sides are interleaved; ratios are medians over rounds
of ratios within a round. Memory is what is not shared with others (USS) of consumers and feeder together, at its
largest, and what the object store holds.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq

import common

LANES, SIZE, LENGTH = 8, 4, 1024
ROUNDS, MEGABYTES, FILES = 2, 64, 8
PREFETCH_BYTES = 64 << 20
STORE_BYTES = 1 << 30
CASES = {"many row groups": 2 << 20, "few row groups": 24 << 20}
"""Bytes of text in a row group."""
WORKERS = (1, 2, 4)
SAMPLE_S = 0.02


def write_text(folder: Path, megabytes: int, group_bytes: int) -> None:
    """The example's texts, as often as needed."""
    texts = pq.read_table(common.DATA, columns=["text"]).column("text").to_pylist()
    mean_bytes = sum(len(text.encode()) for text in texts) / len(texts)
    count = int(megabytes * 2**20 / mean_bytes)
    table = pa.table({"text": [texts[number % len(texts)] for number in range(count)]})
    folder.mkdir()
    for part in range(FILES):
        piece = table.slice(part * count // FILES, count // FILES)
        rows = max(1, int(group_bytes / mean_bytes))
        pq.write_table(piece, folder / f"{part}.parquet", row_group_size=rows, compression="zstd")


def settings(folder: Path) -> dict[str, Any]:
    return {"kind": "parquet", "path": str(folder), "text_column": "text", "sequence_length": LENGTH,
            "prefetch_bytes": PREFETCH_BYTES}  # fmt: skip


class Consumer:
    """An actor that takes some of the lanes of every step, and counts tokens."""

    def open(self, data: dict[str, Any], rank: int, world: int, feeder: Any) -> int:
        """`feeder`: the actor, or None. Gives the process."""
        import torch

        from elastictrain.data import open_source
        from elastictrain.data.block_client import BlockClient
        from elastictrain.data.feeder import Feeder
        from elastictrain.job import Data
        from elastictrain_actors.node_feeder import FeederLine

        torch.set_num_threads(1)
        self._client = None
        if feeder is not None:
            line = FeederLine()
            line.use(1, feeder)
            self._client = BlockClient(line, rank, workers=world)
        source = open_source(Data(**data), seed=1, lanes=LANES, lane_batch_size=SIZE)
        self._lanes = range(rank, LANES, world)
        self._feeder = Feeder.of(source, client=self._client)
        return os.getpid()

    def take(self, first: int, steps: int) -> tuple[int, int]:
        """Tokens of the steps, and their sum."""
        tokens = checked = 0
        for step in range(first, first + steps):
            ahead = range(step, min(first + steps, step + 16))
            self._feeder.expect((s, lane) for s in ahead for lane in self._lanes)
            for lane in self._lanes:
                batch = self._feeder.batch(step, lane)["tokens"]
                tokens += batch.numel()
                checked += int(batch.sum())
        return tokens, checked

    def decoded(self) -> int:
        """Row groups that this process has decoded."""
        return int(self._feeder._reader.blocks_decoded)


@contextmanager
def memory_peak(pids: list[int]) -> Iterator[Callable[[], int]]:
    """Largest sum of what these processes have for themselves, within."""
    done, seen = threading.Event(), list[int]()

    def own_bytes(pid: int) -> int:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))

    def look() -> None:
        while not done.wait(SAMPLE_S):
            seen.append(sum(own_bytes(pid) for pid in pids))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: max(seen)  # a ValueError where nothing could be seen
    finally:
        done.set()
        thread.join(30)


class Side:
    """The processes of one side of a case."""

    def __init__(self, side: str, folder: Path, world: int) -> None:
        import ray

        from elastictrain.job import Data
        from elastictrain_actors.node_feeder import NodeFeeder

        data = settings(folder)
        self._feeder, self._pids, self._decoded = None, [], (0, 0)
        if side == "node":
            actor = ray.remote(num_cpus=0, max_concurrency=64)(NodeFeeder)
            self._feeder = actor.remote(Data(**data), LANES, SIZE)
            pid, error, _ = ray.get(self._feeder.opened.remote())
            assert error is None, error
            self._pids.append(pid)
        self._consumers = [ray.remote(num_cpus=0)(Consumer).remote() for _ in range(world)]
        calls = [one.open.remote(data, rank, world, self._feeder) for rank, one in enumerate(self._consumers)]
        self._pids += ray.get(calls)

    def measure(self, first: int, steps: int) -> dict[str, Any]:
        """So many steps from `first` on."""
        import ray

        with memory_peak(self._pids) as peak:
            begun_s = time.perf_counter()
            taken = ray.get([one.take.remote(first, steps) for one in self._consumers])
            seconds = time.perf_counter() - begun_s
        stats = ray.get(self._feeder.stats.remote()) if self._feeder is not None else {}
        so_far = (sum(ray.get([one.decoded.remote() for one in self._consumers])), stats.get("decoded", 0))
        by_workers, by_feeder = (now - before for now, before in zip(so_far, self._decoded, strict=True))
        self._decoded = so_far
        tokens = sum(count for count, _ in taken)
        return {"tokens_per_s": tokens / seconds, "checked": sum(check for _, check in taken),
                "decoded": by_workers + by_feeder, "store_bytes": stats.get("peak_bytes", 0), "own_bytes": peak(),
                "by_workers": by_workers, "refused": stats.get("refused", 0)}  # fmt: skip

    def close(self) -> None:
        """End the processes."""
        import ray

        for one in (*self._consumers, self._feeder):
            if one is not None:
                ray.kill(one)


def more_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--case", choices=CASES, help="only this one (default: all)")


def main() -> None:
    options = common.arguments(__doc__, more_arguments)
    warnings.simplefilter("ignore")
    common.prepare_data()
    import ray

    from elastictrain.data import open_source
    from elastictrain.job import Data

    name = "data_node_feeder" + (f"_{options.case.partition(' ')[0]}" if options.case else "")
    results = common.Results(name, "Data: one feeder for a node against one for each worker", options)
    rounds, megabytes = (1, 48) if options.quick else (options.rounds, MEGABYTES)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with common.scratch("node-feeder") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        ray.init(address="local", num_cpus=8, num_gpus=0, include_dashboard=False, log_to_driver=False,
                 object_store_memory=STORE_BYTES, logging_level=logging.ERROR,
                 runtime_env={"env_vars": common.child_environment()})  # fmt: skip
        try:
            for number, case in enumerate([options.case] if options.case else CASES):
                folder = place / str(number)
                write_text(folder, megabytes, CASES[case])
                source = open_source(Data(**settings(folder)), seed=1, lanes=LANES, lane_batch_size=SIZE)  # its index
                blocks, steps = len(source.order.block_rows), source.steps_per_epoch
                source.close()
                for world in WORKERS:
                    run_case(results, case, folder, world, steps, blocks, rounds)
        finally:
            ray.shutdown()
    results.notes.append(
        f"An epoch of {megabytes} MiB of text in {FILES} files, tokenised to bytes and packed to {LENGTH}; {LANES} "
        f"lanes of {SIZE}; {rounds} rounds; data.prefetch_bytes {PREFETCH_BYTES >> 20} MiB: for each worker, or for "
        "all of them."
    )
    results.notes.append("Nothing but feeding happens: no step hides it. All processes share the cores named above.")
    results.write()


def run_case(
    results: common.Results, case: str, folder: Path, world: int, steps: int, blocks: int, rounds: int
) -> None:
    found: dict[str, list[dict[str, Any]]] = {"worker": [], "node": []}
    sides = {side: Side(side, folder, world) for side in found}
    for number in range(rounds):
        for side, runs in found.items():
            runs.append(sides[side].measure(number * steps, steps))
        assert len({runs[-1]["checked"] for runs in found.values()}) == 1, "the sides read different tokens"
    for one in sides.values():
        one.close()
    for side, runs in found.items():
        results.row(
            data=case, workers=world, feeder=side,
            tokens_per_s=common.median(run["tokens_per_s"] for run in runs),
            spread=common.spread([run["tokens_per_s"] for run in runs]),
            decoded_of_all=common.median(run["decoded"] for run in runs) / blocks,
            decoded_by_workers=common.median(run["by_workers"] for run in runs) / blocks,
            own_memory_mib=common.median(run["own_bytes"] for run in runs) / 2**20,
            store_peak_mib=common.median(run["store_bytes"] for run in runs) / 2**20,
        )  # fmt: skip
    pairs = list(zip(found["node"], found["worker"], strict=True))
    ratio = common.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
    memory = common.median((a["own_bytes"] + a["store_bytes"]) / b["own_bytes"] for a, b in pairs)
    print(f"-> {case}, {world} workers: tokens/s of node against worker {ratio:.3g}, memory {memory:.3g}", flush=True)
    results.raw.setdefault("cases", []).append(
        {"data": case, "workers": world, "speed": ratio, "memory": memory, "runs": found}
    )


if __name__ == "__main__":
    main()
