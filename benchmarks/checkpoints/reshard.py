"""Saved by four workers as rows (Shard(0)), loaded by two as columns (Shard(1)): storage read, and time against DCP.

Two processes with gloo load in turns, with DCP as it comes, with the load of a state dict that takes its place, as it
comes, and with what is below that in three ways: every stored byte read once and handed on through shared memory, the
same over gloo, and each worker by itself. Warm; the time is that of the slower worker, from a barrier on, the opening
of the checkpoint included. Bytes are those that read calls gave (/proc/self/io).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

SAVED, LOADING = 4, 2
MIB = 1 << 20
HOW = ("DCP", "load, as it comes", "once, shared memory", "once, gloo", "each by itself")


def names(tensors: int) -> list[str]:
    return [f"model/layers.{i}.weight" for i in range(tensors)]


def value(number: int, side: int) -> Any:
    import torch

    return torch.arange(side * side, dtype=torch.float32).reshape(side, side).add_(number)


def enter(rank: int, world: int, folder: Path, meeting: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder / meeting}", rank=rank, world_size=world)


def save(rank: int, folder: Path, tensors: int, side: int) -> None:
    """One of the workers that save: its rows of every tensor, in both formats."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from elastictrain_checkpoint import PackWriter, Part, Piece, Store, commit

    enter(rank, SAVED, folder, "saving")
    mesh = init_device_mesh("cpu", (SAVED,))
    high = side // SAVED
    state = {name: value(i, side)[rank * high : (rank + 1) * high].clone() for i, name in enumerate(names(tensors))}
    shards = {name: DTensor.from_local(mine, mesh, [Shard(0)]) for name, mine in state.items()}
    dcp.save(shards, checkpoint_id=folder / "dcp")
    pieces = [Piece(n, "F32", (side, side), rank * high * side, mine.numpy()) for n, mine in state.items()]
    store = Store(folder / "ours")
    part = PackWriter(store, step=1, attempt="a", writer=f"w{rank}").write(pieces)
    parts: list[Any] = [None] * SAVED
    dist.all_gather_object(parts, part.to_json())
    if rank == 0:
        commit(store, step=1, attempt="a", generation=1, parts=[Part.from_json(one) for one in parts])
    dist.barrier()
    dist.destroy_process_group()


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def loaders(rank: int, folder: Path, outs: dict[str, Any], side: int) -> dict[str, Callable[[], None]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    import elastictrain_checkpoint.torch as checkpoint
    from elastictrain_checkpoint import Reader, Store
    from elastictrain_checkpoint import load as load_step
    from elastictrain_checkpoint.reshard import plan_reads
    from elastictrain_checkpoint.rounds import most_shared_bytes
    from elastictrain_checkpoint.together import read_boxes, read_together
    from elastictrain_checkpoint.torch.exchange import GroupExchange, host_exchange
    from elastictrain_checkpoint.wants import Want

    mesh = init_device_mesh("cpu", (LOADING,))
    wide = side // LOADING
    wants = [[Want(name, (0, worker * wide), (side, wide)) for name in outs] for worker in range(LOADING)]
    buffers = [out.numpy() for out in outs.values()]
    shards = {name: DTensor.from_local(out, mesh, [Shard(1)]) for name, out in outs.items()}
    shared, group = host_exchange(), GroupExchange()

    def once(exchange: Any) -> None:
        store = Store(folder / "ours")
        reader = Reader(store, load_step(store, 1))
        plan = plan_reads(reader.manifest, wants)
        if exchange is shared:
            exchange.make_room(most_shared_bytes(plan))
        read_together(reader, plan, wants, buffers, worker=rank, exchange=exchange)

    def alone() -> None:
        store = Store(folder / "ours")
        read_boxes(Reader(store, load_step(store, 1)), wants[rank], buffers)

    return {
        "DCP": lambda: dcp.load(shards, checkpoint_id=folder / "dcp"),
        "load, as it comes": lambda: checkpoint.load(shards, folder / "ours"),
        "once, shared memory": lambda: once(shared),
        "once, gloo": lambda: once(group),
        "each by itself": alone,
    }


def load(rank: int, folder: Path, tensors: int, side: int, rounds: int) -> None:
    """One of the workers that load, in all ways, round after round."""
    import torch
    import torch.distributed as dist

    enter(rank, LOADING, folder, "loading")
    wide = side // LOADING
    outs = {name: torch.zeros(side, wide) for name in names(tensors)}
    ways = loaders(rank, folder, outs, side)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in HOW}
    for number in range(rounds + 1):  # the first warms up
        for name in HOW[number % len(HOW) :] + HOW[: number % len(HOW)]:
            for out in outs.values():
                out.fill_(-1)
            dist.barrier()
            before, begun = read_bytes(), time.perf_counter()
            ways[name]()
            taken, read = time.perf_counter() - begun, read_bytes() - before
            if number:
                found[name].append((taken, read))
            for i, out in enumerate(outs.values()):
                if i % 7 == number % 7 and not torch.equal(out, value(i, side)[:, rank * wide : (rank + 1) * wide]):
                    raise AssertionError(f"{name} has loaded something else")
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def spawn(work: Callable[..., None], world: int, *rest: Any) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, *rest)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    for process in processes:
        if process.exitcode is None:
            process.kill()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"a worker failed: {[process.exitcode for process in processes]}")


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    options = common.arguments(__doc__, lambda parser: parser.add_argument("--rounds", type=int, default=None))
    results = common.Results("checkpoint_reshard", "Checkpoints: loaded under another layout", options)
    tensors, side = 64, 1024
    rounds = options.rounds or (5 if options.quick else 15)
    os.environ |= common.child_environment()
    with common.scratch("reshard") as folder:
        spawn(save, SAVED, folder, tensors, side)
        spawn(load, LOADING, folder, tensors, side, rounds)
        found = [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(LOADING)]
        stored = {"DCP": stored_bytes(folder / "dcp")}
        ours = stored_bytes(folder / "ours")
    taken = {name: [max(one[name][i][0] for one in found) for i in range(rounds)] for name in HOW}
    read = {name: common.median(sum(one[name][i][1] for one in found) for i in range(rounds)) for name in HOW}
    results.raw = {"seconds": taken, "read": read, "stored": {**stored, "elastictrain": ours}}
    size = tensors * side * side * 4
    faster = {name: common.median(a / b for a, b in zip(taken["DCP"], taken[name], strict=True)) for name in HOW}
    for name in HOW:
        results.row(
            **{
                "way": name,
                "ms": 1000 * common.median(taken[name]),
                "ms over rounds": common.spread([1000 * one for one in taken[name]]),
                "MiB/s": size / MIB / common.median(taken[name]),
                "of DCP": faster[name],
                "bytes read / stored": read[name] / stored.get(name, ours),
            }
        )
    for name in ("load, as it comes", "once, gloo"):
        share = read[name] / ours
        reached = common.verdict(share, 1.02, at_most=True)
        results.figure(f"rows to columns, 4 to 2: bytes read / stored, {name}", share, "1.02 or less", reached)
    for name in HOW[1:]:
        target = "none" if name == "each by itself" else "2.5 or more"
        reached = "beside it" if target == "none" else common.verdict(faster[name], 2.5, at_most=False)
        results.figure(f"rows to columns, 4 to 2: throughput against DCP, {name}", faster[name], target, reached)
    results.notes += [
        f"{tensors} tensors of {side} x {side} fp32; both workers on one host, one thread each; warm page cache.",
        "Elastictrain checks every block that it reads against its hash; DCP checks nothing.",
        "What read calls gave counts, so bytes that processes hand each other over sockets by read do not hide in it.",
    ]
    results.write()


if __name__ == "__main__":
    main()
