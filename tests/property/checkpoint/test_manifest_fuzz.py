"""A fuzzer for manifests: valid ones, altered anywhere and signed again, so that no hash gives the alteration away.

Each must be refused as `InvalidManifest`, or describe something that can be read: then nothing outside of the packs
that were committed is ever asked for, every error is `CorruptData`, and the digest tells whether it is still the same
state.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import reprlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from elastictrain_checkpoint import (
    ITEM_BYTES,
    CorruptData,
    InvalidManifest,
    Manifest,
    Reader,
    Store,
    digest,
    parse_manifest,
)
from elastictrain_checkpoint.commit import wrong_sizes
from elastictrain_checkpoint.pack import BoxData, write_pack
from tests.unit.checkpoint.build import State, make_state, memory_store, save, sign

STATE: State = make_state(
    {
        "model/a": ("F32", (40, 50)),
        "model/b": ("BF16", (9000,)),
        "scalar": ("F64", ()),
        "empty": ("U8", (0, 3)),
        "tp": ("U8", (6, 4)),
    },
    seed=5,
)


class Watched(Store):
    """Remembers which bytes are asked for."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.url, backend=store._backend)
        self.asked: list[tuple[str, int, int]] = []

    def read_into(self, path: str, start: int, out: memoryview) -> int:
        self.asked.append((path, start, start + len(out)))
        return super().read_into(path, start, out)


def build() -> tuple[Watched, dict[str, Any], dict[str, int]]:
    """A store with two steps, the manifest of the second (chunks that are flat runs, and boxes; packs of its own and of
    the first step), and the sizes of its packs.
    """
    store = memory_store(lasts=True)
    told = json.loads(
        save(
            store,
            STATE,
            (0.4, 0.7),
            step=2,
            pack_bytes=9000,
            tree={"lr": 0.1, "betas": (1, 2.5), 3: b"x", "big": 2**80, "nan": [float("inf")]},
            aliases={"tied": "model/a"},
            info={"world": 4},
        ).raw
    )
    whole = memoryview(STATE["tp"][2]).cast("B", (6, 4))
    number = len(told["files"])
    chunks = []
    for column in (0, 3):
        width = 3 if column == 0 else 1
        rows = bytes(whole[r, c] for r in range(6) for c in range(column, column + width))
        box = BoxData("tp", "U8", (6, 4), ((0, column), (6, width)), (memoryview(rows),))
        file = write_pack(store, f"step-00000001/tp/w{column}-00.safetensors", [box])
        told["files"].append({**file.model_dump(by_alias=True), "path": f"../step-00000001/{file.path}"})
        chunks.append([number, file.data_start, [0, column], [6, width]])
        number += 1
    told["tensors"]["tp"]["chunks"] = chunks
    told["base"] = [1]
    manifest = parse_manifest(sign(told), 2)
    sizes = {path: file.size_bytes for path, file in zip(manifest.paths, manifest.files, strict=True)}
    return Watched(store), told, sizes


STORE, DOCUMENT, SIZES = build()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in the document, as keys from the top."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


PLACES = list(places(DOCUMENT))


def deep(kind: str, depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value} if kind == "dict" else {"$tuple": [value]}
    return value


odd_values = st.one_of(
    st.sampled_from(
        [
            None, True, False, -1, 0, 1, 4095, 4096, 1 << 20, 1 << 56, (1 << 60) - 1, 1 << 60, 1 << 63, 1 << 64,
            -(1 << 63),
            10**4000, 1e308, -0.0, 0.5, [], {}, "", " ", "\x00", "\ud800", "é", "F32", "F4", "I32", "U8",
            "../../etc/passwd",
            "/etc/passwd", "../step-00000001/tp/w0-00.safetensors", "../step-00000003/a1/w0000-00.safetensors",
            "a1/w0000-00.safetensors", "a1/../a1/w0000-00.safetensors", "a1\\w0000-00.safetensors", "model/a", "tied",
            "nan", "%%%", "AAAAAAAAAAA=", "0" * 64, {"$int": "9" * 5000}, {"$int": "x"}, {"$float": "1"}, {"$tuple": 3},
            {"$dict": [[1]]}, {"$dict": [[{"$dict": []}, 1]]}, {"$bytes": "?"}, {"$pickle": "x"},
            {"$tuple": [], "b": 1},
        ]
    ),
    st.integers(-10, 10_000),
    st.lists(st.integers(-2, 70), max_size=4),
    st.text(max_size=5),
    st.builds(deep, st.sampled_from(["list", "dict", "tuple"]), st.sampled_from([3, 99, 400, 900, 5000])),
)  # fmt: skip


class Altered(dict[str, Any]):
    """A document that prints in short: what nests deeply could not be printed, and would hide what has failed."""

    def __repr__(self) -> str:
        return reprlib.repr({key: value for key, value in self.items() if value != DOCUMENT.get(key)})


@st.composite
def mutations(draw: st.DrawFn) -> Altered:
    told = copy.deepcopy(DOCUMENT)
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(PLACES))
        at: Any = told
        try:
            for step in path:
                at = at[step]
            old = at[key]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier mutation took it away
        if not isinstance(at, dict | list):
            continue  # … or put a text there
        what = draw(st.sampled_from(["replace", "delete", "nudge", "copy", "swap", "rename", "steal"]))
        if what == "replace":
            at[key] = draw(odd_values)
        elif what == "delete":
            del at[key]
        elif what == "nudge" and type(old) is int:
            at[key] = old + draw(st.sampled_from([-4096, -8, -1, 1, 8, 4096]))
        elif what == "copy" and isinstance(at, list):
            at.append(copy.copy(old))  # no deeper: an earlier mutation may have put in what nests too deeply for that
        elif what == "swap" and isinstance(at, list):
            other = draw(st.integers(0, len(at) - 1))
            at[key], at[other] = at[other], at[key]
        elif what == "rename" and isinstance(at, dict):
            at[draw(st.sampled_from(["x", "", "__metadata__", "model/b", "tied", "a\nb", "x" * 2000]))] = at.pop(key)
        elif what == "steal":
            *others, other = draw(st.sampled_from(PLACES))
            thing: Any = DOCUMENT
            for step in (*others, other):
                thing = thing[step]
            at[key] = copy.deepcopy(thing)
    return Altered(told)


@settings(deadline=None, max_examples=400)
@given(mutations())
@example(DOCUMENT)
@example(Altered(DOCUMENT, version=deep("dict", 900)))
@example(Altered(DOCUMENT, version="9" * 100_000))
@example(Altered(DOCUMENT, step={"x" * 100_000: 1}))
def test_refused_or_read_without_surprise(told: dict[str, Any]) -> None:
    try:
        raw = sign(told)
    except (ValueError, RecursionError):
        return  # JSON itself cannot hold it (numbers of thousands of digits)
    manifest, refusal = parsed(raw)
    if manifest is None:
        event("refused")
        assert refusal.startswith("step-00000002/MANIFEST.json: ")
        assert len(refusal) < 5000, "a sentence, whatever was in it"
    else:
        event(check_accepted(manifest))


def parsed(raw: bytes) -> tuple[Manifest | None, str]:
    try:
        return parse_manifest(raw, 2), ""
    except InvalidManifest as error:
        return None, str(error)


def check_accepted(manifest: Manifest) -> str:
    """Read all that a manifest promises; says how it went."""
    STORE.asked.clear()
    if wrong_sizes(STORE, manifest):
        return "accepted, but `load` refuses it for the sizes of its packs"
    reader = Reader(STORE, manifest)
    found: dict[str, Any] = {}
    for name, (dtype, shape) in reader.tensors.items():
        with contextlib.suppress(CorruptData):
            found[name] = (dtype, shape, read_over(reader, name, 0))
            assert found[name][2] == read_over(reader, name, 255), "every byte comes from storage"
    assert all(path in SIZES and 0 <= start <= stop <= SIZES[path] for path, start, stop in STORE.asked)
    if len(found) < len(reader.tensors):
        with pytest.raises(CorruptData):
            digest(STORE, manifest)
        return "accepted, and its bytes are corrupt"
    same = found == {**STATE, "tied": STATE["model/a"]}
    assert (digest(STORE, manifest) == DOCUMENT["digest"]["hex"]) == same
    return "accepted, the same state" if same else "accepted, another state, which its digest tells"


def read_over(reader: Reader, name: str, fill: int) -> bytes:
    """A tensor, read into memory that holds something else before."""
    dtype, shape = reader.tensors[name]
    out = bytearray([fill]) * (math.prod(shape) * ITEM_BYTES[dtype])
    reader.read_flat(name, 0, math.prod(shape), out=out)
    return bytes(out)


@settings(deadline=None, max_examples=100)
@given(mutations())
def test_without_a_new_signature_every_alteration_is_refused(told: dict[str, Any]) -> None:
    try:
        raw = json.dumps(told, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return
    if raw == sign(DOCUMENT):
        return
    with pytest.raises(InvalidManifest):
        parse_manifest(raw, 2)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60), st.integers(0, 20_000), st.integers(0, 40))
def test_bytes_cut_out_or_put_in(put: bytes, at: int, cut: int) -> None:
    raw = sign(DOCUMENT)
    at %= len(raw)
    changed = raw[:at] + put + raw[at + cut :]
    if changed == raw:
        return
    with pytest.raises(InvalidManifest):
        parse_manifest(changed, 2)


def test_what_it_starts_from_is_read() -> None:
    assert check_accepted(parse_manifest(sign(DOCUMENT), 2)) == "accepted, the same state"
    assert STORE.asked, "bytes are watched"
