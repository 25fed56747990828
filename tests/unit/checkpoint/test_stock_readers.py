"""A live checkpoint opens in safetensors and in stock torch.distributed.checkpoint, without conversion."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from elastictrain_checkpoint import Reader, Store
from tests.unit.checkpoint.build import make_state, save

SPECS: dict[str, tuple[str, tuple[int, ...]]] = {
    "model/embed.weight": ("F32", (300, 100)),
    "model/half": ("BF16", (3, 50, 70)),
    "model/half.bias": ("F16", (9001,)),
    "optim/embed.weight/exp_avg": ("F32", (300, 100)),
    "optim/step": ("I64", (7,)),
}
TORCH = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "F64": torch.float64,
    "BOOL": torch.bool,
}


BREAKS = pytest.mark.parametrize("breaks", [(), (0.2, 0.4, 0.9)], ids=["one buffer", "ropes"])


@BREAKS
def test_stock_dcp_loads_the_folder_of_the_attempt(tmp_path: Path, breaks: tuple[float, ...]) -> None:
    state = make_state(SPECS)
    save(Store(tmp_path), state, (0.13, 0.5, 0.77), step=3, breaks=breaks)
    target = {name: torch.zeros(shape, dtype=TORCH[dtype]) for name, (dtype, shape, _) in state.items()}
    with pytest.warns(UserWarning, match="load in a single process"):
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path / "step-00000003" / "a1")), no_dist=True)
    for name, (_, _, data) in state.items():
        assert target[name].view(torch.uint8).numpy().tobytes() == data, name


@BREAKS
@pytest.mark.parametrize("pack_bytes", [5_000, 1 << 30])
def test_safe_open_reads_every_pack(tmp_path: Path, pack_bytes: int, breaks: tuple[float, ...]) -> None:
    state = {**make_state(), **make_state({"flags": ("BOOL", (5,))})}
    state["flags"] = ("BOOL", (5,), b"\1\0\1\1\0")
    state["model/flags"] = ("BOOL", (9000,), b"\1\0" * 4500)
    manifest = save(Store(tmp_path), state, (0.3, 0.6), step=3, pack_bytes=pack_bytes, breaks=breaks)
    found = {name: torch.zeros(shape, dtype=TORCH[dtype]) for name, (dtype, shape, _) in state.items()}
    for path in manifest.paths:
        raw = (tmp_path / path).read_bytes()
        (header_bytes,) = struct.unpack("<Q", raw[:8])
        assert (header_bytes + 8) % 4096 == 0
        with safe_open(tmp_path / path, framework="pt") as pack:
            offsets = json.loads(pack.metadata()["DCP_SHARDING_INFO"])
            starts = [json.loads(raw[8 : 8 + header_bytes])[key]["data_offsets"][0] for key in pack.keys()]  # noqa: SIM118
            sizes = [pack.get_tensor(key).element_size() for key in pack.offset_keys()]
            assert sizes == sorted(sizes, reverse=True)
            assert len(starts) == len(set(offsets))
            for key in pack.keys():  # noqa: SIM118
                box = pack.get_tensor(key)
                where = tuple(slice(o, o + s) for o, s in zip(offsets[key]["saved_offsets"], box.shape, strict=True))
                found[key][where] = box
    for name, (_, _, data) in state.items():
        assert found[name].view(torch.uint8).numpy().tobytes() == data if found[name].dim() else True, name
    assert found["model/scalar"].reshape(1).view(torch.uint8).numpy().tobytes() == state["model/scalar"][2]


@pytest.mark.parametrize("cuts", [(), (0.13, 0.5, 0.77)], ids=["one writer", "four"])
@pytest.mark.parametrize("changed", [(0, 90), (210, 300), (60, 240)], ids=["head", "tail", "middle"])
def test_what_stock_dcp_finds_of_an_increment_is_whole_or_refused(
    tmp_path: Path, cuts: tuple[float, ...], changed: tuple[int, int]
) -> None:
    """What is unchanged lies in another step's folder, where DCP does not look: it would leave these rows untouched."""
    specs = {"model/w": ("F32", (300, 4096)), "model/new": ("F32", (2, 4096)), "model/frozen": ("F32", (900, 4096))}
    old, store = make_state(specs), Store(tmp_path)
    first = save(store, old, cuts, step=1, cells=True)
    other = make_state(specs, seed=1)
    row = 4096 * 4
    was, now = old["model/w"][2], other["model/w"][2]
    low, high = changed
    mixed = was[: low * row] + now[low * row : high * row] + was[high * row :]
    state = {**old, "model/w": ("F32", (300, 4096), mixed), "model/new": other["model/new"]}
    manifest = save(store, state, cuts, step=2, base=first)
    assert Reader(store, manifest).read("model/w").tobytes() == mixed
    assert any(path.startswith("step-00000001/") for path in manifest.paths), "it is an increment"

    def load(name: str) -> bytes:
        target = {name: torch.zeros(specs[name][1])}
        folder = str(tmp_path / "step-00000002" / "a1")
        with pytest.warns(UserWarning, match="load in a single process"):
            dcp.load(target, storage_reader=HuggingFaceStorageReader(folder), no_dist=True)
        return target[name].numpy().tobytes()

    for name, why in (("model/w", "Size mismatch"), ("model/frozen", "Missing key|Size mismatch")):
        with pytest.raises(CheckpointException, match=why):
            load(name)
    if not cuts:
        assert load("model/new") == state["model/new"][2], "it lies here, whole"
