"""The exchange through shared memory, between threads that stand in for processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastictrain_checkpoint import InvalidPiece
from elastictrain_checkpoint.host_exchange import HostExchange
from elastictrain_checkpoint.together import Shares
from tests.unit.checkpoint.workers import Workers


class Host(Workers):
    def run_with_exchange(self, work: Callable[[int, HostExchange], Any]) -> list[Any]:
        def one(worker: int) -> Any:
            return work(worker, HostExchange(worker, self.workers, self.gather(worker), self.barrier.wait))

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


def test_what_one_has_filled_the_others_see_until_the_next_turn() -> None:
    def work(worker: int, exchange: HostExchange) -> list[list[bytes]]:
        assert isinstance(exchange, Shares)
        exchange.make_room(100)
        seen = []
        for turn in range(5):
            mine = exchange.scratch(2 + worker)
            mine[:] = bytes([turn, worker, 7, 7][: 2 + worker])
            theirs = exchange.turn()
            exchange.scratch(50)[:] = bytes(50)  # of the coming turn: what was given stays as it is
            seen.append([bytes(data[: 2 + other]) for other, data in enumerate(theirs)])
        with pytest.raises(InvalidPiece, match=r"^5000 bytes to share, room for 4096: call make_room first$"):
            exchange.scratch(5000)
        return seen

    expected = [[bytes([turn, worker, 7, 7][: 2 + worker]) for worker in range(3)] for turn in range(5)]
    assert Host(3).run_with_exchange(work) == [expected] * 3
