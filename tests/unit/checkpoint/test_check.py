"""Damage is found, named, and never handed out; reading reads no more than it must."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elastictrain_checkpoint import (
    CorruptData,
    InvalidPiece,
    Manifest,
    Reader,
    Store,
    block_hashes,
    combine_digest,
    digest,
    verify,
)
from elastictrain_checkpoint.posix import PosixBackend
from tests.unit.checkpoint.build import State, flip, live_digest, make_state, save

MIB = 1 << 20
STATE = make_state({"big": ("F32", (1000, 1000)), "second": ("BF16", (1100, 1000)), "tiny": ("U8", (10,))})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Store, Manifest]:
    store = Store(f"file://{tmp_path}/run")
    return store, save(store, STATE, (), step=3)


def test_sound(saved: tuple[Store, Manifest]) -> None:
    store, manifest = saved
    seen: list[tuple[int, int]] = []
    assert verify(store, manifest, lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (manifest.size_bytes, manifest.size_bytes)
    assert digest(store, manifest) == manifest.digest == live_digest(STATE)


def test_a_flipped_byte_names_tensor_block_and_file(saved: tuple[Store, Manifest]) -> None:
    store, manifest = saved
    [path] = manifest.paths
    flip(store, path, 2 * MIB + 17)
    [problem] = verify(store, manifest)
    assert (problem.file, problem.block, problem.tensors) == (path, 2, ("big",))
    assert problem.message == (
        f"step 3: {path}, block 2 (bytes {2 * MIB} to {3 * MIB}): its hash differs from the manifest's; "
        f"tensors in it: big"
    )
    source = Reader(store, manifest)
    out = np.full(4_000_000, 7, dtype=np.uint8)
    with pytest.raises(CorruptData, match="block 2 "):
        source.read_flat("big", 0, 1_000_000, out=out)
    assert source.read("second").tobytes() == STATE["second"][2]
    assert source.read_flat("big", 0, 1000).tobytes() == STATE["big"][2][:4000]
    with pytest.raises(CorruptData, match="block 2 "):
        digest(store, manifest)


def test_a_damaged_header_is_found_by_verify(saved: tuple[Store, Manifest]) -> None:
    store, manifest = saved
    flip(store, manifest.paths[0], 20)
    [problem] = verify(store, manifest)
    assert problem.block == 0
    assert "big" in problem.tensors


def test_cut_short(saved: tuple[Store, Manifest]) -> None:
    store, manifest = saved
    [path] = manifest.paths
    store.put(path, store.read_all(path)[: 4 * MIB + 5])
    problems = verify(store, manifest)
    assert [(p.block, p.tensors) for p in problems] == [(4, ("second",))]
    assert f"the file has {4 * MIB + 5} bytes, not {manifest.size_bytes}" in problems[0].message
    source = Reader(store, manifest)
    assert source.read("big").tobytes() == STATE["big"][2]
    with pytest.raises(CorruptData, match=r"block 5 .*the file is cut short \(0 of \d+ bytes") as caught:
        source.read("tiny")
    assert caught.value.tensors == ("second", "tiny")
    with pytest.raises(CorruptData, match=r"block 4 .*the file is cut short \(5 of \d+ bytes"):
        source.read_flat("second", 95_200, 95_300)


def test_too_long(saved: tuple[Store, Manifest]) -> None:
    store, manifest = saved
    store.put(manifest.paths[0], store.read_all(manifest.paths[0]) + b"x")
    [problem] = verify(store, manifest)
    assert (problem.block, problem.tensors) == (None, ("big", "second", "tiny"))


def test_missing(saved: tuple[Store, Manifest]) -> None:
    store, manifest = saved
    store.remove(manifest.paths[0])
    [problem] = verify(store, manifest)
    assert (problem.file, problem.block) == (manifest.paths[0], None)
    assert problem.tensors == ("big", "second", "tiny")
    with pytest.raises(CorruptData, match="the file is missing; tensors in it: big, second, tiny"):
        Reader(store, manifest).read("big")


@pytest.mark.parametrize("window_bytes", [MIB, 5 * MIB // 2, 1 << 30], ids=["a block", "no whole blocks", "all"])
def test_several_threads_find_what_one_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    """In the order of the files, and each byte read once."""
    monkeypatch.setattr(PosixBackend, "read_window_bytes", window_bytes)
    store = Store(tmp_path)
    manifest = save(store, make_state({f"part{i}": ("F32", (1 + i, 1000, 500)) for i in range(4)}), (0.3, 0.6), step=3)
    first, gone, last = (manifest.paths[number] for number in (0, 4, 8))
    flip(store, first, 5 * MIB + 17)
    flip(store, first, MIB + 17)
    flip(store, last, 2 * MIB + 17)
    store.remove(gone)
    read, inner = list[int](), Store.read_into

    def counted(self: Store, path: str, offset: int, out: memoryview) -> int:
        read.append(len(out))
        return inner(self, path, offset, out)

    monkeypatch.setattr(Store, "read_into", counted)
    one = verify(store, manifest, threads=1)
    assert [(problem.file, problem.block) for problem in one] == [(first, 1), (first, 5), (gone, None), (last, 2)]
    there = sum(file.size_bytes for file, path in zip(manifest.files, manifest.paths, strict=True) if store.size(path))
    assert sum(read) == there
    seen: list[tuple[int, int]] = []
    assert verify(store, manifest, lambda *at: seen.append(at), threads=4) == one
    assert sum(read) == 2 * there
    assert seen == sorted(seen), "progress goes forward"
    assert seen[-1] == (manifest.size_bytes, manifest.size_bytes)


def test_a_store_that_cannot_be_read_is_no_damage(
    saved: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Store, path: str, offset: int, out: memoryview) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Store, "read_into", fails)
    store, manifest = saved
    with pytest.raises(PermissionError):
        verify(store, manifest, threads=4)


def test_every_byte_of_storage_is_read_once(saved: tuple[Store, Manifest]) -> None:
    store, manifest = saved
    source = Reader(store, manifest)
    for name in manifest.table.names:
        source.read(name)
    assert source.read_bytes == manifest.size_bytes
    part = Reader(store, manifest)
    part.read_flat("big", 300_000, 300_010)  # one hash block
    assert part.read_bytes == MIB


def test_reading_into_a_given_buffer(saved: tuple[Store, Manifest]) -> None:
    source = Reader(*saved)
    whole = np.zeros((1000, 1000), dtype=np.float32)
    source.read_flat("big", 0, 500_000, out=whole[:500])
    source.read_flat("big", 500_000, 1_000_000, out=whole[500:])
    assert whole.tobytes() == STATE["big"][2]
    frozen = np.zeros(40, np.uint8)
    frozen.flags.writeable = False
    for out in (np.zeros(39, np.uint8), np.zeros((20, 4), np.uint8)[::2], frozen):
        with pytest.raises(InvalidPiece, match="out must be a writable contiguous buffer of 40 bytes"):
            source.read_flat("big", 0, 10, out=out)


def test_ranges_outside_and_unknown_names(saved: tuple[Store, Manifest]) -> None:
    source = Reader(*saved)
    for start, stop in ((-1, 5), (5, 4), (0, 11)):
        with pytest.raises(InvalidPiece, match=r"do not lie in shape \[10\]"):
            source.read_flat("tiny", start, stop)
    with pytest.raises(KeyError, match="step 3 has no tensor 'nothing'"):
        source.read("nothing")


def test_the_digest_sees_names_types_shapes_bytes_and_aliases() -> None:
    data = bytes(range(12))
    one: State = {"a": ("U8", (12,), data)}
    others: list[State] = [
        {"b": ("U8", (12,), data)},
        {"a": ("I8", (12,), data)},
        {"a": ("U8", (3, 4), data)},
        {"a": ("U8", (12,), data[::-1])},
        {**one, "b": ("U8", (0,), b"")},
        {},
    ]
    digests = [live_digest(state) for state in (one, *others)]
    digests += [live_digest(one, {"x": "a"}), live_digest(one, {"y": "a"})]
    assert len(set(digests)) == len(digests)
    assert live_digest(dict(reversed(make_state().items()))) == live_digest(make_state())


def test_hashes_of_runs_join() -> None:
    data = np.arange(10_000, dtype=np.float32)
    whole = block_hashes(data, 4)
    assert len(whole) == 3 * 16
    assert block_hashes(data[:8192], 4) + block_hashes(data[8192:], 4) == whole
    assert block_hashes(np.zeros((0, 3)), 8) == b""
    assert len(block_hashes(np.float64(1), 8)) == 16
    with pytest.raises(InvalidPiece, match="16 bytes of cell hashes, expected 48"):
        combine_digest({"t": ("F32", (10_000,), whole[:16])})
    with pytest.raises(InvalidPiece, match="10 bytes are not a whole number of elements of 4 bytes"):
        block_hashes(bytes(10), 4)


def test_the_digest_is_the_same_in_every_release() -> None:
    """A golden value: manifests and audits hold digests for years."""
    data = np.arange(10_000, dtype="<f4")
    got = combine_digest({"w": ("F32", (100, 100), block_hashes(data, 4))}, {"tied": "w"})
    assert got == "33033ee7b1673e19e0805ef40c063bc531f5120c95cf6a2464bdff9081719a98"
