"""The groups of a generation over real gloo: ranks are threads of this process, each with sockets of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from elastictrain.engine.collective import GroupSet, Rendezvous, connect, hang_up, meet
from elastictrain.errors import PeerLost
from tests.unit.engine.worlds import CPU

HOST = "127.0.0.1"
T = TypeVar("T")


class World:
    """`size` ranks of one generation."""

    def __init__(self, rendezvous: Rendezvous, size: int, generation: int) -> None:
        self.pool = ThreadPoolExecutor(size)
        self.size = size

        def form(rank: int) -> GroupSet:
            store = connect(rendezvous.address)
            meet(store, generation, rank, size, lambda: False)
            group = GroupSet(store, generation=generation, rank=rank, world=size, device=CPU, host=HOST)
            group.deadline_s = 6.0  # a peer that nobody frees ends as a red test, not as one that hangs
            return group

        self.groups = [f.result() for f in [self.pool.submit(form, rank) for rank in range(size)]]

    def start(self, work: Callable[[GroupSet], T], ranks: list[int] | None = None) -> list[Future[T]]:
        return [self.pool.submit(work, self.groups[r]) for r in ranks or range(self.size)]

    def all(self, work: Callable[[GroupSet], T]) -> list[T]:
        return [future.result(30) for future in self.start(work)]

    def close(self) -> None:
        for group in self.groups:
            group.drop()
        self.pool.shutdown()


@pytest.fixture(scope="module")
def rendezvous() -> Rendezvous:
    return Rendezvous(HOST)


@pytest.fixture
def world(rendezvous: Rendezvous, request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(rendezvous, 3, generation=hash(request.node.name) & 0xFFFFFF)
    yield made
    made.close()


def test_a_ragged_exchange_brings_every_piece_to_its_place(world: World) -> None:
    def values(source: int, target: int, piece: int) -> torch.Tensor:
        return torch.arange(100.0)[: 1 + 5 * piece + source] + 1000 * source + 100 * target

    def work(group: GroupSet) -> bool:
        peers = [r for r in range(3) if r != group.rank]
        pieces = range(3)
        sends = [(p, values(group.rank, p, i)) for p in peers for i in pieces]
        flat = torch.zeros(500)
        recvs, at = [], 0
        for p in peers:
            for i in pieces:
                size = values(p, group.rank, i).numel()
                recvs.append((p, flat[at : at + size]))
                at += size + 3
        called: list[int] = []
        group.exchange(sends, recvs, between=lambda: called.append(1))
        wanted = [values(p, group.rank, i) for p in peers for i in pieces]
        assert called == [1]
        return all(torch.equal(got, want) for (_, got), want in zip(recvs, wanted, strict=True))

    assert world.all(work) == [True] * 3


def test_one_sided_and_empty_exchanges(world: World) -> None:
    def work(group: GroupSet) -> list[float]:
        called: list[int] = []
        group.exchange([], [], between=lambda: called.append(1))
        assert called == [1]
        got = torch.zeros(2)
        if group.rank == 0:
            group.exchange([(2, torch.tensor([3.0, 4.0]))], [])
        if group.rank == 2:
            group.exchange([], [(0, got)])
        return got.tolist()

    assert world.all(work) == [[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]


def test_gathers_are_in_rank_order_and_of_any_size(world: World) -> None:
    def work(group: GroupSet) -> object:
        equal = group.all_gather_equal(bytes([group.rank]) * 5)
        sized = group.all_gather_sized(b"x" * (group.rank * 7))
        none = group.all_gather_sized(b"")
        return equal, sized, none

    expected = ([b"\0" * 5, b"\1" * 5, b"\2" * 5], [b"", b"x" * 7, b"x" * 14], [b""] * 3)
    assert world.all(work) == [expected] * 3


def lost(work: Callable[[], object]) -> tuple[PeerLost, float]:
    start = time.monotonic()
    with pytest.raises(PeerLost) as error:
        work()
    return error.value, time.monotonic() - start


@pytest.mark.parametrize("operation", ["exchange", "gather"])
def test_dropping_frees_a_waiting_peer_at_once_and_it_frees_the_next(world: World, operation: str) -> None:
    """Rank 2 waits for 1, and 1 for 0 (R6): only dropping tells them, and neither error keeps its sockets alive."""
    waiting = threading.Barrier(3)

    def wait(group: GroupSet) -> tuple[PeerLost, float]:
        into = torch.empty(4)

        def arrive() -> None:
            waiting.wait(20)

        def operate() -> None:
            if operation == "exchange":
                group.exchange([], [(group.rank - 1, into)], between=arrive)
            else:
                arrive()
                group.all_gather_equal(b"abc")

        return lost(operate)

    futures = world.start(wait, [1, 2])
    waiting.wait(20)
    world.groups[0].drop()
    for rank, future in zip((1, 2), futures, strict=True):
        error, seconds = future.result(30)
        assert seconds < 1.0
        assert str(error).startswith(f"rank {rank} of 3: ")
        assert error.__context__ is None
        assert error.__cause__ is None


@pytest.mark.parametrize("operation", ["exchange", "gather"])
def test_dropping_frees_its_own_wait_for_a_peer_that_neither_answers_nor_hangs_up(world: World, operation: str) -> None:
    """A frozen peer, or one on a lost node: its connection stands. What comes over it later must not arrive either."""
    buffer, waits = torch.zeros(4), threading.Event()

    def work(group: GroupSet) -> object:
        group.deadline_s = group.gather_deadline_s = 60.0
        if operation == "gather":
            waits.set()
            return group.all_gather_equal(b"here")
        return group.exchange([], [(2, buffer)], between=waits.set)

    (waiting,) = world.start(work, ranks=[1])
    assert waits.wait(30)
    world.groups[1].drop()
    with pytest.raises(PeerLost):
        waiting.result(5)
    late = world.groups[2]
    late.deadline_s = 5.0
    with pytest.raises(PeerLost):
        late.exchange([(1, torch.ones(4))], [(1, torch.zeros(4))])
    assert buffer.tolist() == [0.0] * 4


def test_a_dropped_set_refuses_and_may_be_dropped_again(world: World) -> None:
    group = world.groups[1]
    group.drop()
    group.drop()
    for work in (
        lambda: group.exchange([(0, torch.zeros(1))], []),
        lambda: group.all_gather_equal(b"x"),
        lambda: group.all_gather_sized(b"x"),
    ):
        error, _ = lost(work)
        assert str(error) == "rank 1 of 3: the group was dropped"
        assert error.__context__ is None


def test_a_wait_has_a_deadline(world: World) -> None:
    group = world.groups[1]
    group.deadline_s = 0.1
    error, seconds = lost(lambda: group.exchange([], [(0, torch.empty(1))]))
    assert seconds < 5.0
    assert error.__context__ is None


@pytest.mark.parametrize("gather", ["all_gather_equal", "all_gather_sized"])
def test_a_gather_has_a_deadline_of_its_own(world: World, gather: str) -> None:
    """An exchange may be given minutes (a first step, a compilation); a vote follows an exchange and needs none."""
    group = world.groups[1]
    group.deadline_s, group.gather_deadline_s = 20.0, 0.1
    error, seconds = lost(lambda: getattr(group, gather)(b"x"))
    assert seconds < 5.0
    assert error.__context__ is None
    other = world.groups[2]
    other.deadline_s, other.gather_deadline_s = 0.1, 20.0
    _, seconds = lost(lambda: other.exchange([], [(0, torch.empty(1))]))
    assert seconds < 5.0, "and an exchange does not wait for a gather's"


def test_what_between_raises_is_not_taken_for_a_lost_peer(world: World) -> None:
    def fault() -> None:
        raise ValueError("injected")

    with pytest.raises(ValueError, match=r"^injected$"):
        world.groups[1].exchange([(0, torch.zeros(1))], [], between=fault)


def test_a_new_generation_forms_beside_one_that_was_dropped(rendezvous: Rendezvous) -> None:
    for generation in (501, 502):
        world = World(rendezvous, 2, generation)
        assert world.all(lambda g: g.all_gather_equal(bytes([g.rank]))) == [[b"\0", b"\1"]] * 2
        world.close()


def test_world_1_needs_nobody() -> None:
    group = GroupSet(None, generation=1, rank=0, world=1, device=CPU, host=HOST)
    called: list[int] = []
    group.exchange([], [], between=lambda: called.append(1))
    assert called == [1]
    assert group.all_gather_equal(b"abc") == [b"abc"]
    assert group.all_gather_sized(b"abc") == [b"abc"]
    assert group.all_gather_sized(b"") == [b""]


def test_more_workers_need_a_store() -> None:
    with pytest.raises(PeerLost, match=r"^generation 7: no rendezvous store for 2 workers$"):
        GroupSet(None, generation=7, rank=0, world=2, device=CPU, host=HOST)


def test_without_a_store_nobody_waits() -> None:
    with pytest.raises(PeerLost, match="the first member of this generation"):
        connect("")


def test_waiting_for_peers_ends_when_the_generation_is_given_up(rendezvous: Rendezvous) -> None:
    store = connect(rendezvous.address)
    asked: list[int] = []

    def gone() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(PeerLost, match=r"^generation 900 was given up while it formed$"):
        meet(store, 900, 0, 2, gone)


def test_hanging_up_on_the_store_frees_a_group_that_forms_with_one_who_never_comes() -> None:
    """A peer that dies after all have met: the group's own connect asks the store for it until its time is over."""
    own = Rendezvous(HOST)
    store = connect(own.address)
    with ThreadPoolExecutor(1) as pool:
        forming = pool.submit(GroupSet, store, generation=1, rank=0, world=2, device=CPU, host=HOST)
        watching = connect(own.address)
        while not watching.check(["generation-1/gloo/link/0"]):  # it is on its way
            threading.Event().wait(0.01)
        hang_up(own.address)
        with pytest.raises(PeerLost, match="could not form its group"):
            forming.result(10)
