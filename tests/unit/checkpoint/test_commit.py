"""The commit: what it refuses, what it never overwrites, what the newest checkpoint is."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from elastictrain_checkpoint import (
    AlreadyCommitted,
    CorruptData,
    IncompleteCheckpoint,
    InvalidPiece,
    NoCheckpoint,
    PackWriter,
    Part,
    Piece,
    Reader,
    Skipped,
    StaleGeneration,
    Store,
    commit,
    discard,
    list_steps,
    load,
    newest,
)
from elastictrain_checkpoint.remote import RemoteBackend
from tests.unit.checkpoint.build import flip, live_digest, make_state, memory_store, save, write_parts


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "ckpt") if request.param == "file" else memory_store()


def test_state_beyond_tensors_aliases_and_facts_come_back(store: Store) -> None:
    tree = {"lr": 3e-4, "betas": (0.9, 0.95), "tokens": 2**70, "best": float("inf"), "order": {1: "a"}}
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    save(store, make_state(), step=7, tree=tree, aliases={"model/head": "model/half"}, info={"world": 4}, now=when)
    manifest = newest(store)
    assert manifest is not None
    assert (manifest.step, manifest.attempt, manifest.generation) == (7, "a1", 1)
    assert (manifest.tree, manifest.info, manifest.time) == (tree, {"world": 4}, "2026-01-02T03:04:05.000+00:00")
    source = Reader(store, manifest)
    assert source.tree == tree
    assert source.tensors["model/head"] == ("BF16", (3, 50, 70))
    assert source.read("model/head").tobytes() == make_state()["model/half"][2]
    assert manifest.digest == live_digest(make_state(), {"model/head": "model/half"})
    assert manifest.digest != live_digest(make_state())


def test_a_checkpoint_may_hold_no_tensors_at_all(store: Store) -> None:
    assert commit(store, step=0, attempt="a", generation=0, parts=[], tree=[1]).tensors == {}
    found = newest(store)
    assert found is not None
    assert found.tree == [1]


def test_an_empty_store_has_no_newest(store: Store) -> None:
    assert newest(store) is None
    assert list_steps(store) == []
    with pytest.raises(NoCheckpoint, match=r"has no checkpoint of step 3; steps there: none$"):
        load(store, 3)


def test_a_manifest_is_never_overwritten(store: Store) -> None:
    first = save(store, make_state(seed=1), step=5, attempt="one", generation=3)
    with pytest.raises(AlreadyCommitted, match=r"step 5 was committed by attempt one of generation 3 at .*discard"):
        save(store, make_state(seed=2), step=5, attempt="two", generation=4)
    with pytest.raises(StaleGeneration, match=r"attempt one of generation 3 .*; generation 2 is out of date"):
        save(store, make_state(seed=1), step=5, attempt="old", generation=2)
    assert load(store, 5).raw == first.raw


def test_the_same_commit_again_gives_the_manifest_that_is_there(store: Store) -> None:
    parts = write_parts(store, make_state(), step=5, attempt="one")
    first, again = (commit(store, step=5, attempt="one", generation=3, parts=parts) for _ in range(2))
    assert again.raw == first.raw
    with pytest.raises(AlreadyCommitted):
        commit(store, step=5, attempt="one", generation=3, parts=parts, tree="another")
    with pytest.raises(StaleGeneration):
        commit(store, step=5, attempt="one", generation=2, parts=parts)


def test_a_manifest_that_cannot_be_read_is_not_overwritten_but_can_be_discarded(store: Store) -> None:
    manifest = save(store, make_state(), step=5)
    flip(store, manifest.path, 30)
    parts = write_parts(store, make_state(), step=5, attempt="two")
    with pytest.raises(AlreadyCommitted, match=r"cannot be read .*discard\(store, 5\)"):
        commit(store, step=5, attempt="two", generation=9, parts=parts)
    discard(store, 5)
    assert store.list("step-00000005") == []
    assert save(store, make_state(), step=5, attempt="three").attempt == "three"


def test_packs_are_never_overwritten(store: Store) -> None:
    write_parts(store, make_state(), step=5, attempt="one")
    before = store.read_all("step-00000005/one/w0000-00.safetensors")
    with pytest.raises(FileExistsError):
        write_parts(store, make_state(seed=9), step=5, attempt="one")
    assert store.read_all("step-00000005/one/w0000-00.safetensors") == before


def test_newest_passes_over_what_is_damaged_and_says_why(store: Store) -> None:
    for step in (1, 2, 3, 4, 5):
        save(store, make_state(seed=step), step=step)
    flip(store, "step-00000005/MANIFEST.json", 100)
    store.remove("step-00000004/a1/w0001-00.safetensors")
    path = "step-00000003/a1/w0000-00.safetensors"
    store.put(path, store.read_all(path)[:-1])
    write_parts(store, make_state(), step=6, attempt="never")
    skipped: list[Skipped] = []
    found = newest(store, skipped)
    assert found is not None
    assert found.step == 2
    assert [s.step for s in skipped] == [5, 4, 3]
    assert "altered" in skipped[0].why
    assert "w0001-00.safetensors is missing" in skipped[1].why
    assert "bytes, not " in skipped[2].why
    with pytest.raises(CorruptData, match="is missing, not"):
        load(store, 4)


@pytest.mark.parametrize("hint", [b"999", b"-1", b"x", b"", b"99999999999999999999999"])
def test_the_hint_is_only_a_hint(store: Store, hint: bytes) -> None:
    save(store, make_state(), step=5)
    store.put("LATEST", hint)
    skipped: list[Skipped] = []
    found = newest(store, skipped)
    assert found is not None
    assert (found.step, skipped) == (5, [])


def test_the_hint_helps_where_a_listing_is_stale(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, make_state(), step=5)
    monkeypatch.setattr(Store, "list", lambda self, path="": [])
    found = newest(store)
    assert found is not None
    assert found.step == 5


def piece(start: int, stop: int, name: str = "t", dtype: str = "U8", shape: tuple[int, ...] = (10_000,)) -> Piece:
    return Piece(name, dtype, shape, start, bytes(stop - start))


def votes(store: Store, *writers: list[Piece]) -> list[Part]:
    return [PackWriter(store, step=1, attempt="a", writer=f"w{i}").write(pieces) for i, pieces in enumerate(writers)]


@pytest.mark.parametrize(
    ("writers", "complaint"),
    [
        ([[piece(0, 4096)]], "t: elements .* 10000.* no chunk|cover every tensor"),
        ([[piece(4096, 10_000)]], r"t: cells \[0, 1\] of the digest are missing"),
        ([[piece(0, 8192)], [piece(4096, 10_000)]], r"t: cells \[1, 2\] of the digest are twice"),
        ([[piece(0, 10_000)], [piece(0, 10_000, dtype="I8")]], r"w1 has I8 \[10000\], others have U8 \[10000\]"),
        ([[piece(0, 4096)], [piece(8192, 10_000)]], "missing"),
    ],
)
def test_gaps_overlaps_and_disagreement_are_refused(writers: list[list[Piece]], complaint: str) -> None:
    store = memory_store()
    parts = votes(store, *writers)
    with pytest.raises(IncompleteCheckpoint, match=complaint):
        commit(store, step=1, attempt="a", generation=1, parts=parts)
    assert newest(store) is None


def test_chunks_that_do_not_tile_are_refused_even_if_the_digest_is_whole() -> None:
    store = memory_store()
    [part] = votes(store, [piece(0, 10_000)])
    record = part.tensors["t"]
    [(file, start, _, _)] = record.chunks
    lie = replace(record, chunks=[(file, start, [0], [9_999])])
    with pytest.raises(IncompleteCheckpoint, match=r"t: elements \[9999, 10000\) are in no chunk"):
        commit(store, step=1, attempt="a", generation=1, parts=[part.model_copy(update={"tensors": {"t": lie}})])


def test_parts_of_others_and_twice_the_same_are_refused() -> None:
    store = memory_store()
    [part] = votes(store, [piece(0, 10_000)])
    with pytest.raises(IncompleteCheckpoint, match="is in two parts"):
        commit(store, step=1, attempt="a", generation=1, parts=[part, part])
    with pytest.raises(IncompleteCheckpoint, match=r"is of step 1, attempt a; expected step 1, attempt b"):
        commit(store, step=1, attempt="b", generation=1, parts=[part])
    with pytest.raises(IncompleteCheckpoint, match=r"expected step 2, attempt a"):
        commit(store, step=2, attempt="a", generation=1, parts=[part])


@pytest.mark.parametrize("aliases", [{"t": "t"}, {"x": "nowhere"}, {"x": "t", "y": "x"}])
def test_aliases_must_lead_to_a_tensor(aliases: dict[str, str]) -> None:
    store = memory_store()
    with pytest.raises(IncompleteCheckpoint, match="alias"):
        commit(store, step=1, attempt="a", generation=1, parts=votes(store, [piece(0, 10_000)]), aliases=aliases)
    assert newest(store) is None


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_packs_must_be_as_voted(store: Store, damage: str) -> None:
    parts = votes(store, [piece(0, 10_000)])
    path = "step-00000001/a/w0-00.safetensors"
    data = store.read_all(path)
    store.remove(path)
    if damage != "missing":
        store.put(path, data[:-1] if damage == "short" else data + b"x")
    with pytest.raises(IncompleteCheckpoint, match="nothing was committed"):
        commit(store, step=1, attempt="a", generation=1, parts=parts)
    assert newest(store) is None


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (piece(0, 10_000, dtype="F4"), "dtype 'F4' is not one of BF16, BOOL"),
        (piece(1, 10_000), "neither a multiple of 4096 nor the tensor's end"),
        (piece(0, 5_000), "neither a multiple of 4096 nor the tensor's end"),
        (piece(0, 10_001), r"\[0, 10001\) do not lie in shape \[10000\]"),
        (piece(-4096, 0), r"\[-4096, 0\) do not lie"),
        (piece(0, 9_999, dtype="F16"), "not whole elements"),
        (piece(0, 10_000, name="__metadata__"), "reserved"),
        (piece(0, 10_000, name=""), "empty"),
        (piece(0, 10_000, name="a\nb"), "not printable"),
        (piece(0, 10_000, shape=(-1,)), "dimension"),
        (piece(0, 10_000, shape=(2**40, 2**40)), "more than 2\\^56"),
        (Piece("t", "U8", (2, 2), 0, np.zeros((2, 2), np.uint8).T), "not C-contiguous"),
        (Piece("t", "U8", (2, 2), 0, [1, 2, 3, 4]), "t, buffer 0: data is a int, expected a buffer"),
        (Piece("t", "U8", (10_000,), 0, {1: 2}), "t: data is a dict, expected a buffer"),
        (Piece("t", "F16", (8192,), 0, [bytes(8192), bytes(4096), bytes(4096)]), r"buffer 1 of 3 .*multiple of 8192 "),
        (Piece("t", "U8", (10_000,), 0, [bytes(4096), bytes(4)]), "4100 is neither a multiple of 4096"),
    ],
)
def test_pieces_that_the_format_cannot_hold_are_refused_before_anything_is_written(bad: Piece, complaint: str) -> None:
    store = memory_store()
    with pytest.raises(InvalidPiece, match=complaint):
        votes(store, [piece(0, 100, name="good", shape=(100,)), bad])
    assert store.list() == []


def test_names_cannot_climb(store: Store) -> None:
    for name in ("", "..", "a/b", ".a", "a b", "x" * 65):
        with pytest.raises(InvalidPiece, match="attempt"):
            PackWriter(store, step=1, attempt=name, writer="w")
        with pytest.raises(InvalidPiece, match="writer"):
            PackWriter(store, step=1, attempt="a", writer=name)
    for step in (-1, 1.5, True):
        with pytest.raises(InvalidPiece, match="step"):
            PackWriter(store, step=step, attempt="a", writer="w")  # type: ignore[arg-type]
    for path in ("../x", "/x", "a//b", "a/../b", "a\\b", "."):
        with pytest.raises(InvalidPiece, match="not a plain relative path"):
            store.read_all(path)


def test_parts_are_refused_if_they_are_not_parts() -> None:
    for text in ("", "[]", "{}", '{"version":2}'):
        with pytest.raises(InvalidPiece, match="not a part of a checkpoint"):
            Part.from_json(text)


def test_thousands_of_chunks_are_parsed_fast() -> None:
    """20,000 chunks: the table is built by columns; a loop of NumPy calls per chunk would take minutes."""
    store = memory_store()
    specs = {f"layer.{i}": ("U8", (2, 4096)) for i in range(10_000)}
    parts = votes(
        store,
        [Piece(n, d, s, 0, bytes(4096)) for n, (d, s) in specs.items()],
        [Piece(n, d, s, 4096, bytes(4096)) for n, (d, s) in specs.items()],
    )
    manifest = commit(store, step=1, attempt="a", generation=1, parts=parts)
    assert len(manifest.table) == 20_000
    assert sum(math.prod(shape) for _, shape in manifest.tensors.values()) == manifest.table.size_bytes.sum()


def test_writers_may_write_in_several_calls_and_small_packs() -> None:
    store = memory_store()
    state = make_state()
    writer = PackWriter(store, step=1, attempt="a", writer="w", pack_bytes=20_000)
    parts = [writer.write([Piece(name, dtype, shape, 0, data)]) for name, (dtype, shape, data) in state.items()]
    manifest = commit(store, step=1, attempt="a", generation=1, parts=parts)
    assert len(set(manifest.paths)) == len(state)
    assert manifest.digest == live_digest(state)
    assert json.loads(manifest.raw)["hash"] == {"algo": "xxh3-64", "block": 1 << 20}


def test_an_upload_that_fails_leaves_no_pack(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(blocks: object) -> object:
        yield memoryview(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.create("step-00000001/a/w-00.safetensors", failing(None))  # type: ignore[arg-type]
    assert store.size("step-00000001/a/w-00.safetensors") is None


class StaleMemory(MemoryFileSystem):  # type: ignore[misc]
    """An object store whose look is stale: only its conditional create knows the truth."""

    cachable = False

    def exists(self, path: str, **kwargs: object) -> bool:
        return False

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        if mode == "create" and self.size_of(path) is not None:
            raise FileExistsError(path)
        super().pipe_file(path, value)

    def size_of(self, path: str) -> int | None:
        found = self.store.get(self._strip_protocol(path))
        return None if found is None else found.size


class PlainMemory(MemoryFileSystem):  # type: ignore[misc]
    """An object store without a conditional create."""

    cachable = False

    def pipe_file(self, path: str, value: bytes) -> None:
        super().pipe_file(path, value)


@pytest.mark.parametrize("system", [StaleMemory, PlainMemory])
def test_object_stores_publish_once_with_or_without_a_conditional_create(system: type[MemoryFileSystem]) -> None:
    store = Store("stub", backend=RemoteBackend(system(), f"/{uuid.uuid4().hex}"))
    store.publish("step-00000001/MANIFEST.json", b"first")
    with pytest.raises(FileExistsError):
        store.publish("step-00000001/MANIFEST.json", b"second")
    assert store.read_all("step-00000001/MANIFEST.json") == b"first"
