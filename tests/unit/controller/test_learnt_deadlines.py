"""How long parking and forming may take is learnt from what they took, and never from a deadline that has passed."""

from __future__ import annotations

from elastictrain.controller import events as ev
from tests.unit.controller.scene import Scene


def park_after(scene: Scene, seconds: float) -> None:
    """Worker 1 dies; 0 parks at once; 2 does not: it is killed at the deadline and gone `seconds` after the start."""
    begun_s = scene.now_s
    scene.die(1)
    scene.park(0, applied=1)
    while scene.machine.next_deadline_s() is not None and scene.now_s < begun_s + seconds:
        scene.now_s = min(begun_s + seconds, scene.machine.next_deadline_s() or 0.0)
        scene.send(ev.Tick(scene.now_s))
    scene.now_s = begun_s + seconds
    scene.die(2)


def test_a_parking_that_its_own_deadline_has_ended_teaches_nothing() -> None:
    scene = Scene(max_workers=3).run()
    before_s = scene.machine.core.parking_limit_s()
    park_after(scene, 2 * before_s)
    assert scene.machine.core.parking_limit_s() == before_s


def test_a_slow_parking_teaches_more_patience() -> None:
    scene = Scene(max_workers=3).run()
    before_s = scene.machine.core.parking_limit_s()
    park_after(scene, before_s / 2)
    assert scene.machine.core.parking_limit_s() == 10 * before_s


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
