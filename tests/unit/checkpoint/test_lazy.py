"""Policies, deadlines and errors of saves in the background; the bytes are tests/property/checkpoint/test_lazy.py's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from elastictrain_checkpoint import InvalidPiece, Part, Piece, list_steps
from elastictrain_checkpoint.errors import SaveDropped, SaveFailed, SaveTimeout
from elastictrain_checkpoint.handle import SaveState
from elastictrain_checkpoint.pool import Pool
from tests.unit.checkpoint.gated import MB, Scene


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene(blocks=2, deadline_s=30.0)
    yield made
    made.gate.opened.set()
    made.saver.wait()


def test_what_the_storage_has_taken_is_not_copied(scene: Scene) -> None:
    handle = scene.save(1)
    assert repr(handle) == "SaveHandle(step=1, state=running)"
    assert scene.gate.reached.wait(30)
    scene.saver.before_mutation()
    scene.data += 1
    scene.saver.before_mutation()
    scene.data += 1
    scene.gate.opened.set()
    assert handle.result(30).step == 1
    assert handle.state is SaveState.COMMITTED
    assert scene.stored(1) == {0}
    # A header of 4 KiB before 4 MiB: five units, of which the third is in the writer's hands.
    assert handle.copied_bytes == MB + 4096
    assert scene.saver.pool.size_bytes == 2 * MB
    assert handle.stall_s > 0


def test_who_waits_for_a_save_may_be_called_away(scene: Scene) -> None:
    handle = scene.save(1)

    def called_away() -> None:
        raise KeyError("parked")

    with pytest.raises(KeyError, match="parked"):
        handle.result(30, called_away)
    with pytest.raises(SaveTimeout, match=r"waited 0\.15 s for it$"):
        handle.result(0.15, lambda: None)
    scene.gate.opened.set()
    assert handle.result(30, lambda: None).step == 1


def test_the_pool_is_used_again(scene: Scene) -> None:
    for step in (1, 2, 3):
        scene.gate.reached.clear()
        scene.gate.opened.clear()
        handle = scene.save(step)
        assert scene.gate.reached.wait(30)
        scene.saver.before_mutation()
        scene.data += 1
        scene.gate.opened.set()
        handle.result(30)
        assert scene.stored(step) == {step - 1}
        assert scene.saver.pool.size_bytes == 2 * MB


# --- no more than a fraction is copied ---


def test_the_pool_lends_no_slot_twice() -> None:
    pool = Pool(3 * MB - 5)
    assert pool.size_bytes == 3 * MB
    first = pool.lend(2)
    second = pool.lend(4)
    assert len({*first, *second}) == 6
    assert pool.size_bytes == 6 * MB
    pool.slot(first[0])[:] = 1
    pool.slot(second[0])[:] = 2
    assert set(np.unique(pool.slot(first[0])).tolist()) == {1}
    pool.give_back(first)
    assert sorted(pool.lend(2)) == sorted(first)


@pytest.mark.parametrize("when_busy", ["wait", "skip", "supersede"])
def test_a_save_while_one_runs(scene: Scene, when_busy: Any) -> None:
    first = scene.save(1)
    assert scene.gate.reached.wait(30)
    scene.saver.before_mutation()
    scene.data += 1
    if when_busy == "wait":
        threading.Timer(0.05, scene.gate.opened.set).start()
    second = scene.save(2, when_busy=when_busy)
    scene.gate.opened.set()
    assert (first.wait(30), second.wait(30)) == {
        "wait": (SaveState.COMMITTED, SaveState.COMMITTED),
        "skip": (SaveState.COMMITTED, SaveState.SKIPPED),
        "supersede": (SaveState.SUPERSEDED, SaveState.COMMITTED),
    }[when_busy]
    assert list_steps(scene.store) == {"wait": [1, 2], "skip": [1], "supersede": [2]}[when_busy]
    assert scene.stored(1 if when_busy == "skip" else 2) == {0 if when_busy == "skip" else 1}
    dropped = first if when_busy == "supersede" else second
    if when_busy != "wait":
        with pytest.raises(
            SaveDropped, match=rf"^the save of step {dropped.step} was {dropped.state.value}: another one"
        ):
            dropped.result(0)


def test_a_commit_that_has_begun_is_not_superseded() -> None:
    scene = Scene()
    scene.gate.opened.set()
    committing, go_on = threading.Event(), threading.Event()

    def finish(part: Part) -> str:
        committing.set()
        assert go_on.wait(30)
        return "committed"

    piece = Piece("t", "U8", (4,), 0, b"abcd")
    first = scene.saver.save([piece], step=1, attempt="a", writer="w", finish=finish)
    assert committing.wait(30)
    assert scene.saver.give_up() == []
    threading.Timer(0.05, go_on.set).start()
    second = scene.saver.save([piece], step=2, attempt="a", writer="w", when_busy="supersede")
    assert (first.state, first.result(0)) == (SaveState.COMMITTED, "committed")
    assert isinstance(second.result(30), Part)
    assert second.state is SaveState.WRITTEN


def test_what_is_given_up_leaves_nothing_and_the_state_is_free(scene: Scene) -> None:
    handle = scene.save(1)
    assert scene.gate.reached.wait(30)
    assert scene.saver.give_up() == [handle]
    assert handle.done
    scene.data += 1
    scene.gate.opened.set()
    assert scene.save(2).result(30).step == 2
    assert list_steps(scene.store) == [2]
    assert scene.stored(2) == {1}


def test_what_is_given_up_at_the_last_moment_is_not_committed() -> None:
    scene = Scene(blocks=1000)
    handle = scene.save(1)
    assert scene.gate.reached.wait(30)
    assert scene.saver.give_up() == [handle]
    scene.gate.opened.set()
    assert scene.save(2).result(30).step == 2
    assert list_steps(scene.store) == [2]
    assert handle.state is SaveState.SUPERSEDED


def test_the_pool_gets_back_what_a_save_that_was_given_up_had_copied(scene: Scene) -> None:
    for step in range(1, 5):
        scene.gate.reached.clear()
        scene.gate.opened.clear()
        handle = scene.save(step)
        assert scene.gate.reached.wait(30)
        scene.saver.before_mutation()
        assert handle.copied_bytes == MB + 4096
        scene.saver.give_up()
        scene.gate.opened.set()
        assert scene.saver._thread.wait(30)
    assert scene.saver.pool.size_bytes == 2 * MB


def test_a_wait_ends_at_its_deadline_and_says_how_far_the_save_is() -> None:
    scene = Scene(blocks=2, deadline_s=0.01)
    handle = scene.save(1)
    assert scene.gate.reached.wait(30)
    said = r"^the save of step 1 to memory://\S+ has written 2\.1 of 4\.2 MB in \d+\.\d s \(\d+\.\d MB/s\); "
    said += "waited {} s for it$"
    with pytest.raises(SaveTimeout, match=said.format("0.02")):
        handle.result(0.02)
    for call in (lambda: scene.save(2), scene.saver.wait):
        with pytest.raises(SaveTimeout, match=said.format("0.01")):
            call()
    assert isinstance(SaveTimeout("x"), TimeoutError)
    scene.gate.opened.set()
    assert handle.result(30).step == 1, "it goes on"


def test_an_error_of_the_storage_is_said_once_at_the_next_call(scene: Scene) -> None:
    scene.gate.error = OSError(5, "Input/output error")
    scene.gate.opened.set()
    handle = scene.save(1)
    assert handle._ended.wait(30)
    scene.saver.before_mutation()
    with pytest.raises(
        SaveFailed, match=r"^step 1 was not saved to memory://\S+: OSError: \[Errno 5\] Input/output error$"
    ) as error:
        scene.saver.check()
    assert isinstance(error.value.__cause__, OSError)
    scene.saver.check()
    scene.gate.error = None
    assert scene.save(2).result(30).step == 2
    assert list_steps(scene.store) == [2]


def test_the_outcome_is_known_although_nobody_could_be_told(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """The storage that has failed is also where others would learn of it, and not all storage raises OSErrors."""

    def nobody_hears(error: BaseException | None) -> None:
        raise RuntimeError("SSH session not active")

    scene.gate.error = OSError(5, "Input/output error")
    scene.gate.opened.set()
    handle = scene.save(1, dropped=nobody_hears)
    assert handle.wait(30) is SaveState.FAILED
    scene.gate.error = None
    assert scene.save(2).result(30).step == 2
    assert "SSH session not active" in caplog.text


def test_an_error_that_somebody_has_asked_for_is_not_said_again(scene: Scene) -> None:
    scene.gate.error = OSError(5, "Input/output error")
    scene.gate.opened.set()
    with pytest.raises(SaveFailed):
        scene.save(1).result(30)
    scene.gate.error = None
    scene.save(2).result(30)


def test_pieces_that_cannot_be_written_fail_their_save(scene: Scene) -> None:
    scene.gate.opened.set()
    pieces = [Piece("t", "U8", (4,), 0, b"abcd"), Piece("t", "I8", (4,), 0, b"abcd")]
    handle = scene.saver.save(pieces, step=1, attempt="a", writer="w")
    with pytest.raises(SaveFailed, match=r"InvalidPiece: t: pieces disagree, U8 \[4\] and I8 \[4\]$"):
        handle.result(30)
    scene.saver.before_mutation()
    with pytest.raises(InvalidPiece, match=r"^writer '\.\./w' must be letters"):
        scene.saver.save([], step=1, attempt="a", writer="../w")
    with pytest.raises(ValueError, match=r"^eager names \['other'\], which are not among the pieces$"):
        scene.saver.save([], step=1, attempt="a", writer="w", eager=["other"])


def test_eager_buffers_are_free_at_once_and_their_memory_is_used_again(scene: Scene) -> None:
    for step in (1, 2):
        scene.gate.reached.clear()
        scene.gate.opened.clear()
        handle = scene.save(step, eager=["t"])
        assert scene.gate.reached.wait(30)
        memory = {id(buffer) for buffers in scene.saver._arena.values() for buffer in buffers}
        scene.data += 1
        scene.saver.before_mutation()
        scene.gate.opened.set()
        handle.result(30)
        assert handle.copied_bytes == 0
        assert scene.stored(step) == {step - 1}
        assert {id(buffer) for buffers in scene.saver._arena.values() for buffer in buffers} == memory


def test_nothing_to_save_is_saved_too(scene: Scene) -> None:
    part = scene.saver.save([], step=1, attempt="a", writer="w").result(30)
    assert (part.files, part.tensors) == ([], {})
    scene.saver.before_mutation()
    scene.saver.close()
