"""Manifests that lie: each carries a right hash of itself, so only disbelief can find the lie."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from elastictrain_checkpoint import InvalidManifest, Reader, Skipped, newest, parse_manifest
from tests.unit.checkpoint.build import make_state, memory_store, save, sign

EMBED = "model/embed.weight"
Document = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Document:
    store = memory_store()
    manifest = save(store, make_state(), step=1000, aliases={"model/head": EMBED})
    result: Document = json.loads(manifest.raw)
    assert parse_manifest(sign(result), 1000).digest == manifest.digest
    return result


def chunk(document: Document, number: int = 0) -> list[Any]:
    found: list[Any] = document["tensors"][EMBED]["chunks"][number]
    return found


def set_at(*keys: Any) -> Callable[[Document], None]:
    *path, last, value = keys

    def change(document: Document) -> None:
        at: Any = document
        for key in path:
            at = at[key]
        at[last] = value

    return change


def climb(path: str) -> Callable[[Document], None]:
    return set_at("files", 0, "path", path)


LIES: list[tuple[str, Callable[[Document], None], str]] = [
    ("version", set_at("version", 2), "version 2; this library reads version 1"),
    ("format", set_at("format", "other"), "not a checkpoint manifest"),
    ("step", set_at("step", 999), "it says step 999, but lies in the folder of step 1000"),
    ("climbs", climb("../../etc/passwd"), "is not that of a pack inside the store"),
    ("climbs far", climb("../step-00000900/../../x/a.safetensors"), "is not that of a pack"),
    ("absolute", climb("/etc/passwd.safetensors"), "is not that of a pack"),
    ("hidden", climb("a1/.x.safetensors"), "is not that of a pack"),
    ("newline", climb("a1/w0000-00.safetensors\n"), "is not that of a pack"),
    ("unlisted base", climb("../step-00000900/a/w-00.safetensors"), "leads to step 900, which is not listed"),
    ("odd base", climb("../step-000000900/a/w-00.safetensors"), "is not that of a pack"),
    ("file twice", lambda d: d["files"].__setitem__(1, d["files"][0]), "a file is listed twice"),
    ("sums short", set_at("files", 0, "sums", ""), "0 block sums, expected"),
    ("sums no base64", set_at("files", 0, "sums", "%%%"), "not base64"),
    ("sums odd", set_at("files", 0, "sums", "AAAA"), "buffer size"),
    ("sums changed", set_at("files", 0, "sums", base64.b64encode(bytes(8)).decode()), "do not fit their root"),
    ("huge file", set_at("files", 0, "bytes", 1 << 62), "less than"),
    ("negative", set_at("files", 0, "data_start", -1), "greater than or equal to 0"),
    ("block 0", set_at("hash", "block", 0), "hash.block"),
    ("hash algo", set_at("hash", "algo", "crc32"), "hash.algo"),
    ("digest algo", set_at("digest", "algo", "md5"), "digest algorithm 'md5'"),
    ("digest hex", set_at("digest", "hex", "xyz"), "digest.hex"),
    ("unknown key", set_at("surprise", 1), "surprise"),
    ("missing key", lambda d: d.pop("files"), "files: Field required"),
    ("text for number", set_at("generation", "7"), "generation"),
    ("attempt climbs", set_at("attempt", "../x"), "attempt"),
    ("reserved name", lambda d: d["tensors"].__setitem__("__metadata__", d["tensors"][EMBED]), "reserved"),
    ("alias to nothing", set_at("alias", "model/head", "nowhere"), "its target is not one"),
    ("alias is a tensor", set_at("alias", EMBED, EMBED), "it is a tensor itself"),
    ("dtype", set_at("tensors", EMBED, "dtype", "F7"), "dtype 'F7' is not one of"),
    ("wider dtype", set_at("tensors", EMBED, "dtype", "F64"), "points outside its file"),
    ("larger shape", set_at("tensors", EMBED, "shape", [301, 100]), r"elements \[30000, 30100\) are in no chunk"),
    ("smaller shape", set_at("tensors", EMBED, "shape", [299, 100]), "lies outside of shape"),
    ("other rank", set_at("tensors", EMBED, "shape", [30000]), "has not the 1 dimensions"),
    ("vast shape", set_at("tensors", EMBED, "shape", [2**50, 2**50]), "more than 2\\^56"),
    ("vast empty", set_at("tensors", EMBED, "shape", [0, 2**50, 2**50]), "more than 2\\^56"),
    ("no file", lambda d: chunk(d).__setitem__(0, 99), "points outside its file: file 99 of"),
    ("in header", lambda d: chunk(d).__setitem__(1, 0), "points outside its file"),
    ("beyond end", lambda d: chunk(d).__setitem__(1, 1 << 40), "points outside its file"),
    ("gap", lambda d: d["tensors"][EMBED]["chunks"].pop(0), f"{EMBED}: elements \\[0, .*in no chunk"),
    ("overlap", lambda d: d["tensors"][EMBED]["chunks"].append(chunk(d)), "in two chunks"),
    ("moved", lambda d: chunk(d).__setitem__(2, [10**9, 0]), "lies outside of shape"),
    ("wraps round", lambda d: chunk(d).__setitem__(2, [(1 << 60) - 1, 0]), "lies outside of shape"),
    ("empty box", lambda d: chunk(d).__setitem__(3, [0, 100]), "is empty"),
    ("tree tag", set_at("tree", {"$pickle": "x"}), r"unknown or malformed tag \$pickle"),
    ("unhashable key", set_at("tree", {"$dict": [[[], 1]]}), "unhashable"),
]


@pytest.mark.parametrize(("lie", "complaint"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_lies_are_refused(document: Document, lie: Callable[[Document], None], complaint: str) -> None:
    told = copy.deepcopy(document)
    lie(told)
    with pytest.raises(InvalidManifest, match=complaint) as caught:
        parse_manifest(sign(told), 1000)
    assert str(caught.value).startswith("step-00001000/MANIFEST.json: ")


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"format":"elastictrain.ckpt"}']
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(raw, 3)


def test_a_changed_text_is_refused_even_if_it_means_the_same(document: Document) -> None:
    raw = sign(document)
    for text in (
        raw + b" ",
        raw.replace(b'"step":1000', b'"step":1000.0'),
        json.dumps(document).encode(),
        raw.replace(b'{"format"', b'{"format":"x","format"'),
    ):
        with pytest.raises(InvalidManifest, match="altered after it was written"):
            parse_manifest(text)
    with pytest.raises(InvalidManifest, match="its own hash differs"):
        parse_manifest(raw.replace(b'"generation":1', b'"generation":2'))


def test_a_lie_makes_the_step_no_checkpoint(document: Document) -> None:
    store = memory_store()
    store.put("step-00001000/MANIFEST.json", sign(document))
    skipped: list[Skipped] = []
    assert newest(store, skipped) is None
    assert [one.step for one in skipped] == [1000]


def test_packs_of_an_earlier_step_may_be_used_if_it_is_listed() -> None:
    """The form in which unchanged tensors will be saved: read, checked and pinned already now."""
    store, state = memory_store(), make_state()
    told = json.loads(save(store, state, step=900).raw)
    for file in told["files"]:
        file["path"] = "../step-00000900/" + file["path"]
    told.update(step=1000, base=[900])
    store.put("step-00001000/MANIFEST.json", sign(told))
    found = newest(store)
    assert found is not None
    assert (found.step, found.base) == (1000, (900,))
    assert all(Reader(store, found).read(name).tobytes() == data for name, (_, _, data) in state.items())


@pytest.mark.parametrize("name", ["plain", 'quo"te\\', "straße", "層/0", "a b"])
def test_the_text_is_that_of_the_standard_library(name: str) -> None:
    """Whatever writes it: other versions compare it letter by letter."""
    store = memory_store()
    state = make_state({name: ("F32", (3, 2)), "second": ("I64", ())})
    manifest = save(store, state, step=1, tree={"lr": 1e16, "name": name})
    document = json.loads(manifest.raw)
    assert json.dumps(document, separators=(",", ":"), allow_nan=False).encode() == manifest.raw
    assert parse_manifest(manifest.raw).tensors[name] == ("F32", (3, 2))
