"""Saves in the background with a base: the same as a writer that stands still makes of them, wherever changes fall."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from elastictrain_checkpoint import (
    Base,
    InvalidPiece,
    Manifest,
    PackWriter,
    Part,
    Piece,
    Reader,
    Store,
    commit,
    digest,
    incremental,
    lazy,
    verify,
)
from elastictrain_checkpoint import changes as changes_module
from elastictrain_checkpoint.errors import SaveFailed
from elastictrain_checkpoint.lazy import LazySaver
from tests.property.checkpoint.test_incremental import SPECS, fractions, spans
from tests.property.checkpoint.test_lazy import Watched, live
from tests.unit.checkpoint.build import State, changed, cut, live_digest, make_state, memory_store, save


@pytest.fixture(autouse=True, scope="module")
def small_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incremental, "MIN_RUN_BYTES", 20_000)
        patch.setattr(incremental, "MAX_RUNS", 3)
        yield


COPIED: list[int] = []
"""Bytes that had to be copied, by save: for Hypothesis' statistics."""


def lazily(
    store: Store, state: State, cuts: list[float], step: int, base: Manifest | None, spoil: set[int]
) -> list[Part]:
    """The parts of every writer, saved in the background; after these blocks the state is changed, as announced."""
    parts, copied = [], COPIED
    for rank, still in enumerate(cut(state, cuts)):
        pieces, buffers = live(still)
        backend = Watched(store.url)
        saver = LazySaver(Store(store.url, backend=backend), pack_bytes=100_000)

        def change(blocks: int, saver: LazySaver = saver, buffers: list[Any] = buffers) -> None:
            if blocks in spoil:
                saver.before_mutation()
                for buffer in buffers:
                    buffer ^= 255

        backend.each = change
        read = None if base is None else lambda: Base.read(store, base)
        handle = saver.save(pieces, step=step, attempt="a1", writer=f"w{rank:04d}", base=read)
        parts.append(Part.from_json(handle.result().to_json()))
        copied.append(handle.copied_bytes)
        saver.close()
    return parts


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(spans, st.lists(fractions, max_size=3), st.booleans(), st.sets(st.integers(1, 4), max_size=2)),
        min_size=1,
        max_size=4,
    )
)
def test_any_history_is_what_a_writer_that_stands_still_makes_of_it(history: list[Any]) -> None:
    still, store, state = memory_store(), memory_store(), make_state(SPECS)
    expected = [save(still, state, (0.5,), step=0, cells=True, pack_bytes=100_000)]
    found = [save(store, state, (0.5,), step=0, cells=True, pack_bytes=100_000)]
    states = [state]
    for step, (spans_, cuts, full, spoil) in enumerate(history, 1):
        state = changed(state, step, *spans_)
        base = None if full else expected[-1]
        wanted = [
            PackWriter(still, step=step, attempt="a1", writer=f"w{i:04d}", base=base, pack_bytes=100_000).write(pieces)
            for i, pieces in enumerate(cut(state, cuts))
        ]
        parts = lazily(store, state, cuts, step, None if full else found[-1], spoil)
        event(f"copied: {sum(COPIED) > 0}")
        COPIED.clear()
        assert parts == wanted
        facts: dict[str, Any] = {"step": step, "attempt": "a1", "generation": 1, "cells": True}
        expected.append(commit(still, parts=wanted, **facts))
        found.append(commit(store, parts=parts, **facts))
        states.append(state)
    for manifest, before in zip(found, states, strict=True):
        assert verify(store, manifest) == []
        assert digest(store, manifest) == manifest.digest == live_digest(before)
        reader = Reader(store, manifest)
        assert all(reader.read(name).tobytes() == data for name, (_, _, data) in before.items())


def test_nothing_is_written_where_nothing_has_changed() -> None:
    store, state = memory_store(), make_state(SPECS)
    state.pop("d")  # what is empty needs a place in a file
    base = save(store, state, (), step=1, cells=True)
    [part] = lazily(store, state, [], 2, base, set())
    assert sorted(file.path for file in part.files) == sorted(f"../{path}" for path in base.paths)
    assert store.list("step-00000002") == []
    assert commit(store, step=2, attempt="a1", generation=1, parts=[part]).digest == base.digest


def test_an_update_waits_for_the_hashes_and_copies_only_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    store, state = memory_store(), make_state(SPECS)
    base = save(store, state, step=1, cells=True)
    after = changed(state, 1, ("b", 0.0, 0.2))
    [still] = cut(after, [])
    pieces, buffers = live(still)
    hashing, go_on, written = threading.Event(), threading.Event(), threading.Event()
    split = incremental.split

    def slow(*arguments: Any) -> Any:
        hashing.set()
        assert go_on.wait(60)
        return split(*arguments)

    monkeypatch.setattr(changes_module, "split", slow)
    backend = Watched(store.url, lambda _: written.wait(60) and None)
    saver = LazySaver(Store(store.url, backend=backend))
    handle = saver.save(pieces, step=2, attempt="a1", writer="w", base=lambda: Base.read(store, base))
    assert hashing.wait(60)
    updating = threading.Thread(target=saver.before_mutation)
    updating.start()
    assert updating.is_alive(), "the hashes are not there"
    go_on.set()
    updating.join(60)
    for buffer in buffers:
        buffer ^= 255
    written.set()
    part = handle.result()
    manifest = commit(store, step=2, attempt="a1", generation=1, parts=[part])
    assert digest(store, manifest) == manifest.digest == live_digest(after)
    assert handle.copied_bytes < sum(len(buffer) for buffer in buffers) / 2


def test_an_update_that_comes_before_the_base_makes_a_full_save() -> None:
    store, state = memory_store(), make_state(SPECS)
    base = save(store, state, step=1, cells=True)
    [still] = cut(state, [])
    pieces, buffers = live(still)
    asked, go_on = threading.Event(), threading.Event()

    def slow() -> Base:
        asked.set()
        assert go_on.wait(60)
        return Base.read(store, base)

    saver = LazySaver(store)
    handle = saver.save(pieces, step=2, attempt="a1", writer="w", base=slow)
    assert asked.wait(60)
    saver.before_mutation()  # returns, although nobody has answered
    for buffer in buffers:
        buffer ^= 255
    go_on.set()
    assert handle.result() == PackWriter(memory_store(), step=2, attempt="a1", writer="w").write(still)


def test_what_is_the_saves_own_holds_no_update_up() -> None:
    store, state = memory_store(), make_state(SPECS)
    base = save(store, state, step=1, cells=True)
    [still] = cut(changed(state, 1, ("a", 0.0, 0.5)), [])
    go_on = threading.Event()
    saver = LazySaver(store)
    handle = saver.save(
        still, step=2, attempt="a1", writer="w", base=lambda: Base.read(store, base), stable=list(state),
        ready=lambda: go_on.wait(60) and None,
    )  # fmt: skip
    saver.before_mutation()
    go_on.set()
    writer = PackWriter(memory_store(), step=2, attempt="a1", writer="w", base=Base.read(store, base))
    assert handle.result() == writer.write(still)


def test_a_change_that_nobody_announced_while_it_was_hashed_fails_the_save() -> None:
    store, state = memory_store(), make_state(SPECS)
    base = save(store, state, step=1, cells=True)
    [still] = cut(state, [])
    saver = LazySaver(store)
    handle = saver.save(
        still, step=2, attempt="a1", writer="w", base=lambda: Base.read(store, base), intact=lambda: "model/a"
    )
    with pytest.raises(SaveFailed, match="model/a has changed while it was read"):
        handle.result()


@pytest.mark.parametrize("step", [1, 2])
def test_a_base_that_is_no_earlier_step_fails_the_save(step: int) -> None:
    store, state = memory_store(), make_state(SPECS)
    base = save(store, state, step=2, cells=True)
    [still] = cut(state, [])
    handle = LazySaver(store).save(still, step=step, attempt="a2", writer="w", base=lambda: Base.read(store, base))
    with pytest.raises(SaveFailed, match=f"base is step 2, expected one before step {step}") as error:
        handle.result()
    assert isinstance(error.value.__cause__, InvalidPiece)


def test_without_a_base_all_is_written() -> None:
    store, state = memory_store(), make_state(SPECS)
    [still] = cut(state, [])
    part = LazySaver(store).save(still, step=2, attempt="a1", writer="w", base=lambda: None).result()
    assert part == PackWriter(memory_store(), step=2, attempt="a1", writer="w").write(still)
    assert not any(file.path.startswith("../") for file in part.files)


@pytest.mark.parametrize("wrong", [{"data": bytearray(7)}, {"dtype": "F128"}, {"start": 1}])
def test_a_piece_that_cannot_be_one_is_refused_although_nothing_of_it_would_be_written(wrong: dict[str, Any]) -> None:
    store = memory_store()
    base = Base.read(store, save(store, make_state({"t": ("F32", (2,))}), step=1, cells=True))
    piece = {"name": "t", "dtype": "F32", "shape": (2,), "start": 0, "data": bytearray(8)} | wrong
    with pytest.raises(InvalidPiece, match=r"^(t: |dtype 'F128' is not one of)"):
        changes_module.plan_changes([Piece(**piece)], base, 1 << 20)


def test_an_update_waits_while_a_save_is_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would copy what the first plan lists, and the second would read what has changed."""
    store, state = memory_store(), make_state(SPECS)
    base = save(store, state, step=1, cells=True)
    planning, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        planning.set()
        assert go_on.wait(30)
        return changes_module.plan_changes(*arguments)

    def change() -> None:
        saver.before_mutation()
        for buffer in buffers:
            buffer[:] ^= 255

    monkeypatch.setattr(lazy, "plan_changes", held)
    [still] = cut(state, [])
    pieces, buffers = live(still)
    saver = LazySaver(store)
    handle = saver.save(pieces, step=2, attempt="a1", writer="w", base=lambda: Base.read(store, base))
    assert planning.wait(30)
    update = threading.Thread(target=change)
    update.start()
    update.join(0.05)
    assert update.is_alive()
    go_on.set()
    update.join(30)
    assert not update.is_alive()
    second = commit(store, step=2, attempt="a1", generation=1, parts=[handle.result(30)])
    assert second.digest == digest(store, second) == base.digest
