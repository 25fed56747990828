"""What is copied to a further store, and what the nearer one keeps until then, over any two stores and policies."""

from __future__ import annotations

import itertools
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from elastictrain_checkpoint.catalogue import Entry, happened
from elastictrain_checkpoint.following import LONGEST_PAUSE_S, in_words, let_go, pause_s, present, wanted
from elastictrain_checkpoint.policies import Best, EverySteps, Newest, Point, Policy, Spaced, Younger

NOW_S = 10_000.0


def entry(step: int, generation: int = 1, size_bytes: int = 100, time_s: float = 0.0, loss: float = 1.0) -> Entry:
    return Entry(step, generation, f"g{generation}", size_bytes, Point(step, time_s, {"loss": loss}))


entries = st.builds(
    entry, st.integers(1, 12), st.integers(1, 4), st.integers(1, 50), st.floats(0, NOW_S), st.floats(0, 9)
)
stores = st.lists(entries, max_size=8, unique_by=lambda one: one.step).map(lambda found: sorted(found, key=_step))
histories = stores.map(happened)
simple: st.SearchStrategy[Policy] = st.one_of(
    st.integers(1, 5).map(Newest),
    st.integers(1, 5).map(EverySteps),
    st.floats(1, NOW_S).map(lambda s: Younger(timedelta(seconds=s))),
    st.floats(1, NOW_S).map(lambda s: Spaced(timedelta(seconds=s))),
    st.integers(1, 3).map(lambda n: Best("loss", n)),
)
policies = st.tuples(st.integers(1, 3).map(Newest), simple).map(lambda two: two[0] | two[1])
aparts = st.integers(1, 6)
finals = st.none() | st.integers(1, 12)


def _step(one: Entry) -> int:
    return one.step


@given(stores, stores)
def test_a_history_has_no_step_that_was_left_behind(near: list[Entry], far: list[Entry]) -> None:
    found = happened([*near, *far])
    assert found == happened([*far, *near]) or {(e.step, e.generation) for e in found} == {
        (e.step, e.generation) for e in happened([*far, *near])
    }
    assert [e.step for e in found] == sorted({e.step for e in found})
    assert [e.generation for e in found] == sorted(e.generation for e in found)
    highest = max((e.generation for e in [*near, *far]), default=0)
    assert max((e.generation for e in found), default=0) == highest, "the newest generation is never left behind"
    for left in {e.step for e in [*near, *far]} - {e.step for e in found}:
        generation = max(e.generation for e in [*near, *far] if e.step == left)
        assert any(e.step < left and e.generation > generation for e in [*near, *far])


@given(stores, stores, policies, aparts, finals)
def test_what_is_wanted_is_in_the_nearer_store_and_not_in_the_further(
    near: list[Entry], far: list[Entry], keep: Policy, apart: int, final: int | None
) -> None:
    steps = wanted(near, far, keep, NOW_S, apart_steps=apart, final=final)
    assert steps == sorted(set(steps), reverse=True), "the newest first"
    here = {e.step: e.generation for e in near}
    there = {e.step: e.generation for e in far}
    for step in steps:
        assert step in here
        assert there.get(step, 0) < here[step]
        assert step not in present(near, far)


@given(histories, policies, aparts, finals)
def test_when_all_of_it_is_copied_nothing_more_is_wanted_and_retention_takes_nothing_of_it(
    near: list[Entry], keep: Policy, apart: int, final: int | None
) -> None:
    first = wanted(near, [], keep, NOW_S, apart_steps=apart, final=final)
    far: list[Entry] = []
    for _ in range(20):
        steps = wanted(near, far, keep, NOW_S, apart_steps=apart, final=final)
        if not steps:
            break
        far = sorted([*far, next(e for e in near if e.step == steps[0])], key=_step)
    assert not wanted(near, far, keep, NOW_S, apart_steps=apart, final=final)
    assert {e.step for e in far} == set(first), "in whatever order it is looked at"


@given(histories, aparts, finals)
def test_copies_are_apart_but_for_the_last_one_of_a_run(near: list[Entry], apart: int, final: int | None) -> None:
    steps = sorted(wanted(near, [], EverySteps(1), NOW_S, apart_steps=apart, final=final))
    if near:
        assert steps[0] == near[0].step
    for before, after in itertools.pairwise(steps):
        assert after - before >= apart or after == final
    if final in {e.step for e in near}:
        assert final in steps
    for e in near:
        if e.step not in steps:
            below = max(step for step in steps if step < e.step)
            assert e.step - below < apart


@given(histories, st.integers(1, 5))
def test_a_slow_store_gets_the_newest_and_nothing_piles_up(near: list[Entry], n: int) -> None:
    assert wanted(near, [], Newest(n), NOW_S) == [e.step for e in reversed(near)][:n]


@given(stores, st.none() | st.integers(0, 400), st.integers(0, 400))
def test_what_is_let_go_for_room_is_the_oldest_and_no_more_than_it_takes(
    waiting: list[Entry], free_bytes: int | None, room_bytes: int
) -> None:
    gone = let_go(waiting, free_bytes, room_bytes)
    if free_bytes is None:
        assert gone == set()
        return
    ordered = sorted(waiting, key=_step)
    assert gone == {e.step for e in ordered[: len(gone)]}
    sizes = [e.size_bytes for e in ordered]
    assert free_bytes + sum(sizes[: len(gone)]) >= room_bytes or len(gone) == len(ordered)
    if gone:
        assert free_bytes + sum(sizes[: len(gone) - 1]) < room_bytes


@given(st.integers(1, 10_000))
def test_a_store_that_fails_is_tried_later_and_later_but_always_again(failures: int) -> None:
    assert 0 < pause_s(failures) <= pause_s(failures + 1) <= LONGEST_PAUSE_S
    assert pause_s(0) == 0.0
    assert [pause_s(n) for n in (1, 2, 3, 7)] == [1.0, 2.0, 4.0, 60.0]


def test_what_a_run_that_went_back_has_left_behind_is_not_copied() -> None:
    near = [entry(4, 1), entry(5, 2), entry(8, 1)]
    assert wanted(near, [], Newest(5), NOW_S) == [5, 4]
    assert wanted([entry(4, 1), entry(6, 3)], [entry(4, 1), entry(6, 2)], Newest(5), NOW_S) == [6], "a later commit"
    assert wanted([entry(6, 2)], [entry(6, 3)], Newest(5), NOW_S) == [], "an earlier one"


def test_a_few_steps_in_words() -> None:
    assert in_words({4, 2}) == "2, 4"
    assert in_words(range(1, 8)) == "7 steps, the newest 3, 4, 5, 6, 7"
