"""The exchange through shared memory, between threads that stand in for processes."""

from __future__ import annotations

import fcntl
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastictrain_checkpoint import InvalidPiece
from elastictrain_checkpoint.host_exchange import SLOTS, HostExchange
from elastictrain_checkpoint.together import Shares
from tests.unit.checkpoint.workers import Workers


class Host(Workers):
    def run_with_exchange(self, work: Callable[[int, HostExchange], Any]) -> list[Any]:
        def one(worker: int) -> Any:
            return work(worker, HostExchange(worker, self.workers, self.gather(worker)))

        return self.run(one)


def test_everybody_gets_what_each_has_sent_in_every_call() -> None:
    def work(worker: int, exchange: HostExchange) -> list[list[bytes]]:
        exchange.make_room(100)
        got = []
        for call in range(5):
            columns = np.arange(12, dtype=np.uint16).reshape(3, 4)[:, call % 4 : call % 4 + 1] + 100 * worker
            sent = [[columns, np.array([call, to], dtype=np.uint8)] if to != worker else [] for to in range(3)]
            came = exchange(sent, [0 if other == worker else 8 for other in range(3)])
            got.append([bytes(data) for data in came])
        exchange.close()
        return got

    found = Host(3).run_with_exchange(work)
    for worker, calls in enumerate(found):
        for call, came in enumerate(calls):
            for other, data in enumerate(came):
                column = [call % 4 + 4 * row + 100 * other for row in range(3)]
                expected = np.array(column, dtype=np.uint16).tobytes() + bytes([call, worker])
                assert data == (b"" if other == worker else expected)


def test_what_does_not_fit_is_refused() -> None:
    room = 4096 - 8

    def work(_: int, exchange: HostExchange) -> None:
        exchange.make_room(10)
        exchange([[np.zeros(room, dtype=np.uint8)]], [room])
        exchange([[np.zeros(room + 1, dtype=np.uint8)]], [room + 1])

    [error] = Host(1).run_with_exchange(work)
    assert isinstance(error, InvalidPiece)
    assert str(error) == "4097 bytes to exchange, room for 4096: call make_room first"


def test_workers_that_ask_for_different_room_are_refused() -> None:
    found = Host(2).run_with_exchange(lambda worker, exchange: exchange.make_room(10_000 * worker))
    assert any(str(error) == "workers share [4096, 12288] bytes, expected one size" for error in found)


@pytest.mark.parametrize("times", [1, 4])
def test_no_file_is_left_open(times: int) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])

    def work(_: int, exchange: HostExchange) -> None:
        for _ in range(times):
            exchange.make_room(10)
            exchange([[], []], [0, 0])
        exchange.close()

    assert Host(2).run_with_exchange(work) == [None, None]
    assert len([*Path("/proc/self/fd").iterdir()]) <= before


def pattern(worker: int, turn: int, size: int) -> bytes:
    return bytes([turn, worker, *range(size)])[:size]


def test_what_one_has_filled_all_see_in_its_turn() -> None:
    sizes = [[5, 0, 90, 7, 7, 30, 2, 1, 0, 11, 4], [0] * 11, [3 * turn for turn in range(11)]]

    def work(worker: int, exchange: HostExchange) -> list[Any]:
        assert isinstance(exchange, Shares)
        exchange.make_room(100)
        seen: list[Any] = []

        def fill(turn: int, memory: memoryview) -> None:
            memory[:] = pattern(worker, turn, len(memory))

        def take(turn: int, other: int, memory: memoryview) -> None:
            seen.append((turn, other, bytes(memory[: sizes[other][turn]])))

        for _ in range(2):  # with a call of the other kind between and behind: what it gives stays until the next
            exchange.stream(sizes[worker], fill, take)
            came = exchange([[np.full(9, worker, dtype=np.uint8)]] * 3, [9] * 3)
            seen.append([bytes(data) for data in came])
        return seen

    turns = [(turn, worker, pattern(worker, turn, sizes[worker][turn])) for turn in range(11) for worker in range(3)]
    for seen in Host(3).run_with_exchange(work):
        for begin in (0, 34):
            assert sorted(seen[begin : begin + 33]) == turns
            for other in range(3):
                assert [turn for turn, who, _ in seen[begin : begin + 33] if who == other] == list(range(11))
            assert seen[begin + 33] == [bytes([other] * 9) for other in range(3)]


def test_a_worker_goes_ahead_as_far_as_there_is_memory_and_no_further() -> None:
    ahead, taken = threading.Event(), list[int]()

    def work(worker: int, exchange: HostExchange) -> None:
        exchange.make_room(10)

        def fill(turn: int, memory: memoryview) -> None:
            if worker == 1:
                assert ahead.wait(30), "worker 0 waits in a turn for which it has memory"
            elif turn == SLOTS - 1:
                ahead.set()
            elif turn >= SLOTS:
                assert turn - SLOTS in taken, "memory is filled again before it is read"
            memory[:] = pattern(worker, turn, 10)

        def take(turn: int, other: int, memory: memoryview) -> None:
            assert bytes(memory[:10]) == pattern(other, turn, 10)
            if (worker, other) == (1, 0):
                taken.append(turn)

        exchange.stream([10] * 20, fill, take)

    assert Host(2).run_with_exchange(work) == [None, None]
    assert taken == list(range(20))


def test_what_is_heard_while_it_decides_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 1 is done but for the last turn of worker 0, which finds its memory full; only then worker 1 reads, says
    so, and has no more to say.
    """
    turns, taken, full = SLOTS + 1, list[int](), threading.Event()
    real = HostExchange._may_fill

    def found(self: HostExchange, turn: int) -> bool:
        may = real(self, turn)
        if self._worker == 0 and len(taken) < turns:
            return False
        if self._worker == 0 and not may:
            full.set()
            said = bytearray(4)
            while int.from_bytes(said, sys.byteorder) < SLOTS:
                fcntl.ioctl(self._pipes.inboxes[1], termios.FIONREAD, said)
        return may

    monkeypatch.setattr(HostExchange, "_may_fill", found)

    def one(worker: int) -> None:
        def take(turn: int, other: int, memory: memoryview) -> None:
            del turn, memory
            if (worker, other) == (0, 1):
                taken.append(1)
            elif (worker, other) == (1, 0):
                assert full.wait(30)

        exchange = HostExchange(worker, 2, host.gather(worker), timeout_s=30.0)
        exchange.make_room(10)
        exchange.stream([10] * turns, lambda *_: None, take)

    host = Host(2)
    assert host.run(one) == [None, None]


def test_what_a_call_has_given_stays_until_the_next() -> None:
    """Also where the others are at the next already."""
    begun, overwritten, done = threading.Event(), threading.Event(), threading.Event()

    def work(worker: int, exchange: HostExchange) -> None:
        exchange.make_room(10)
        came = exchange([[np.full(5, worker, dtype=np.uint8)]] * 2, [5] * 2)

        def fill(turn: int, memory: memoryview) -> None:
            if worker == 1:
                begun.set()
                if turn == SLOTS - 1 and not done.is_set():
                    overwritten.set()
            memory[:] = bytes([9] * 10)

        if worker == 0:
            assert begun.wait(30)
            assert not overwritten.wait(0.2)
            assert [bytes(data) for data in came] == [bytes([0] * 5), bytes([1] * 5)]
            done.set()
        exchange.stream([10] * 5, fill, lambda *_: None)

    assert Host(2).run_with_exchange(work) == [None, None]


@pytest.mark.parametrize("kind", ["stream", "call"])
def test_who_gives_up_is_not_waited_for(kind: str) -> None:
    def work(worker: int, exchange: HostExchange) -> None:
        exchange.make_room(10)
        if kind == "call":
            exchange([[], []], [0, 0])
            exchange([[np.zeros(5 if worker else 5000, dtype=np.uint8)]] * 2, [5] * 2)
        exchange.stream([10] * 5, lambda turn, _: 1 // (worker or 2 - turn), lambda *_: None)

    first, second = Host(2).run_with_exchange(work)
    assert isinstance(first, ZeroDivisionError if kind == "stream" else InvalidPiece)
    assert isinstance(second, ConnectionError)
    why = "integer division or modulo by zero" if kind == "stream" else first
    assert str(second) == f"worker 0 has given up: {type(first).__name__}: {why}"


def test_who_does_not_get_on_is_waited_for_until_a_deadline() -> None:
    over, host = threading.Event(), Host(2)

    def work(worker: int) -> str:
        exchange = HostExchange(worker, 2, host.gather(worker), timeout_s=0.05)
        exchange.make_room(10)
        try:
            exchange.stream([10] * 9, lambda *_: worker == 1 and over.wait(30), lambda *_: None)
        except (TimeoutError, ConnectionError) as error:
            return str(error)
        finally:
            over.set()
        return ""

    assert host.run(work) == [
        "workers [1] have not got on for 0.05 s",
        "worker 0 has given up: workers [1] have not got on for 0.05 s",
    ]


def test_without_room_nothing_is_shared() -> None:
    def work(_: int, exchange: HostExchange) -> None:
        exchange.make_room(10)
        exchange.close()
        exchange.stream([10], lambda *_: None, lambda *_: None)

    for error in Host(1).run_with_exchange(work):
        assert isinstance(error, InvalidPiece)
        assert str(error) == "10 bytes to share, room for 0: call make_room first"
