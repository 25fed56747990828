"""Many chunks: the table lies beside the manifest, is checked like the manifest, and says the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from elastictrain_checkpoint import (
    InvalidManifest,
    Manifest,
    Reader,
    Skipped,
    Store,
    copy_step,
    digest,
    load,
    newest,
    parse_manifest,
    prune,
    sidecar,
    verify,
)
from tests.unit.checkpoint.build import changed, flip, make_state, memory_store, save, sign

STATE = make_state()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(sidecar, "TABLE_CHUNKS", 5)
    return memory_store()


@pytest.fixture
def manifest(store: Store) -> Manifest:
    return save(store, STATE, (0.3, 0.7), step=1, cells=True, aliases={"model/head": "model/half"})


def test_the_table_beside_says_the_same_as_the_text(store: Store, manifest: Manifest, monkeypatch: Any) -> None:
    assert json.loads(manifest.raw)["tensors"] == {}
    assert manifest.chunks is not None
    found = load(store, 1)
    assert verify(store, found) == []
    assert digest(store, found) == manifest.digest
    reader = Reader(store, found)
    assert all(reader.read(name).tobytes() == data for name, (_, _, data) in STATE.items())
    monkeypatch.setattr(sidecar, "TABLE_CHUNKS", 10_000)
    text = save(memory_store(), STATE, (0.3, 0.7), step=1, aliases={"model/head": "model/half"})
    assert text.chunks is None
    assert (found.tensors, found.digest, found.paths) == (text.tensors, text.digest, text.paths)
    assert list(found.table.boxes) == list(text.table.boxes)
    for column in ("bounds", "tensor", "file", "start", "size_bytes", "flat_start", "flat_stop", "dense"):
        assert np.array_equal(getattr(found.table, column), getattr(text.table, column)), column


def test_it_is_needed_and_checked(store: Store, manifest: Manifest) -> None:
    assert manifest.chunks is not None
    path = f"step-00000001/{manifest.chunks.path}"
    with pytest.raises(InvalidManifest, match=f"its chunks lie in {re.escape(path)}: pass fetch=store.read_all"):
        parse_manifest(manifest.raw, 1)
    flip(store, path, 100)
    skipped: list[Skipped] = []
    assert newest(store, skipped) is None
    assert "is not as it was written" in skipped[0].why
    store.remove(path)
    with pytest.raises(InvalidManifest, match=f"its chunks lie in {re.escape(path)}, which is missing"):
        load(store, 1)


def test_increments_copies_and_retention_know_it(store: Store, manifest: Manifest) -> None:
    state = changed(STATE, 1, ("model/half", 0, 1))
    second = save(store, state, (), step=2, base=load(store, 1), cells=True)
    assert second.base == (1,)
    other = memory_store()
    copy_step(store, other, 2)
    assert prune(store, 1, lease_s=0, now_s=1e12).removed == [1]
    for place in (store, other):
        found = load(place, 2)
        assert verify(place, found) == []
        assert digest(place, found) == second.digest
    assert not any(name.startswith(("chunks", "cells")) for name in store.list("step-00000001/a1"))


def lie(**columns: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        for name, value in columns.items():
            values = table[name].to_pylist()
            values[0] = value
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, table[name].type))
        return table

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lie(name="zzz"), "its names are not ascending"),
        (lie(name=None), "or one is missing"),
        (lie(dtype=None), "or one is missing"),
        (lie(dtype="F7"), "dtype 'F7' is not one of"),
        (lie(shape=[9]), "of different lengths"),
        (lie(offsets=[]), "of different lengths"),
        (lie(start=[0]), "of different lengths"),
        (lie(start=None), "is not of lists of whole numbers"),
        (lie(sizes=[None, 50, 70]), "is not of lists of whole numbers"),
        (lie(file=[-1], start=[4096], offsets=[0, 0, 0], sizes=[3, 50, 70]), "points outside its file"),
        (lie(file=[0], start=[4096], offsets=[-1, 0, 0], sizes=[3, 50, 70]), "lies outside of shape"),
        (lie(file=[0], start=[4096], offsets=[0, 0, 0], sizes=[-3, 50, 70]), "lies outside of shape"),
        (lambda table: table.drop_columns(["shape"]), "not a table of chunks"),
        (lambda table: table.set_column(2, "shape", pa.array(["x"] * len(table))), "is not of lists of whole numbers"),
    ],
)
def test_tables_that_lie_are_refused(
    store: Store, manifest: Manifest, change: Callable[[pa.Table], pa.Table], complaint: str
) -> None:
    table = pa.ipc.open_file(pa.BufferReader(store.read_all(manifest.sidecars[0][0]))).read_all()
    order = sorted(range(len(table)), key=lambda row: table["name"][row].as_py() != "model/half")
    table = table.take(pa.array(order)) if "ascending" not in complaint else table
    if "ascending" not in complaint:
        table = table.set_column(0, "name", pa.array([f"{row:02d}" for row in range(len(table))]))
    table = change(table)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = bytes(sink.getvalue())
    record = sidecar.record_of(sidecar.CHUNKS, "a1", data)
    told = json.loads(manifest.raw) | {"chunks": record.model_dump(by_alias=True), "alias": {}}
    del told["cells"]
    with pytest.raises(InvalidManifest, match=complaint):
        parse_manifest(sign(told), 1, lambda path: data)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"chunks": {"path": "../x/chunks-0.arrow", "bytes": 1, "hash": "0" * 32}}, "is not that of chunks beside"),
        ({"cells": {"path": "a1/MANIFEST.json", "bytes": 1, "hash": "0" * 32}}, "is not that of cells beside"),
        ({"cells": {"path": "a1/x", "bytes": 1, "hash": "../"}}, "cells.hash"),
        (
            {"tensors": {"t": {"dtype": "U8", "shape": [0], "chunks": []}}},
            "stand in the text and in the file of chunks",
        ),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(
    store: Store, manifest: Manifest, change: dict[str, Any], complaint: str
) -> None:
    told = json.loads(manifest.raw) | change
    with pytest.raises(InvalidManifest, match=complaint):
        parse_manifest(sign(told), 1, store.read_all)


def test_garbage_is_no_table() -> None:
    with pytest.raises(ValueError, match="not a table of chunks"):
        sidecar.decode_chunks(b"ARROW1 or something else")
