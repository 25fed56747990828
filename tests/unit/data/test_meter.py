"""The meter counts every second once, for the innermost stage; waiting is told from its clocks."""

from __future__ import annotations

import io
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.meter import OTHER, STAGES, Meter, TimedFile, timed, waited_for


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_inner_stage_stops_the_outer_ones_clock() -> None:
    clock = Clock()
    meter = Meter(clock)
    with meter.stage("pack"):
        clock.now += 1
        with meter.stage("decode"):
            clock.now += 2
            with timed("store"):
                clock.now += 4
                assert meter.read() == dict.fromkeys(STAGES, 0.0) | {"pack": 1.0, "decode": 2.0, "store": 4.0}
            clock.now += 8
        clock.now += 16
    clock.now += 32
    assert meter.read() == dict.fromkeys(STAGES, 0.0) | {"pack": 17.0, "decode": 10.0, "store": 4.0}


def test_an_error_leaves_its_stage() -> None:
    clock = Clock()
    meter = Meter(clock)
    with pytest.raises(KeyError), meter.stage("pack"), meter.stage("decode"):
        raise KeyError
    clock.now += 5
    assert sum(meter.read().values()) == 0


def test_threads_have_stages_of_their_own() -> None:
    clock = Clock()
    meter = Meter(clock)
    entered, leave = threading.Event(), threading.Event()

    def copy() -> None:
        with meter.stage("copy"):
            entered.set()
            assert leave.wait(30)

    thread = threading.Thread(target=copy)
    with meter.stage("pack"):
        thread.start()
        assert entered.wait(30)
        clock.now += 3
    clock.now += 1
    leave.set()
    thread.join(30)
    assert (meter.read()["pack"], meter.read()["copy"]) == (3.0, 4.0)


def test_without_a_meter_nothing_is_counted_and_nothing_breaks() -> None:
    with timed("store"):
        pass
    clock = Clock()
    meter = Meter(clock)

    class Slow(io.BytesIO):
        def read(self, *size: int | None) -> bytes:
            clock.now += 2
            return super().read(*size)

    with TimedFile(Slow(b"abcd")) as file:
        assert file.read(1) == b"a"
        assert file.tell() == 1
        with meter.stage("decode"):
            assert file.read() == b"bcd"
    assert file.closed
    assert meter.read()["store"] == 2.0


@given(
    st.dictionaries(st.sampled_from(STAGES), st.floats(0, 100), max_size=5),
    st.dictionaries(st.sampled_from(STAGES), st.floats(0, 100), max_size=5),
    st.floats(0, 50),
)
def test_the_parts_of_a_wait_sum_up_to_it(before: dict[str, float], more: dict[str, float], waited_s: float) -> None:
    after = {stage: before.get(stage, 0.0) + more.get(stage, 0.0) for stage in STAGES}
    parts = waited_for(before, after, waited_s)
    assert sum(parts.values()) == pytest.approx(waited_s)
    assert all(seconds > 0 for seconds in parts.values())
    assert set(parts) <= {stage for stage in more if after[stage] > before.get(stage, 0.0)} | {OTHER}
