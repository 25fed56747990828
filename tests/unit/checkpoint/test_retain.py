"""Retention: manifest first, never the newest verified one, garbage only after its lease."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from elastictrain_checkpoint import (
    CorruptData,
    InvalidPiece,
    Store,
    commit,
    discard,
    list_steps,
    load,
    newest,
    pin,
    prune,
    verify,
    withdraw,
)
from tests.unit.checkpoint.build import flip, make_state, memory_store, save, sign, write_parts

STATE = make_state({"t": ("F32", (100,))})
TWO_PACKS = make_state({"t": ("F32", (10_000,))})


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = Store(tmp_path / "ckpt") if request.param == "file" else memory_store()
    for step in (10, 20, 30, 40):
        save(place, STATE, (), step=step)
    return place


def folders(store: Store) -> list[str]:
    return [name for name in store.list() if name.startswith("step")]


def test_the_newest_stay_and_the_rest_goes_with_its_folders(store: Store) -> None:
    result = prune(store, 2)
    assert (result.kept, result.removed, result.garbage, result.unsound) == ([30, 40], [10, 20], [], [])
    assert folders(store) == ["step-00000030", "step-00000040"]
    assert prune(store, 2).removed == []


def test_nothing_is_removed_while_none_of_the_kept_is_verified(store: Store) -> None:
    for step in (30, 40):
        flip(store, f"step-{step:08d}/a1/w0000-00.safetensors", 4100)
    result = prune(store, 2)
    assert (result.kept, result.removed) == ([10, 20, 30, 40], [])
    assert [one.step for one in result.unsound] == [30, 40]
    assert prune(store, 3).removed == [10]  # 20 is sound, and newer than what goes


def test_one_verified_among_the_kept_is_enough(store: Store) -> None:
    flip(store, "step-00000040/a1/w0000-00.safetensors", 4100)
    assert prune(store, 2).removed == [10, 20]


def test_what_is_newer_than_all_that_are_whole_stays(store: Store) -> None:
    """The newest is damaged and an old one pinned: what lies between is what one would go back to."""
    pin(store, 20)
    flip(store, "step-00000040/a1/w0000-00.safetensors", 4100)
    result = prune(store, 1)
    assert (result.kept, result.removed) == ([20, 30, 40], [10])
    assert [(one.step, one.why) for one in result.unsound] == [(40, "its bytes are damaged")]
    assert prune(store, 1, current=20).removed == []  # of the same generation: it has happened


def test_what_the_caller_has_verified_is_not_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_reading(self: Store, path: str, start: int, out: memoryview) -> int:
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(Store, "read_into", no_reading)
    assert prune(store, 2, verified={40}).removed == [10, 20]
    with pytest.raises(AssertionError, match=r"step-00000040/a1/w0000-00\.safetensors is read"):
        prune(store, 1, verified={30})


def test_unsound_steps_are_left_for_a_person(store: Store) -> None:
    flip(store, "step-00000020/MANIFEST.json", 50)
    result = prune(store, 1, lease_s=0, now_s=time.time() + 10)
    assert (result.kept, result.removed) == ([40], [10, 30])
    assert [one.step for one in result.unsound] == [20]
    assert folders(store) == ["step-00000020", "step-00000040"]
    assert store.list("step-00000020") == ["MANIFEST.json", "a1"]


def lose_packs(store: Store, step: int, most: int) -> None:
    for path in load(store, step).own_paths[:most]:
        store.remove(path)


def test_a_manifest_that_came_when_its_packs_were_cleared_away_is_garbage(store: Store) -> None:
    save(store, TWO_PACKS, step=50, attempt="late")
    lose_packs(store, 50, 2)
    with pytest.raises(CorruptData, match="none of the packs that were written for it is there"):
        load(store, 50)
    assert newest(store).step == 40  # type: ignore[union-attr]
    by_hand = prune(store, 5, lease_s=0, now_s=time.time() + 10)
    assert [one.step for one in by_hand.unsound] == [50], "somebody may have moved the packs"
    result = prune(store, 5, abandoned=lambda attempt: attempt == "late")
    assert (result.unsound, result.removed) == ([], [])
    assert "step-00000050/MANIFEST.json" in result.garbage
    assert list_steps(store) == [10, 20, 30, 40]


def test_a_manifest_with_a_part_of_its_packs_was_damaged_and_is_left_for_a_person(store: Store) -> None:
    save(store, TWO_PACKS, step=50, attempt="late")
    lose_packs(store, 50, 1)
    result = prune(store, 5, abandoned=lambda attempt: attempt == "late")
    assert [one.step for one in result.unsound] == [50]
    assert "none of the packs" not in result.unsound[0].why


def test_only_the_manifest_of_that_attempt_is_withdrawn(store: Store) -> None:
    assert not withdraw(store, 40, "another")
    assert not withdraw(store, 45, "a1"), "there is none"
    assert not withdraw(store, 40, "a1", if_torn=True), "it is whole"
    assert list_steps(store) == [10, 20, 30, 40]
    assert withdraw(store, 40, "a1")
    lose_packs(store, 30, 1)
    assert withdraw(store, 30, "a1", if_torn=True)
    assert list_steps(store) == [10, 20]


def test_garbage_goes_after_its_lease(store: Store) -> None:
    write_parts(store, STATE, step=40, attempt="lost")
    write_parts(store, STATE, step=50, attempt="being-written")
    store.put("step-00000040/.MANIFEST.json.0123", b"draft")
    store.put("step-00000060/a/.draft", b"half")
    now = time.time()
    assert prune(store, 4, lease_s=60, now_s=now).garbage == []
    result = prune(store, 4, lease_s=60, now_s=now + 120)
    assert sorted(result.garbage) == [
        "step-00000040/.MANIFEST.json.0123",
        "step-00000040/lost",
        "step-00000050/being-written",
        "step-00000060/a",
    ]
    assert result.kept == list_steps(store) == [10, 20, 30, 40]
    assert folders(store) == [f"step-000000{step}" for step in (10, 20, 30, 40)]


def test_what_is_not_ours_is_not_touched(store: Store) -> None:
    for path in ("notes.txt", "step-1/x", "steps/a", "step-000000010/a/x"):
        store.put(path, b"mine")
    prune(store, 1, lease_s=0, now_s=time.time() + 1e6)
    assert all(store.read_all(path) == b"mine" for path in ("notes.txt", "step-1/x", "steps/a", "step-000000010/a/x"))


def test_steps_that_a_kept_one_uses_stay(store: Store) -> None:
    told = json.loads(store.read_all("step-00000020/MANIFEST.json"))
    for file in told["files"]:
        file["path"] = "../step-00000020/" + file["path"]
    store.put("step-00000050/MANIFEST.json", sign({**told, "step": 50, "base": [20]}))
    result = prune(store, 1, lease_s=0, now_s=time.time() + 1e6)
    assert (result.kept, result.removed) == ([20, 50], [10, 30, 40])
    found = newest(store)
    assert found is not None
    assert found.step == 50


# --- what has not happened in the history that goes on ---


@pytest.fixture
def forked(store: Store) -> Store:
    """Steps 10 to 40 of generation 1, then 25 of generation 5: a run went back to 20 and goes on from there."""
    save(store, STATE, (), step=25, generation=5)
    return store


def test_later_steps_of_lower_generations_go_with_the_new_one(forked: Store) -> None:
    result = prune(forked, 10, current=25)
    assert (result.kept, result.removed) == ([10, 20, 25], [30, 40])
    assert folders(forked) == ["step-00000010", "step-00000020", "step-00000025"]


def test_a_step_that_is_being_written_anew_keeps_what_is_there_of_it(forked: Store) -> None:
    """The run that went back is at step 30 again before retention has come to the old step 30."""
    parts = write_parts(forked, STATE, (), step=30, attempt="anew")
    assert prune(forked, 10, current=25).removed == [30, 40]
    assert forked.list("step-00000030") == ["anew"]
    assert not verify(forked, commit(forked, step=30, attempt="anew", generation=5, parts=parts))
    assert prune(forked, 10, current=30).kept == [10, 20, 25, 30]


def test_they_do_not_count_among_those_that_are_kept(forked: Store) -> None:
    result = prune(forked, 2, current=25)
    assert (result.kept, result.removed) == ([20, 25], [10, 30, 40])


def test_later_steps_of_the_same_or_a_higher_generation_stay(forked: Store) -> None:
    save(forked, STATE, (), step=50, generation=6)
    save(forked, STATE, (), step=60, generation=5)
    result = prune(forked, 10, current=25)
    assert (result.kept, result.removed) == ([10, 20, 25, 50, 60], [30, 40])


def test_earlier_steps_stay_whatever_their_generation(store: Store) -> None:
    save(store, STATE, (), step=15, generation=9)
    assert prune(store, 10, current=40).removed == []
    save(store, STATE, (), step=50, generation=10)
    assert prune(store, 10, current=50).removed == []


@pytest.mark.parametrize("current", [None, 26, 99])
def test_without_a_current_step_that_is_there_nothing_has_been_given_up(forked: Store, current: int | None) -> None:
    assert prune(forked, 10, current=current).removed == []


def test_a_current_step_that_is_not_sound_removes_nothing(forked: Store) -> None:
    flip(forked, "step-00000025/MANIFEST.json", 50)
    result = prune(forked, 10, current=25)
    assert result.removed == []
    assert [one.step for one in result.unsound] == [25]


def test_the_last_one_that_is_whole_is_never_given_up(forked: Store) -> None:
    """Of those that would be kept not one can be verified: then what was given up is better than nothing."""
    for step in (10, 20):
        flip(forked, f"step-{step:08d}/a1/w0000-00.safetensors", 4100)
    flip(forked, "step-00000025/a1/w0000-00.safetensors", 4100)
    result = prune(forked, 10, current=25)
    assert (result.kept, result.removed) == ([10, 20, 25, 30, 40], [])
    assert prune(forked, 10, current=25, verified={25}).removed == [30, 40]


def test_given_up_steps_that_a_kept_one_uses_stay(forked: Store) -> None:
    told = json.loads(forked.read_all("step-00000040/MANIFEST.json"))
    for file in told["files"]:
        file["path"] = "../step-00000040/" + file["path"]
    told |= {"step": 26, "generation": 5, "base": [40]}
    forked.put("step-00000026/MANIFEST.json", sign(told))
    result = prune(forked, 10, current=26)
    assert (result.kept, result.removed) == ([10, 20, 25, 26, 40], [30])


def test_at_least_one_is_kept(store: Store) -> None:
    with pytest.raises(InvalidPiece, match="keep=0: at least one checkpoint is always kept"):
        prune(store, 0)


def test_discard_may_keep_the_packs_of_the_attempt_that_is_to_take_the_place(store: Store) -> None:
    parts = write_parts(store, STATE, (0.5,), step=40, attempt="new")
    write_parts(store, STATE, step=40, attempt="lost")
    store.put("step-00000040/.MANIFEST.json.0123", b"draft")
    discard(store, 40, keep_attempt="new")
    assert store.list("step-00000040") == ["new"]
    assert list_steps(store) == [10, 20, 30]
    manifest = commit(store, step=40, attempt="new", generation=0, parts=parts)
    assert verify(store, manifest) == []
    discard(store, 30, keep_attempt="new")
    assert store.list("step-00000030") == []
    with pytest.raises(InvalidPiece, match=r"keep_attempt '\.\.' must be letters"):
        discard(store, 40, keep_attempt="..")
    assert list_steps(store) == [10, 20, 40]


def test_discard_takes_the_manifest_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr(Store, "remove", lambda self, path: removed.append(path))
    for keep in (None, "new"):
        removed.clear()
        discard(store, 40, keep_attempt=keep)
        assert removed[0] == "step-00000040/MANIFEST.json"
        assert "step-00000040/a1/w0000-00.safetensors" in removed
