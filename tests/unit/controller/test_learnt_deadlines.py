"""How long parking and forming may take is learnt from what they took, and never from a deadline that has passed."""

from __future__ import annotations

import pytest

from elastictrain.controller import events as ev
from elastictrain.controller.core import MOST_PATIENCE
from elastictrain.controller.phases import Phase
from tests.unit.controller.scene import Scene


def test_a_worker_that_never_parks_teaches_nothing() -> None:
    scene = Scene(max_workers=3).run()
    before_s = scene.machine.core.parking_limit_s()
    scene.die(1)
    scene.park(0, applied=1)
    scene.now_s += before_s / 2
    scene.die(2)
    assert scene.machine.phase is Phase.FORMING
    assert scene.machine.core.parking_limit_s() == before_s


def test_a_slow_report_teaches_more_patience_within_bounds() -> None:
    scene = Scene(max_workers=3).run()
    before_s = scene.machine.core.parking_limit_s()
    for part, learnt in ((1 / 10, 2), (1.9, MOST_PATIENCE)):
        scene.die(scene.ledger.members()[-1])
        scene.now_s += before_s * part
        scene.park(*scene.machine.core.waiting(), applied=1)
        assert scene.machine.core.parking_limit_s() == pytest.approx(learnt * before_s)
        scene.seal()


def test_a_restore_from_storage_does_not_teach_what_forming_takes() -> None:
    scene = Scene(checkpoint=True).run()
    before_s = scene.machine.core.forming_limit_s(False)
    scene.send(ev.CheckpointCommitted(1.0, 1, 5, "s3://c/5"))
    scene.die(0, 1)
    scene.park(2, applied=9)
    assert scene.plan.restore is not None
    scene.now_s += before_s  # as long as a forming without storage may take at all
    scene.seal()
    assert scene.machine.core.forming_limit_s(False) <= 2 * before_s
