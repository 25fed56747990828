"""The advice on slow and cheap writing costs no more time than there is, and learns which way is the faster one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain_checkpoint.pace import AHEAD_BYTES, MARGIN, PROBE_BYTES, PROBE_SHARE, REMEMBERED, Course, Pace

MB = 1 << 20
PROBE = (AHEAD_BYTES + PROBE_BYTES) // MB + 1
"""Units (of 1 MiB) after which the rate of a way is known."""
seconds = st.floats(0.001, 100.0)
rates = st.floats(1.0, 10_000.0)


class Device:
    """Takes a unit in so many seconds, either way."""

    def __init__(self, direct: float, cached: float) -> None:
        self.seconds = {True: 1 / direct, False: 1 / cached}

    def save(self, course: Course, units: int, hurries: bool = False) -> tuple[list[bool], float]:
        """What was told before each unit, and how long all of them took."""
        told, at = [], 0.0
        for unit in range(units):
            told.append(
                course.past_cache(
                    read_bytes=unit * MB, live_bytes=(units - unit) * MB, now_s=course.begun_s + at, hurries=hurries
                )
            )
            at += self.seconds[told[-1]]
        return told, at


def test_nobody_waits_for_what_is_not_live() -> None:
    assert Course(0.0).past_cache(read_bytes=0, live_bytes=0, now_s=9.0)


def test_without_experience_there_is_no_time() -> None:
    assert not Course(0.0).past_cache(read_bytes=100 * MB, live_bytes=1, now_s=0.0)


@given(st.lists(seconds, min_size=1, max_size=9), seconds, st.integers(1, 1 << 40), rates)
def test_the_shortest_window_counts(windows: list[float], since: float, live: int, rate: float) -> None:
    def told(windows_s: tuple[float, ...]) -> bool:
        return Course(5.0, windows_s, None, rate).past_cache(read_bytes=0, live_bytes=live, now_s=5.0 + since)

    assert told(tuple(windows)) == told((min(windows),))
    assert not told(tuple(windows)) or since < MARGIN * min(windows) + 1e-9


@given(window=seconds, units=st.integers(1, 400), slow=rates, fast=rates)
def test_it_ends_in_time_or_nearly_as_soon_as_the_fast_way(window: float, units: int, slow: float, fast: float) -> None:
    """Rates in units (of 1 MiB) a second; the way past the cache may also be the faster one."""
    told, at = Device(slow, fast).save(Course(0.0, (window,)), units)
    if units / slow < MARGIN * window * (1 - 1e-9):
        assert all(told), "there is time for all of it"
    probe_s = min(PROBE / slow, MARGIN * window + 1 / slow)
    assert at <= max(MARGIN * window, probe_s + units / fast) + 1 / slow + 1e-6


def test_the_time_that_is_gone_counts() -> None:
    course = Course(0.0, (1.0 / MARGIN,), cached=1000.0 * MB, direct=100.0 * MB)
    assert course.past_cache(read_bytes=0, live_bytes=60 * MB, now_s=0.3), "0.6 s of the 0.7 that are left"
    assert not course.past_cache(read_bytes=0, live_bytes=60 * MB, now_s=0.5), "0.6 s of the 0.5 that are left"


@given(window=seconds, units=st.integers(PROBE, 400), slow=rates)
def test_a_disk_that_was_too_slow_is_tried_anew_for_a_part_of_the_time(window: float, units: int, slow: float) -> None:
    """The cache takes no time."""
    told, _ = Device(slow, 1e9).save(Course(0.0, (window,), direct=1.0), units)
    tried = told.index(False) if False in told else units
    assert 1 <= tried <= max(PROBE_SHARE * MARGIN * window * slow, 0) + 2 or units / slow < MARGIN * window * 1.001


def test_who_is_late_takes_the_way_that_is_known_to_be_the_faster_one() -> None:
    """The window is too short for either way, and all units past the cache are asked in a second save."""
    for direct, cached in ((150.0, 100.0), (100.0, 150.0)):
        pace, device = Pace(), Device(direct, cached)
        pace.windows_s.append(1.0)
        first, _ = device.save(pace.begin(0.0), 400)
        assert {True, False} <= set(first), "both are tried"
        assert first[-1] == (direct > cached)
        second, _ = device.save(pace.begin(100.0), 400)
        assert second[3 * PROBE :] == [direct > cached] * (400 - 3 * PROBE)
        hurried, _ = device.save(pace.begin(200.0), 400, hurries=True)
        assert hurried == [direct > cached] * 400


def test_nothing_that_fills_what_lies_ahead_of_the_device_is_measured() -> None:
    course = Course(0.0, (100.0,))
    ahead = AHEAD_BYTES // MB
    for unit in range(ahead + PROBE_BYTES // MB + 1):
        assert course.rate(True) is None
        at = 0.0 if unit <= ahead else (unit - ahead) * 0.5  # the first ones take no time
        course.past_cache(read_bytes=unit * MB, live_bytes=500 * MB, now_s=at)
    assert course.rate(True) == 2 * MB
    assert course.rate(False) is None


def test_a_disk_that_hesitates_for_a_moment_is_not_given_up() -> None:
    """Known as fast, it is slow for the first bytes that count; without that experience the cache takes the rest."""
    for known, expected in ((1000.0 * MB, True), (None, False)):
        course, at, told = Course(0.0, (1.0,), 200.0 * MB, known), 0.0, []
        for unit in range(200):
            told.append(course.past_cache(read_bytes=unit * MB, live_bytes=(200 - unit) * MB, now_s=at))
            at += 0.01 if 8 <= unit < 24 else 0.001
        assert all(told) == expected


def test_a_way_that_nobody_has_taken_for_long_is_not_known_any_more() -> None:
    pace, device = Pace(), Device(200.0, 100.0)
    device.save(pace.begin(0.0), 100)  # nothing is known yet: through the cache
    pace.windows_s.append(1000.0)
    known = []
    for _ in range(REMEMBERED + 1):
        course = pace.begin(0.0)
        known.append(course.rate(False))
        device.save(course, 100)
    assert known == [pytest.approx(100.0 * MB)] * REMEMBERED + [None]
    assert pace.begin(0.0).rate(True) == pytest.approx(200.0 * MB)
