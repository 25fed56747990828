"""Actors that Ray does not create at once, or not at all, while its head is away."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from ray.exceptions import GetTimeoutError, RaySystemError

from elastictrain_actors.creations import Created, Creations

WAIT_S = 20.0


class Head:
    """Answers when it is there. `ended`: the actors that were ended again."""

    def __init__(self) -> None:
        self.is_there = threading.Event()
        self.asked, self.done = threading.Event(), threading.Event()
        self.ended: list[str] = []

    def create(self, name: str) -> Callable[[], str]:
        def create() -> str:
            self.asked.set()
            assert self.is_there.wait(WAIT_S)
            return name

        return create

    def end(self, handle: str) -> None:
        self.ended.append(handle)
        self.done.set()


@pytest.fixture
def head() -> Head:
    return Head()


def test_a_head_that_is_there(head: Head) -> None:
    creations = Creations(head.end)
    head.is_there.set()
    creations.ask(0, head.create("a"))
    creations.ask(1, head.create("b"))
    assert creations.take(WAIT_S) == [Created(0, "a"), Created(1, "b")], "all that were asked for, without a turn more"
    assert 0 not in creations
    assert creations.take(WAIT_S) == [], "with nothing under way there is nothing to wait for"
    creations.close()
    assert head.ended == []


def test_while_the_head_is_away_nobody_waits(head: Head) -> None:
    creations = Creations(head.end)
    creations.ask(7, head.create("a"))
    assert head.asked.wait(WAIT_S)
    assert creations.take() == []
    assert 7 in creations
    head.is_there.set()
    assert creations.take(WAIT_S) == [Created(7, "a")]
    creations.close()


def test_what_waits_for_long_is_said_once(head: Head) -> None:
    creations = Creations(head.end)
    creations.ask(7, head.create("a"))
    creations.ask(8, head.create("b"))
    creations.drop(8)
    assert creations.late(3600.0) == []
    assert creations.late(-1.0) == [7], "8 is wanted no more"
    assert creations.late(-1.0) == []
    creations.ask(9, head.create("c"))
    head.is_there.set()
    assert creations.take(WAIT_S) == [Created(7, "a"), Created(9, "c")]
    assert creations.late(-1.0) == [], "it is there"
    creations.close()


@pytest.mark.parametrize("error", [GetTimeoutError("no answer"), RaySystemError("no GCS"), ConnectionError("refused")])
def test_what_fails_because_the_head_is_away_is_done_again(head: Head, error: Exception) -> None:
    errors = [error, error]

    def create() -> str:
        if errors:
            raise errors.pop()
        return "a"

    creations = Creations(head.end, retry_s=0.001)
    creations.ask(0, create)
    assert creations.take(WAIT_S) == [Created(0, "a")]
    assert not errors
    creations.close()


def test_another_error_is_handed_on(head: Head) -> None:
    error = ValueError("no such label")

    def create() -> str:
        raise error

    creations = Creations(head.end)
    creations.ask(0, create)
    creations.ask(1, lambda: "b")
    assert creations.take(WAIT_S) == [Created(0, error=error), Created(1, "b")]
    creations.close()


def test_one_that_is_dropped_is_ended_when_it_is_there(head: Head) -> None:
    creations = Creations(head.end)
    creations.ask(0, head.create("a"))
    creations.ask(1, head.create("b"))
    creations.drop(0)
    assert 0 not in creations
    head.is_there.set()
    assert creations.take(WAIT_S) == [Created(1, "b")]
    assert head.ended == ["a"]
    creations.drop(1)
    assert creations.take() == [], "to drop one that is there changes nothing"
    creations.close()
    assert head.ended == ["a"]


def test_one_that_nobody_has_taken_is_ended_at_the_end(head: Head) -> None:
    creations = Creations(head.end)
    creations.ask(0, head.create("a"))
    assert head.asked.wait(WAIT_S)
    creations.close()
    head.is_there.set()
    assert head.done.wait(WAIT_S)
    assert head.ended == ["a"]
