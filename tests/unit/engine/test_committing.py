"""The commit beside training: one at a time; its failure waits for the training thread; it ends with its generation."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.engine.committing import Account, Begun, Committer, Open, Statement, settled, still_lost
from elastictrain.engine.saver import Saver, attempt_of, generation_of
from elastictrain.errors import ClusterError
from elastictrain_checkpoint import Store, list_steps, load, running, verify
from elastictrain_checkpoint.posix import PosixBackend
from tests.unit.engine.test_saving import pieces_of, save, store_of, trained
from tests.unit.engine.worlds import NetRecipe, make_job

STAY: Any = lambda: None  # noqa: E731


def begin_commit(
    saver: Saver, model: Any, step: int, generation: int, told: list[str], check: Any = STAY, **rest: Any
) -> None:
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    share = saver.begin(owned, step=step, generation=generation, worker=0).share()
    facts: dict[str, Any] = {"step": step, "generation": generation, "tree": {}, "info": {}, **rest}
    told_of = {
        "committed": lambda step, path: told.append(f"{step}: {path}"),
        "removed": lambda _: None,
        "refused": told.append,
        "check": check,
    }
    saver.begin_commit([share], **told_of, aliases=model.space.aliases, **facts)


class Gate:
    """Storage that stops in one verb until it is let on."""

    def __init__(self, patch: pytest.MonkeyPatch, verb: str) -> None:
        self.reached, self.go_on, self.calls = threading.Event(), threading.Event(), 0
        inner = getattr(PosixBackend, verb)

        def held(backend: PosixBackend, *args: Any) -> Any:
            self.reached.set()
            assert self.go_on.wait(60)
            self.calls += 1
            return inner(backend, *args)

        patch.setattr(PosixBackend, verb, held)


def test_training_goes_on_while_the_storage_holds_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    saver, told, gate = Saver(settings), [], Gate(monkeypatch, "publish")
    begin_commit(saver, model, 2, 1, told)
    assert gate.reached.wait(60)
    assert saver.committed() == []
    assert told == []
    gate.go_on.set()
    assert saver.wait_for_commit(STAY) == [2]
    assert told == [f"2: {settings.path}/step-00000002"]
    assert saver.committed() == [], "said once"
    assert list_steps(Store(settings.path)) == [2]


def test_a_full_disk_is_raised_where_the_training_thread_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    saver, told = Saver(settings), []

    def full(self: Store, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", full)
        begin_commit(saver, model, 2, 1, told)
        with pytest.raises(ClusterError, match=r"^checkpoint step 2 cannot be stored in checkpoint\.path=.*No space"):
            saver.wait_for_commit(STAY)
    assert told == []
    assert saver.wait_for_commit(STAY) == [], "raised once"
    begin_commit(saver, model, 2, 1, told)
    assert saver.wait_for_commit(STAY) == [2]


def test_commits_follow_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    saver, told, gate, waits = Saver(settings), [], Gate(monkeypatch, "publish"), threading.Event()
    begin_commit(saver, model, 2, 1, told)
    assert gate.reached.wait(60)
    second = threading.Thread(target=begin_commit, args=(saver, model, 4, 1, told, waits.set))
    second.start()
    assert waits.wait(60), "the first one is under way"
    gate.go_on.set()
    second.join(60)
    saver.wait_for_commit(STAY)
    assert [(said[0], said[-1]) for said in told] == [("2", "2"), ("4", "4")]
    assert list_steps(Store(settings.path)) == [2, 4]


@pytest.mark.parametrize(("verb", "is_there", "left"), [("size", False, None), ("publish", True, Open(2, 1))])
def test_what_is_given_up_ends_with_the_call_that_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, is_there: bool, left: Open | None
) -> None:
    """Nobody waits for that call. If it may change something, this is known; once it is answered nothing changes any
    more. In either case nobody is told.
    """
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    saver, told = Saver(settings), []
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    writing = saver.begin(owned, step=2, generation=1, worker=0)
    share = writing.share()
    assert saver.begun == (Begun(2, "g000001", 1),)
    gate = Gate(monkeypatch, verb)
    facts: dict[str, Any] = {"step": 2, "generation": 1, "tree": {}, "info": {}, "aliases": model.space.aliases}
    told_of = {
        "committed": lambda step, path: told.append(f"{step}: {path}"),
        "removed": told.append,
        "refused": told.append,
        "check": STAY,
    }
    saver.begin_commit([share], **told_of, **facts)
    saver.travelled(2)
    assert saver.begun == (Begun(2, "g000001", 1, travelled=True),)
    assert gate.reached.wait(60)
    work = saver._committer._work
    assert work is not None
    told.clear()
    saver.give_up()  # would not return before the gate opens if it waited
    assert saver.open == left
    assert not work.ended.is_set()
    gate.go_on.set()
    assert work.ended.wait(60)
    assert saver.open is None
    assert gate.calls == 1, "no further call"
    assert told == []
    assert saver.committed() == []
    assert saver.is_committed(saver.begun[0]) == is_there
    assert (list_steps(Store(settings.path)) == [2]) == is_there


def test_what_fails_after_its_generation_fails_nobody(tmp_path: Path) -> None:
    committer, go_on = Committer(Store(tmp_path)), threading.Event()

    def fails(_: Store) -> bool:
        assert go_on.wait(60)
        raise OSError(28, "No space left on device")

    committer.begin(2, 1, fails)
    work = committer._work
    committer.give_up()
    go_on.set()
    assert work is not None
    assert work.ended.wait(60)
    assert committer.committed() == [], "nothing is raised"
    committer.begin(3, 2, lambda _: True)
    assert committer.wait(STAY, 60) == [3]


def left_open(saver: Saver, model: Any, told: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Gate, Begun]:
    """A generation ends while it creates the manifest of step 2, which the gate holds."""
    with monkeypatch.context() as patch:
        gate = Gate(patch, "publish")
        begin_commit(saver, model, 2, 1, told)
        (begun,) = saver.begun
        assert gate.reached.wait(60)
        saver.give_up()
    return gate, begun


def test_the_next_commit_waits_for_what_was_left_open_and_says_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of step 2 is created after its generation: its packs are still there, and it is told."""
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    saver, told = Saver(settings), []
    gate, begun = left_open(saver, model, told, monkeypatch)
    assert not saver.is_committed(begun)
    begin_commit(saver, model, 3, 2, told, late=begun)
    with pytest.raises(ClusterError, match="has not ended"):
        saver._committer.wait(STAY, 0.1)
    assert told == []
    gate.go_on.set()
    assert saver.wait_for_commit(STAY) == [3]
    assert [(said[0], said[-1]) for said in told] == [("2", "2"), ("3", "3")]
    for step in (2, 3):
        assert verify(Store(settings.path), load(Store(settings.path), step)) == []


def test_a_late_manifest_of_the_step_that_is_written_again_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    saver, told = Saver(settings), []
    gate, begun = left_open(saver, model, told, monkeypatch)
    begin_commit(saver, model, 2, 2, told, late=begun)
    gate.go_on.set()
    assert saver.wait_for_commit(STAY) == [2]
    assert [said[0] for said in told] == ["2"], "once"
    there = load(Store(settings.path), 2)
    assert there.generation == 1, "never removed to be committed anew"
    assert verify(Store(settings.path), there) == []
    begin_commit(saver, model, 3, 3, told)
    assert saver.wait_for_commit(STAY) == [3]
    assert packs_in(settings) == ["step-00000002/g000001", "step-00000003/g000003"], "what was not needed goes"


def test_who_publishes_spares_what_another_has_left_open(tmp_path: Path) -> None:
    """Nothing is committed in that folder, and the packs stay that the open call may make a checkpoint of."""
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    other, saver, told = Saver(settings), Saver(settings), []
    other.begin(owned, step=4, generation=1, worker=1).share()
    begin_commit(saver, model, 4, 2, told, elsewhere=(Open(4, 1),))
    assert saver.wait_for_commit(STAY) == []
    assert told == ["a call to the storage that an earlier generation made there is not answered yet"]
    begin_commit(saver, model, 5, 2, told, elsewhere=(Open(4, 1),))
    assert saver.wait_for_commit(STAY) == [5]
    assert packs_in(settings) == ["step-00000004/g000001", "step-00000004/g000002", "step-00000005/g000002"]
    begin_commit(saver, model, 6, 3, told)
    assert saver.wait_for_commit(STAY) == [6]
    assert packs_in(settings) == ["step-00000005/g000002", "step-00000006/g000003"]


def packs_in(settings: Any) -> list[str]:
    return sorted(path.parent.relative_to(settings.path).as_posix() for path in Path(settings.path).rglob("*.saf*"))


def test_another_attempt_at_the_step_is_not_the_one_that_was_begun(tmp_path: Path) -> None:
    model = trained(make_job(NetRecipe(), lanes=2))
    saver = Saver(save(model, tmp_path, generation=3))
    assert saver.is_committed(Begun(2, "g000003", 3))
    assert not saver.is_committed(Begun(2, "g000004", 4))
    assert not saver.is_committed(Begun(4, "g000003", 3))


def test_who_waits_hears_that_its_generation_is_over(tmp_path: Path) -> None:
    store = Store(tmp_path)
    committer, go_on = Committer(store), threading.Event()
    committer.begin(2, 1, lambda _: go_on.wait(60))

    def over() -> None:
        raise KeyError("parked")

    with pytest.raises(KeyError, match="parked"):
        committer.wait(over, 60)
    with pytest.raises(ClusterError, match=r"has taken 0\.1 s and has not ended: the storage does not answer"):
        committer.wait(STAY, 0.1)
    go_on.set()
    assert committer.wait(STAY, 60) == [2]


def test_what_older_generations_have_left_goes_with_the_next_commit(tmp_path: Path) -> None:
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    dead, saver = Saver(settings), Saver(settings)
    for generation, step in ((1, 4), (2, 6)):
        dead.begin(owned, step=step, generation=generation, worker=1).share()
    begin_commit(saver, model, 5, 2, [])
    assert saver.wait_for_commit(STAY) == [5]
    assert packs_in(settings) == ["step-00000005/g000002", "step-00000006/g000002"], (
        "of this generation somebody may still write"
    )
    assert load(Store(settings.path), 5).generation == 2


@given(st.integers(0, 10**7))
def test_an_attempt_names_its_generation(generation: int) -> None:
    assert generation_of(attempt_of(generation)) == generation


@pytest.mark.parametrize("name", ["", "g", "g1", "g00001", "g0000001", "h000001", "g00000x", "g٠٠٠٠٠١", "gg00001"])
def test_other_names_are_of_no_generation(name: str) -> None:
    assert generation_of(name) is None


accounts = st.builds(Account, st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
several = st.lists(accounts, max_size=3).map(tuple)
statements = st.builds(Statement, several, several)


@given(st.lists(statements, max_size=4))
def test_all_members_come_to_the_same_of_all_that_one_of_them_has_begun(said: list[Statement]) -> None:
    what = settled([Statement.from_bytes(one.to_bytes()) for one in said])
    assert what == settled(said[::-1]), "whatever the order"
    begun = [one for statement in said for one in statement.accounts]
    assert [(one.step, one.generation) for one in what] == sorted({(one.step, one.generation) for one in begun})
    for one in what:
        same = [other for other in begun if (other.step, other.generation) == (one.step, one.generation)]
        assert one.found == any(other.found for other in same)
        assert one.travelled == any(other.travelled for other in same)


def test_what_the_controller_knows_of_is_settled() -> None:
    begun = (Begun(4, "g000001", 1, travelled=True), Begun(6, "g000001", 1))
    assert Account.of(begun, 6, lambda _: True) == ()
    assert Account.of((), 0, lambda _: True) == ()
    assert Account.of(begun, 4, lambda _: False) == (Account(6, 1, False, False),)
    assert Account.of(begun, 3, lambda one: one.step == 4) == (Account(4, 1, True, True), Account(6, 1, False, False))


def test_what_was_committed_and_is_not_there_was_removed_since() -> None:
    begun = (Begun(4, "g000001", 1, travelled=True, noted=True), Begun(6, "g000001", 1))
    assert Account.of(begun, 3, lambda _: False) == (Account(6, 1, False, False),)
    assert Account.of(begun, 3, lambda _: True)[0] == Account(4, 1, True, True), "its publisher may have died with it"


def test_of_several_under_way_each_is_settled() -> None:
    slower = Statement((Account(4, 1, True, False),))
    looked = Statement((Account(4, 1, True, True), Account(6, 1, True, False), Account(8, 1, False, False)))
    assert [one.step for one in settled([slower, looked]) if one.found] == [4]
    assert [one.step for one in still_lost([slower, looked], 4, (0, 0))] == [6, 8]
    newest = Statement((Account(4, 1, True, False), Account(6, 1, True, True)))
    assert still_lost([slower, newest], 6, (0, 0)) == (), "retention may have removed the older one"


def test_a_saver_remembers_what_nobody_has_settled(tmp_path: Path) -> None:
    model, saver = trained(make_job(NetRecipe(), lanes=2)), Saver(store_of(tmp_path))
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    for step in (1, 2, 3, 4):
        saver.begin(owned, step=step, generation=1, worker=0).share()
        saver.travelled(step)
    assert [one.step for one in saver.begun] == [2, 3, 4]
    saver.noted(3)
    assert [(one.step, one.noted) for one in saver.begun] == [(3, True), (4, False)]


def test_an_update_never_waits_for_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the state: not for the first file of a save, nor for one that was given up before."""
    monkeypatch.setattr(running, "MIN_COPY_BYTES", 1)
    model = trained(make_job(NetRecipe(), lanes=2))
    saver, gate = Saver(store_of(tmp_path)), Gate(monkeypatch, "create")
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    for generation in (1, 2):
        writing = saver.begin(owned, step=2, generation=generation, worker=0)
        assert gate.reached.wait(60)
        update = threading.Thread(target=saver.before_apply, daemon=True)
        update.start()
        update.join(30)
        assert not update.is_alive(), "storage still holds the first file"
        if generation == 1:
            saver.give_up()
    gate.go_on.set()
    assert writing.share()["attempt"] == attempt_of(2)


# --- what has come to nothing ---

places = st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(st.lists(statements, min_size=1, max_size=4), st.integers(0, 3), places)
def test_what_one_member_knows_to_be_lost_all_know(said: list[Statement], known: int, heard: tuple[int, int]) -> None:
    said = [Statement.from_bytes(one.to_bytes()) for one in said]
    lost = still_lost(said, known, heard)
    assert {(one.generation, one.step) for one in lost} == {
        (one.generation, one.step) for one in still_lost(said[::-1], known, heard)
    }, "whatever the order"
    found = {(one.generation, one.step) for one in lost}
    assert [(one.generation, one.step) for one in lost] == sorted(found), "in the order in which they were begun"
    under_way = settled(said)
    newest = max((one.step for one in under_way if one.found), default=0)
    said_lost = {(one.generation, one.step) for statement in said for one in statement.lost}
    new = {(one.generation, one.step) for one in under_way if one.step > newest}
    assert found <= said_lost | new
    for place in (said_lost | new) - found:
        assert place <= heard, "who publishes may have died before the controller heard of it"
        assert place[1] <= known, "and nothing newer is there"
    assert still_lost([Statement(lost=lost)], known, heard) == lost, "until something is known"


def test_lost_is_lost_until_it_is_said_and_made_up_for() -> None:
    begun = Statement((Account(4, 1, travelled=True),))
    (lost,) = still_lost([Statement(), begun], 0, (0, 0))
    assert lost == Account(4, 1, travelled=True)
    nobody_heard = still_lost([Statement(lost=(lost,)), Statement((Account(5, 2),))], 0, (0, 0))
    assert nobody_heard == (lost, Account(5, 2))
    assert still_lost([Statement(lost=nobody_heard)], 0, (1, 4)) == nobody_heard, "heard, but nothing newer is stored"
    assert still_lost([Statement(lost=nobody_heard)], 5, (1, 4)) == (Account(5, 2),)
    assert still_lost([Statement(lost=nobody_heard)], 5, (2, 5)) == ()
