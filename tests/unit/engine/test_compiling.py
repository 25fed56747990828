"""A shape that is new in the middle of a run is compiled then: the step is excused, and the pulse says what goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from elastictrain.engine.compiling import COMPILER
from elastictrain.engine.signals import StepClock
from elastictrain.pulse import Pulse
from elastictrain.signs import Activity
from elastictrain.stragglers.signals import FLAG_COMPILE


@pytest.fixture
def pulse() -> Iterator[Pulse]:
    """Of this thread, amid a step."""
    pulse = Pulse.create_or_mute(None, 0)[0]
    pulse.enter(Activity.COMPUTE)
    with COMPILER.shown_in(pulse):
        yield pulse


def step(clock: StepClock) -> int:
    """The flags of a step in which a function may be compiled."""
    return clock.signal(1, {"compute_s": 1.0}, {}, 0, 0.0, stores=False, evaluates=False).flags


def test_a_new_shape_is_compiled_in_the_middle_of_a_run(pulse: Pulse) -> None:
    seen = []

    def look(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.append(pulse.activity)
        return module

    double = torch.compile(lambda values: values * 2, backend=look, dynamic=False)
    clock = StepClock()
    flags = []
    for rows in (3, 3, 3, 5, 5):
        clock.begin()
        double(torch.ones(rows))
        assert pulse.activity is Activity.COMPUTE
        flags.append(step(clock))
    assert flags == [FLAG_COMPILE, 0, 0, FLAG_COMPILE, 0]
    assert seen == [Activity.COMPILE, Activity.COMPILE]


def test_what_another_thread_compiles_is_not_this_one_s_work_where_several_train(pulse: Pulse) -> None:
    elsewhere = Pulse.create_or_mute(None, 1)[0]
    elsewhere.enter(Activity.COMPUTE)
    seen = []

    def train() -> None:
        with COMPILER.shown_in(elsewhere):
            COMPILER._begins(None)
            seen.append((pulse.activity, elsewhere.activity))
            COMPILER._ends(None)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [(Activity.COMPUTE, Activity.COMPILE)]
    assert elsewhere.activity is Activity.COMPUTE


def test_what_backward_compiles_in_a_thread_of_its_own_is_the_only_trainer_s(pulse: Pulse) -> None:
    seen = []

    def backward() -> None:
        COMPILER._begins(None)
        seen.append(pulse.activity)
        COMPILER._ends(None)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert (seen, pulse.activity) == ([Activity.COMPILE], Activity.COMPUTE)
