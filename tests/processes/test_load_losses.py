"""A rank that runs out of memory, or dies, in the middle of a load that all do together: the others hear why, or at
least that it is gone, and nobody waits for it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.gloo_ranks import on_ranks

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

SIDE = 1536
POINTS = ("choose", "join", "prepare", "plan_reads", "most_shared_bytes", "get_ready", "read", "second read", "put")
TIMEOUT_S = 20
"""Of the group: what a rank waits at most for one that is silent."""


def state_of(fill: float | None = None) -> dict[str, Any]:
    """34 MiB: several rounds on every rank; rows of one tensor are longer than the memory that is offered first."""
    import torch

    shapes = {"long": (2, 900_000), **{f"w{n}": (SIDE, SIDE) for n in range(3)}}
    whole = {name: torch.arange(float(a * b)).add_(a).reshape(a, b) for name, (a, b) in shapes.items()}
    return whole if fill is None else {name: torch.full_like(value, fill) for name, value in whole.items()}


def plant(point: str, strike: Any, patch: pytest.MonkeyPatch) -> None:
    """Have `strike` called when this process comes to a point of a load."""
    from elastictrain_checkpoint.host_exchange import HostExchange
    from elastictrain_checkpoint.reader import Reader
    from elastictrain_checkpoint.torch import company

    owner: Any = {"join": HostExchange, "get_ready": company.Together, "read": Reader, "second read": Reader}.get(
        point, company
    )
    name = "read_spans" if owner is Reader else point
    real, calls, due = getattr(owner, name), 0, 2 if point == "second read" else 1

    def struck(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == due:
            strike()
        return real(*args, **more)

    patch.setattr(owner, name, struck)


def over(how: str, patch: pytest.MonkeyPatch) -> None:
    from elastictrain_checkpoint.torch import company

    if how == "group":
        patch.setattr(company, "share_a_host", lambda _: False)


def run_out(mesh: Any, rank: int, folder: Path, how: str) -> list[tuple[str, str]]:
    """What this rank says where one has no memory at each of the points in turn, and of a load after each."""
    import torch

    import elastictrain_checkpoint.torch as checkpoint

    del mesh

    def no_memory() -> None:
        raise MemoryError("planted")

    said = []
    for point in POINTS:
        if how == "group" and point == "join":
            continue
        with pytest.MonkeyPatch.context() as patch:
            over(how, patch)
            state = state_of(-1.0)
            if rank == (0 if point == "choose" else 1):
                plant(point, no_memory, patch)
            try:
                checkpoint.load(state, folder / "c")
            except Exception as error:
                said.append((point, f"{type(error).__name__}: {error}"))
            else:
                said.append((point, "loaded"))
        with pytest.MonkeyPatch.context() as patch:
            over(how, patch)
            checkpoint.load(state, folder / "c")
            assert all(torch.equal(value, state[name]) for name, value in state_of().items()), point
    return said


@pytest.mark.parametrize("how", ["memory", "group"])
def test_a_rank_without_memory_tells_all_of_it_and_they_can_load_again(how: str, tmp_path: Path) -> None:
    import elastictrain_checkpoint.torch as checkpoint

    checkpoint.save(state_of(), tmp_path / "c", step=1)
    zero, one = on_ranks(2, tmp_path, run_out, how)
    assert [point for point, _ in zero] == [point for point in POINTS if how == "memory" or point != "join"]
    for (point, here), (_, there) in zip(zero, one, strict=True):
        hit, other = (here, there) if point == "choose" else (there, here)
        assert hit == "MemoryError: planted", point
        assert other.startswith("LoadFailed: "), point
        assert other.endswith("MemoryError: planted"), point
        assert ("rank 0" if point == "choose" else "1") in other


def lose(rank: int, folder: Path, point: str, how: str, pipe: Any) -> None:
    import torch.distributed as dist

    import elastictrain_checkpoint.torch as checkpoint

    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=3, timeout=timedelta(seconds=TIMEOUT_S)
    )
    with pytest.MonkeyPatch.context() as patch:
        over(how, patch)
        dist.barrier()
        if rank == 1:
            plant(point, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
        begun = time.monotonic()
        try:
            checkpoint.load(state_of(-1.0), folder / "c")
        except Exception as error:
            pipe.send((type(error).__name__, str(error), time.monotonic() - begun))
        else:
            pipe.send(("nothing", "", time.monotonic() - begun))


@pytest.mark.parametrize(
    ("point", "how"),
    [("prepare", "memory"), ("plan_reads", "memory"), ("second read", "memory"), ("second read", "group"),
     ("put", "memory"), ("put", "group")],
)  # fmt: skip
def test_the_others_hear_of_a_death_within_the_groups_timeout(point: str, how: str, tmp_path: Path) -> None:
    """Through shared memory at once, by the end of its pipe; over the group when its connection ends."""
    import elastictrain_checkpoint.torch as checkpoint

    checkpoint.save(state_of(), tmp_path / "c", step=1)
    context = multiprocessing.get_context("forkserver")
    pipes, processes = [], []
    for rank in range(3):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=lose, args=(rank, tmp_path, point, how, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        said = []
        for rank in (0, 2):
            assert pipes[rank].poll(90), f"rank {rank} says nothing"
            said.append(pipes[rank].recv())
        processes[1].join(30)
        assert processes[1].exitcode == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.join()
    for kind, text, waited_s in said:
        assert kind == "LoadFailed", text
        assert text.startswith("the ranks cannot go on loading: "), text
        assert waited_s < 2 * TIMEOUT_S, text
    if how == "memory" and point in ("second read", "put"):
        assert any("worker 1 is gone" in text for _, text, _ in said), said
