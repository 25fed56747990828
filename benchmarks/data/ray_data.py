"""Tokens/s of shuffled batches for four consumers, and what that takes of Ray's object store: against Ray Data.

Rows of 1025 int32 tokens in zstd Parquet, page cache warm. Four actors take an epoch together: from
`elastictrain.data.stream`, one rank each, which read for themselves; or from `streaming_split` by `iter_torch_batches`
with a local shuffle buffer of as many rows as our windows hold. Both hand out batches of the same size as torch tensors
and both are read through once before. Processes are started before the clock is, once for all rounds: to import torch
and Ray Data in four of them takes longer than an epoch. The peak of the object store is the largest of what it says at
every 10 ms. Sides are interleaved; ratios are medians over rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import common

CONSUMERS, LANES, SIZE, LENGTH = 4, 8, 8, 1024
ROUNDS, MEGABYTES, GROUP_ROWS, FILES = 3, 128, 2048, 8
STORE_BYTES = 1 << 30
SAMPLE_S = 0.01


def write_rows(folder: Path, megabytes: int) -> int:
    """Rows of the bytes of real text, as tokens; row groups of 8 MB decoded. Gives their number."""
    texts = pq.read_table(common.DATA, columns=["text"]).column("text").to_pylist()
    joined = np.frombuffer("".join(texts).encode(), dtype=np.uint8)
    count = (megabytes << 18) // (LENGTH + 1) // FILES * FILES
    tokens = np.resize(joined, count * (LENGTH + 1)).astype(np.int32)
    table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens), LENGTH + 1)})
    folder.mkdir()
    for part in range(FILES):
        piece = table.slice(part * count // FILES, count // FILES)
        pq.write_table(piece, folder / f"{part}.parquet", row_group_size=GROUP_ROWS, compression="zstd")
    return count


class Consumer:
    """An actor that takes its part of an epoch and counts tokens."""

    def ready(self) -> int:
        """Import what both sides need; gives the process."""
        import ray.data
        import torch

        import elastictrain.data

        torch.set_num_threads(1)
        del ray, elastictrain
        return os.getpid()

    def ours(self, folder: str, rank: int) -> tuple[int, int]:
        """Tokens of an epoch's batches, and the sum of all tokens."""
        from elastictrain.data import parquet, stream

        batches = stream(parquet(folder), batch_size=LANES * SIZE, lanes=LANES, seed=1, rank=rank, world=CONSUMERS,
                         epochs=1)  # fmt: skip
        return _taken(batch["tokens"] for batch in batches)

    def theirs(self, split: Any) -> tuple[int, int]:
        """The same from Ray Data."""
        return _taken(
            batch["tokens"]
            for batch in split.iter_torch_batches(
                batch_size=LANES * SIZE // CONSUMERS, local_shuffle_buffer_size=2 * GROUP_ROWS, drop_last=True
            )
        )

    def peak_rss_bytes(self) -> int:
        """Largest resident memory of the process so far, shared pages included."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _taken(batches: Iterator[Any]) -> tuple[int, int]:
    tokens = checked = 0
    for batch in batches:
        tokens += batch.numel()
        checked += int(batch[:, 0].sum())
    return tokens, checked


@contextmanager
def store_peak() -> Iterator[Callable[[], int]]:
    """Largest number of bytes in use in the object store, within."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    done = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not done.wait(SAMPLE_S):
            seen.append(int(get_memory_info_reply(state).store_stats.object_store_bytes_used))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: max(seen)  # a ValueError where nothing could be seen
    finally:
        done.set()
        thread.join(30)


def start(side: str) -> list[Any]:
    """The consumers of a side. Those of Ray Data have a logical core each, so that as many are left for its tasks."""
    import ray

    actor = ray.remote(num_cpus=1 if side == "Ray Data" else 0)(Consumer)
    consumers = [actor.remote() for _ in range(CONSUMERS)]
    ray.get([one.ready.remote() for one in consumers])
    return consumers


def measure(side: str, folder: Path, consumers: list[Any]) -> dict[str, Any]:
    """One epoch of one side."""
    import ray
    import ray.data

    with store_peak() as peak:
        begun_s = time.perf_counter()
        if side == "elastictrain":
            calls = [one.ours.remote(str(folder), rank) for rank, one in enumerate(consumers)]
        else:
            splits = ray.data.read_parquet(str(folder)).streaming_split(CONSUMERS, equal=True)
            calls = [one.theirs.remote(split) for one, split in zip(consumers, splits, strict=True)]
        taken = ray.get(calls)
        seconds = time.perf_counter() - begun_s
    rss = sum(ray.get([one.peak_rss_bytes.remote() for one in consumers]))
    tokens = sum(count for count, _ in taken)
    return {"tokens": tokens, "tokens_per_s": tokens / seconds, "store_bytes": peak(), "consumers_rss_bytes": rss}


def more_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES)


def main() -> None:
    options = common.arguments(__doc__, more_arguments)
    warnings.simplefilter("ignore")
    common.prepare_data()
    import ray
    import ray.data

    results = common.Results("data_ray_data", "Data: four consumers, against Ray Data", options)
    rounds, megabytes = (2, 96) if options.quick else (options.rounds, options.megabytes)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with common.scratch("ray-data") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        rows = write_rows(place / "rows", megabytes)
        ray.init(address="local", num_cpus=2 * CONSUMERS, num_gpus=0, include_dashboard=False, log_to_driver=False,
                 object_store_memory=STORE_BYTES, logging_level=logging.ERROR,
                 runtime_env={"env_vars": common.child_environment()})  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            found: dict[str, list[dict[str, Any]]] = {"elastictrain": [], "Ray Data": []}
            consumers = {side: start(side) for side in found}
            for side in found:
                measure(side, place / "rows", consumers[side])
            for number in range(rounds):
                for side, runs in found.items():
                    runs.append(measure(side, place / "rows", consumers[side]))
                print(f"round {number + 1} of {rounds}", flush=True)
        finally:
            ray.shutdown()
    report(results, found, rows)


def report(results: common.Results, found: dict[str, list[dict[str, Any]]], rows: int) -> None:
    for side, runs in found.items():
        speeds = [run["tokens_per_s"] for run in runs]
        results.row(
            side=side,
            tokens_per_s=common.median(speeds),
            spread=common.spread(speeds),
            of_all_tokens=common.median(run["tokens"] for run in runs) / (rows * (LENGTH + 1)),
            store_peak_mib=common.median(run["store_bytes"] for run in runs) / 2**20,
            consumers_rss_mib=common.median(run["consumers_rss_bytes"] for run in runs) / 2**20,
        )
    pairs = list(zip(found["elastictrain"], found["Ray Data"], strict=True))
    speed = common.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
    results.figure(
        "tokens/s against Ray Data iter_torch_batches with local shuffle, 4 consumers",
        speed, ">= 3", common.verdict(speed, 3.0, at_most=False),
    )  # fmt: skip
    store = common.median(a["store_bytes"] / max(1, b["store_bytes"]) for a, b in pairs)
    results.figure(
        "peak object-store memory against Ray Data's", store, "<= 0.25", common.verdict(store, 0.25, at_most=True)
    )
    results.raw = {"runs": found}
    results.notes.append(
        f"{CONSUMERS} actors on a Ray of {2 * CONSUMERS} logical cores; the real ones are named above. Ray Data "
        "reads in tasks beside its consumers, ours in a thread of each consumer."
    )
    results.notes.append(f"{rows} rows, {len(pairs)} rounds.")
    results.notes.append("Resident memory counts shared pages of the object store once for each consumer.")
    results.write()


if __name__ == "__main__":
    main()
