"""The advice on slow and cheap writing costs no more time than there is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastictrain_checkpoint.pace import MARGIN, PROBE_BYTES, has_time

MB = 1 << 20
seconds = st.floats(0.001, 100.0)
rates = st.floats(1.0, 10_000.0)


def test_nobody_waits_for_what_is_not_live() -> None:
    assert has_time(read_bytes=0, live_bytes=0, since_s=9.0, windows_s=[])


def test_without_experience_there_is_no_time() -> None:
    assert not has_time(read_bytes=100 * MB, live_bytes=1, since_s=0.0, windows_s=[])


@given(st.lists(seconds, min_size=1, max_size=9), seconds, st.integers(0, 1 << 40), st.integers(1, 1 << 40))
def test_the_shortest_window_counts(windows: list[float], since: float, read: int, live: int) -> None:
    facts = {"read_bytes": read, "live_bytes": live, "since_s": since}
    assert has_time(**facts, windows_s=windows) == has_time(**facts, windows_s=[min(windows)])
    assert not has_time(**facts, windows_s=windows) or since < MARGIN * min(windows)


@given(window=seconds, units=st.integers(1, 400), slow=rates, fast=rates)
def test_it_ends_in_time_or_nearly_as_soon_as_the_fast_way(window: float, units: int, slow: float, fast: float) -> None:
    """Rates in units (of 1 MiB) a second; the slow way may also be the faster one."""
    at, slow_units = 0.0, 0
    for unit in range(units):
        live = (units - unit) * MB
        is_slow = has_time(read_bytes=unit * MB, live_bytes=live, since_s=at, windows_s=[window])
        slow_units += is_slow
        at += 1 / (slow if is_slow else fast)
    if units / slow < MARGIN * window:
        assert slow_units == units, "there is time for all of it"
    probe_s = min(PROBE_BYTES / MB / slow, MARGIN * window + 1 / slow)
    assert at <= max(MARGIN * window, probe_s + units / fast) + 1 / slow + 1e-6
