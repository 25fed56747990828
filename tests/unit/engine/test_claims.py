"""Claims of lanes: one for each lane and step, whoever asks at the same time, and no wait without an end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from elastictrain.engine.claims import ClaimBoard
from elastictrain.engine.collective import Rendezvous, connect, hang_up
from elastictrain.errors import PeerLost
from elastictrain.redundancy import Claim


class Words:
    """A store in one process, with torch's rule: what is expected is replaced, "" means that nothing is there."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self.lock = threading.Lock()
        self.asked = 0

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        with self.lock:
            self.asked += 1
            there = self.words.get(key)
            if there is None and expected:
                return expected.encode()
            if there is None or there == expected:
                self.words[key] = there = desired
            return there.encode()


def board(words: Words) -> ClaimBoard:
    return ClaimBoard(words, lambda: None)


def test_one_of_all_who_ask_at_once_has_the_lane() -> None:
    words, found, together = Words(), [], threading.Barrier(8)

    def ask(rank: int) -> None:
        mine = board(words)
        together.wait(30)
        found.append((rank, mine.claim("lane/3", Claim(7, rank)).rank))
        mine.close()

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    winners = {winner for _, winner in found}
    assert len(found) == 8
    assert len(winners) == 1
    assert words.words == {"lane/3": f"7:{winners.pop()}"}


def test_the_next_step_replaces_what_all_know_with_one_question() -> None:
    words = Words()
    one, two = board(words), board(words)
    assert one.claim("a", Claim(1, 0)) == Claim(1, 0)
    assert two.claim("a", Claim(1, 1)) == Claim(1, 0)
    for each in (one, two):
        each.settle(["a"], [Claim(1, 0)])
    asked = words.asked
    assert two.claim("a", Claim(2, 1)) == Claim(2, 1)
    assert words.asked == asked + 1
    assert one.claim("a", Claim(2, 0)) == Claim(2, 1)


def test_a_claim_of_a_step_that_one_knows_nothing_of_is_replaced_all_the_same() -> None:
    words = Words()
    board(words).claim("a", Claim(3, 2))
    assert board(words).claim("a", Claim(5, 0)) == Claim(5, 0)
    assert board(words).read("a", 5) == Claim(5, 0)
    assert board(words).read("a", 6) is None
    assert board(words).read("b", 5) is None
    assert "b" not in words.words, "to ask changes nothing"


def test_the_first_result_counts() -> None:
    words = Words()
    own, copy = board(words), board(words)
    begun = own.claim("a", Claim(4, 0))
    assert copy.finish("a", begun, Claim(4, 1, True)) == Claim(4, 1, True)
    assert own.finish("a", begun, Claim(4, 0, True)) == Claim(4, 1, True)
    assert own.read("a", 4) == Claim(4, 1, True)


class Broken:
    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        raise RuntimeError("Connection reset by peer\nand a trace")


def test_a_store_that_is_gone_is_a_lost_peer() -> None:
    with pytest.raises(
        PeerLost, match=r"the first member's store gave no answer about a for [0-9.]+ s: Connection reset by peer$"
    ):
        ClaimBoard(Broken(), lambda: None).claim("a", Claim(1, 0))


def test_a_question_does_not_end_while_its_connection_is_cut() -> None:
    """Else the next generation could have a connection to the same store by then, and that would be cut."""
    cutting, may_end = threading.Event(), threading.Event()

    class Late:
        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            assert cutting.wait(30)
            return desired.encode()

    def hang_up() -> None:
        cutting.set()
        assert may_end.wait(30)

    mine = ClaimBoard(Late(), hang_up, answer_s=0.01)
    asks = threading.Thread(target=mine.claim, args=("a", Claim(1, 0)))
    asks.start()
    assert cutting.wait(30)
    asks.join(0.2)
    assert asks.is_alive()
    may_end.set()
    asks.join(30)
    assert not asks.is_alive()
    mine.close()
    assert mine._thread is not None
    mine._thread.join(30)
    assert not mine._thread.is_alive()


def test_nothing_is_cut_once_the_board_is_closed() -> None:
    cut, asked = threading.Event(), threading.Event()

    class Never:
        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            asked.set()
            mine._ended.wait(30)
            with mine._asking:  # the board is closed, and this question is still open, and late
                assert mine._thread is not None
                mine._answer_s = 0.0
            mine._thread.join(30)
            return desired.encode()

    mine = ClaimBoard(Never(), cut.set)
    asks = threading.Thread(target=mine.claim, args=("a", Claim(1, 0)))
    asks.start()
    assert asked.wait(30)
    mine.close()
    asks.join(30)
    assert not cut.is_set()


def _serve(pipe: Any) -> None:
    rendezvous = Rendezvous()
    pipe.send(rendezvous.address)
    pipe.recv()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_store_that_is_frozen_is_a_lost_peer_too() -> None:
    """Nothing ends a question to it by itself: the connection is cut when the answer takes too long."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(60)
        address = ours.recv()
        store, cut = connect(address), []

        def cuts() -> None:
            cut.append(address)
            hang_up(address)

        patient, mine = ClaimBoard(store, cuts), ClaimBoard(store, cuts, answer_s=0.2)
        assert patient.claim("a", Claim(1, 0)) == Claim(1, 0)
        patient.close()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        with pytest.raises(PeerLost, match="gave no answer about b"):
            mine.claim("b", Claim(1, 0))
        assert cut
        mine.close()
    finally:
        process.kill()
        process.join(30)
