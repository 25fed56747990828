"""Exchanges over torch.distributed, for `elastictrain_checkpoint.together`. The only modules that need torch are those
that are imported by name, like this one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from elastictrain_checkpoint.host_exchange import HostExchange
from elastictrain_checkpoint.together import lay_out


class GroupExchange:
    """An all-to-all of a process group for the CPU, such as gloo's; its timeout is the deadline of every call. What a
    call gives is overwritten by the second next: memory that is new in every round would cost as much as sending it.

    Attributes:
        broken: whether a call has failed; then no other can be made.

    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.broken = False
        self._group = group
        self._memory = [[torch.empty(0, dtype=torch.uint8) for _ in range(2)] for _ in range(2)]

    def __call__(self, sent: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]) -> list[memoryview]:
        """Exchange, and wait for it."""
        return self.begin(sent, sizes)()

    def begin(self, sent: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]) -> Callable[[], list[memoryview]]:
        """See `elastictrain_checkpoint.together.Begins`; two may be under way."""
        lengths = [sum(part.nbytes for part in parts) for parts in sent]
        self._memory.reverse()
        data, out = self._room(0, sum(lengths)), self._room(1, sum(sizes))
        lay_out([part for parts in sent for part in parts], memoryview(data.numpy()))  # type: ignore[arg-type]
        self.broken = True
        work = dist.all_to_all_single(out, data, list(sizes), lengths, group=self._group, async_op=True)
        self.broken = False

        def wait() -> list[memoryview]:
            self.broken = True
            work.wait()
            self.broken = False
            came = memoryview(out.numpy())  # type: ignore[arg-type]
            ends = [0, *itertools.accumulate(sizes)]
            return [came[begin:end] for begin, end in itertools.pairwise(ends)]

        return wait

    def _room(self, which: int, size_bytes: int) -> torch.Tensor:
        memory = self._memory[0]
        if len(memory[which]) < size_bytes:
            memory[which] = torch.empty(size_bytes, dtype=torch.uint8)
        return memory[which][:size_bytes]


def host_exchange(group: dist.ProcessGroup | None = None) -> HostExchange | None:
    """An exchange through shared memory if all workers of the group are on this host, else None; all workers call this.

    ``make_room`` is to be called before its first use. It waits as long as the group does.
    """
    return over_host(group) if share_a_host(gather_objects(group, place_here())) else None


def over_host(group: dist.ProcessGroup | None) -> HostExchange:
    """As `host_exchange`, where it is known that all workers are on this host."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return HostExchange(rank, size, lambda value: gather_objects(group, value), timeout_s_of(group))


def gather_objects(group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """Everybody's object, in the order of the ranks; all ranks call this."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def place_here() -> tuple[str, ...]:
    """What is equal for processes of one host that see each other under /proc; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return boot, str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ()


def share_a_host(places: Sequence[tuple[str, ...]]) -> bool:
    """Whether workers with these `place_here` can see each other's memory, as far as can be told without trying."""
    return len(set(places)) == 1 and bool(places[0])


def exchanges_host_memory(group: dist.ProcessGroup | None) -> bool:
    """Whether a group moves tensors of the CPU; nccl's does not."""
    try:
        _cpu_backend(group)
    except RuntimeError:
        return False
    return True


def timeout_s_of(group: dist.ProcessGroup | None) -> float:
    """How long a group waits; torch's own default where it does not say."""
    try:
        return float(_cpu_backend(group).options._timeout.total_seconds())
    except (RuntimeError, AttributeError):
        return float(dist.default_pg_timeout.total_seconds())


def _cpu_backend(group: dist.ProcessGroup | None) -> Any:
    return (group or dist.distributed_c10d._get_default_group())._get_backend(torch.device("cpu"))
