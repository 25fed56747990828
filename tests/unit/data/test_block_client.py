"""How long a worker waits for its node's feeder, whatever that does: with a clock and a line that follow a script."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.data import block_client
from elastictrain.data.block_client import BlockClient
from elastictrain.data.reliance import FIRST_PAUSE_S, LATE_TIMES
from elastictrain.data.sharing import NO_BLOCK, Answer, Ask, Look
from elastictrain.data.warm import Arrays


def yes() -> bool:
    return True


def no() -> bool:
    return False


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Scripted:
    """A line whose answers are a script: "hang" (no answer in time), "dead", "coming", "full", "none", "here"."""

    def __init__(self, clock: Clock, script: list[str], block: npt.NDArray[Any]) -> None:
        self.clock, self.script, self.block, self.number = clock, script, block, 1
        self.calls: list[float] = []
        self.asks: list[Ask] = []
        self.told: SimpleQueue[tuple[int, Ask]] = SimpleQueue()

    def tell(self, number: int, ask: Ask) -> None:
        self.told.put((number, ask))

    def call(self, number: int, ask: Ask, deadline_s: float) -> tuple[Answer, Arrays | None]:
        del number
        self.calls.append(self.clock.now_s)
        self.asks.append(ask)
        what = self.script.pop(0) if self.script else "here"
        if what == "dead":
            raise RuntimeError("dead")
        if what == "hang":
            self.clock.now_s += deadline_s
            raise TimeoutError
        self.clock.now_s += ask.wait_s if what == "coming" else 0.001
        item = {"x": self.block} if what == "here" else None
        return Answer(Look(what), 1, 0.0, item), item


def client_of(script: list[str]) -> tuple[BlockClient, Clock, Scripted]:
    clock = Clock()
    line = Scripted(clock, script, np.arange(3))
    return BlockClient(line, 0, workers=1, clock=clock), clock, line


def test_a_feeder_that_does_not_answer_costs_one_deadline_and_then_nothing() -> None:
    client, clock, line = client_of(["hang"])
    assert client.take("k", 1, 0.0, urgent=yes) is None
    assert clock.now_s == pytest.approx(1.25)
    for _ in range(5):
        assert client.take("k", 1, 0.0, urgent=yes) is None
    assert len(line.calls) == 1, "it is left alone"
    clock.now_s += FIRST_PAUSE_S
    assert client.take("k", 1, 0.0, urgent=yes) is None, "who waits does not try it out"
    assert client.take("k", 1, 0.0, urgent=no) is not None, "who reads ahead does"
    assert client.take("k", 1, 0.0, urgent=yes) is not None


def test_a_feeder_that_only_says_coming_is_waited_for_as_long_as_patience_lasts() -> None:
    client, clock, _ = client_of(["coming"] * 1000)
    assert client.take("k", 1, 0.0, urgent=yes) is None
    assert clock.now_s == pytest.approx(0.5)
    assert client.take("k", 1, 0.0, urgent=no) is None
    assert clock.now_s == pytest.approx(2.5)


def test_a_feeder_that_is_replaced_meanwhile_is_asked_anew() -> None:
    client, _, line = client_of(["dead"])
    assert client.take("k", 1, 0.0, urgent=yes) is None
    line.number = 2
    assert client.take("k", 1, 0.0, urgent=yes) is not None


@settings(max_examples=40, deadline=None)
@given(script=st.lists(st.sampled_from(["hang", "dead", "coming", "full", "none", "here"]), max_size=40),
       urgent=st.lists(st.booleans(), min_size=1, max_size=40))  # fmt: skip
def test_nothing_that_a_feeder_does_makes_a_worker_wait_for_long(script: list[str], urgent: list[bool]) -> None:
    client, clock, _ = client_of(list(script))
    for hurried in urgent:
        begun_s = clock.now_s
        block = client.take("k", 1, 0.0, urgent=lambda hurried=hurried: hurried)
        assert clock.now_s - begun_s <= (0.5 if hurried else 2.0) + 2 * 1.25
        assert block is None or block.arrays["x"].tolist() == [0, 1, 2]
        del block
        clock.now_s += 0.3


def test_a_feeder_that_is_late_again_and_again_is_left_alone_for_a_while() -> None:
    client, _, line = client_of(["coming"] * 1000)
    for _ in range(LATE_TIMES):
        assert client.take("k", 1, 0.0, urgent=yes) is None
    calls = len(line.calls)
    assert client.take("k", 1, 0.0, urgent=no) is None
    assert len(line.calls) == calls, "it lives, but nothing comes"


def test_a_question_without_an_answer_is_settled_all_the_same() -> None:
    """Else the feeder would believe for ever that what it answered then is held."""
    client, clock, line = client_of(["dead"])
    assert client.take("k", 1, 0.0, urgent=no) is None
    clock.now_s += FIRST_PAUSE_S
    assert client.take("k", 1, 0.0, urgent=no) is not None
    assert [ask.settled for ask in line.asks] == [1, 2]


def test_a_question_is_not_settled_while_another_thread_still_puts_it() -> None:
    client, _, line = client_of([])
    call, heard = line.call, list[int]()
    client.listen(heard.append)

    def meanwhile(number: int, ask: Ask, deadline_s: float) -> tuple[Answer, Arrays | None]:
        if ask.block == 1:
            assert client.take("k", 2, 0.0, urgent=no) is not None
        return call(number, ask, deadline_s)

    line.call = meanwhile  # type: ignore[method-assign]
    assert client.take("k", 1, 0.0, urgent=no) is not None
    assert client.take("k", 3, 0.0, urgent=no) is not None
    assert [(ask.serial, ask.settled) for ask in line.asks] == [(2, 1), (1, 1), (3, 3)]
    assert heard == [1], "who listens is told what has changed, and nothing else"


def test_a_question_becomes_urgent_while_it_is_put() -> None:
    client, clock, _ = client_of(["coming"] * 1000)
    assert client.take("k", 1, 0.0, urgent=lambda: clock.now_s >= 1.0) is None
    assert clock.now_s == pytest.approx(1.0), "patience is that of somebody who waits, as soon as somebody does"


def test_whoever_hears_of_the_budget_last_hears_what_holds() -> None:
    client, _, line = client_of([])
    heard: dict[str, list[int]] = {"first": [], "second": []}
    counts = [2, 3]
    call = line.call

    def counted(number: int, ask: Ask, deadline_s: float) -> tuple[Answer, Arrays | None]:
        answer, arrays = call(number, ask, deadline_s)
        return replace(answer, workers=counts.pop(0) if counts else 3), arrays

    line.call = counted  # type: ignore[method-assign]

    def first(workers: int) -> None:
        heard["first"].append(workers)
        if workers == 2:  # while this one is told, another answer arrives
            client.take("k", 2, 0.0, urgent=no)

    client.listen(first)
    client.listen(heard["second"].append)
    client.take("k", 1, 0.0, urgent=no)
    assert client.workers == 3
    assert heard["first"][-1] == heard["second"][-1] == 3


def test_what_an_idle_worker_lets_go_of_is_told_without_a_question() -> None:
    client, _, line = client_of([])
    kept, gone = (client.take("k", block, 0.0, urgent=no) for block in (1, 2))
    del gone
    number, ask = line.told.get(timeout=30)
    assert (number, ask.block, ask.held) == (1, NO_BLOCK, {1})
    assert ask.serial > line.asks[-1].serial, "it is news to the feeder"
    assert len(line.asks) == 2, "and nothing was asked for it"
    del kept
    assert line.told.get(timeout=30)[1].held == frozenset()


def test_what_a_question_has_said_is_not_told_again() -> None:
    client, _, line = client_of([])
    held = client.take("k", 1, 0.0, urgent=no)
    del held
    held = client.take("k", 2, 0.0, urgent=no)
    assert line.asks[-1].held == frozenset()
    client._tell()
    assert line.told.empty()
    del held


def test_a_line_that_breaks_while_it_is_told_breaks_nothing() -> None:
    client, _, line = client_of([])
    tried = threading.Event()

    def broken(number: int, ask: Ask) -> None:
        tried.set()
        raise RuntimeError("dead")

    tell, line.tell = line.tell, broken  # type: ignore[method-assign]
    held = client.take("k", 1, 0.0, urgent=no)
    del held
    assert tried.wait(30)
    line.tell = tell  # type: ignore[method-assign]
    held = client.take("k", 2, 0.0, urgent=no)
    del held
    assert line.told.get(timeout=30)[1].held == frozenset(), "the next one goes through"


def test_the_thread_that_tells_ends_with_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.data.test_node_feeding import wait_until  # which takes something from here

    monkeypatch.setattr(block_client, "TELL_S", 3600.0)  # it waits for a further end when the client goes
    client, _, _ = client_of([])
    held = client.take("k", 1, 0.0, urgent=no)
    teller, places = client._teller, client._held
    assert teller is not None
    del held
    wait_until(lambda: not places)  # the thread has noted it, and waits for more
    assert teller.is_alive()
    del client
    gc.collect()
    teller.join(30)
    assert not teller.is_alive()
