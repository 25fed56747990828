"""A thousand flipped bits, all over packs and manifests: every one is found, and what it hit is named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from elastictrain_checkpoint import (
    CorruptData,
    InvalidManifest,
    Manifest,
    Reader,
    Request,
    Store,
    hashing,
    load,
    parse_manifest,
    verify,
)
from elastictrain_checkpoint import commit as commit_function
from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.together import read_boxes
from elastictrain_checkpoint.wants import Want
from tests.unit.checkpoint.build import State, make_state, save

BLOCK = 4096
FLIPS_OF_PACKS, FLIPS_OF_MANIFESTS = 900, 300


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "SUM_BLOCK_BYTES", BLOCK)
    monkeypatch.setitem(commit_function.__globals__, "SUM_BLOCK_BYTES", BLOCK)


def flip_on_disk(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def tensors_in(manifest: Manifest, number: int, block: int) -> set[str]:
    """By hand: the tensors with bytes in a block."""
    table, low = manifest.table, block * BLOCK
    return {
        table.names[table.tensor[row]]
        for row in range(len(table))
        if table.file[row] == number
        and max(int(table.start[row]), low) < min(int(table.start[row] + table.size_bytes[row]), low + BLOCK)
    }


def read_everything(store: Store, manifest: Manifest, how: str) -> None:
    source = Reader(store, manifest)
    if how == "flat":
        source.read_many([Request(name, 0, num_elements(shape)) for name, (_, shape) in source.tensors.items()])
    elif how == "one by one":
        for name in source.tensors:
            source.read(name)
    else:
        wants = [Want(name, (0,) * len(shape), shape) for name, (_, shape) in source.tensors.items()]
        outs = [bytearray(len(source.read(want.name))) for want in wants]
        read_boxes(source, wants, outs)


def checkpoint(tmp_path: Path) -> tuple[Store, State, Manifest]:
    store = Store(tmp_path)
    state = make_state()
    return store, state, save(store, state, (0.3, 0.7), step=7, pack_bytes=40_000)


def test_every_flip_in_a_pack_is_found_and_named(tmp_path: Path) -> None:
    store, state, manifest = checkpoint(tmp_path)
    draw = random.Random(4)
    assert len(manifest.files) > 3
    assert verify(store, manifest) == []
    found = in_headers = 0
    for flip in range(FLIPS_OF_PACKS):
        number = draw.randrange(len(manifest.files))
        at, bit = draw.randrange(manifest.files[number].size_bytes), draw.randrange(8)
        path, block = manifest.paths[number], at // BLOCK
        hit = tensors_in(manifest, number, block)
        flip_on_disk(tmp_path / path, at, bit)
        [problem] = verify(store, manifest)
        assert (problem.file, problem.block, set(problem.tensors)) == (path, block, hit), f"flip {flip}"
        how = ("flat", "one by one", "boxes")[flip % 3]
        if hit:
            with pytest.raises(CorruptData, match="its hash differs from the manifest's") as caught:
                read_everything(store, manifest, how)
            assert (caught.value.file, caught.value.block, set(caught.value.tensors)) == (path, block, hit)
            assert all(name in str(caught.value) for name in hit)
        else:
            in_headers += 1  # nothing of the state: verify finds it, and every tensor reads as it was written
            source = Reader(store, manifest)
            assert all(source.read(name).tobytes() == raw for name, (_, _, raw) in state.items())
        found += 1
        flip_on_disk(tmp_path / path, at, bit)
    assert found == FLIPS_OF_PACKS
    assert 0 < in_headers < FLIPS_OF_PACKS / 2
    assert verify(store, manifest) == []


def test_every_flip_in_a_manifest_is_found(tmp_path: Path) -> None:
    store, _, manifest = checkpoint(tmp_path)
    draw = random.Random(5)
    path = tmp_path / manifest.path
    for _ in range(FLIPS_OF_MANIFESTS):
        at, bit = draw.randrange(len(manifest.raw)), draw.randrange(8)
        flip_on_disk(path, at, bit)
        with pytest.raises(InvalidManifest, match=r"^step-00000007/MANIFEST\.json: ") as caught:
            load(store, 7)
        assert caught.value.file == manifest.path
        flip_on_disk(path, at, bit)
    assert parse_manifest(path.read_bytes(), 7).raw == manifest.raw
