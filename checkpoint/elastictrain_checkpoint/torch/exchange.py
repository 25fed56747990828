"""Exchanges over torch.distributed, for `elastictrain_checkpoint.together`. The only modules that need torch are those
that are imported by name, like this one.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from elastictrain_checkpoint.host_exchange import HostExchange
from elastictrain_checkpoint.together import lay_out


class GroupExchange:
    """An all-to-all of a process group for the CPU, such as gloo's; its timeout is the deadline of every call. What a
    call gives is overwritten by the next: memory that is new in every round would cost as much as sending it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._memory = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]

    def __call__(self, sent: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]) -> list[memoryview]:
        lengths = [sum(part.nbytes for part in parts) for parts in sent]
        data, out = self._room(0, sum(lengths)), self._room(1, sum(sizes))
        lay_out([part for parts in sent for part in parts], memoryview(data.numpy()))  # type: ignore[arg-type]
        dist.all_to_all_single(out, data, list(sizes), lengths, group=self._group)
        came = memoryview(out.numpy())  # type: ignore[arg-type]
        ends = [0, *itertools.accumulate(sizes)]
        return [came[begin:end] for begin, end in itertools.pairwise(ends)]

    def _room(self, which: int, size_bytes: int) -> torch.Tensor:
        if len(self._memory[which]) < size_bytes:
            self._memory[which] = torch.empty(size_bytes, dtype=torch.uint8)
        return self._memory[which][:size_bytes]


def host_exchange(group: dist.ProcessGroup | None = None) -> HostExchange | None:
    """An exchange through shared memory if all workers of the group are on this host, else None; all workers call this.

    ``make_room`` is to be called before its first use. It waits as long as the group does.
    """
    workers = dist.get_world_size(group)

    def gather(value: Any) -> list[Any]:
        found: list[Any] = [None] * workers
        dist.all_gather_object(found, value, group=group)
        return found

    here = (Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), socket.gethostname())
    if len(set(gather(here))) > 1:
        return None
    return HostExchange(dist.get_rank(group), workers, gather, lambda: dist.barrier(group=group), _timeout_s(group))


def _timeout_s(group: dist.ProcessGroup | None) -> float:
    backend: Any = (group or dist.distributed_c10d._get_default_group())._get_backend(torch.device("cpu"))
    return float(backend.options._timeout.total_seconds())
