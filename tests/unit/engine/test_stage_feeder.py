"""Batches asked for by the run's steps come from the order of their stage; so does what is ready, or not needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from elastictrain.engine.host import StageFeeder
from elastictrain.protocol import Stage


class Notes:
    """A feeder that writes down what it is asked."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def ready(self, step: int, lane: int) -> bool:
        self.said.append(("ready", step, lane))
        return lane == 1

    def forget(self, places: Iterable[tuple[int, int]]) -> None:
        self.said.append(("forget", list(places)))


def test_of_which_stage_a_batch_lies_ready_and_which_is_not_needed() -> None:
    """The second stage begins after step 10, in an order of its own."""
    first, second = Notes(), Notes()
    stages = (Stage(0, 0, 4, 2), Stage(1, 10, 4, 2))
    feeder = StageFeeder(stages, lambda stage: first, second)  # type: ignore[arg-type,return-value]
    assert feeder.ready(12, 1)
    assert not feeder.ready(12, 2)
    feeder.forget(12, [1, 3])
    assert second.said == [("ready", 1, 1), ("ready", 1, 2), ("forget", [(1, 1), (1, 3)])]
    feeder.forget(9, [0])
    assert first.said == [("forget", [(8, 0)])]
