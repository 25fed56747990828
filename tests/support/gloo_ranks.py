"""Plain gloo processes that do the same work, without elastictrain."""

from __future__ import annotations

import faulthandler
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_SILENT_S = 90


def _rank(rank: int, world: int, folder: Path, work: Callable[..., Any], pipe: Any, more: tuple[Any, ...]) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    stacks = (folder / f"stacks-{rank}").open("w")
    faulthandler.dump_traceback_later(_SILENT_S - 10, file=stacks)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder / f'meet-{world}'}", rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (world,))
        pipe.send(("ok", work(mesh, rank, folder, *more)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


def _stacks(folder: Path) -> str:
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(folder.glob("stacks-*")))


def on_ranks(world: int, folder: Path, work: Callable[..., Any], *more: Any) -> list[Any]:
    """What `work(mesh, rank, folder, *more)` gives on every rank."""
    (folder / f"meet-{world}").unlink(missing_ok=True)
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = _context.Pipe()
        processes.append(_context.Process(target=_rank, args=(rank, world, folder, work, theirs, more), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    said = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(_SILENT_S), f"rank {rank} says nothing; {_stacks(folder)}"
            said.append(pipe.recv())
    finally:
        for process in processes:
            process.kill()
            process.join()
    for kind, text in said:
        assert kind == "ok", text
    return [value for _, value in said]
