"""What is worked out once for many small tensors says the same as what is worked out for each."""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

import numpy as np
import pytest
from pydantic_core import to_json

from elastictrain_checkpoint import InvalidPiece, Manifest, PackWriter, Part, Piece, Store, commit
from elastictrain_checkpoint.errors import IncompleteCheckpoint
from elastictrain_checkpoint.header import HEADER_ALIGN_BYTES, pack_header
from elastictrain_checkpoint.manifest import parse_manifest
from elastictrain_checkpoint.pack import BoxData, cut_piece, cut_pieces
from tests.unit.checkpoint.build import cut, make_state, memory_store

NAMES = ["a", "a/b.c", 'quo"ted', "back\\slash", "ünïcode", "中文", "a b", "{}[],:", "'", "\N{GRINNING FACE}"]


def plain_header(boxes: list[BoxData]) -> bytes:
    """The header as one document that a library writes: the format's definition."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_VERSION": "1.0"}}
    sharding: dict[str, Any] = {}
    at = 0
    for box in boxes:
        key, (offsets, sizes) = box.name, box.box
        if key in sharding:
            key = f"{box.name}@{','.join(map(str, offsets))}"
            while key in sharding:
                key += "'"
        sharding[key] = {"saved_offsets": offsets}
        header[key] = {"dtype": box.dtype, "shape": sizes, "data_offsets": (at, at + box.size_bytes)}
        at += box.size_bytes
    header["__metadata__"]["DCP_SHARDING_INFO"] = to_json(sharding).decode()
    text = to_json(header)
    text += b" " * (-(len(text) + 8) % HEADER_ALIGN_BYTES)
    return struct.pack("<Q", len(text)) + text


def boxes_of(names: list[str]) -> list[BoxData]:
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 3), (0, 4)]
    out = []
    for number, name in enumerate(names):
        shape = shapes[number % len(shapes)]
        data = np.zeros(shape, dtype=np.float32)
        rope = (memoryview(data.tobytes()),) if data.size else ()
        out.append(BoxData(name, "F32", shape, ((0,) * len(shape), shape), rope))
    return out


@pytest.mark.parametrize(
    "names", [[], NAMES, NAMES * 2, ["a", "a@0,0", "a", "a"]], ids=["none", "odd", "twice", "taken"]
)
def test_a_header_from_templates_is_the_one_of_a_json_library(names: list[str]) -> None:
    boxes = boxes_of(names)
    assert pack_header(boxes) == plain_header(boxes)
    size = struct.unpack("<Q", pack_header(boxes)[:8])[0]
    assert len(json.loads(pack_header(boxes)[8 : 8 + size])) == len(names) + 1


def test_pieces_are_cut_together_as_each_by_itself() -> None:
    pieces = [piece for writer in cut(make_state(), [0.3, 0.6], [0.5]) for piece in writer]
    pieces += [Piece("again", "F32", (2, 3), 0, np.ones((2, 3), dtype=np.float32)) for _ in range(3)]
    together, apart = cut_pieces(pieces), [cut_piece(piece) for piece in pieces]
    assert together == apart
    assert [[box.size_bytes for box in found] for found in together] == [
        [sum(map(len, box.rope)) for box in found] for found in apart
    ]


@pytest.mark.parametrize("dim", [True, np.int64(1), 1.0])
def test_a_shape_that_only_equals_one_of_whole_numbers_is_refused(dim: Any) -> None:
    data = np.zeros((1, 2), dtype=np.float32)
    with pytest.raises(InvalidPiece, match="not an integer"):
        cut_pieces([Piece("right", "F32", (1, 2), 0, data), Piece("wrong", "F32", (dim, 2), 0, data)])


def test_bytes_that_are_not_those_of_the_shape_are_refused_after_some_that_are() -> None:
    right, wrong = np.zeros((2, 3), dtype=np.float32), np.zeros((2, 4), dtype=np.float32)
    with pytest.raises(InvalidPiece, match="wrong: elements"):
        cut_pieces([Piece("right", "F32", (2, 3), 0, right), Piece("wrong", "F32", (2, 3), 0, wrong)])


def written(store: Store) -> Part:
    pieces = [
        Piece(name, "F32", (2, 3), 0, np.full((2, 3), number, dtype=np.float32)) for number, name in enumerate(NAMES)
    ]
    return PackWriter(store, step=1, attempt="a", writer="w0").write(pieces)


def facts(manifest: Manifest) -> dict[str, Any]:
    found = {one.name: getattr(manifest, one.name) for one in dataclasses.fields(manifest)}
    table, found["sums"] = found.pop("table"), [one.tolist() for one in manifest.sums]
    return found | {key: np.asarray(value).tolist() for key, value in vars(table).items() if key != "boxes"}


def test_what_a_commit_gives_is_what_its_text_says() -> None:
    store = memory_store()
    made = commit(store, step=1, attempt="a", generation=1, parts=[written(store)], tree={"tensors": {"a": (1, None)}})
    assert facts(made) == facts(parse_manifest(made.raw, 1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one.shape.__setitem__(0, True),
        lambda one: one.shape.__setitem__(0, 2.0),
        lambda one: one.chunks.__setitem__(0, (0, 1 << 70, [0, 0], [2, 3])),
        lambda one: one.chunks.__setitem__(0, (*one.chunks[0], 1)),
        lambda one: one.chunks.__setitem__(0, (False, *one.chunks[0][1:])),
        lambda one: one.chunks.__setitem__(0, (1, *one.chunks[0][1:])),
        lambda one: setattr(one, "dtype", b"F32"),
    ],
    ids=["a truth as size", "a fraction as size", "a place beyond", "too long", "a truth as file", "no such file", "b"],
)
def test_a_part_that_was_spoiled_in_memory_is_refused(spoil: Any) -> None:
    store = memory_store()
    part = written(store)
    spoil(part.tensors["a"])
    with pytest.raises((IncompleteCheckpoint, InvalidPiece, ValueError)):
        commit(store, step=1, attempt="a", generation=1, parts=[part])
    assert store.list("step-00000001") == ["a"]
