"""Large pieces between workers of one host: the receiver reads them out of the sender's memory.

Over loopback every byte is copied into the kernel and out of it again, by a thread at either end. Linux lets a process
read another one of the same user (`process_vm_readv`, which MPI libraries call cross-memory attach): one copy, made by
whoever waits for the data anyway. gloo carries two small messages beside it: the *notice* with the addresses, and the
receiver's word that it is *done*, after which the sender may use its memory again. Both sides know from the pieces
alone whether they go this way, and peers that die, freeze or give up are noticed at those messages like at any other.

A receiver may read what a sender that has given up is already overwriting. Nothing can come of it: such a sender has
never got the receiver's word, so it neither votes nor seals in that generation, and without it nobody can (R2, R4).

Where the kernel, its Yama module or a container's filter forbid it, and where hosts or users differ, gloo carries
everything. ELASTICTRAIN_DIRECT in a worker's environment: how many bytes one must have for the other in an exchange
to go this way (262144); 0: gloo carries everything.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch

from elastictrain.errors import ConfigError

MIN_BYTES = 256 * 1024
"""Below it two more messages cost more than the copies."""
MAX_READ_BYTES = 256 * 2**20
THREAD_BYTES, MAX_THREADS = 16 * 2**20, 4
"""A thread more for every so many bytes that one peer has for this one."""
_NOTICE, _DONE = 1, 2
_PR_SET_PTRACER, _PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)
_YAMA, _ADMINS_ONLY = Path("/proc/sys/kernel/yama/ptrace_scope"), 2
_refused: list[str] = []
"""Why a peer's memory could not be read although it should have been possible: then it is not tried again."""


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def read(pid: int, address: int, into: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor from another process's memory. Raises RuntimeError when that is not possible."""
    libc = _libc()
    at, left = 0, into.numel() * into.element_size()
    while left:
        size = min(left, MAX_READ_BYTES)
        here, there = _Span(into.data_ptr() + at, size), _Span(address + at, size)
        got = libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if got <= 0:
            error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            if isinstance(error, PermissionError):
                _refused.append(str(error))
            raise RuntimeError(f"process {pid} of this host cannot be read: {error}")
        at, left = at + got, left - got


def read_all(pid: int, wanted: Mapping[int, torch.Tensor]) -> None:
    """{address: tensor to fill}. What is worth it goes through several threads: most of the time of a first read is
    spent on the pages of the target. Raises RuntimeError as `read` does.
    """
    threads = min(MAX_THREADS, os.cpu_count() or 1, _bytes(list(wanted.values())) // THREAD_BYTES)
    if threads < 2:
        for address, tensor in wanted.items():
            read(pid, address, tensor)
        return
    parts = [
        (address + at, part)
        for address, tensor in wanted.items()
        for at, part in _parts(tensor.view(-1).view(torch.uint8), THREAD_BYTES)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: read(pid, *part), parts))


def _parts(tensor: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    for at in range(0, tensor.numel(), size):
        yield at, tensor[at : at + size]


def identity() -> str:
    """Of this process, for its peers: those whose `host` part is the same may read each other. "" where none may."""
    host = "" if _refused or not min_bytes() else _host()
    return f"{host}/{min_bytes()} {os.getpid()}" if host else ""


def min_bytes() -> int:
    """From how many bytes on pieces go this way; 0: none do. Raises ConfigError for what is no number."""
    text = os.environ.get("ELASTICTRAIN_DIRECT", str(MIN_BYTES))
    if not text.isdecimal():
        raise ConfigError(f"ELASTICTRAIN_DIRECT={text!r}: expected a number of bytes, or 0 for never")
    return int(text)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.process_vm_readv  # AttributeError where there is none
    span = ctypes.c_void_p, ctypes.c_ulong
    call.argtypes, call.restype = (ctypes.c_int, *span, *span, ctypes.c_ulong), ctypes.c_ssize_t
    return libc


@cache
def _host() -> str:
    """Kernel, namespaces and user: in which other processes this one may read, if the kernel lets it read at all."""
    with suppress(OSError, AttributeError, RuntimeError):
        limit = int(_YAMA.read_text(encoding="ascii")) if _YAMA.exists() else 0
        if limit >= _ADMINS_ONLY:
            return ""
        if limit:  # only by ancestors, unless the process that is to be read agrees
            _libc().prctl(_PR_SET_PTRACER, _PTRACER_ANY, 0, 0, 0)
        source, target = torch.arange(4), torch.zeros(4, dtype=torch.int64)
        read(os.getpid(), source.data_ptr(), target)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        spaces = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "user")]
        return "/".join([boot, *spaces, str(os.geteuid())]) if torch.equal(source, target) else ""
    return ""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The peers of one generation that this process reads and is read by: their pids by rank."""

    pids: Mapping[int, int]
    least_bytes: int

    @classmethod
    def among(cls, own: str, others: Mapping[int, str]) -> Self:
        """From everybody's `identity`."""
        host = own.rpartition(" ")[0]
        found = {rank: text.rpartition(" ") for rank, text in others.items()}
        return cls({rank: int(pid) for rank, (at, _, pid) in found.items() if host and at == host}, min_bytes())

    def split(
        self, pieces: Sequence[tuple[int, torch.Tensor]]
    ) -> tuple[dict[int, list[torch.Tensor]], list[tuple[int, torch.Tensor]]]:
        """(pieces by rank that are read, those that gloo carries). Sender and receiver come to the same result."""
        by_rank: dict[int, list[torch.Tensor]] = {}
        for rank, tensor in pieces:
            by_rank.setdefault(rank, []).append(tensor)
        large = {r: own for r, own in by_rank.items() if r in self.pids and _bytes(own) >= self.least_bytes}
        return large, [(rank, tensor) for rank, tensor in pieces if rank not in large]


NOBODY = Neighbours({}, 0)


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Reading:
    """One exchange of large pieces, begun. `sends`, `recvs`: by rank; they stay as they are until `finish` returns."""

    def __init__(
        self,
        group: Any,
        near: Neighbours,
        sends: Mapping[int, Sequence[torch.Tensor]],
        recvs: Mapping[int, Sequence[torch.Tensor]],
    ) -> None:
        self._group, self._near = group, near
        self._expected = []
        for rank, tensors in recvs.items():
            notice = torch.empty(len(tensors) + 1, dtype=torch.int64)
            self._expected.append((rank, tensors, notice, group.recv([notice], rank, _NOTICE)))
        self._works, self._kept = [], []
        for rank, tensors in sends.items():
            notice, done = torch.tensor([_bytes(tensors), *(t.data_ptr() for t in tensors)]), torch.empty(1)
            self._kept += [notice, done]
            self._works += [group.send([notice], rank, _NOTICE), group.recv([done], rank, _DONE)]

    def finish(self, deadline: timedelta) -> None:
        """Read what was announced, say so, and wait for the others' word. Raises RuntimeError as gloo does."""
        word = torch.zeros(1)
        for rank, tensors, notice, work in self._expected:
            work.wait(deadline)
            size, *addresses = notice.tolist()
            if size != _bytes(tensors):
                raise RuntimeError(f"rank {rank} sends {size} bytes, expected {_bytes(tensors)}")
            read_all(self._near.pids[rank], dict(zip(addresses, tensors, strict=True)))
            self._works.append(self._group.send([word], rank, _DONE))
        for work in self._works:
            work.wait(deadline)
