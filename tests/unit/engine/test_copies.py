"""The further places of a run: what the first one keeps for them, what nobody has any more, where a run starts."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from elastictrain.engine import copies as copies_module
from elastictrain.engine.copies import Copies
from elastictrain.engine.saver import Saver
from elastictrain.engine.saving import find_checkpoint, open_checkpoint, open_stores
from elastictrain.engine.stored import Stored, older_offer, refuse_checkpoints
from elastictrain.errors import ClusterError, ConfigError, CorruptCheckpoint
from elastictrain.job import Checkpoint, Copy
from elastictrain_checkpoint import Standing, Store, copy_step, discard, list_steps, load
from elastictrain_checkpoint import follower as follower_module
from elastictrain_checkpoint.posix import PosixBackend
from tests.unit.engine.test_saving import pieces_of, trained
from tests.unit.engine.worlds import NetRecipe, committed, make_job


@pytest.fixture(scope="module")
def model() -> Any:
    return trained(make_job(NetRecipe(), lanes=2))


def settings_of(path: Path, *places: dict[str, Any], **rest: Any) -> Checkpoint:
    copies = [Copy(**({"path": str(path / "far")} | place)) for place in (places or ({},))]
    return Checkpoint(path=str(path / "near"), copy_to=copies, **rest)


@pytest.fixture
def made() -> Iterator[list[Copies]]:
    """To be put to rest."""
    found: list[Copies] = []
    yield found
    for copies in found:
        copies.rest()


def store_in(saver: Saver, model: Any, step: int, generation: int = 1, **rest: Any) -> None:
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    share = saver.begin(owned, step=step, generation=generation, worker=0).share()
    facts: dict[str, Any] = {"step": step, "generation": generation, "tree": {"step": step}, "info": {}}
    committed(saver, [share], aliases=model.space.aliases, **facts, **rest)


def wait(copies: Copies) -> list[Standing]:
    assert copies.wait(lambda: None, 60)
    return [standing for _, standing in copies.news()]


def steps_in(settings: Checkpoint) -> list[list[int]]:
    return [list_steps(store) for store in open_stores(settings)]


def test_a_job_with_one_place_has_nothing_to_copy(tmp_path: Path) -> None:
    settings = Checkpoint(path=str(tmp_path / "near"))
    copies = Copies(settings, Store(settings.path))
    copies.serve()
    copies.look()
    assert not copies
    assert copies.needed() == set()
    assert copies.lost([1, 2]) == [1, 2]
    assert list(copies.news()) == []
    assert copies.wait(lambda: None, 0)


def test_the_first_place_keeps_what_is_not_copied_yet(tmp_path: Path, model: Any, made: Any) -> None:
    settings = settings_of(tmp_path, {"keep": 2}, keep=1)
    saver = Saver(settings)
    made.append(saver.copies)
    for step in (1, 2, 3, 4):
        store_in(saver, model, step)
    assert steps_in(settings) == [[3, 4], []], "two are wanted there"
    saver.copies.serve()
    assert wait(saver.copies) == [Standing(4, (), "")]
    store_in(saver, model, 5)
    assert wait(saver.copies) == [Standing(5, (), "")]
    assert steps_in(settings) == [[5], [4, 5]]


def test_without_room_on_the_disk_the_oldest_that_waits_is_let_go(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, {"keep": 9}, keep=1)
    saver = Saver(settings)
    for step in (1, 2, 3):
        store_in(saver, model, step)
    size = load(Store(settings.path), 3).size_bytes
    for free_bytes, kept in ((2 * size, {1, 2, 3}), (2 * size - 1, {2, 3}), (0, {3})):
        monkeypatch.setattr(PosixBackend, "free_bytes", lambda _, free_bytes=free_bytes: free_bytes)
        assert saver.copies.needed() == kept
    store_in(saver, model, 4)
    assert steps_in(settings)[0] == [3, 4]


def test_what_another_place_has_is_not_gone(tmp_path: Path, model: Any, made: Any) -> None:
    settings = settings_of(tmp_path, {"keep": 2}, {"path": str(tmp_path / "third"), "keep": 1}, keep=1)
    saver = Saver(settings)
    made.append(saver.copies)
    saver.copies.serve()
    removed: list[int] = []
    for step in (1, 2, 3, 4):
        [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
        share = saver.begin(owned, step=step, generation=1, worker=0).share()
        told: dict[str, Any] = {"committed": print, "removed": removed.extend, "refused": print, "check": lambda: None}
        facts: dict[str, Any] = {"step": step, "generation": 1, "tree": {}, "info": {}, "aliases": model.space.aliases}
        saver.begin_commit([share], **told, **facts)
        saver.wait_for_commit(lambda: None)
        wait(saver.copies)
    assert steps_in(settings) == [[4], [3, 4], [4]]
    assert sorted(removed + saver.copies.gone()) == [1, 2], "3 is still in the second place"
    assert saver.copies.gone() == []


def test_the_last_step_of_a_job_is_copied_however_near_it_is(tmp_path: Path, model: Any, made: Any) -> None:
    settings = settings_of(tmp_path, {"every_steps": 3})
    saver = Saver(settings)
    made.append(saver.copies)
    saver.copies.serve()
    for step in (1, 2, 4, 5):
        store_in(saver, model, step, final=step == 5)
        wait(saver.copies)
    assert steps_in(settings)[1] == [1, 4, 5]


def test_news_are_said_once_and_again_by_whoever_serves_next(tmp_path: Path, model: Any, made: Any) -> None:
    settings = settings_of(tmp_path)
    saver = Saver(settings)
    made.append(saver.copies)
    store_in(saver, model, 1)
    saver.copies.serve()
    assert wait(saver.copies) == [Standing(1, (), "")]
    assert list(saver.copies.news()) == []
    saver.copies.serve()
    assert list(saver.copies.news()) == [(settings.copy_to[0].path, Standing(1, (), ""))]


def test_who_waits_for_copies_hears_that_its_generation_is_over(
    tmp_path: Path, model: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, create = threading.Event(), PosixBackend.create

    def held(self: PosixBackend, path: str, blocks: Any) -> int:
        assert "far" not in str(self.root) or go_on.wait(60)
        return create(self, path, blocks)

    monkeypatch.setattr(PosixBackend, "create", held)
    settings = settings_of(tmp_path)
    saver = Saver(settings)
    made.append(saver.copies)
    store_in(saver, model, 1)
    saver.copies.serve()

    def over() -> None:
        raise KeyError("parked")

    with pytest.raises(KeyError, match="parked"):
        saver.copies.wait(over, 60)
    assert not saver.copies.wait(lambda: None, 0.1)
    monkeypatch.setattr(follower_module, "SILENT_S", 0.0)
    assert saver.copies.wait(lambda: None, 60), "nobody waits for a place that does not answer"
    go_on.set()


class Failing:
    """A follower that fails again `late_s` after it was told to try; the clock goes while somebody waits."""

    def __init__(self, clock: list[float], first_s: float, late_s: float) -> None:
        self.clock, self.fails_s, self.late_s, self.hurried, self.is_silent = clock, first_s, late_s, 0, False

    def hurry(self) -> None:
        if self.clock[0] >= self.fails_s:
            self.hurried, self.fails_s = self.hurried + 1, self.clock[0] + self.late_s

    def look(self, final: int | None) -> None:
        pass

    def wait(self, timeout_s: float) -> bool:
        if self.clock[0] < self.fails_s:
            self.clock[0] += timeout_s
        return self.clock[0] >= self.fails_s


def test_places_that_fail_each_at_its_own_time_do_not_keep_a_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(copies_module.time, "monotonic", lambda: clock[0])
    copies = Copies(Checkpoint(path=str(tmp_path)), Store(tmp_path))
    places = {"a": Failing(clock, 100.0, 15.0), "b": Failing(clock, 112.0, 30.0)}
    copies._followers = cast("Any", places)
    rounds = 1
    while not copies.wait(lambda: None, 20.0):
        rounds += 1
        assert rounds < 10
    assert [place.hurried for place in places.values()] == [1, 0]
    assert clock[0] < 120
    places["a"].fails_s, places["b"].fails_s = 0.0, 200.0
    assert not copies.wait(lambda: None, 20.0)
    places["a"].fails_s = 1000.0  # a try of its own, later: it has had its chance
    while not copies.wait(lambda: None, 20.0):
        assert clock[0] < 300
    assert [place.hurried for place in places.values()] == [2, 0]


def unseen(settings: Checkpoint) -> tuple[Copies, Any]:
    """Copies, and the follower of their one further place, into which nobody has looked yet."""
    copies = Copies(settings, Store(settings.path))
    [follower] = copies._followers.values()
    return copies, follower


def test_what_nobody_has_looked_for_yet_is_not_said_to_be_gone(tmp_path: Path, model: Any, made: Any) -> None:
    settings = settings_of(tmp_path)
    saver = Saver(settings)
    copies, follower = unseen(settings)
    made.append(copies)
    store_in(saver, model, 2)
    copy_step(*open_stores(settings), 2)
    discard(Store(settings.path), 2)
    assert follower.holds(2)
    assert copies.lost([1, 2]) == [], "it is not known yet"
    assert copies.lost([]) == []
    copies.serve()
    wait(copies)
    assert copies.lost([]) == [1], "now it is"
    assert copies.lost([]) == []


def test_a_first_place_that_cannot_be_listed_delays_what_is_said_of_another(
    tmp_path: Path, model: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, {"keep": 1})
    saver = Saver(settings)
    made.append(saver.copies)
    for step in (1, 2):
        store_in(saver, model, step)
        copy_step(*open_stores(settings), step)
    discard(Store(settings.path), 1)
    with monkeypatch.context() as patch:

        def refused(_: Store) -> list[int]:
            raise OSError(5, "Input/output error")

        patch.setattr(copies_module, "list_steps", refused)
        saver.copies.serve()
        assert wait(saver.copies) == [Standing(2, (), "")], "the further place is not to blame"
        assert saver.copies.gone() == []
    assert saver.copies.lost([]) == [1]


def test_what_is_not_to_be_trusted_goes_everywhere(tmp_path: Path, model: Any, made: Any) -> None:
    settings = settings_of(tmp_path)
    saver = Saver(settings)
    made.append(saver.copies)
    saver.copies.serve()
    for step in (1, 2, 3):
        store_in(saver, model, step)
    wait(saver.copies)
    saver.copies.rest()
    saver.discard_after(1, 2)
    assert steps_in(settings) == [[1], [1]]


def test_a_place_that_does_not_answer_forgets_it_before_its_next_copy(
    tmp_path: Path, model: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path)
    saver = Saver(settings)
    made.append(saver.copies)
    saver.copies.serve()
    for step in (1, 2, 3):
        store_in(saver, model, step)
    wait(saver.copies)
    saver.copies.rest()
    with monkeypatch.context() as patch:
        remove = PosixBackend.remove

        def refused(self: PosixBackend, path: str) -> None:
            if "far" in str(self.root):
                raise OSError(30, "Read-only file system")
            remove(self, path)

        patch.setattr(PosixBackend, "remove", refused)
        saver.discard_after(1, 2)
        assert steps_in(settings) == [[1], [1, 2, 3]]
    saver.copies.serve()
    wait(saver.copies)
    assert steps_in(settings) == [[1], [1]]


# --- where a run starts ---


@pytest.fixture
def two(tmp_path: Path, model: Any) -> Checkpoint:
    """Steps 2 and 4 in both places, and 6 in the first alone."""
    settings = settings_of(tmp_path)
    saver = Saver(settings)
    near, far = open_stores(settings)
    for step in (2, 4, 6):
        store_in(saver, model, step, generation=step)
    for step in (2, 4):
        copy_step(near, far, step)
    return settings


def test_the_newest_whole_one_of_all_places(two: Checkpoint, tmp_path: Path) -> None:
    found = Stored.of(two)
    manifest, place = found.choose(None)
    assert (manifest.step, place, found.steps, found.newest_generation) == (6, two.path, [2, 4, 6], 6)
    shutil.rmtree(tmp_path / "near")
    found = Stored.of(two)
    manifest, place = found.choose(None)
    assert (manifest.step, place) == (4, two.copy_to[0].path)
    assert (found.steps, found.newest_generation) == ([2, 4], 4)
    assert found.place_of(2) == two.copy_to[0].path
    assert found.choose(2)[0].step == 2
    with pytest.raises(ConfigError, match=r"^--resume-step 6: .*near has steps 2, 4; choose one of them"):
        found.choose(6)
    assert open_checkpoint(two, 4).read("model/gain").nbytes == 4
    with pytest.raises(CorruptCheckpoint, match=r"^checkpoint step 6 in .*near: none of .* has a checkpoint of step 6"):
        find_checkpoint(two, 6)


def test_what_is_whole_nowhere_is_refused_and_the_next_one_offered(two: Checkpoint, tmp_path: Path) -> None:
    near, far = open_stores(two)
    near.remove(load(near, 6).paths[0])
    near.remove(load(near, 4).paths[0])
    with pytest.raises(CorruptCheckpoint, match=r"^checkpoint step 6 is damaged: .*; the newest whole one is step 4"):
        Stored.of(two).choose(None)
    far.remove(load(far, 4).paths[0])
    with pytest.raises(CorruptCheckpoint, match=r"^checkpoint step 6 is damaged: .*; the newest whole one is step 2"):
        Stored.of(two).choose(None)
    job = make_job(NetRecipe(), lanes=2).model_copy(update={"checkpoint": two})
    assert older_offer(job, 6) == "take the older step 2 with --resume-step 2"
    assert older_offer(job, 2) == "there is no older one that is whole"


def test_what_a_run_that_went_back_has_left_in_one_place_is_not_gone_on_from(two: Checkpoint, model: Any) -> None:
    near, far = open_stores(two)
    copy_step(near, far, 6)
    for step in (4, 6):
        discard(near, step)
    store_in(Saver(two), model, 3, generation=7)
    found = Stored.of(two)
    assert found.steps == [2, 3]
    assert found.choose(None)[0].step == 3
    assert found.newest_generation == 7


@pytest.fixture
def far_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = PosixBackend.list

    def refused(self: PosixBackend, path: str) -> list[str]:
        if self.root.name == "far":
            raise OSError(101, "Network is unreachable")
        return inner(self, path)

    monkeypatch.setattr(PosixBackend, "list", refused)


@pytest.mark.usefixtures("far_is_silent")
def test_a_place_that_does_not_answer_is_said_and_a_resumed_run_goes_on_without(two: Checkpoint) -> None:
    found = Stored.of(two)
    assert found.choose(None)[0].step == 6
    ((kind, data),) = found.notes
    assert (kind, data["path"]) == ("place_silent", two.copy_to[0].path)
    assert "Network is unreachable" in data["error"]
    shutil.rmtree(two.path)
    with pytest.raises(ClusterError, match=r"^--resume: no checkpoint was found, and .*far does not answer: OSError: "):
        Stored.of(two).choose(None)


@pytest.mark.usefixtures("far_is_silent")
def test_a_new_run_begins_when_all_its_places_answer(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"^checkpoint\.copy_to\.0\.path='.*far' cannot be read: OSError: "):
        refuse_checkpoints(settings_of(tmp_path))


def test_a_new_run_refuses_what_another_has_stored_in_any_place(two: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint\.path='.*near' already holds checkpoints \(steps 2, 4, 6\)"):
        refuse_checkpoints(two)
    shutil.rmtree(tmp_path / "near")
    with pytest.raises(ConfigError, match=r"^checkpoint\.copy_to\.0\.path='.*far' already holds .* \(steps 2, 4\)"):
        refuse_checkpoints(two)
    shutil.rmtree(tmp_path / "far")
    refuse_checkpoints(two)
