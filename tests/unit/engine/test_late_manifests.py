"""A manifest that comes when its generation is over: where it is not to be trusted, and where its packs are gone."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from elastictrain.engine.committing import Committer, Open
from elastictrain.engine.saver import Saver
from elastictrain.engine.stored import Stored
from elastictrain.errors import ClusterError, CorruptCheckpoint
from elastictrain_checkpoint import Store, list_steps, newest, verify
from elastictrain_checkpoint.posix import PosixBackend
from tests.unit.engine.test_committing import STAY, Gate, begin_commit, left_open, packs_in
from tests.unit.engine.test_saving import store_of, trained
from tests.unit.engine.worlds import NetRecipe, make_job


@pytest.fixture(scope="module")
def model() -> Any:
    return trained(make_job(NetRecipe(), lanes=2))


Left = tuple[Any, Saver, Gate]


@pytest.fixture
def left(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> Left:
    """A generation has ended while its worker creates the manifest of step 2, which the gate holds."""
    settings = store_of(tmp_path)
    saver = Saver(settings)
    return settings, saver, left_open(saver, model, [], monkeypatch)[0]


def answer(saver: Saver, gate: Gate) -> None:
    [work] = saver._committer._left
    gate.go_on.set()
    assert work.ended.wait(60)


def test_what_comes_after_it_was_distrusted_goes_again(left: Left, model: Any) -> None:
    settings, saver, gate = left
    saver.distrust(1, 2)
    saver.discard_after(1, 2)
    assert list_steps(Store(settings.path)) == [], "it is not there yet"
    answer(saver, gate)
    assert gate.calls == 1, "the manifest was created"
    assert list_steps(Store(settings.path)) == []
    begin_commit(saver, model, 2, 2, [])
    assert saver.wait_for_commit(STAY) == [2]
    assert newest(Store(settings.path)).generation == 2  # type: ignore[union-attr]


def test_a_worker_that_does_not_publish_removes_what_it_has_made_before_it_heard(left: Left) -> None:
    settings, saver, gate = left
    Saver(settings).discard_after(1, 2)
    answer(saver, gate)
    assert list_steps(Store(settings.path)) == [2]
    saver.distrust(1, 2)
    assert list_steps(Store(settings.path)) == []


@pytest.mark.parametrize(("good", "generation"), [(2, 2), (1, 1)])
def test_what_is_trusted_stays(left: Left, good: int, generation: int) -> None:
    settings, saver, gate = left
    saver.distrust(good, generation)
    answer(saver, gate)
    saver.distrust(good, generation)
    assert verify(Store(settings.path), newest(Store(settings.path))) == []  # type: ignore[arg-type]


def test_each_doubt_counts(left: Left) -> None:
    settings, saver, gate = left
    saver.distrust(1, 2)
    saver.distrust(7, 3)
    answer(saver, gate)
    assert list_steps(Store(settings.path)) == []


def test_a_call_is_open_until_what_came_of_it_is_gone(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever publishes now commits nothing into that folder meanwhile: it would be what is removed."""
    settings, saver, gate = left
    saver.distrust(1, 2)
    removing = Gate(monkeypatch, "remove")
    [work] = saver._committer._left
    gate.go_on.set()
    assert removing.reached.wait(60)
    assert list_steps(Store(settings.path)) == [2]
    assert saver.open == Open(2, 1)
    removing.go_on.set()
    assert work.ended.wait(60)
    assert saver.open is None
    assert list_steps(Store(settings.path)) == []


def test_what_is_doubted_while_it_is_seen_to_is_seen_to_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A doubt that comes between the look at the doubts and the end of the call is lost on nobody."""
    committer, calls = Committer(Store(tmp_path)), []
    hung, go_on, gate = threading.Event(), threading.Event(), Gate(monkeypatch, "publish")

    def work(store: Store) -> bool:
        store.publish("step-00000002/MANIFEST.json", b"")
        return True

    def answered() -> None:
        calls.append("seen to")
        hung.set()
        assert go_on.wait(60)

    committer.begin(2, 1, work, answered)
    assert gate.reached.wait(60)
    committer.give_up()
    gate.go_on.set()
    assert hung.wait(60)
    committer.see_to_the_answered()  # returns at once
    assert calls == ["seen to"]
    [left] = committer._left
    go_on.set()
    assert left.ended.wait(60)
    assert calls == ["seen to", "seen to"]


def test_that_it_cannot_be_removed_ends_the_run_with_its_words(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    _, saver, gate = left
    saver.distrust(1, 2)

    def fails(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(PosixBackend, "remove", fails)
    answer(saver, gate)
    with pytest.raises(ClusterError, match="Read-only file system"):
        saver.committed()


# --- packs that were cleared away ---


def out_of_reach(settings: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Saver, Gate, Any]:
    """A worker creates the manifest of step 2, which the gate holds; another one has gone on without it, and has
    cleared away what it had written.
    """
    saver, other = Saver(settings), Saver(settings)
    with monkeypatch.context() as patch:
        gate = Gate(patch, "publish")
        begin_commit(saver, model, 2, 1, [])
        assert gate.reached.wait(60)
    begin_commit(other, model, 3, 2, [])
    assert other.wait_for_commit(STAY) == [3]
    assert packs_in(settings) == ["step-00000003/g000002"]
    return saver, gate, other


def test_who_has_left_a_call_removes_the_manifest_without_packs(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = store_of(tmp_path)
    saver, gate, _ = out_of_reach(settings, model, monkeypatch)
    saver.give_up()
    answer(saver, gate)
    assert list_steps(Store(settings.path)) == [3]


def test_a_manifest_without_packs_is_never_chosen_and_goes_with_the_next_commit(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has created it does not know that its generation is over."""
    settings, store = store_of(tmp_path), Store(store_of(tmp_path).path)
    saver, gate, other = out_of_reach(settings, model, monkeypatch)
    shutil.rmtree(Path(settings.path) / "step-00000003")  # there is nothing else to choose
    gate.go_on.set()
    saver.wait_for_commit(STAY)
    assert list_steps(store) == [2]
    skipped: list[Any] = []
    assert newest(store, skipped) is None
    assert "none of the packs that were written for it is there" in skipped[0].why
    begin_commit(other, model, 4, 2, [])
    assert other.wait_for_commit(STAY) == [4]
    assert list_steps(store) == [4]
    assert not list((Path(settings.path) / "step-00000002").iterdir())


def test_a_resume_does_not_ask_a_person_about_a_manifest_without_packs(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the newest by its step, and was left behind by those who went on without the worker that created it."""
    settings = store_of(tmp_path)
    saver, other = Saver(settings), Saver(settings)
    with monkeypatch.context() as patch:
        gate = Gate(patch, "publish")
        begin_commit(saver, model, 4, 1, [])
        assert gate.reached.wait(60)
    begin_commit(other, model, 3, 2, [])
    assert other.wait_for_commit(STAY) == [3]
    gate.go_on.set()
    saver.wait_for_commit(STAY)
    assert list_steps(Store(settings.path)) == [3, 4]
    manifest, _ = Stored.of(settings).choose(None)
    assert manifest.step == 3
    pack = next(Path(settings.path).glob("step-00000003/*/*.safetensors"))
    pack.unlink()
    with pytest.raises(CorruptCheckpoint, match="checkpoint step 3 is damaged"):
        Stored.of(settings).choose(None)
