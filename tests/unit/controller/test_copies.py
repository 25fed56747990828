"""How the further places of checkpoints are: what is newer there is said, and the first failure, and its end."""

from __future__ import annotations

from typing import Any

from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller import view
from tests.unit.controller.scene import Scene, every


def stand(step: int, *waiting: int, error: str = "", generation: int = 1, path: str = "s3://far") -> ev.CopiesStand:
    return ev.CopiesStand(2.0, generation, 0, path, step, waiting, error)


def said(scene: Scene, event: ev.Event) -> list[tuple[str, dict[str, Any]]]:
    return [(one.kind, dict(one.data)) for one in every(cm.Announce, scene.send(event))]


def test_a_newer_copy_is_said_once() -> None:
    scene = Scene(checkpoint=True).run()
    assert said(scene, stand(0, 4)) == []
    assert view(scene.machine)["copies"] == {"s3://far": {"step": 0, "waiting": [4], "error": ""}}
    copied = ("checkpoint_copied", {"step": 4, "path": "s3://far", "waiting": [6]})
    assert said(scene, stand(4, 6)) == [copied]
    assert said(scene, stand(4, 6)) == [], "said again in the next generation"
    assert said(scene, stand(4)) == []
    assert said(scene, stand(2)) == [], "a run that has gone back"
    assert view(scene.machine)["copies"] == {"s3://far": {"step": 2, "waiting": [], "error": ""}}


def test_a_place_that_fails_is_said_when_it_begins_and_when_it_ends() -> None:
    scene = Scene(checkpoint=True).run()
    failed = ("copy_failed", {"path": "s3://far", "error": "it is full", "waiting": [4]})
    assert said(scene, stand(2, 4, error="it is full")) == [
        ("checkpoint_copied", {"step": 2, "path": "s3://far", "waiting": [4]}),
        failed,
    ]
    assert said(scene, stand(2, 4, 6, error="it is still full")) == []
    assert view(scene.machine)["copies"]["s3://far"]["error"] == "it is still full"
    assert said(scene, stand(6)) == [
        ("checkpoint_copied", {"step": 6, "path": "s3://far", "waiting": []}),
        ("copy_works", {"path": "s3://far", "waiting": []}),
    ]
    assert said(scene, stand(2, 4, error="it is full", path="/other")) != []
    assert set(view(scene.machine)["copies"]) == {"s3://far", "/other"}


def test_what_is_said_of_another_generation_or_before_the_seal_changes_nothing() -> None:
    scene = Scene(checkpoint=True, replace=False).run()
    assert scene.send(stand(4, generation=2)) == []
    scene.die(0)
    scene.park(1, 2, applied=7)
    assert scene.send(stand(4, generation=1)) == []
    assert scene.send(stand(4, generation=2)) == [], "not sealed yet"
    assert view(scene.machine)["copies"] == {}
    scene.seal()
    assert said(scene, stand(4, generation=2)) != []
