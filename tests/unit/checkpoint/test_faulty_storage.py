"""Storage that fails now and then, is full, read-only or slow: an error or a checkpoint, never half of one."""

from __future__ import annotations

import errno
import uuid

import pytest

from elastictrain_checkpoint import (
    CorruptData,
    Reader,
    Store,
    discard,
    list_steps,
    newest,
    prune,
    verify,
)
from elastictrain_checkpoint.transfer import copy_checkpoint
from tests.unit.checkpoint.build import make_state, memory_store, save
from tests.unit.checkpoint.faulty import Mood

STATE = make_state()


def pair() -> tuple[Store, Store, Mood]:
    """The same place, seen through moods and as it is."""
    mood, name = Mood(), uuid.uuid4().hex
    return Store(f"faulty://{name}", storage_options={"mood": mood}), Store(f"memory://{name}"), mood


def sound(store: Store) -> list[int]:
    """Steps that are there; each must be whole."""
    steps = list_steps(store)
    for step in steps:
        found = newest(store)
        assert found is not None
        assert verify(store, found) == [], step
    return steps


def calls_of_a_save() -> int:
    store, _, mood = pair()
    save(store, STATE, step=2)
    return len(mood.calls)


def try_to_save(store: Store, attempt: str) -> bool:
    """Whether it said that it succeeded."""
    try:
        save(store, STATE, step=2, attempt=attempt)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("every", range(1, calls_of_a_save() + 1))
def test_every_nth_call_fails(every: int) -> None:
    """For each n, so each call of a save is once the first to fail: what is there is whole, a later try succeeds."""
    store, plain, mood = pair()
    save(plain, STATE, step=1)
    mood.every = every
    succeeded = try_to_save(store, "a1")
    there = sound(plain)
    assert there == [1, 2] if succeeded else there in ([1], [1, 2]), "a lost answer may hide a commit, nothing more"
    mood.every = 0
    if there == [1]:
        assert try_to_save(store, "a2")
    assert sound(store) == [1, 2]


@pytest.mark.parametrize("every", [3, 5, 7])
def test_reads_that_fail_are_errors_and_not_damage(every: int) -> None:
    store, plain, mood = pair()
    manifest = save(plain, STATE, step=1)
    mood.every = every
    failures = 0
    for name, (_, _, raw) in STATE.items():
        try:
            assert Reader(store, manifest).read(name).tobytes() == raw
        except CorruptData:  # pragma: no cover
            pytest.fail("storage that fails is not damaged data")
        except OSError:
            failures += 1
    assert failures


@pytest.mark.parametrize("every", [1, 2, 3, 5, 8, 13, 21, 34, 50])
def test_a_copy_that_failed_is_gone_on_with(every: int) -> None:
    source = memory_store()
    manifest = save(source, make_state(seed=4), step=1, pack_bytes=5000)
    store, plain, mood = pair()
    mood.every = every
    with pytest.raises(OSError, match="failed"):
        copy_checkpoint(source, manifest, store)
    whole = [path for path in manifest.paths if plain.size(path) is not None]
    assert newest(plain) is None or verify(plain, manifest) == []
    mood.every = 0
    done = copy_checkpoint(source, manifest, store)
    assert done.present == tuple(whole), "what was whole is not sent again"
    found = newest(plain)
    assert found is not None
    assert found.raw == manifest.raw
    assert verify(plain, found) == []


@pytest.mark.parametrize("room_bytes", [0, 100, 5000, 100_000, 135_000])
def test_a_full_store(room_bytes: int) -> None:
    store, plain, mood = pair()
    first = save(plain, make_state(seed=1), step=1)
    mood.room_bytes = room_bytes
    with pytest.raises(OSError, match="No space left") as caught:
        save(store, STATE, step=2)
    assert caught.value.errno == errno.ENOSPC
    assert sound(plain) == [1]
    mood.room_bytes = None
    done = prune(store, keep=1, lease_s=0, now_s=4e9)
    assert done.kept == [1]
    assert "step-00000002" not in plain.list() or plain.list("step-00000002") == []
    save(store, STATE, step=2)
    assert sound(plain) == [1, 2]
    assert newest(plain) is not None
    assert verify(plain, first) == []


def test_a_read_only_store() -> None:
    store, plain, mood = pair()
    manifest = save(plain, STATE, step=1)
    mood.read_only = True
    for call in (
        lambda: save(store, STATE, step=2),
        lambda: prune(store, keep=1, lease_s=0, now_s=4e9, current=1) and discard(store, 1),
        lambda: copy_checkpoint(plain, manifest, Store("faulty://elsewhere", storage_options={"mood": mood})),
    ):
        with pytest.raises(PermissionError):
            call()
    assert sound(plain) == [1]
    assert Reader(store, manifest).read("model/half").tobytes() == STATE["model/half"][2]
    assert verify(store, manifest) == []


def test_a_slow_store_gives_the_same() -> None:
    store, plain, mood = pair()
    mood.delay_s = 0.002
    manifest = save(store, STATE, step=1)
    assert len(mood.calls) > 5
    assert verify(store, manifest) == []
    assert sound(plain) == [1]
