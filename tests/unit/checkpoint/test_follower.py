"""A further store that is kept in step: what is missing is read off the stores, whoever served before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastictrain_checkpoint import (
    EverySteps,
    Follower,
    Newest,
    Policy,
    Standing,
    Store,
    catalogue,
    discard,
    list_steps,
    load,
    pin,
    retain,
    verify,
)
from elastictrain_checkpoint import follower as module
from elastictrain_checkpoint.posix import PosixBackend
from tests.unit.checkpoint.build import flip, make_state, save

STATE = make_state({"model/a": ("F32", (300, 1024)), "model/b": ("U8", (1_500_000,))})
HEADER = 4096


class Mood(PosixBackend):
    """A disk that fails, or waits in the middle of a file, while it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.error: Exception | None = None
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.created: list[str] = []

    def create(self, path: str, blocks: Iterable[memoryview]) -> int:
        if self.error is not None:
            raise self.error
        self.created.append(path)

        def held() -> Iterator[memoryview]:
            for block in blocks:
                yield block
                self.reached.set()
                assert self.go_on.wait(60)

        return super().create(path, held())


@pytest.fixture
def near(tmp_path: Path) -> Store:
    return Store(tmp_path / "near")


@pytest.fixture
def mood(tmp_path: Path) -> Mood:
    return Mood(tmp_path / "far")


@pytest.fixture
def far(mood: Mood, tmp_path: Path) -> Store:
    return Store(tmp_path / "far", backend=mood)


@pytest.fixture
def follow(near: Store, far: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Follower]]:
    monkeypatch.setattr(module, "pause_s", lambda failures: 0.01 * bool(failures))
    made: list[Follower] = []

    def make(keep: Policy | None = None, **rest: Any) -> Follower:
        made.append(Follower(near, far, keep or Newest(9), **rest))
        return made[-1]

    yield make
    for follower in made:
        follower.rest()


def idle(follower: Follower) -> Standing:
    assert follower.wait(60)
    return follower.standing


def test_what_is_missing_and_what_comes_is_copied_while_it_serves(near, far, follow) -> None:
    for step in (2, 4):
        save(near, STATE, step=step)
    follower = follow()
    assert follower.wait(0), "it does not serve"
    follower.look()
    assert list_steps(far) == []
    follower.serve()
    follower.serve()
    assert idle(follower) == Standing(4, (), "")
    save(near, STATE, step=6)
    follower.look()
    assert idle(follower) == Standing(6, (), "")
    assert [load(far, step).raw for step in (2, 4, 6)] == [load(near, step).raw for step in (2, 4, 6)]
    assert follower.holds(4)
    assert not follower.holds(8)
    follower.rest()
    save(near, STATE, step=8)
    follower.look()
    assert follower.wait(0)
    assert list_steps(far) == [2, 4, 6]


def test_each_store_has_a_retention_of_its_own(near, far, follow, monkeypatch) -> None:
    """What was just copied was checked block by block: it is not read back before others are removed."""
    monkeypatch.setattr(retain, "verify", lambda *_: pytest.fail("a copy was read back"))
    gone: list[int] = []
    follower = follow(Newest(1) | EverySteps(4), removed=gone.extend)
    follower.serve()
    for step in (2, 4, 6, 8, 10):
        save(near, STATE, step=step)
        follower.look()
        assert idle(follower).copied == step
    assert list_steps(far) == [4, 8, 10]
    assert gone == [2, 6]
    assert list_steps(near) == [2, 4, 6, 8, 10]
    pin(far, 10)
    save(near, STATE, step=11)
    follower.look()
    idle(follower)
    assert list_steps(far) == [4, 8, 10, 11]


def test_copies_are_apart_but_for_the_last(near, far, follow) -> None:
    follower = follow(apart_steps=4)
    follower.serve()
    for step in (2, 4, 6, 7):
        save(near, STATE, step=step)
        follower.look()
        idle(follower)
    assert list_steps(far) == [2, 6]
    follower.look(final=7)
    assert idle(follower) == Standing(7, (), "")
    assert list_steps(far) == [2, 6, 7]


def test_a_store_that_fails_is_said_and_tried_again_and_meanwhile_nothing_may_go(
    near, far, follow, mood, monkeypatch
) -> None:
    monkeypatch.setattr(module, "pause_s", lambda failures: 600.0 * bool(failures))  # not while we look
    mood.error = RuntimeError("whatever a file system raises")
    for step in (2, 4):
        save(near, STATE, step=step)
    follower = follow(Newest(1))
    follower.serve()
    assert idle(follower) == Standing(None, (4,), "RuntimeError: whatever a file system raises")
    assert follower.needed(catalogue(near), 0.0) == {4}, "2 would be removed there at once"
    save(near, STATE, step=6)
    assert follower.needed(catalogue(near), 0.0) == {6}
    mood.error = None
    follower.hurry()
    assert idle(follower) == Standing(6, (), "")
    assert follower.needed(catalogue(near), 0.0) == set()


def test_what_has_failed_is_tried_again_after_a_pause(near, far, follow, mood) -> None:
    mood.error = OSError(5, "Input/output error")
    save(near, STATE, step=2)
    follower = follow()
    follower.serve()
    assert idle(follower).error
    mood.error = None
    assert mood.reached.wait(60), "nobody has asked for it"
    assert idle(follower) == Standing(2, (), "")


def test_what_waits_is_known_although_the_store_cannot_even_be_looked_into(near, follow, mood, monkeypatch) -> None:
    for step in (2, 4):
        save(near, STATE, step=step)
    monkeypatch.setattr(mood, "list", lambda _: mood.nobody_is_there())
    follower = follow(Newest(1))
    follower.serve()
    standing = idle(follower)
    assert (standing.copied, standing.waiting) == (None, (4,))
    assert standing.error.startswith("AttributeError: ")


def test_nothing_may_go_before_anybody_has_looked(near, follow) -> None:
    for step in (2, 4):
        save(near, STATE, step=step)
    assert follow().needed(catalogue(near), 0.0) == {2, 4}


def test_who_is_told_to_rest_stops_in_the_middle_of_a_file_and_whoever_follows_goes_on(near, far, follow, mood) -> None:
    save(near, STATE, step=2)
    mood.go_on.clear()
    first, second = follow(), follow()
    first.serve()
    assert mood.reached.wait(60)
    assert first.needed(catalogue(near), 0.0) == {2}
    first.rest()
    second.serve()  # while the other one is still in its call
    mood.go_on.set()
    while list_steps(far) != [2]:
        second.hurry()
        assert second.wait(60)
    assert verify(far, load(far, 2)) == []
    assert first.standing.copied is None, "it was over before"


def test_what_is_being_copied_stays_although_a_newer_one_has_come(near, follow, mood) -> None:
    save(near, STATE, step=2)
    mood.go_on.clear()
    follower = follow(Newest(1))
    follower.serve()
    assert mood.reached.wait(60)
    save(near, STATE, step=4)
    assert follower.needed(catalogue(near), 0.0) == {2, 4}
    mood.go_on.set()
    follower.look()
    idle(follower)
    assert follower.needed(catalogue(near), 0.0) == set()


def test_who_is_told_to_rest_publishes_nothing_any_more(near, far, follow, mood) -> None:
    save(near, STATE, step=2)
    mood.go_on.clear()
    follower = follow()
    follower.serve()
    assert mood.reached.wait(60)
    (thread,) = [one for one in threading.enumerate() if one.name == "elastictrain-copies"]
    follower.rest()
    mood.go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    assert list_steps(far) == []


def test_damage_is_not_copied_and_does_not_hold_up_the_others(near, far, follow) -> None:
    for step in (2, 4):
        manifest = save(near, STATE, step=step)
    flip(near, manifest.paths[0], HEADER + 10)
    follower = follow()
    follower.serve()
    said = f"step 4: damaged in {near.url}, and whole in no other store; it is not copied"
    assert idle(follower) == Standing(2, (4,), said)
    assert list_steps(far) == [2]
    assert follower.needed(catalogue(near), 0.0) == set(), "nobody waits for it"


def test_damage_is_mended_from_a_third_store_and_then_copied(near, far, follow, tmp_path: Path) -> None:
    third = Store(tmp_path / "third")
    manifest = save(near, STATE, step=4)
    for path in [*manifest.paths, manifest.path]:
        third.create(path, [memoryview(near.read_all(path))])
    flip(near, manifest.paths[0], HEADER + 10)
    follower = follow(others=[third])
    follower.serve()
    assert idle(follower) == Standing(4, (), "")
    assert verify(near, load(near, 4)) == verify(far, load(far, 4)) == []


def test_it_mends_what_a_reader_has_found_damaged(near, far, follow) -> None:
    manifest = save(near, STATE, step=4)
    follower = follow()
    follower.serve()
    idle(follower)
    flip(near, manifest.paths[0], HEADER + 10)
    follower.mend(4)
    assert idle(follower) == Standing(4, (), "")
    assert verify(near, load(near, 4)) == []


def test_what_is_mended_stays_and_what_fails_is_mended_later(near, far, follow, monkeypatch) -> None:
    manifest = save(near, STATE, step=4)
    follower = follow()
    follower.serve()
    idle(follower)
    flip(near, manifest.paths[0], HEADER + 10)
    heal, seen = module.heal, []

    def fails_once(store: Any, step: int, others: Any) -> Any:
        seen.append(follower.needed([], 0.0))
        if len(seen) == 1:
            raise OSError(5, "Input/output error")
        return heal(store, step, others)

    monkeypatch.setattr(module, "heal", fails_once)
    follower.mend(4)
    assert idle(follower) == Standing(4, (), ""), "it holds nothing up"
    assert verify(near, load(near, 4)) != []
    follower.look()
    idle(follower)
    assert verify(near, load(near, 4)) == []
    follower.look()
    idle(follower)
    assert seen == [{4}, {4}], "while it is mended it may not go; then it is done"


def test_a_step_that_retention_takes_meanwhile_is_no_failure(near, far, follow, monkeypatch) -> None:
    for step in (2, 4):
        save(near, STATE, step=step)
    copy = module.copy_checkpoint

    def removed_under_it(source: Any, manifest: Any, target: Any, **rest: Any) -> Any:
        if manifest.step == 4:
            discard(near, 4)
        return copy(source, manifest, target, **rest)

    monkeypatch.setattr(module, "copy_checkpoint", removed_under_it)
    follower = follow()
    follower.serve()
    assert idle(follower) == Standing(2, (), "")


def test_what_is_not_to_be_trusted_goes_there_too_before_anything_else(near, far, follow, mood) -> None:
    for step in (2, 4, 6):
        save(near, STATE, step=step)
    follower = follow()
    follower.serve()
    idle(follower)
    for step in (4, 6):
        discard(near, step)
    follower.go_back(2, 3)
    idle(follower)
    assert list_steps(far) == [2], "before there is anything new to copy"
    save(near, STATE, step=4, generation=3, attempt="new")
    follower.look()
    assert idle(follower) == Standing(4, (), "")
    assert list_steps(far) == [2, 4]
    assert load(far, 4).generation == 3
    follower.go_back(2, 3)
    follower.forget()
    assert list_steps(far) == [2, 4], "what this generation has stored stays"


def test_what_is_forgotten_while_it_is_being_copied_does_not_come_back(near, far, follow, mood) -> None:
    for step in (2, 4):
        save(near, STATE, step=step)
    publish, reached, go_on = mood.publish, threading.Event(), threading.Event()

    def held(path: str, data: bytes) -> None:
        reached.set()
        assert go_on.wait(60)
        publish(path, data)

    mood.publish = held
    follower = follow()
    follower.serve()
    assert reached.wait(60)
    discard(near, 4)
    follower.go_back(2, 3)
    follower.forget()
    go_on.set()
    idle(follower)
    assert list_steps(far) == [2]


def test_what_a_run_that_went_back_left_there_goes_with_the_next_copy(near, far, follow) -> None:
    for step in (2, 4, 6):
        save(near, STATE, step=step)
    follower = follow()
    follower.serve()
    idle(follower)
    for step in (4, 6):
        discard(near, step)
    save(near, STATE, step=3, generation=2, attempt="new")
    follower.look()
    assert idle(follower) == Standing(3, (), "")
    assert list_steps(far) == [2, 3]


def test_a_store_that_does_not_answer_is_said(near, far, mood, follow) -> None:
    now_s = [0.0]
    save(near, STATE, step=2)
    mood.go_on.clear()
    follower = follow(clock=lambda: now_s[0])
    follower.serve()
    assert mood.reached.wait(60)
    assert follower.standing.error == ""
    now_s[0] = module.SILENT_S + 1
    assert follower.standing.error == f"{far.url} has not answered for 60 s"
    mood.go_on.set()
    assert idle(follower) == Standing(2, (), "")
    now_s[0] += 1000
    assert follower.standing.error == "", "there is nothing to do"
