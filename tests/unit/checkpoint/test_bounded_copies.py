"""How much of a state a save may copy, and what an update waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from elastictrain_checkpoint import Piece, Reader, commit, lazy, list_steps, load, running
from elastictrain_checkpoint.errors import SaveFailed
from elastictrain_checkpoint.handle import SaveState
from elastictrain_checkpoint.lazy import LazySaver
from tests.unit.checkpoint.gated import MB, Scene


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene(blocks=2, deadline_s=30.0)
    yield made
    made.gate.opened.set()
    made.saver.wait()


class Update(threading.Thread):
    """A change of the state, announced, in a thread of its own: it may have to wait."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene, self.gate_was_open = scene, False
        self.start()

    def run(self) -> None:
        self.scene.saver.before_mutation()
        self.gate_was_open = self.scene.gate.opened.is_set()
        self.scene.data += 1


@pytest.fixture
def capped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scene]]:
    """Scenes in which even a small state is not copied whole: of 4 MiB, 1 MiB."""
    monkeypatch.setattr(running, "MIN_COPY_BYTES", MB)
    made: list[Scene] = []

    def make(**settings: Any) -> Scene:
        made.append(Scene(blocks=2, **{"deadline_s": 30.0, **settings}))
        return made[-1]

    yield make
    for scene in made:
        scene.gate.opened.set()
        scene.saver._jobs[-1].handle.wait()


@pytest.mark.parametrize(("max_copy", "slots"), [(0.0, 0), (0.1, 1), (0.25, 1), (0.5, 2)])
def test_an_update_waits_for_what_may_not_be_copied(capped: Any, max_copy: float, slots: int) -> None:
    # Six units: five of 1 MiB, of which the third is in the writer's hands, and a small one.
    scene = capped(max_copy=max_copy)
    scene.data = np.zeros(5 * MB, dtype=np.uint8)
    for step in (1, 2):
        scene.gate.reached.clear()
        scene.gate.opened.clear()
        handle = scene.save(step)
        assert scene.gate.reached.wait(30)
        update = Update(scene)
        update.join(0.05)
        assert update.is_alive()
        scene.gate.opened.set()
        update.join(30)
        assert update.gate_was_open
        assert handle.result(30).step == step
        assert scene.stored(step) == {step - 1}
        assert handle.copied_bytes == (0, 4096, MB + 4096)[slots], "the last units, which the writer comes to last"
        assert scene.saver.pool.size_bytes == slots * MB
        assert handle.stall_s > 0


def test_an_update_goes_on_when_the_writer_has_read_the_rest_whatever_storage_does(capped: Any) -> None:
    scene = capped(max_copy=0.25, deadline_s=300.0)
    scene.gate.free, scene.gate.stops = 3, {2: threading.Event()}
    handle = scene.save(1)
    assert scene.gate.reached.wait(30)
    update = Update(scene)
    update.join(0.05)
    assert update.is_alive()
    scene.gate.stops[2].set()  # the writer reads one more unit, the last that is not copied; storage does not take it
    update.join(30)
    assert not update.is_alive()
    assert not update.gate_was_open
    scene.gate.opened.set()
    assert handle.result(30).step == 1
    assert scene.stored(1) == {0}


@pytest.mark.parametrize("tensors", [1, 12])
def test_a_fraction_of_one_never_waits(capped: Any, tensors: int) -> None:
    """Although a state in many packs has more units than its bytes would fill slots."""
    scene = capped(max_copy=1.0, pack_bytes=8192, deadline_s=5.0)
    scene.gate.free = 0
    state = [np.zeros(5 * MB // tensors, dtype=np.uint8) for _ in range(tensors)]
    pieces = [Piece(f"t{number}", "U8", one.shape, 0, one.data) for number, one in enumerate(state)]
    handle = scene.saver.save(pieces, step=1, attempt="a", writer="w")
    assert scene.gate.reached.wait(30)
    scene.saver.before_mutation()
    for one in state:
        one += 1
    scene.gate.opened.set()
    commit(scene.store, step=1, attempt="a", generation=1, parts=[handle.result(30)])
    reader = Reader(scene.store, load(scene.store, 1))
    assert {int(reader.read(piece.name).max()) for piece in pieces} == {0}


def test_one_call_may_copy_more_than_the_saver(capped: Any) -> None:
    scene = capped(max_copy=0.0)
    handle = scene.save(1)
    assert scene.gate.reached.wait(30)
    scene.saver.before_mutation(max_copy=1.0)
    scene.data += 1
    scene.gate.opened.set()
    assert handle.result(30).step == 1
    assert scene.stored(1) == {0}


def test_a_small_state_is_copied_whole(scene: Scene) -> None:
    assert lazy.copy_bytes(10, 0.01) == lazy.MIN_COPY_BYTES
    assert lazy.copy_bytes(10, 0.0) == 0
    assert lazy.copy_bytes(1 << 40, 0.25) == 1 << 38
    assert lazy.copy_bytes(1 << 40, 1.0) is None
    handle = scene.save(1)
    assert scene.gate.reached.wait(30)
    scene.saver.before_mutation()
    assert handle.copied_bytes == MB + 4096
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"^max_copy={wrong} is not a fraction of the state, from 0 to 1$"):
            LazySaver(scene.store, max_copy=wrong)


def test_an_update_does_not_wait_for_ever_and_the_save_says_why(capped: Any) -> None:
    scene = capped(max_copy=0.25, deadline_s=0.05)
    handle = scene.save(1)
    assert scene.gate.reached.wait(30)
    scene.saver.before_mutation()
    scene.data += 1
    assert handle.state is SaveState.FAILED
    said = r"SaveTimeout: the save of step 1 to \S+ has written 2\.1 of 4\.2 MB in .*; the state was to change, and no "
    said += r"more than 0\.25 of it may be copied \(max_copy\): waited 0\.05 s until the rest is written$"
    with pytest.raises(SaveFailed, match=said):
        scene.saver.check()
    scene.gate.opened.set()
    assert scene.save(2).result(30).step == 2
    assert list_steps(scene.store) == [2], "what was given up was not committed"
    assert scene.stored(2) == {1}


@pytest.mark.parametrize("how", ["given up", "broken"])
def test_an_update_waits_no_longer_when_the_save_has_ended(capped: Any, how: str) -> None:
    scene = capped(max_copy=0.25, deadline_s=300.0)
    handle = scene.save(1)
    assert scene.gate.reached.wait(30)
    update = Update(scene)
    update.join(0.05)
    assert update.is_alive()
    if how == "given up":
        assert scene.saver.give_up() == [handle]
    else:
        scene.gate.error = OSError(5, "Input/output error")
        scene.gate.opened.set()
    update.join(15)  # the gate gives up after 30 s
    assert not update.is_alive()
    assert update.gate_was_open == (how == "broken")
    assert handle.wait(30) is (SaveState.SUPERSEDED if how == "given up" else SaveState.FAILED)
