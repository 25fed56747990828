"""Pieces that are read out of a peer's memory: who may, which go that way, and what is waited for."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.engine import direct
from elastictrain.engine.collective import GroupSet, Rendezvous
from elastictrain.errors import ConfigError, PeerLost
from tests.unit.engine.test_collective import HOST, World

HOLDER = """
import ctypes, sys
memory = ctypes.create_string_buffer(bytes(range(256)) * 4096)
print(ctypes.addressof(memory), flush=True)
sys.stdin.read()
"""
LARGE = direct.MIN_BYTES // 4


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every piece that is read."""
    monkeypatch.delenv("ELASTICTRAIN_DIRECT", raising=False)
    found, real = list[int](), direct.read

    def counted(pid: int, address: int, into: torch.Tensor) -> None:
        found.append(into.numel())
        real(pid, address, into)

    monkeypatch.setattr(direct, "read", counted)
    return found


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(Rendezvous(HOST), 2, generation=hash(request.node.name) & 0xFFFFFF)
    yield made
    made.close()


def swap(group: GroupSet) -> bool:
    """Both ranks send each other two large pieces and, before them, a small one; all must come as they are."""
    other = 1 - group.rank
    sizes = (3, LARGE, 2 * LARGE + 1)
    sends = [(other, torch.arange(float(n)) + group.rank) for n in sizes]
    recvs = [(other, torch.zeros(n)) for n in sizes]
    group.exchange(sends, recvs)
    return all(torch.equal(got, torch.arange(float(n)) + other) for (_, got), n in zip(recvs, sizes, strict=True))


def test_large_exchanges_are_read_and_small_ones_are_not(world: World, reads: list[int]) -> None:
    assert world.all(swap) == [True] * 2
    assert sorted(reads) == sorted(2 * [3, LARGE, 2 * LARGE + 1])
    reads.clear()
    small = torch.ones(LARGE - 1)
    world.all(lambda g: g.exchange([(1 - g.rank, small)], [(1 - g.rank, torch.zeros(LARGE - 1))]))
    assert reads == []


@pytest.mark.parametrize("refused", [False, True])
def test_the_same_comes_where_it_is_not_allowed(
    monkeypatch: pytest.MonkeyPatch, reads: list[int], refused: bool
) -> None:
    if refused:
        monkeypatch.setattr(direct, "_refused", ["Operation not permitted"])
    else:
        monkeypatch.setenv("ELASTICTRAIN_DIRECT", "0")
    world = World(Rendezvous(HOST), 2, generation=1)
    assert world.all(swap) == [True] * 2
    assert reads == []
    world.close()


def test_a_sender_waits_until_it_has_been_read(world: World) -> None:
    """Else it would use its memory again while the receiver still reads."""
    spoilt = threading.Event()

    def work(group: GroupSet) -> bool:
        if group.rank == 0:
            mine = torch.ones(LARGE)
            group.exchange([(1, mine)], [])
            mine.zero_()
            spoilt.set()
            return True
        into = torch.zeros(LARGE)
        group.exchange([], [(0, into)], between=lambda: assert_not(spoilt.wait(0.3)))
        return bool(into.eq(1.0).all())

    def assert_not(value: bool) -> None:
        assert not value

    assert world.all(work) == [True] * 2


def test_a_peer_that_gives_up_frees_whoever_waits_for_its_word(world: World) -> None:
    def work(group: GroupSet) -> None:
        if group.rank == 1:
            group.exchange([], [(0, torch.zeros(LARGE))], between=group.drop)
        group.exchange([(1, torch.ones(LARGE))], [])

    for future in world.start(work):
        with pytest.raises(PeerLost):
            future.result(5)


def test_sizes_that_differ_are_no_exchange(world: World) -> None:
    def work(group: GroupSet) -> None:
        if group.rank == 0:
            group.exchange([(1, torch.ones(LARGE))], [])
        group.exchange([], [(0, torch.ones(LARGE + 1))])

    receiver = world.start(work)[1]
    with pytest.raises(PeerLost, match=f"rank 0 sends {4 * LARGE} bytes, expected {4 * LARGE + 4}"):
        receiver.result(5)


def test_another_processs_memory_is_read_while_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MAX_READ_BYTES", 300_000)  # in several calls
    into = torch.zeros(256 * 4096, dtype=torch.uint8)
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        address = int(holder.stdout.readline())
        direct.read(holder.pid, address, into)
        assert torch.equal(into, torch.arange(256).repeat(4096).to(torch.uint8))
        with pytest.raises(RuntimeError, match=rf"^process {holder.pid} of this host cannot be read: .*Bad address"):
            direct.read(holder.pid, 0, into)
        holder.kill()
    with pytest.raises(RuntimeError, match="No such process"):
        direct.read(holder.pid, address, into)
    assert direct.identity(), "a peer that has died is no reason not to read others"


def test_who_was_refused_once_does_not_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(direct, "_refused", [])
    assert direct.identity()
    monkeypatch.setattr(direct, "_libc", lambda: SimpleNamespace(process_vm_readv=refuse))
    with pytest.raises(RuntimeError, match="not permitted"):
        direct.read(1, 0, torch.zeros(1))
    assert direct.identity() == ""


@pytest.mark.parametrize(("scope", "allowed"), [("0", True), ("1", True), ("2", False), ("3", False)])
def test_yamas_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, allowed: bool) -> None:
    file = tmp_path / "ptrace_scope"
    file.write_text(scope + "\n")
    monkeypatch.setattr(direct, "_YAMA", file)
    assert bool(direct._host.__wrapped__()) is allowed


def test_a_kernel_that_has_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise AttributeError("process_vm_readv")

    monkeypatch.setattr(direct, "_libc", none)
    assert direct._host.__wrapped__() == ""


def test_only_processes_of_one_host_and_user_with_the_same_setting_are_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = direct.identity()
    assert own.endswith(f" {os.getpid()}")
    place = own.rpartition(" ")[0]
    others = {1: f"{place} 12", 2: "", 3: f"x{place} 13", 4: f"{place} 14"}
    assert direct.Neighbours.among(own, others).pids == {1: 12, 4: 14}
    assert direct.Neighbours.among("", others).pids == {}
    monkeypatch.setenv("ELASTICTRAIN_DIRECT", "1024")
    assert direct.Neighbours.among(direct.identity(), others).pids == {}


@pytest.mark.parametrize("text", ["", "-1", "yes"])
def test_a_setting_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ELASTICTRAIN_DIRECT", text)
    with pytest.raises(ConfigError, match="ELASTICTRAIN_DIRECT"):
        direct.min_bytes()


@given(
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=12),
    near=st.sets(st.integers(0, 3)),
    least=st.integers(1, 200),
)
def test_every_piece_goes_one_way_and_a_pair_goes_one_way_as_a_whole(
    sizes: list[tuple[int, int]], near: set[int], least: int
) -> None:
    pieces = [(rank, torch.zeros(size)) for rank, size in sizes]
    large, rest = direct.Neighbours(dict.fromkeys(near, 1), least).split(pieces)
    for rank in range(4):
        own = [tensor for r, tensor in pieces if r == rank]
        total = 4 * sum(tensor.numel() for tensor in own)
        is_read = rank in near and total >= least
        assert [id(t) for t in large.get(rank, [])] == ([id(t) for t in own] if is_read else [])
        assert [id(t) for r, t in rest if r == rank] == ([] if is_read else [id(t) for t in own])


def test_what_is_worth_it_is_read_by_several_threads(
    world: World, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "THREAD_BYTES", LARGE)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert world.all(swap) == [True] * 2
    assert max(reads) == LARGE, "in parts of at most so many bytes"
    assert sum(reads) == 2 * 4 * (3 + LARGE + 2 * LARGE + 1), "every byte once"


def test_a_read_that_fails_in_a_thread_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "THREAD_BYTES", 1024)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    source, target = torch.ones(4096), torch.zeros(4096)
    with pytest.raises(RuntimeError, match="cannot be read"):
        direct.read_all(os.getpid(), {source.data_ptr(): target, 16: torch.zeros(1024)})
    direct.read_all(os.getpid(), {source.data_ptr(): target})
    assert torch.equal(source, target)
