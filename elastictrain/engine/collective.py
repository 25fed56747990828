"""The process groups of one generation: one small class, no global state, so that groups can be dropped and formed
again in milliseconds.

Three operations are enough: a ragged exchange (a batch of point-to-point sends and receives straight from and into
views), an all-gather of bytes of equal size (the vote) and one of any size. gloo moves CPU tensors and every vote, on
CUDA too: a vote on the host leaves no device in doubt (invariant R2). NCCL moves CUDA tensors. Large pieces between
workers of one host are read out of each other's memory (see `direct`).

Invariant R6, drop instead of abort: on gloo `abort()` does nothing to an operation in flight, and a survivor that waits
for a live peer that has given up would wait for the whole timeout. Dropping a group shuts down its connections (see
`links`), which frees this worker and its peers at once, whatever state they are in. Where connections cannot be found,
dropping every reference to the group closes its sockets; so errors leave this module as `PeerLost` without the
traceback that would keep pending works, and with them the sockets, alive.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from elastictrain.engine import direct, links
from elastictrain.errors import PeerLost

Peer = tuple[int, torch.Tensor]
T = TypeVar("T")
_Gloo = tuple[Any, tuple[int, set[links.Address]] | None, direct.Neighbours]
FORM_TIMEOUT_S = 20.0
GATHER_DEADLINE_S = 30.0


class GroupSet:
    """The groups of one generation, seen from one rank.

    `deadline_s` bounds every wait; the session keeps it at a multiple of what it has measured. World size 1 needs no
    group. Every method raises PeerLost when a peer is gone, has given up, or when the set was dropped meanwhile.
    """

    def __init__(
        self, store: Store | None, *, generation: int, rank: int, world: int, device: torch.device, host: str
    ) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.deadline_s = 600.0
        # A gather follows an exchange, so peers are close together; where they are not, the session raises this.
        self.gather_deadline_s = GATHER_DEADLINE_S
        self._gloo: Any = None
        self._nccl: Any = None
        self._links: tuple[int, set[links.Address]] | None = None
        self._near = direct.NOBODY
        self._dropped = threading.Event()
        if world == 1:
            return
        if store is None:
            raise PeerLost(f"generation {generation}: no rendezvous store for {world} workers")
        own = PrefixStore(f"generation-{generation}/gloo", store)
        self._gloo, self._links, self._near = _form_gloo(own, rank, world, host)
        if device.type == "cuda":
            self._nccl = _form_nccl(PrefixStore(f"generation-{generation}/nccl", store), rank, world)

    def exchange(
        self, sends: Sequence[Peer], recvs: Sequence[Peer], *, between: Callable[[], None] = lambda: None
    ) -> None:
        """Send and receive contiguous 1-D tensors; both sides list their pieces in the same order per peer. `between`
        is called while they are on their way.
        """
        if not sends and not recvs:
            between()
        elif self._nccl is not None and (sends or recvs)[0][1].is_cuda:
            self._guard(lambda: self._exchange_nccl(sends, recvs))
            between()
        else:
            self._guard(lambda: self._exchange_gloo(sends, recvs, between))

    def _exchange_gloo(self, sends: Sequence[Peer], recvs: Sequence[Peer], between: Callable[[], None]) -> None:
        group = self._live_gloo()
        (near_sends, sends), (near_recvs, recvs) = self._near.split(sends), self._near.split(recvs)
        works = [group.recv([tensor], peer, 0) for peer, tensor in recvs]
        works += [group.send([tensor], peer, 0) for peer, tensor in sends]
        reading = direct.Reading(group, self._near, near_sends, near_recvs)
        between()
        deadline = timedelta(seconds=self.deadline_s)
        reading.finish(deadline)
        for work in works:
            work.wait(deadline)

    def _exchange_nccl(self, sends: Sequence[Peer], recvs: Sequence[Peer]) -> None:
        group = self._nccl
        group._start_coalescing(self.device)
        for peer, tensor in recvs:
            group.recv([tensor], peer, 0)
        for peer, tensor in sends:
            group.send([tensor], peer, 0)
        group._end_coalescing(self.device).wait()
        # R2: a vote may follow only after the host knows that the data is here.
        torch.cuda.current_stream(self.device).synchronize()

    def all_gather_equal(self, payload: bytes, *, deadline_s: float | None = None) -> list[bytes]:
        """Everybody's payload in rank order; all must have the same length. `deadline_s`: default that of gathers."""
        if self.world == 1:
            return [payload]
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        out = [torch.empty_like(mine) for _ in range(self.world)]

        def gather() -> None:
            options = AllgatherOptions()
            options.timeout = timedelta(seconds=self.gather_deadline_s if deadline_s is None else deadline_s)
            self._live_gloo().allgather([out], [mine], options).wait(options.timeout)

        self._guard(gather)
        return [tensor.numpy().tobytes() for tensor in out]

    def all_gather_sized(self, payload: bytes) -> list[bytes]:
        """Everybody's payload in rank order, of any length (two rounds)."""
        sizes = [int.from_bytes(raw, "little") for raw in self.all_gather_equal(len(payload).to_bytes(8, "little"))]
        longest = max(sizes)
        if longest == 0:
            return [b""] * self.world
        padded = self.all_gather_equal(payload.ljust(longest, b"\0"))
        return [raw[:size] for raw, size in zip(padded, sizes, strict=True)]

    def drop(self) -> None:
        """Let go of the groups; peers that wait on us are freed at once. Safe from any thread, more than once."""
        self._dropped.set()
        own, self._links = self._links, None
        if own is not None:
            links.cut(*own)
        self._gloo = None  # last: a group that is let go waits for what is under way in it
        if self._nccl is not None:
            nccl, self._nccl = self._nccl, None
            nccl.abort()

    def _live_gloo(self) -> Any:
        group = self._gloo
        if group is None:  # the control thread has dropped it in between
            raise RuntimeError("the group was dropped")
        return group

    def _guard(self, operation: Callable[[], None]) -> None:
        problem = ""
        try:
            if self._dropped.is_set():
                problem = "the group was dropped"
            else:
                operation()
        except RuntimeError as error:
            problem = f"{type(error).__name__}: {error}"
        if not problem and self._dropped.is_set():
            problem = "the group was dropped meanwhile"  # an aborted NCCL operation ends like one that has succeeded
        if problem:
            # Raised outside the except block: no context, hence no traceback that would keep works and sockets alive.
            self.drop()
            raise PeerLost(f"rank {self.rank} of {self.world}: {problem}")


def _form_gloo(store: Store, rank: int, world: int, host: str) -> _Gloo:
    """The group, where its connections end (own port, addresses of the peers), and the peers on this host."""

    def build() -> _Gloo:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=FORM_TIMEOUT_S)
        device, port = links.listening(lambda: dist.ProcessGroupGloo.create_device(hostname=host))
        options._devices = [device]
        own = direct.identity()
        store.set(f"link/{rank}", f"{socket.gethostbyname(host)}:{port or ''}\n{own}")
        group = dist.ProcessGroupGloo(store, rank, world, options)
        said = {peer: store.get(f"link/{peer}").decode().partition("\n") for peer in range(world) if peer != rank}
        near = direct.Neighbours.among(own, {peer: who for peer, (_, _, who) in said.items()})
        ends = [end.rpartition(":") for end, _, _ in said.values()]
        return group, None if port is None else (port, {(name, int(at)) for name, _, at in ends if at}), near

    return _build(build, rank, world)


def _form_nccl(store: Store, rank: int, world: int) -> Any:
    def build() -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=600)
        return dist.ProcessGroupNCCL(store, rank, world, options)

    return _build(build, rank, world)


def _build(build: Callable[[], T], rank: int, world: int) -> T:
    problem = ""
    try:
        return build()
    except RuntimeError as error:
        problem = str(error)
    raise PeerLost(f"rank {rank} of {world} could not form its group: {problem}")


class Rendezvous:
    """Where groups meet: a TCPStore. Every worker has one, and a generation meets in that of its first member: no other
    process has to live for it, and a generation needs no member more than any other once it has formed.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.address = f"{host}:{self._store.port}"


def connect(address: str) -> Store:
    """A client of the rendezvous store. Raises PeerLost when nobody listens there."""
    if not address:
        raise PeerLost("the first member of this generation, whose store all were to meet at, is out of reach")
    host, _, port = address.rpartition(":")
    problem = ""
    try:
        return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=FORM_TIMEOUT_S))
    except RuntimeError as error:
        problem = str(error)
    raise PeerLost(f"no rendezvous store at {address}: {problem}")


def hang_up(address: str) -> None:
    """End this process's connection to the store: a group that is forming waits there for peers that may have died."""
    host, _, port = address.rpartition(":")
    links.cut(None, {(socket.gethostbyname(host), int(port))})


def meet(store: Store, generation: int, rank: int, world: int, gone: Callable[[], bool]) -> None:
    """Wait until every rank of `generation` has arrived, or raise PeerLost as soon as `gone()` says to stop.

    The group's own connect cannot be interrupted, so it starts only when all peers are known to be on their way. Raises
    PeerLost too when the store does not answer: `hang_up` may have cut a connection that was to be used again.
    """
    problem = ""
    try:
        store.set(f"generation-{generation}/here/{rank}", "1")
        keys = [f"generation-{generation}/here/{peer}" for peer in range(world)]
        while not store.check(keys):
            if gone():
                raise PeerLost(f"generation {generation} was given up while it formed")
            threading.Event().wait(0.002)
    except RuntimeError as error:
        problem = str(error).partition("\n")[0]
    if problem:
        raise PeerLost(f"generation {generation}: the rendezvous store does not answer: {problem}")
