"""What counts as shared by peers where some are not there, or where half of them have changed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elastictrain.stragglers.alarms import COMPUTE, LINK
from elastictrain.stragglers.peers import in_common
from tests.unit.stragglers.test_detector import Change, run, slower

NAN = math.nan


def shared(*changes: float) -> list[float]:
    """The same for all causes."""
    found = in_common(np.tile(np.array(changes), (4, 1)), [np.arange(len(changes))])
    assert (found[:, :1] == found).all()
    return [float(row[0]) for row in found]


@pytest.mark.parametrize(
    "changes",
    [(0.4, 0.01, NAN), (0.01, NAN, NAN, 0.4), (0.4, 0.01), (0.4, 0.01, 0.5, -0.02), (-0.4, -0.5, 0.01, 0.02),
     (0.4, 0.01, -0.3)],
)  # fmt: skip
def test_half_of_the_peers_or_fewer_share_nothing(changes: tuple[float, ...]) -> None:
    assert shared(*changes)[COMPUTE] == pytest.approx(0.0, abs=0.021)


@pytest.mark.parametrize("changes", [(0.4, 0.41), (0.4, 0.42, NAN), (0.4, 0.39, 0.42, 0.41, 0.4, 0.0)])
def test_what_more_than_half_share_is_shared(changes: tuple[float, ...]) -> None:
    assert shared(*changes)[COMPUTE] == pytest.approx(0.4, abs=0.02)


def test_who_is_alone_has_only_its_own_history() -> None:
    """Its transfer may as well be the network's as its own."""
    found = shared(0.4, NAN)
    assert found[COMPUTE] == 0.0
    assert found[LINK] == 0.4


def silent(workers: tuple[int, ...], change: Change, first: int = 15) -> Change:
    def both(step: int, columns: dict[str, list[float]]) -> None:
        change(step, columns)
        for worker in workers if step >= first else ():
            columns["compute_s"][worker] = NAN

    return both


@pytest.mark.parametrize(("workers", "out"), [(2, (0,)), (3, (0,)), (3, (0, 2)), (4, (0, 2)), (4, (0, 2, 3))])
def test_who_says_nonsense_keeps_nobody_else_from_being_judged(workers: int, out: tuple[int, ...]) -> None:
    alarms, detector = run(silent(out, slower(1, 1.3)), workers=workers)
    assert [(alarm.worker, alarm.kind) for alarm in alarms] == [(1, "slow")]
    assert alarms[0].factor == pytest.approx(1.3, rel=0.03)
    assert detector.ignored[list(out)].min() > 40


def test_of_four_two_become_slow_at_once() -> None:
    def both(step: int, columns: dict[str, list[float]]) -> None:
        slower(1, 1.4)(step, columns)
        slower(2, 1.3)(step, columns)

    alarms, _ = run(both, workers=4)
    assert sorted((alarm.worker, alarm.kind) for alarm in alarms) == [(1, "slow"), (2, "slow")]
