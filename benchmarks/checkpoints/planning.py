"""Planning a load of 100,000 chunks, saved by 64 workers, by 128 workers: elastictrain against DCP's planner.

Both as a job does it: what one worker waits for while all plan side by side, in processor time of one thread. With DCP
every worker plans what it reads (whole chunks); one unpickles all plans, takes the global step and pickles each; all
unpickle their own. With `elastictrain_checkpoint.torch.load` every worker says what it wants, unpickles what all want,
and makes the plan of the whole job by itself. In runs all wants are known from the layout, so nothing is said at all.
The time of the network is in neither. A few of the 128 workers are planned with DCP, the others are taken to be alike.
"""

from __future__ import annotations

import gc
import pickle
import sys
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import common
from elastictrain_checkpoint import Manifest
from elastictrain_checkpoint.manifest import parse_manifest, write_manifest
from elastictrain_checkpoint.part import FileRecord, TensorRecord
from elastictrain_checkpoint.reshard import plan_reads
from elastictrain_checkpoint.wants import Numbering, Want, WantColumns

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


@dataclass(frozen=True)
class Took:
    """Seconds of planning: as the job waits for it; at the least (ours: nothing is said, as in a run; DCP's: without
    the garbage collector of Python); of all workers together.
    """

    waits_s: float
    least_s: float
    all_s: float


def ours(manifest: Manifest, tensors: int, turned: bool) -> Took:
    wants = [[Want(name, *shard(worker, turned)) for name in names(tensors)] for worker in range(LOADING)]
    gc.collect()
    numbering = Numbering(manifest)
    sent = [pickle.dumps(numbering.columns(mine)) for mine in wants]
    begun = time.thread_time()
    pickle.dumps(Numbering(manifest).columns(wants[5]))
    there = [WantColumns(numbering, pickle.loads(raw)) for raw in sent]
    plan = plan_reads(manifest, there)
    waits_s = time.thread_time() - begun
    held = sum(np.prod(want.sizes) for mine in wants for want in mine)
    if plan.read_bytes != manifest.size_bytes - 4096 * SAVED or held * 4 != plan.read_bytes:
        raise AssertionError("the plan does not read what is stored")
    begun = time.thread_time()
    plan_reads(manifest, wants)
    return Took(waits_s, time.thread_time() - begun, LOADING * waits_s)


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
    begun = time.thread_time()
    items = []
    for name in names(tensors):
        items += create_read_items_for_chunk_list(name, metadata.state_dict_metadata[name], mine)
    return time.thread_time() - begun, items


def dcp(tensors: int, turned: bool, sample: int) -> Took:
    from torch.distributed.checkpoint.default_planner import create_default_global_load_plan
    from torch.distributed.checkpoint.planner import LoadPlan

    metadata = dcp_facts(tensors)
    workers = [int(w) for w in np.linspace(0, LOADING - 1, sample)]
    found = [dcp_worker_s(metadata, tensors, worker, turned) for worker in workers]
    local_s = common.median([seconds for seconds, _ in found])
    plans = [LoadPlan(items) for _, items in found]
    begun = time.thread_time()
    create_default_global_load_plan([plans[i % sample] for i in range(LOADING)])
    global_s = time.thread_time() - begun
    each_s, bare_s = _pickled_s(plans), _pickled_s(plans, collects=False)
    both_s = [local_s + (LOADING + 1) * one_s + global_s for one_s in (each_s, bare_s)]
    return Took(*both_s, LOADING * (local_s + 2 * each_s) + global_s)


def _pickled_s(plans: list[Any], *, collects: bool = True) -> float:
    """Seconds to pickle one of these plans and to unpickle it, with Python's garbage collector on, as it is, or off."""
    gc.collect()
    if not collects:
        gc.disable()
    begun = time.thread_time()
    for plan in plans:
        pickle.loads(pickle.dumps(plan))
    seconds = (time.thread_time() - begun) / len(plans)
    gc.enable()
    return seconds


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
    begun = time.thread_time()
    manifest = manifest_of(tensors)
    print(f"made a manifest of {len(manifest.table)} chunks in {time.thread_time() - begun:.1f} s", flush=True)
    for turned in (False, True):
        layout = "rows and columns" if turned else "rows"
        found = [(ours(manifest, tensors, turned), dcp(tensors, turned, sample)) for _ in range(rounds)]
        results.raw[layout] = [(asdict(mine), asdict(theirs)) for mine, theirs in found]
        times = common.median(theirs.waits_s / mine.waits_s for mine, theirs in found)
        least = common.median(theirs.least_s / mine.waits_s for mine, theirs in found)
        work = common.median(theirs.all_s / mine.all_s for mine, theirs in found)
        results.row(
            **{
                "chunks": len(manifest.table),
                "wanted": layout,
                "load, s": common.median(mine.waits_s for mine, _ in found),
                "in a run, s": common.median(mine.least_s for mine, _ in found),
                "DCP, s": common.median(theirs.waits_s for _, theirs in found),
                "DCP, no collector, s": common.median(theirs.least_s for _, theirs in found),
                "times": times,
                "times, no collector": least,
                "times, all workers' work": work,
            }
        )
        reached = common.verdict(times, 50, at_most=False)
        results.figure(f"planning against DCP, as the job waits for it, {layout}", times, "50 or more", reached)
        results.figure(f"planning against DCP without Python's garbage collector, {layout}", least, "none", "beside it")
    results.notes += [
        f"{SAVED} workers saved rows of {tensors} tensors, {LOADING} load rows, or blocks of rows of one column each.",
        f"The plan for the whole job takes {memory_mib(manifest, tensors):.0f} MiB of memory at its peak.",
        "`load, s`: one worker's wants in columns, pickled, all 128 unpickled, and the plan of the whole job.",
        "`in a run, s`: that plan alone, from wants that follow from the layout: no collective. `load` gathers once.",
        "`DCP, s`: the median local plan, pickled; 128 unpickled, the global step, 128 pickled; one unpickled.",
        "All in processor time of the one thread that plans: other processes hardly touch it.",
        "`no collector`: Python's garbage collector looks again and again at the objects of DCP's metadata and plans.",
        "It is on in `DCP, s`, as in anybody's process; ours pauses it by itself.",
        "`all workers' work`: each worker of ours makes the plan of the whole job, each of DCP's only its own.",
    ]
    results.write()


if __name__ == "__main__":
    main()
