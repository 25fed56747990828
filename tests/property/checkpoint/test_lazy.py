"""A save in the background stores the state of the moment of its call, wherever a change falls, in the same bytes as a
writer that stands still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from elastictrain_checkpoint import ITEM_BYTES, PackWriter, Part, Piece, Store, commit, digest, hashing, verify
from elastictrain_checkpoint import commit as commit_function
from elastictrain_checkpoint.lazy import LazySaver, SaveState
from elastictrain_checkpoint.store import _backend
from tests.property.checkpoint.test_round_trip import BLOCK, specs, worlds
from tests.unit.checkpoint.build import cut, make_state, memory_store


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "SUM_BLOCK_BYTES", BLOCK)
        patch.setitem(commit_function.__globals__, "SUM_BLOCK_BYTES", BLOCK)
        yield


class Watched:
    """Storage that calls `each` after every block that it has taken, in the thread that writes."""

    def __init__(self, url: str, each: Callable[[int], None] = lambda _: None) -> None:
        self._inner: Any = _backend(url, {})
        self.each, self.blocks = each, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, path: str, blocks: Iterable[memoryview]) -> int:
        def watched() -> Iterator[memoryview]:
            for block in blocks:
                yield block
                self.blocks += 1
                self.each(self.blocks)

        return int(self._inner.create(path, watched()))


def live(pieces: list[Piece]) -> tuple[list[Piece], list[np.ndarray[Any, Any]]]:
    """The pieces, with buffers that can be changed."""
    buffers: list[np.ndarray[Any, Any]] = []

    def writable(data: Any) -> Any:
        if isinstance(data, list):
            return [writable(one) for one in data]
        buffers.append(np.frombuffer(bytearray(data), dtype=np.uint8) if len(data) else np.empty(0, np.uint8))
        return buffers[-1].data

    return [Piece(p.name, p.dtype, p.shape, p.start, writable(p.data)) for p in pieces], buffers


@settings(deadline=None)
@given(
    specs,
    st.integers(0, 99),
    worlds,
    worlds,
    st.sampled_from([5_000, 1 << 30]),
    st.lists(st.integers(0, 40), max_size=3),
    st.integers(0, 20_000),
)
def test_the_state_of_the_call_is_stored_wherever_changes_fall(
    shapes: Any, seed: int, cuts: list[float], breaks: list[float], pack_bytes: int, changes: list[int], reserve: int
) -> None:
    state = make_state(shapes, seed)
    parts, expected = [], []
    store = memory_store()
    for rank, still in enumerate(cut(state, cuts, breaks)):
        pieces, buffers = live(still)

        url = memory_store().url
        backend = Watched(url)
        watched = Store(url, backend=backend)
        saver = LazySaver(watched, pool_bytes=reserve, pack_bytes=pack_bytes)

        def change(blocks: int, saver: LazySaver = saver, buffers: list[Any] = buffers) -> None:
            if blocks in changes:
                saver.before_mutation()
                for buffer in buffers:
                    buffer ^= 255

        backend.each = change
        handle = saver.save(pieces, step=7, attempt="a", writer=f"w{rank}")
        part = handle.result()
        assert handle.state is SaveState.WRITTEN
        assert handle.written_bytes == handle.total_bytes == part.size_bytes
        assert handle.copied_bytes <= saver.pool.size_bytes
        event(f"copied: {handle.copied_bytes > 0}")
        saver.close()
        for file in part.files:  # into one store, for the commit
            store.create(f"step-00000007/{file.path}", [memoryview(watched.read_all(f"step-00000007/{file.path}"))])
        parts.append(Part.from_json(part.to_json()))
        expected.append(
            PackWriter(memory_store(), step=7, attempt="a", writer=f"w{rank}", pack_bytes=pack_bytes).write(still)
        )
    assert parts == expected
    manifest = commit(store, step=7, attempt="a", generation=1, parts=parts)
    assert verify(store, manifest) == []
    assert digest(store, manifest) == manifest.digest


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.booleans())
def test_a_change_that_nobody_announced_fails_the_save(block: int, announced: bool) -> None:
    """Torn writes are found: by whoever announces the next change, or at the end."""
    [still] = cut(make_state({"a": ("F32", (9000,)), "b": ("I64", (700,))}), [])
    pieces, buffers = live(still)
    touched = False

    def change(blocks: int) -> None:
        nonlocal touched
        if blocks == block:
            buffers[0][:] ^= 255
            touched = True
            if announced:
                saver.before_mutation()

    url = memory_store().url
    saver = LazySaver(Store(url, backend=Watched(url, change)))
    handle = saver.save(
        pieces, step=7, attempt="a", writer="w", intact=lambda: "the tensor a" if touched else "", finish=lambda p: p
    )
    units = -(-(4096 + math.prod((9000,)) * ITEM_BYTES["F32"] + 700 * 8) // BLOCK)
    if block < units:  # the last units are safe already when the change falls after them
        assert handle.wait() is SaveState.FAILED
        assert str(handle.error).startswith("step 7 was not saved: the tensor a has changed while it was read. Call")
    else:
        assert handle.wait() is SaveState.COMMITTED


def test_what_may_change_meanwhile_does_not_spoil_what_lies_in_memory_of_its_own() -> None:
    """After a change that was announced, units that no change can reach ask nobody whether anything has changed."""
    [still] = cut(make_state({"a": ("F32", (9000,)), "b": ("F32", (9000,))}), [])
    pieces, buffers = live(still)
    changed = False

    def change(blocks: int) -> None:
        nonlocal changed
        if blocks == 1:
            saver.before_mutation()
            buffers[0][:] ^= 255
            changed = True

    url = memory_store().url
    saver = LazySaver(Store(url, backend=Watched(url, change)), pack_bytes=8192)
    handle = saver.save(
        pieces, step=7, attempt="a", writer="w", stable={"b"}, intact=lambda: "the tensor a" if changed else ""
    )
    assert handle.wait(30) is SaveState.WRITTEN
    assert changed
