"""Waiting for an order to grow: what went wrong before anybody waited is looked at again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from elastictrain.data.live_feeder import LiveFeeder
from elastictrain.errors import DataError
from tests.support.panic import Panic

PATIENCE_S = 30.0


class Script:
    """An order that grows as `looks` say, one after the other; each is told whether somebody waits."""

    ended: str | None = None
    waiting_for, place = "more", "a script"
    poll_s = 1000.0  # nothing here may depend on being looked for again after a while
    deadline = ("its deadline", 20.0)

    def __init__(self, *looks: Callable[[bool], bool]) -> None:
        self.decided, self._looks = 0, list(looks)
        self.asked: list[bool] = []
        self.prepared: list[int] = []
        self.prepares = threading.Condition()

    def advance(self, *, needed: bool) -> bool:
        self.asked.append(needed)
        grown = self._looks.pop(0)(needed) if self._looks else False
        self.decided += grown
        return grown

    def prepare(self, step: int) -> None:
        with self.prepares:
            self.prepared.append(step)
            self.prepares.notify_all()
        if step == 1:
            raise ValueError("a bad segment")

    def mark_of(self, step: int) -> dict[str, Any]:
        return {"step": step}

    def check(self, mark: Any) -> None:
        raise AssertionError(mark)


class Batches:
    """Instead of a `Feeder`."""

    def expect(self, upcoming: Any) -> None:
        self.expected = list(upcoming)

    def batch(self, step: int, lane: int) -> Any:
        class Batch(dict[str, Any]):
            waited: dict[str, float]

        found = Batch(step=step, lane=lane)
        found.waited = {}
        return found

    def close(self) -> None:
        """Nothing is open."""


def fails(_: bool) -> bool:
    raise DataError("out of reach")


def panics(_: bool) -> bool:
    raise Panic


def grows(_: bool) -> bool:
    return True


def feeding(script: Script) -> LiveFeeder:
    return LiveFeeder(Batches(), script)  # type: ignore[arg-type]


def test_what_failed_before_anybody_waited_is_looked_at_again() -> None:
    script = Script(fails, grows)
    with feeding(script) as feeder:
        feeder.expect([(0, 0)])
        with feeder._changed:
            assert feeder._changed.wait_for(lambda: feeder._error is not None, PATIENCE_S)
        assert feeder.batch(0, 0) == {"step": 0, "lane": 0}
    assert script.asked == [False, True]


def test_what_fails_while_somebody_waits_is_raised_and_then_over() -> None:
    script = Script(fails, grows)
    with feeding(script) as feeder:
        with pytest.raises(DataError, match=r"^out of reach$"):
            feeder.batch(0, 0)
        assert feeder.batch(0, 0) == {"step": 0, "lane": 0}
    assert script.asked == [True, True]


def test_a_panic_while_somebody_waits_is_raised_and_the_next_look_goes_on() -> None:
    with feeding(Script(panics, grows)) as feeder:
        with pytest.raises(Panic):
            feeder.batch(0, 0)
        assert feeder.batch(0, 0) == {"step": 0, "lane": 0}


@pytest.mark.parametrize("fails_first", [False, True])
def test_who_begins_to_wait_during_a_look_is_looked_for_at_once(fails_first: bool) -> None:
    begun, waits = threading.Event(), threading.Event()

    def until_somebody_waits(_: bool) -> bool:
        begun.set()
        assert waits.wait(PATIENCE_S)
        return fails(_) if fails_first else False

    script = Script(until_somebody_waits, grows)
    with feeding(script) as feeder:
        feeder.while_waiting = waits.set
        feeder.expect([(0, 0)])
        assert begun.wait(PATIENCE_S)
        assert feeder.batch(0, 0) == {"step": 0, "lane": 0}
    assert script.asked == [False, True]


def nothing(_: bool) -> bool:
    return False


def test_the_store_is_asked_once_in_a_while_however_often_steps_are_expected() -> None:
    script = Script(nothing, grows)
    with feeding(script) as feeder:
        for last in range(50):
            feeder.expect([(step, 0) for step in range(last + 1)])
        with feeder._changed:
            assert feeder._changed.wait_for(lambda: feeder._rests_until_s > 0, PATIENCE_S)
        for last in range(50):
            feeder.expect([(step, 0) for step in range(last + 1)])
            with feeder._changed:
                assert not feeder._is_due()
                assert (feeder._rest_s() or 0) > 900
        assert script.asked == [False]
        assert feeder.batch(0, 0) == {"step": 0, "lane": 0}  # but at once when somebody waits
    assert script.asked[:2] == [False, True]


def test_who_waits_is_looked_for_every_poll_s() -> None:
    script = Script(nothing, nothing, nothing, grows)
    script.poll_s = 0.01
    with feeding(script) as feeder:
        assert feeder.batch(0, 0) == {"step": 0, "lane": 0}
    assert script.asked == [True] * 4


def test_a_decided_step_is_given_whatever_went_wrong_behind_it() -> None:
    script = Script(grows, fails)
    with feeding(script) as feeder:
        feeder.expect([(step, 0) for step in range(3)])
        with feeder._changed:
            assert feeder._changed.wait_for(lambda: feeder._error is not None, PATIENCE_S)
            feeder._looks += 1  # as if it had just gone wrong
            feeder._error = (feeder._looks + 5, DataError("out of reach"))
        feeder._wait_for(0, lambda: None)


def test_who_waits_again_is_looked_for_again() -> None:
    class Enough(Exception): ...

    def enough() -> None:
        raise Enough

    script = Script(nothing, grows)
    with feeding(script) as feeder:
        feeder.while_waiting = enough
        with pytest.raises(Enough):
            feeder.batch(0, 0)
        with feeder._changed:
            assert feeder._changed.wait_for(lambda: feeder._rests_until_s > 0, PATIENCE_S)
        feeder.while_waiting = lambda: None
        assert feeder.batch(0, 0) == {"step": 0, "lane": 0}
    assert script.asked == [True, True]


def test_what_is_decided_is_opened_ahead_in_order_and_once() -> None:
    def grows_by_four(_: bool) -> bool:
        script.decided += 3
        return True

    script = Script(grows_by_four, nothing, grows_by_four)
    with feeding(script) as feeder:
        feeder.expect([(step, lane) for step in range(6) for lane in range(2)])
        with script.prepares:
            assert script.prepares.wait_for(lambda: len(script.prepared) == 4, PATIENCE_S)
        assert script.prepared == [0, 1, 2, 3]  # a step that cannot be opened ends nothing
        feeder.expect([(step, lane) for step in range(2, 6) for lane in range(2)])
        assert feeder.batch(5, 0) == {"step": 5, "lane": 0}
        with script.prepares:
            assert script.prepares.wait_for(lambda: len(script.prepared) == 6, PATIENCE_S)
    assert script.prepared == [0, 1, 2, 3, 4, 5]
    assert script.asked == [False, False, True]


def test_nothing_is_opened_ahead_while_somebody_waits() -> None:
    script = Script(nothing)
    script.decided = 2
    with feeding(script) as feeder, feeder._changed:
        feeder._expected, feeder._needed = 3, 3
        assert feeder._unprepared() is None
        feeder._needed = 2
        assert feeder._unprepared() == 0
        feeder._prepared = 2
        assert feeder._unprepared() is None
        feeder._expected = feeder._needed = 0
