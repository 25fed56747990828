"""Unchanged runs are referred to: little is written, nothing else changes, and lies are refused."""

from __future__ import annotations

import json
import math

import pytest

from elastictrain_checkpoint import (
    Base,
    CorruptData,
    IncompleteCheckpoint,
    InvalidPiece,
    Manifest,
    PackWriter,
    Reader,
    Store,
    commit,
    digest,
    discard,
    list_steps,
    load,
    newest,
    parse_manifest,
    prune,
    verify,
)
from elastictrain_checkpoint.errors import InvalidManifest
from tests.unit.checkpoint.build import (
    State,
    changed,
    cut,
    flip,
    live_digest,
    make_state,
    memory_store,
    save,
    sign,
    write_parts,
)

SPECS = {
    "frozen": ("F32", (1024, 512)),
    "embed": ("F32", (2048, 512)),
    "head": ("F32", (256, 512)),
    "bias": ("F32", (7,)),
    "scalar": ("F64", ()),
    "empty": ("F32", (0, 5)),
}
FULL = make_state(SPECS)


def written_bytes(manifest: Manifest) -> int:
    return sum(file.size_bytes - file.data_start for file in manifest.files if not file.path.startswith("../"))


def check_all(store: Store, manifest: Manifest, state: State) -> None:
    assert verify(store, manifest) == []
    assert digest(store, manifest) == manifest.digest == live_digest(state)
    reader = Reader(store, load(store, manifest.step))
    assert all(reader.read(name).tobytes() == data for name, (_, _, data) in state.items())


@pytest.fixture
def store() -> Store:
    return memory_store()


@pytest.fixture
def first(store: Store) -> Manifest:
    return save(store, FULL, (), step=1, cells=True)


def test_what_is_unchanged_is_not_written(store: Store, first: Manifest) -> None:
    state = changed(FULL, 1, ("head", 0, 1), ("embed", 0.25, 0.5))
    second = save(store, state, (), step=2, base=first)
    assert second.base == (1,)
    assert second.digest == save(memory_store(), state, (), step=2).digest
    assert written_bytes(second) == 256 * 512 * 4 + 512 * 512 * 4
    assert len(second.table) == 3 + 5  # embed is in three chunks, everything else in one
    check_all(store, second, state)


def test_nothing_is_written_when_nothing_changed(store: Store, first: Manifest) -> None:
    second = save(store, FULL, (0.3, 0.6), step=2, base=first, cells=True)
    assert written_bytes(second) == 0
    check_all(store, second, FULL)


def test_references_lead_to_the_pack_and_never_to_a_reference(store: Store, first: Manifest) -> None:
    state, manifest = FULL, first
    for step in range(2, 7):
        state = changed(state, step, ("head", 0, 1))
        manifest = save(store, state, (), step=step, base=manifest, cells=True)
        assert manifest.base == (1,)
        assert written_bytes(manifest) == 256 * 512 * 4
    discard(store, 3)
    check_all(store, manifest, state)


def test_small_runs_are_written_with_their_neighbours(store: Store, first: Manifest) -> None:
    """Every 50th row changes: runs of 100 KiB in between are not worth a chunk each."""
    spans = [("embed", row / 2048, (row + 1) / 2048) for row in range(0, 2048, 50)]
    state = changed(FULL, 1, *spans)
    second = save(store, state, (), step=2, base=first)
    number = second.table.names.index("embed")
    assert second.table.bounds[number + 1] - second.table.bounds[number] == 1
    check_all(store, second, state)


def test_a_chunk_for_each_long_run_and_no_more(store: Store, first: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [("embed", row / 2048, (row + 1) / 2048) for row in range(0, 2048, 256)]
    state = changed(FULL, 1, *spans)
    many = save(store, state, (), step=2, base=first)
    monkeypatch.setattr("elastictrain_checkpoint.incremental.MAX_RUNS", 3)
    few = save(store, state, (), step=3, base=first)
    number = many.table.names.index("embed")
    assert [int(m.table.bounds[number + 1] - m.table.bounds[number]) for m in (many, few)] == [16, 7]
    check_all(store, many, state)
    check_all(store, few, state)


def test_a_pack_that_is_hardly_used_is_given_up(store: Store) -> None:
    """Only a tenth of the first pack is frozen: it moves once into a pack of its own, which is then referred to."""
    state = make_state({"frozen": ("F32", (256, 512)), "hot": ("F32", (2048, 512))})
    one = save(store, state, (), step=1, cells=True)
    state = changed(state, 1, ("hot", 0, 1))
    two = save(store, state, (), step=2, base=one, cells=True)
    assert (two.base, written_bytes(two), len(two.files)) == ((), 9 * 256 * 512 * 4, 2)
    state = changed(state, 2, ("hot", 0, 1))
    three = save(store, state, (), step=3, base=two, cells=True)
    assert (three.base, written_bytes(three)) == ((2,), 8 * 256 * 512 * 4)
    check_all(store, three, state)
    assert prune(store, 1, lease_s=0, now_s=1e12).removed == [1, 2]
    check_all(store, three, state)
    assert len(store.list("step-00000002/a1")) == 1


def test_another_type_or_shape_is_another_tensor(store: Store, first: Manifest) -> None:
    dtype, shape, data = FULL["head"]
    state = {**FULL, "head": (dtype, (shape[0] * shape[1],), data), "frozen": ("I32", *FULL["frozen"][1:])}
    second = save(store, state, (), step=2, base=first)
    assert written_bytes(second) == len(data) + len(FULL["frozen"][2])
    check_all(store, second, state)


def test_other_worlds_may_share_a_base(store: Store) -> None:
    first = save(store, FULL, (0.5,), step=1, cells=True, pack_bytes=1 << 20)
    state = changed(FULL, 1, ("head", 0.1, 0.2))
    for step, cuts in ((2, (0.2, 0.4, 0.9)), (3, ()), (4, (0.5,))):
        manifest = save(store, state, cuts, step=step, base=first, pack_bytes=1 << 20)
        assert written_bytes(manifest) < first.size_bytes / 4
        check_all(store, manifest, state)


def test_the_base_can_be_had_without_reading(store: Store) -> None:
    parts = write_parts(store, FULL, (0.5,), step=1, attempt="a1")
    manifest = commit(store, step=1, attempt="a1", generation=1, parts=parts)
    base = Base.of_parts(manifest, parts)
    assert base.cells == Base.read(store, save(store, FULL, (0.1,), step=2, cells=True)).cells
    assert written_bytes(save(store, FULL, (), step=3, base=base)) == 0
    with pytest.raises(InvalidPiece, match="these are not the parts of step 1: "):
        Base.of_parts(manifest, parts[:1])


def test_what_cannot_be_a_base(store: Store, first: Manifest) -> None:
    with pytest.raises(InvalidPiece, match="base is step 1, expected one before step 1"):
        PackWriter(store, step=1, attempt="x", writer="w", base=first)
    without = save(store, FULL, (), step=2)
    with pytest.raises(InvalidPiece, match=r"step 2 was committed without its cell hashes .*cells=True"):
        PackWriter(store, step=3, attempt="x", writer="w", base=without)
    path = next(path for path, _ in first.sidecars)
    flip(store, path, 5)
    with pytest.raises(
        CorruptData, match=r"step 1: step-00000001/a1/cells-.*\.bin: .*is not as it was written"
    ) as caught:
        Base.read(store, first)
    assert caught.value.file == path
    assert [(one.file, one.block) for one in verify(store, first)] == [(path, None)]
    store.remove(path)
    with pytest.raises(CorruptData, match="is missing"):
        Base.read(store, first)
    assert newest(store) is not None  # nobody needs it to restore


def test_a_base_with_other_blocks_is_refused(store: Store, first: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastictrain_checkpoint.incremental.SUM_BLOCK_BYTES", 1 << 16)
    with pytest.raises(InvalidPiece, match="has sums for blocks of 1048576 bytes, this library writes 65536"):
        Base.read(store, first)


def test_a_missing_pack_is_named(store: Store, first: Manifest) -> None:
    lost = first.paths[0]
    state = changed(FULL, 1, ("head", 0, 1))
    parts = write_parts(store, state, (), step=2, attempt="a1", base=first)
    store.remove(lost)
    with pytest.raises(IncompleteCheckpoint, match=f"step 2, attempt a1: {lost} is missing, not .* bytes; nothing was"):
        commit(store, step=2, attempt="a1", generation=1, parts=parts)
    assert 2 not in list_steps(store)


def test_a_pack_lost_later_makes_every_step_that_needs_it_unsound(store: Store, first: Manifest) -> None:
    save(store, changed(FULL, 1, ("head", 0, 1)), (), step=2, base=first)
    whole = save(store, FULL, (), step=0)
    store.remove(first.paths[0])
    with pytest.raises(CorruptData, match=f"step 2: {first.paths[0]} is missing"):
        load(store, 2)
    found = newest(store)
    assert found is not None
    assert found.step == whole.step


def test_parts_that_disagree_about_a_pack_they_refer_to(store: Store, first: Manifest) -> None:
    one, two = write_parts(store, FULL, (0.5,), step=2, attempt="a1", base=first)
    lie = two.files[0].model_copy(update={"size_bytes": two.files[0].size_bytes + 1})
    with pytest.raises(IncompleteCheckpoint, match=r"w0001 and others disagree on \.\./step-00000001/a1/w0000-00"):
        commit(store, step=2, attempt="a1", generation=1, parts=[one, two.model_copy(update={"files": [lie]})])


@pytest.mark.parametrize(
    ("path", "base", "complaint"),
    [
        ("../step-00000002/a1/w0000-00.safetensors", [2], "refers to the step itself"),
        ("../step-00000001/a1/w0000-00.safetensors", [1, 1], r"base lists the steps \[1, 1\], the packs lie in \[1\]"),
        ("../step-00000001/a1/w0000-00.safetensors", [0, 1], r"base lists the steps \[0, 1\], the packs lie in \[1\]"),
        ("../step-00000001/../step-00000001/a1/w0000-00.safetensors", [1], "is not that of a pack inside the store"),
        ("../../step-00000001/a1/w0000-00.safetensors", [1], "is not that of a pack inside the store"),
        ("../step-00000001/a1/../../../x.safetensors", [1], "is not that of a pack inside the store"),
    ],
)
def test_references_that_lead_in_circles_or_out_are_refused(
    store: Store, first: Manifest, path: str, base: list[int], complaint: str
) -> None:
    told = json.loads(save(store, FULL, (), step=2, base=first).raw)
    told["files"][0]["path"] = path
    with pytest.raises(InvalidManifest, match=complaint):
        parse_manifest(sign({**told, "base": base}), 2)


def test_bytes_of_a_pack_of_another_step_are_checked_and_named(store: Store, first: Manifest) -> None:
    second = save(store, FULL, (), step=2, base=first)
    flip(store, first.paths[0], 5000)
    with pytest.raises(CorruptData, match=r"step 2: step-00000001/a1/w0000-00\.safetensors, block 0") as caught:
        Reader(store, second).read("frozen")
    assert "frozen" in caught.value.tensors


def test_a_part_with_references_survives_its_journey(store: Store, first: Manifest) -> None:
    parts = [
        type(part).from_json(part.to_json())
        for part in write_parts(store, FULL, (0.5,), step=2, attempt="a1", base=first)
    ]
    check_all(store, commit(store, step=2, attempt="a1", generation=1, parts=parts), FULL)


def test_pieces_in_several_buffers_and_off_the_rows(store: Store) -> None:
    state = make_state({"t": ("F32", (3, 70_000)), "u": ("U8", (2_000_000,))})
    first = save(store, state, (0.37,), step=1, cells=True)
    state = changed(state, 1, ("t", 0.5, 0.51), ("u", 0.2, 0.21))
    second = save(store, state, (0.5,), step=2, base=first, breaks=(0.1, 0.6))
    assert written_bytes(second) < math.prod((3, 70_000)) * 4
    check_all(store, second, state)
    assert sum(len(part) for part in cut(state, (0.5,), (0.1, 0.6))) == 4
