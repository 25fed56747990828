"""Planning a load of 100,000 chunks, saved by 64 workers, by 128 workers: elastictrain against DCP's planner.

Elastictrain's plan is for the whole job, who reads what for whom, and every worker makes it by itself. DCP plans for
one worker at a time what that worker reads (its whole chunks), then gathers all plans on one worker, and scatters them;
the gathering is not in its time here. A few of the 128 workers are planned with DCP, the others are taken to be alike.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import common
from elastictrain_checkpoint import Manifest
from elastictrain_checkpoint.manifest import parse_manifest, write_manifest
from elastictrain_checkpoint.part import FileRecord, TensorRecord
from elastictrain_checkpoint.reshard import Want, plan_reads

SAVED, LOADING = 64, 128
ROWS, COLUMNS = 8192, 16


def names(tensors: int) -> list[str]:
    return [f"model/layers.{i // 10}.part{i % 10}.weight" for i in range(tensors)]


def manifest_of(tensors: int) -> Manifest:
    """A checkpoint of row shards, one pack for each worker that saved; there are no bytes behind it."""
    import datetime

    from elastictrain_checkpoint.hashing import pack_sums, root_sum, unpack_sums

    high = ROWS // SAVED
    size = high * COLUMNS * 4
    total = 4096 + tensors * size
    sums = pack_sums([0] * -(-total // (1 << 20)))
    files = [
        FileRecord(
            path=f"a/w{w:04d}-00.safetensors",
            size_bytes=total,
            data_start=4096,
            sums=sums,
            root=root_sum(unpack_sums(sums)),
        )
        for w in range(SAVED)
    ]
    records = {
        name: TensorRecord(
            dtype="F32",
            shape=[ROWS, COLUMNS],
            chunks=[(w, 4096 + i * size, [w * high, 0], [high, COLUMNS]) for w in range(SAVED)],
        )
        for i, name in enumerate(names(tensors))
    }
    draft = write_manifest(
        step=1, attempt="a", generation=1, time=datetime.datetime.now(datetime.UTC), info={}, block_bytes=1 << 20,
        digest="0" * 64, files=files, tensors=records, alias={}, tree=None,
    )  # fmt: skip
    return parse_manifest(draft.raw)


def shard(worker: int, turned: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Box of one of the workers that load: rows, or (turned) blocks of rows and columns."""
    if not turned:
        high = ROWS // LOADING
        return (worker * high, 0), (high, COLUMNS)
    high, wide = ROWS // (LOADING // COLUMNS), 1
    return (worker // COLUMNS * high, worker % COLUMNS * wide), (high, wide)


def ours(manifest: Manifest, tensors: int, turned: bool) -> tuple[float, float]:
    """Seconds to plan for the whole job, and for one worker that reads by itself."""
    wants = [[Want(name, *shard(worker, turned)) for name in names(tensors)] for worker in range(LOADING)]
    gc.collect()
    begun = time.perf_counter()
    plan = plan_reads(manifest, wants)
    whole_s = time.perf_counter() - begun
    held = sum(np.prod(want.sizes) for mine in wants for want in mine)
    if plan.read_bytes != manifest.size_bytes - 4096 * SAVED or held * 4 != plan.read_bytes:
        raise AssertionError("the plan does not read what is stored")
    mine = [[Want(name, *shard(5, turned)) for name in names(tensors)]]
    begun = time.perf_counter()
    plan_reads(manifest, mine)
    return whole_s, time.perf_counter() - begun


def dcp_facts(tensors: int) -> Any:
    import torch
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    high = ROWS // SAVED
    chunks = [ChunkStorageMetadata(torch.Size((w * high, 0)), torch.Size((high, COLUMNS))) for w in range(SAVED)]
    properties = TensorProperties(dtype=torch.float32)
    stored = TensorStorageMetadata(properties, torch.Size((ROWS, COLUMNS)), chunks)
    return Metadata(dict.fromkeys(names(tensors), stored))


def dcp_worker_s(metadata: Any, tensors: int, worker: int, turned: bool) -> tuple[float, list[Any]]:
    """Seconds of DCP's local plan for one worker; the read items are those of its default load planner."""
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    offsets, sizes = shard(worker, turned)
    mine = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))]
    gc.collect()
    begun = time.perf_counter()
    items = []
    for name in names(tensors):
        items += create_read_items_for_chunk_list(name, metadata.state_dict_metadata[name], mine)
    return time.perf_counter() - begun, items


def dcp(tensors: int, turned: bool, sample: int) -> tuple[float, float]:
    """Seconds to plan for the whole job (local plans and the global step) and for the slowest worker alone."""
    from torch.distributed.checkpoint.default_planner import create_default_global_load_plan
    from torch.distributed.checkpoint.planner import LoadPlan

    metadata = dcp_facts(tensors)
    workers = [int(w) for w in np.linspace(0, LOADING - 1, sample)]
    found = [dcp_worker_s(metadata, tensors, worker, turned) for worker in workers]
    taken = [seconds for seconds, _ in found]
    begun = time.perf_counter()
    create_default_global_load_plan([LoadPlan(found[i % sample][1]) for i in range(LOADING)])
    global_s = time.perf_counter() - begun
    return common.median(taken) * LOADING + global_s, max(taken)


def memory_mib(manifest: Manifest, tensors: int) -> float:
    wants = [[Want(name, *shard(worker, False)) for name in names(tensors)] for worker in range(LOADING)]
    tracemalloc.start()
    plan_reads(manifest, wants)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    options = common.arguments(__doc__, lambda parser: parser.add_argument("--rounds", type=int, default=None))
    results = common.Results("checkpoint_planning", "Checkpoints: planning a load under another layout", options)
    tensors = 160 if options.quick else 1563
    rounds, sample = options.rounds or (3 if options.quick else 5), 2 if options.quick else 4
    begun = time.perf_counter()
    manifest = manifest_of(tensors)
    print(f"made a manifest of {len(manifest.table)} chunks in {time.perf_counter() - begun:.1f} s", flush=True)
    for turned in (False, True):
        layout = "rows and columns" if turned else "rows"
        found = [(*ours(manifest, tensors, turned), *dcp(tensors, turned, sample)) for _ in range(rounds)]
        results.raw[layout] = found
        job, one, dcp_job, dcp_one = (common.median(column) for column in zip(*found, strict=True))
        results.row(
            **{
                "chunks": len(manifest.table),
                "wanted": layout,
                "whole job, s": job,
                "DCP, all workers, s": dcp_job,
                "times": common.median(row[2] / row[0] for row in found),
                "one worker, s": one,
                "DCP, one worker, s": dcp_one,
                "times, one worker": common.median(row[3] / row[1] for row in found),
            }
        )
        value = common.median(row[2] / row[0] for row in found)
        reached = common.verdict(value, 50, at_most=False)
        results.figure(f"planning for the whole job against DCP, {layout}", value, "50 or more", reached)
        value = common.median(row[3] / row[1] for row in found)
        results.figure(f"planning for one worker against DCP, {layout}", value, "none", "beside it")
    results.figure("collectives to plan", 0, "0", "reached: the plan is a function of the manifest and the wants")
    results.notes += [
        f"{SAVED} workers saved rows of {tensors} tensors, {LOADING} load rows, or blocks of rows of one column each.",
        f"The plan for the whole job takes {memory_mib(manifest, tensors):.0f} MiB of memory at its peak.",
        "DCP's time is that of all its workers' local plans (one after the other) and of its global step.",
    ]
    results.write()


if __name__ == "__main__":
    main()
