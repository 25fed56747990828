"""What a worker measures, and what an injected slowness does."""

from __future__ import annotations

import gc

import pytest

from elastictrain.engine import signals
from elastictrain.engine.probes import Probes
from elastictrain.engine.signals import COLLECTOR, StepClock
from elastictrain.faults import slow
from elastictrain.stragglers.signals import (
    FLAG_CHECKPOINT,
    FLAG_COLLECTION,
    FLAG_COMPILE,
    FLAG_EVALUATION,
    Signal,
)


class Time:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(signals.time, "perf_counter", lambda: self.now_s)


@pytest.fixture
def time(monkeypatch) -> Time:
    return Time(monkeypatch)


def signal(clock: StepClock, seconds=None, waits=None, **how) -> Signal:
    facts = {"stores": False, "evaluates": False} | how
    return clock.signal(4, seconds or {"compute_s": 2.0}, waits or {}, 10, 20.0, **facts)


def test_phases_become_a_signal(time):
    clock = StepClock()
    clock.begin()
    time.now_s += 3.0
    clock.arrive()
    time.now_s += 1.0
    clock.arrive()  # of several exchanges the first counts
    seconds = {"compute_s": 2.5, "exchange_s": 0.75, "mirror_s": 0.25}
    said = signal(clock, seconds, {"read": 0.25, "decode": 0.25})
    assert (said.compute_s, said.data_s, said.arrive_s, said.exchange_s) == (2.0, 0.5, 3.0, 1.0)
    assert said.mirror_s == 0.25
    assert (said.lanes, said.tokens, said.squares) == (4, 10.0, 20.0)
    time.now_s += 5.0
    clock.voted()
    clock.end({"vote_s": 0.5, "gather_s": 0.125, "step_s": 9.0})
    time.now_s += 2.0
    clock.begin()
    clock.arrive()
    said = signal(clock)
    assert said.arrive_s == 2.0
    assert (said.vote_s, said.gather_s, said.step_s) == (0.5, 0.125, 9.0)


def test_flags_say_what_excuses_a_step(time):
    clock = StepClock()
    assert signal(clock).flags == FLAG_COMPILE
    assert signal(clock).flags == 0
    assert signal(clock, stores=True, evaluates=True).flags == FLAG_CHECKPOINT | FLAG_EVALUATION
    clock.changed()
    assert signal(clock).flags == FLAG_COMPILE


def test_garbage_collection_is_heard(time):
    clock = StepClock()
    signal(clock)
    COLLECTOR._heard("start", {})
    time.now_s += 1.0
    COLLECTOR._heard("stop", {})
    said = signal(clock)
    assert (said.collected_s, said.flags) == (1.0, FLAG_COLLECTION)
    assert signal(clock).flags == 0
    StepClock()
    assert gc.callbacks.count(COLLECTOR._heard) == 1


def test_a_slowness_has_a_beginning_and_an_end():
    probes = Probes(1, [slow(1, 5, factor=3.0, steps=2), slow(1, 6, factor=2.0), slow(1, 1, what="data"), slow(2, 1)])
    assert [probes.drags(step, "compute", 0.5) for step in (4, 5, 6, 7, 99)] == [0.0, 1.0, 2.5, 0.5, 0.5]
    assert probes.drags(3, "data", 1.0) == 1.0
    assert probes.drags(3, "link", 1.0) == 0.0


def test_a_slow_link_takes_some_times_as_long_or_a_delay_longer():
    probes = Probes(1, [slow(1, 5, factor=3.0, steps=2, what="link"), slow(1, 6, what="link", delay_s=0.25)])
    assert [probes.drags(step, "link", 0.5) for step in (4, 5, 6, 7)] == [0.0, 1.0, 1.25, 0.25]
    assert probes.drags(6, "compute", 0.5) == 0.0
