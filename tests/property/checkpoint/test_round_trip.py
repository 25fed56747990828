"""Any world saves, any other loads; any flipped byte is found and named."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain_checkpoint import (
    ITEM_BYTES,
    CorruptData,
    Part,
    Reader,
    Request,
    check,
    commit,
    digest,
    hashing,
    list_steps,
    newest,
    reader,
    verify,
)
from elastictrain_checkpoint import commit as commit_function
from elastictrain_checkpoint.manifest import parse_manifest
from elastictrain_checkpoint.pack import BoxData, write_pack
from tests.unit.checkpoint.build import State, flip, live_digest, make_state, memory_store, save, sign, write_parts

BLOCK = 4096


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Many hash blocks, windows and packs in little data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "SUM_BLOCK_BYTES", BLOCK)
        patch.setitem(commit_function.__globals__, "SUM_BLOCK_BYTES", BLOCK)
        patch.setattr(reader, "WINDOW_BYTES", 3 * BLOCK)
        patch.setattr(reader, "CACHED_BLOCKS", 2)
        patch.setattr(check, "WINDOW_BYTES", 2 * BLOCK)
        yield


dims = st.sampled_from([0, 1, 2, 3, 7, 64, 90])
specs = st.dictionaries(
    st.text("abc./", min_size=1, max_size=5),
    st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(dims, max_size=3).map(tuple)),
    min_size=1,
    max_size=4,
).filter(lambda made: all(math.prod(shape) < 60_000 for _, shape in made.values()))
worlds = st.lists(st.floats(0, 1, exclude_max=True), max_size=4)
states = st.builds(make_state, specs, st.integers(0, 99))


@settings(deadline=None)
@given(states, worlds, worlds, worlds, st.sampled_from([5_000, 1 << 30]), st.data())
def test_any_world_to_any_world(
    state: State, saved: list[float], breaks: list[float], loading: list[float], pack_bytes: int, data: st.DataObject
) -> None:
    store = memory_store()
    committed = save(store, state, saved, pack_bytes=pack_bytes, breaks=breaks)
    manifest = newest(store)
    assert manifest is not None
    assert manifest.raw == committed.raw
    assert verify(store, manifest) == []
    assert digest(store, manifest) == manifest.digest == live_digest(state)

    source = Reader(store, manifest)
    assert source.tensors == {name: (dtype, shape) for name, (dtype, shape, _) in state.items()}
    requests, expected = [], []
    for name, (dtype, shape, raw) in state.items():
        count, item = math.prod(shape), ITEM_BYTES[dtype]
        assert source.read(name).tobytes() == raw
        borders = [0, *sorted(int(at * count) for at in loading), count]  # readers need no grid
        for start, stop in itertools.pairwise(borders):
            requests.append(Request(name, start, stop))
            expected.append(raw[start * item : stop * item])
    order = data.draw(st.permutations(range(len(requests))))
    found = source.read_many([requests[i] for i in order])
    assert [f.tobytes() for f in found] == [expected[i] for i in order]


@settings(deadline=None)
@given(states, worlds, worlds, worlds)
def test_the_digest_does_not_depend_on_layout(
    state: State, one: list[float], two: list[float], breaks: list[float]
) -> None:
    store = memory_store()
    a, b = save(store, state, one, step=1), save(store, state, two, step=2, pack_bytes=3000, breaks=breaks)
    assert a.digest == b.digest == live_digest(state)
    assert list_steps(store) == [1, 2]


@settings(deadline=None)
@given(states, worlds, st.data())
def test_a_flipped_bit_is_found_and_named(state: State, world: list[float], data: st.DataObject) -> None:
    store = memory_store()
    manifest = save(store, state, world)
    if not manifest.files:
        return
    number = data.draw(st.integers(0, len(manifest.files) - 1))
    at = data.draw(st.integers(0, manifest.files[number].size_bytes - 1))
    flip(store, manifest.paths[number], at, 1 << data.draw(st.integers(0, 7)))

    [problem] = verify(store, manifest)
    table, low = manifest.table, at // BLOCK * BLOCK
    hit = {
        table.names[table.tensor[row]]
        for row in range(len(table))
        if table.file[row] == number
        and max(table.start[row], low) < min(table.start[row] + table.size_bytes[row], low + BLOCK)
    }
    assert (problem.file, problem.block, set(problem.tensors)) == (manifest.paths[number], at // BLOCK, hit)
    source = Reader(store, manifest)
    for name, (_, _, raw) in state.items():
        if name in hit:
            with pytest.raises(CorruptData, match="its hash differs") as caught:
                source.read(name)
            assert name in caught.value.tensors
            assert (caught.value.file, caught.value.block) == (problem.file, problem.block)
        else:
            assert source.read(name).tobytes() == raw


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_a_flipped_bit_in_the_manifest_is_found(at: int, bit: int) -> None:
    store = memory_store()
    manifest = save(store, make_state(), step=5)
    save(store, make_state(), step=4)
    flip(store, manifest.path, at % len(manifest.raw), 1 << bit)
    skipped: list[object] = []
    found = newest(store, skipped)  # type: ignore[arg-type]
    assert found is not None
    assert found.step == 4
    assert len(skipped) == 1


@settings(deadline=None)
@given(st.data())
def test_boxes_that_are_no_flat_run_are_read_too(data: st.DataObject) -> None:
    """A tensor-parallel layout, as an import of another format would write it."""
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 40))
    split = data.draw(st.integers(1, columns - 1))
    whole = np.random.default_rng(0).integers(0, 2**31, (rows, columns), dtype=np.int32)
    store, files, chunks = memory_store(), [], []
    for number, (begin, end) in enumerate(((0, split), (split, columns))):
        view = memoryview(np.ascontiguousarray(whole[:, begin:end])).cast("B")
        box = BoxData("t", "I32", (rows, columns), ((0, begin), (rows, end - begin)), (view,))
        files.append(write_pack(store, f"step-00000001/tp/w{number}-00.safetensors", [box]))
        chunks.append([number, files[-1].data_start, [0, begin], [rows, end - begin]])
    document = json.loads(save(store, {"t": ("I32", (rows, columns), whole.tobytes())}, step=1).raw)
    document["files"] = [file.model_dump(by_alias=True) for file in files]
    document["tensors"]["t"]["chunks"] = chunks
    manifest = parse_manifest(sign(document))
    source = Reader(store, manifest)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, whole.size)] * 2)))
    assert source.read_flat("t", start, stop).tobytes() == whole.tobytes()[start * 4 : stop * 4]
    assert source.read("t").tobytes() == whole.tobytes()
    assert digest(store, manifest) == manifest.digest


@settings(deadline=None)
@given(states, worlds, st.randoms())
def test_parts_travel_as_json_and_in_any_order(state: State, world: list[float], random: object) -> None:
    one, two = memory_store(), memory_store()
    a = write_parts(one, state, world, step=3, attempt="x")
    b = [Part.from_json(part.to_json()) for part in write_parts(two, state, world, step=3, attempt="x")]
    random.shuffle(b)  # type: ignore[attr-defined]
    first = commit(one, step=3, attempt="x", generation=1, parts=a)
    second = commit(two, step=3, attempt="x", generation=1, parts=b)
    assert json.loads(first.raw)["tensors"] == json.loads(second.raw)["tensors"]
    assert first.files == second.files
