"""Hugging Face safetensors in and out, against the reference implementation of the format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elastictrain_checkpoint import AlreadyCommitted, CorruptData, Reader, Store, digest, load, newest, verify
from elastictrain_checkpoint.convert import (
    default_rules,
    detect,
    export_safetensors,
    import_checkpoint,
    only_the_model,
    open_source,
)
from elastictrain_checkpoint.convert.out_safetensors import plan_shards
from elastictrain_checkpoint.errors import ForeignFormat, InvalidMapping, StateMismatch
from elastictrain_checkpoint.mapping import Mapped
from elastictrain_checkpoint.source import Arrays
from tests.unit.checkpoint.build import make_state, memory_store, save

WEIGHTS = {
    "embed.weight": torch.randn(300, 100),
    "layers.0.w": torch.randn(64, 32).bfloat16(),
    "layers.0.steps": torch.arange(7),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 5),
    "fp8": torch.randn(16).to(torch.float8_e4m3fn),
}


def same(data: Any, tensor: torch.Tensor) -> bool:
    return bool(data.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def test_one_file_in(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "any.safetensors", metadata={"format": "pt"})
    for url in (str(tmp_path), str(tmp_path / "any.safetensors")):
        source = open_source(url)
        assert source.format == "safetensors"
        assert source.tensors["layers.0.w"] == ("BF16", (64, 32))
        store = memory_store()
        manifest = import_checkpoint(Mapped(source, default_rules(source)), store, step=3)
        assert verify(store, manifest) == []
        assert digest(store, manifest) == manifest.digest
        reader = Reader(store, load(store, 3))
        assert sorted(reader.tensors) == sorted(f"model/{name}" for name in WEIGHTS)
        assert all(same(reader.read(f"model/{name}"), tensor) for name, tensor in WEIGHTS.items())
        assert reader.tree == {"foreign": {"format": "pt"}}


def test_shards_with_an_index_in(tmp_path: Path) -> None:
    names = sorted(WEIGHTS)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:])):
        file = f"model-{number}.safetensors"
        save_file({name: WEIGHTS[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    save_file({"not": torch.zeros(1)}, tmp_path / "beside.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    source = open_source(f"file://{tmp_path}")
    assert sorted(source.tensors) == names
    assert all(same(source.read_flat(n, 0, t.numel()), t) for n, t in WEIGHTS.items())
    assert same(source.read_flat("embed.weight", 50, 60), WEIGHTS["embed.weight"].reshape(-1)[50:60])
    index.write_text(json.dumps({"weight_map": {**weight_map, "lost": "model-0.safetensors"}}))
    with pytest.raises(CorruptData, match=r"lost .*is in no file"):
        open_source(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "model-1.safetensors"}}))
    with pytest.raises(CorruptData, match=f"says that {names[0]} is in model-1.safetensors; it is in model-0"):
        open_source(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ForeignFormat, match="is not the name of a safetensors file beside it"):
        open_source(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CorruptData, match=r"gone\.safetensors is missing"):
        open_source(str(tmp_path))
    for odd in ("[]", "{", '{"weight_map": {"a": 1}}', '{"weight_map": []}'):
        index.write_text(odd)
        with pytest.raises(ForeignFormat, match="is not an index"):
            open_source(str(tmp_path))


def header(document: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "not a safetensors file"),
        (header({}, length=1 << 60), "its header would have 1152921504606846976 bytes"),
        (header(b"{", b""), "its header is damaged"),
        (header([], b""), "its header is damaged"),
        (header({"a": entry()}, b"abc"), r"would lie in bytes \[0, 4\) of 3"),
        (header({"a": entry(offsets=(-1, 3))}, b"abcd"), "would lie in bytes"),
        (header({"a": entry(offsets=(3, 1))}, b"abcd"), "would lie in bytes"),
        (header({"a": entry(offsets=(0, 4.0))}, b"abcd"), "would lie in bytes"),
        (header({"a": entry(shape=(5,))}, b"abcd"), "has 4 bytes, expected 5 for U8"),
        (header({"a": entry(), "b": entry(offsets=(2, 6))}, b"abcdef"), "a and b lie in the same bytes"),
        (header({"a": {"dtype": "U8"}}, b""), "its header is damaged"),
        (header({"a": 3}, b""), "its header is damaged"),
        (header(b"[" * 5000, b""), "its header is damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, raw: bytes, complaint: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(CorruptData, match=complaint):
        open_source(str(tmp_path))


@pytest.mark.parametrize("wrong", [entry(dtype="F4"), entry(shape=(-4,)), entry(shape=(1 << 60,))])
def test_what_this_library_cannot_hold_is_refused_with_a_reason(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "x.safetensors").write_bytes(header({"a": wrong}, b"abcd"))
    with pytest.raises(ForeignFormat, match=r"x\.safetensors: a: (dtype 'F4' is not one of BF16|shape)"):
        open_source(str(tmp_path))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(WEIGHTS, path)
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:-10_000])
    with pytest.raises(CorruptData, match="is cut short"):
        import_checkpoint(source, memory_store())


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"w": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ForeignFormat, match=r"w is in a\.safetensors and in b\.safetensors"):
        open_source(str(tmp_path))


def test_what_is_no_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ForeignFormat, match="holds nothing: none of"):
        detect(Store(tmp_path / "nowhere"))
    (tmp_path / "readme").touch()
    with pytest.raises(ForeignFormat, match="holds readme: none of"):
        open_source(str(tmp_path))
    with pytest.raises(ForeignFormat, match="format 'zip' is not one of auto, safetensors, dcp"):
        open_source(str(tmp_path), "zip")
    with pytest.raises(ForeignFormat, match="is one safetensors file"):
        open_source(str(tmp_path / "a.safetensors"), "dcp")
    with pytest.raises(ForeignFormat, match="holds neither"):
        open_source(str(tmp_path), "safetensors")


# --- import ---


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    source = open_source(str(tmp_path))
    store = Store(tmp_path / "out")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(CorruptData):
        import_checkpoint(source, store, step=1, pack_bytes=1000)
    assert newest(store) is None
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_a_step_that_is_there_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = save(store, make_state(), step=0)
    with pytest.raises(AlreadyCommitted, match="has a checkpoint of step 0; choose another step"):
        import_checkpoint(Arrays({"a": ("U8", (1,), b"x")}), store)
    assert load(store, 0).raw == before.raw


def test_ties_are_checked_and_stored_once() -> None:
    held = {"a": ("U8", (3,), b"abc"), "b": ("U8", (3,), b"abc"), "c": ("U8", (3,), b"abd")}
    store = memory_store()
    manifest = import_checkpoint(Arrays(held), store, aliases={"b": "a", "new": "c"})
    assert sorted(manifest.tensors) == ["a", "c"]
    assert Reader(store, manifest).read("b").tobytes() == b"abc"
    with pytest.raises(StateMismatch, match="c and a differ, so they cannot be tied"):
        import_checkpoint(Arrays(held), memory_store(), aliases={"c": "a"})
    for ties in ({"x": "nowhere"}, {"b": "a", "c": "b"}):
        with pytest.raises(InvalidMapping, match=r"there is no tensor .* to tie it to"):
            import_checkpoint(Arrays(held), memory_store(), aliases=ties)


def test_memory_is_one_pack_not_the_checkpoint() -> None:
    class Watched(Arrays):
        alive = 0
        most = 0

        def read_flat(self, name: str, start: int, stop: int) -> Any:
            held = type(self)
            held.alive += stop - start
            held.most = max(held.most, held.alive)
            return super().read_flat(name, start, stop).copy()

    source = Watched({f"t{i}": ("U8", (1000,), bytes(1000)) for i in range(50)})

    def packed(done: int, total: int) -> None:
        Watched.alive = 0

    manifest = import_checkpoint(source, memory_store(), pack_bytes=3000, progress=packed)
    assert Watched.most <= 3000
    assert len(manifest.files) == 17


# --- export ---


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000])
def test_out_and_the_reference_reads_it(tmp_path: Path, shard_bytes: int) -> None:
    store = memory_store()
    state = make_state(
        {
            "model/embed.weight": ("F32", (300, 100)),
            "model/half": ("BF16", (3, 50, 70)),
            "model/scalar": ("F64", ()),
            "model/empty": ("F32", (0, 5)),
            "buffer/seen": ("I64", (7,)),
            "optim/half/exp_avg": ("F32", (3, 50, 70)),
        }
    )
    manifest = save(store, state, (0.3, 0.6), step=3)
    done = export_safetensors(
        Mapped(Reader(store, manifest), only_the_model()), Store(tmp_path), shard_bytes=shard_bytes
    )
    wanted = {name.partition("/")[2]: name for name in state if not name.startswith("optim/")}
    assert done.tensors == len(wanted)
    if shard_bytes == 1 << 30:
        assert done.files == ("model.safetensors",)
        weight_map = dict.fromkeys(wanted, "model.safetensors")
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        weight_map = index["weight_map"]
        assert index["metadata"]["total_size"] == done.size_bytes
        assert set(weight_map.values()) == {f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)}
    assert set(weight_map) == set(wanted)
    for file in set(weight_map.values()):
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        for name, tensor in load_file(tmp_path / file).items():
            assert weight_map[name] == file
            assert same(np.frombuffer(state[wanted[name]][2], np.uint8), tensor), name
    again = open_source(str(tmp_path))
    assert {n: again.tensors[n] for n in wanted} == {n: state[o][:2] for n, o in wanted.items()}
    with pytest.raises(FileExistsError, match=r"already holds model.*; export into an empty folder"):
        export_safetensors(Mapped(Reader(store, manifest), only_the_model()), Store(tmp_path))


def test_out_as_bfloat16(tmp_path: Path) -> None:
    held = torch.randn(1000, 7)
    source = Arrays({"w": ("F32", (1000, 7), held.numpy()), "n": ("I64", (2,), bytes(16))})
    export_safetensors(source, Store(tmp_path), cast="BF16")
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["w"], held.bfloat16())
    assert found["n"].dtype == torch.int64
    with pytest.raises(InvalidMapping, match="cast='I8' is not one of F64, F32, F16, BF16"):
        export_safetensors(source, Store(tmp_path / "b"), cast="I8")


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    held = {"a": ("U8", (3,), b"abc"), "b": ("F64", (2,), bytes(16)), "c": ("BF16", (3,), bytes(6))}
    export_safetensors(Arrays(held), Store(tmp_path))
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert [found[name]["data_offsets"][0] for name in "bca"] == [0, 16, 22]


def test_nothing_is_exported_from_damage_or_from_nothing(tmp_path: Path) -> None:
    from tests.unit.checkpoint.build import flip

    store = memory_store()
    manifest = save(store, make_state(), (), step=1)
    flip(store, manifest.paths[0], 5000)
    with pytest.raises(CorruptData, match="its hash differs"):
        export_safetensors(Reader(store, manifest), Store(tmp_path))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    with pytest.raises(ForeignFormat, match="there is no tensor to write"):
        export_safetensors(Arrays({}), Store(tmp_path))
    with pytest.raises(ForeignFormat, match="reserves that name"):
        export_safetensors(Arrays({"__metadata__": ("U8", (1,), b"x")}), Store(tmp_path))


def test_shards_fill_up_in_order() -> None:
    assert plan_shards({}, 10) == [[]]
    sizes = {"a": 4, "b": 6, "c": 1, "d": 30, "e": 0, "f": 1}
    assert plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
