"""Any history of changes, worlds and bases: the state that is read is the state that was saved."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain_checkpoint import Reader, digest, incremental, verify
from elastictrain_checkpoint.incremental import Base, Held, split
from tests.unit.checkpoint.build import changed, live_digest, make_state, memory_store, save

SPECS = {"a": ("F32", (300, 100)), "b": ("U8", (70_000,)), "c": ("F64", (5, 7, 900)), "d": ("F32", (0, 3))}
fractions = st.floats(0, 1, exclude_max=True)
spans = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), fractions, fractions).map(lambda t: (t[0], min(t[1:]), max(t[1:]))),
    max_size=4,
)
saves = st.lists(st.tuples(spans, st.lists(fractions, max_size=3), st.booleans()), min_size=1, max_size=5)


@pytest.fixture(autouse=True, scope="module")
def small_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incremental, "MIN_RUN_BYTES", 20_000)
        patch.setattr(incremental, "MAX_RUNS", 3)
        yield


@settings(deadline=None, max_examples=60)
@given(saves)
def test_any_history_reads_back(history: list[tuple[list[tuple[str, float, float]], list[float], bool]]) -> None:
    store, state = memory_store(), make_state(SPECS)
    manifests = [save(store, state, (0.5,), step=0, cells=True, pack_bytes=100_000)]
    states = [state]
    for step, (changes, cuts, full) in enumerate(history, 1):
        state = changed(state, step, *changes)
        base = None if full else manifests[-1]
        manifests.append(save(store, state, cuts, step=step, cells=True, base=base, pack_bytes=100_000))
        states.append(state)
    for manifest, before in zip(manifests, states, strict=True):
        assert verify(store, manifest) == []
        assert digest(store, manifest) == manifest.digest == live_digest(before)
        reader = Reader(store, manifest)
        assert all(reader.read(name).tobytes() == data for name, (_, _, data) in before.items())


@settings(deadline=None, max_examples=60)
@given(spans, st.lists(fractions, max_size=3), st.lists(fractions, max_size=3))
def test_a_split_is_a_tiling_of_what_is_held(
    changes: list[tuple[str, float, float]], before: list[float], now: list[float]
) -> None:
    store, state = memory_store(), make_state(SPECS)
    base = Base.read(store, save(store, state, before, step=0, cells=True))
    after = changed(state, 1, *changes)
    new = Base.read(store, save(store, after, now, step=1, cells=True))
    held = [
        Held(name, *base.tensors[name], 0, len(data) // {"F32": 4, "U8": 1, "F64": 8}[dtype], new.cells[name])
        for name, (dtype, _, data) in after.items()
    ]
    for one, found in zip(held, split(held, base), strict=True):
        runs = sorted([*((ref.start, ref.stop) for ref in found.references), *found.cold, *found.hot])
        assert [runs[0][0], *(stop for _, stop in runs)] == [*(start for start, _ in runs), runs[-1][1]]
        assert (runs[0][0], runs[-1][1]) == (one.start, one.stop)
        assert len(found.references) <= incremental.MAX_RUNS
        item = {"F32": 4, "U8": 1, "F64": 8}[one.dtype]
        old, data = state[one.name][2], after[one.name][2]
        for start, stop in [*((ref.start, ref.stop) for ref in found.references), *found.cold]:
            assert old[start * item : stop * item] == data[start * item : stop * item]
