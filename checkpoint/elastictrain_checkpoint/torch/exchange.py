"""Exchanges over torch.distributed, for `elastictrain_checkpoint.together`. The only modules that need torch are those
that are imported by name, like this one.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from elastictrain_checkpoint.host_exchange import HostExchange
from elastictrain_checkpoint.together import TURNS, lay_out, take_out

_GATHERED_BYTES, _LEAST_GATHERED_BYTES, _LENGTH_BYTES = 64 << 10, 1 << 10, 8
"""What a first gather of objects takes of all ranks together, of one at least, and to say how long each is."""


@dataclass(slots=True)
class _Turn:
    """What comes in one turn, from all others; `work` once this worker has sent its own."""

    out: torch.Tensor
    sizes: list[int]
    work: dist.Work | None = None

    def wait(self) -> None:
        _work(self.work).wait()


class GroupExchange:
    """All-to-alls of a process group for the CPU, such as gloo's; its timeout is the deadline of every call. Memory is
    made once: if it were new in every round, that would cost as much as sending. (Messages of 256 KiB and more straight
    to where they belong, expected ahead, were tried: a third slower, on one host.)

    Attributes:
        broken: whether a call has failed; then no other can be made.

    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.broken = False
        self._group = group
        self._leaving, self._arriving = deque[torch.Tensor](), deque[torch.Tensor]()
        self._expected, self._under_way = deque[_Turn](), deque[_Turn]()

    def __call__(self, sent: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]) -> list[memoryview]:
        """Exchange, and wait for it."""
        with self._or_broken():
            while self._under_way:
                self._under_way.popleft().wait()
            lengths = [sum(part.nbytes for part in parts) for parts in sent]
            data, out = (torch.empty(sum(each), dtype=torch.uint8) for each in (lengths, sizes))
            lay_out([part for parts in sent for part in parts], _view(data))
            dist.all_to_all_single(out, data, list(sizes), lengths, group=self._group)
            ends = [0, *itertools.accumulate(sizes)]
            return [_view(out)[begin:end] for begin, end in itertools.pairwise(ends)]

    def make_room(self, sent_bytes: int, come_bytes: int) -> None:
        """See `elastictrain_checkpoint.together.Posts`."""
        self._leaving = deque(torch.empty(sent_bytes, dtype=torch.uint8) for _ in range(TURNS))
        self._arriving = deque(torch.empty(come_bytes, dtype=torch.uint8) for _ in range(TURNS))

    def expect(self, come: Sequence[Sequence[NDArray[Any]]]) -> Callable[[], None]:
        """See `elastictrain_checkpoint.together.Posts`."""
        sizes = [sum(part.nbytes for part in parts) for parts in come]
        self._arriving.rotate(-1)
        turn = _Turn(self._arriving[0][: sum(sizes)], sizes)
        self._expected.append(turn)

        def wait() -> None:
            with self._or_broken():
                turn.wait()
            take_out(_view(turn.out), [part for parts in come for part in parts])

        return wait

    def send(self, sent: Sequence[Sequence[NDArray[Any]]]) -> None:
        """See `elastictrain_checkpoint.together.Posts`."""
        lengths = [sum(part.nbytes for part in parts) for parts in sent]
        with self._or_broken():
            if len(self._under_way) == len(self._leaving):
                self._under_way.popleft().wait()
            self._leaving.rotate(-1)
            turn, data = self._expected.popleft(), self._leaving[0][: sum(lengths)]
            lay_out([part for parts in sent for part in parts], _view(data))
            turn.work = _work(
                dist.all_to_all_single(turn.out, data, turn.sizes, lengths, group=self._group, async_op=True)
            )
            self._under_way.append(turn)

    @contextlib.contextmanager
    def _or_broken(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.broken = True
            raise


def _work(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise RuntimeError("this process is not in the group")
    return work


def _view(data: torch.Tensor) -> memoryview:
    return memoryview(data.numpy())  # type: ignore[arg-type]


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
    """Everybody's object, in the order of the ranks; all ranks call this. One gather where all are small."""
    size = dist.get_world_size(group)
    if not exchanges_host_memory(group):
        found: list[Any] = [None] * size
        dist.all_gather_object(found, value, group=group)
        return found

    return gather_pickled(value, partial(gather_bytes, group), max(_GATHERED_BYTES // size, _LEAST_GATHERED_BYTES))


def gather_bytes(group: dist.ProcessGroup | None, data: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Everybody's bytes, equally many, in the order of the ranks; of a group that moves tensors of the CPU."""
    came = [torch.empty(len(data), dtype=torch.uint8) for _ in range(dist.get_world_size(group))]
    dist.all_gather(came, torch.from_numpy(data), group=group)
    return [one.numpy() for one in came]


def gather_pickled(
    value: Any, gather: Callable[[NDArray[np.uint8]], Sequence[NDArray[np.uint8]]], first_bytes: int
) -> list[Any]:
    """Everybody's object by gathers of equally many bytes: one of ``first_bytes``, a second if that is too little."""
    mine = pickle.dumps(value)
    sent = np.zeros(first_bytes, dtype=np.uint8)
    sent[:_LENGTH_BYTES].view(np.int64)[0] = len(mine)
    begun = min(len(mine), first_bytes - _LENGTH_BYTES)
    sent[_LENGTH_BYTES : _LENGTH_BYTES + begun] = np.frombuffer(mine, dtype=np.uint8, count=begun)
    came = [one.tobytes() for one in gather(sent)]
    lengths = [int.from_bytes(one[:_LENGTH_BYTES], sys.byteorder) for one in came]
    found = [one[_LENGTH_BYTES : _LENGTH_BYTES + length] for one, length in zip(came, lengths, strict=True)]
    more = max(lengths) + _LENGTH_BYTES - first_bytes
    if more > 0:
        rest = np.zeros(more, dtype=np.uint8)
        rest[: len(mine) - begun] = np.frombuffer(mine, dtype=np.uint8, offset=begun)
        came = [one.tobytes() for one in gather(rest)]
        found = [begin + end[: length - len(begin)] for begin, end, length in zip(found, came, lengths, strict=True)]
    return [pickle.loads(one) for one in found]  # from ranks of this job, as all_gather_object does


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
