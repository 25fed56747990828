"""When a new process may begin to import: not while others recover, and not much later either."""

from __future__ import annotations

from elastictrain_actors.starts import AFTER_RECOVERY_S, Starts


def at_ten() -> tuple[Starts, list[float]]:
    now_s = [10.0]
    return Starts(lambda: now_s[0]), now_s


def test_when_nobody_recovers_a_process_starts_at_once() -> None:
    starts, _ = at_ten()
    starts.want(3, ("node1",))
    starts.want(4, ())
    assert starts.due() == {3: ("node1",), 4: ()}
    assert starts.due() == {}, "once"


def test_it_waits_for_the_seal_of_those_that_recover() -> None:
    starts, now_s = at_ten()
    starts.parking()
    starts.want(3, ())
    now_s[0] += 0.9 * AFTER_RECOVERY_S
    assert starts.due() == {}
    starts.sealed()
    assert starts.due() == {3: ()}


def test_a_recovery_that_takes_long_may_need_the_process() -> None:
    starts, now_s = at_ten()
    starts.parking()
    starts.want(3, ())
    now_s[0] += AFTER_RECOVERY_S
    assert starts.due() == {3: ()}


def test_every_parking_is_waited_for_anew() -> None:
    starts, now_s = at_ten()
    starts.parking()
    starts.want(3, ())
    now_s[0] += 0.9 * AFTER_RECOVERY_S
    starts.parking()  # somebody died while the others formed
    now_s[0] += 0.9 * AFTER_RECOVERY_S
    assert starts.due() == {}


def test_who_is_needed_no_more_is_not_started() -> None:
    starts, _ = at_ten()
    starts.parking()
    starts.want(3, ())
    starts.want(4, ())
    starts.drop(3)
    starts.drop(9)
    starts.sealed()
    assert starts.due() == {4: ()}


def test_it_is_known_whether_the_others_step() -> None:
    starts, _ = at_ten()
    assert not starts.others_step, "at the beginning of a run everybody waits for the imports"
    starts.sealed()
    assert starts.others_step
    starts.parking()
    assert not starts.others_step
