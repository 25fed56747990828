"""Megatron's torch_dist and DeepSpeed's universal checkpoints, made here after their formats: in, trusting nothing."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from elastictrain_checkpoint import CorruptData, Reader, Store
from elastictrain_checkpoint.convert import default_rules, import_checkpoint, open_source
from elastictrain_checkpoint.errors import ForeignFormat
from elastictrain_checkpoint.mapping import Mapped
from tests.unit.checkpoint.build import memory_store

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def same(data: Any, tensor: torch.Tensor) -> bool:
    return bool(data.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path | str = "/nonexistent/evil") -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


# --- Megatron ---


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    """The files of ``torch_dist``: names, layers stacked along the first axis, and the two files beside."""
    state = {
        "decoder.layers.mlp.linear_fc1.weight": torch.randn(4, 6, 2).bfloat16(),
        "embedding.word_embeddings.weight": torch.randn(10, 2).bfloat16(),
        "optimizer.state.fp32_param.decoder.layers.mlp.linear_fc1.weight": torch.randn(4, 6, 2),
        "chained_0.optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.randn(4, 6, 2),
    }
    folder = tmp_path / "iter_0000010"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    told = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    (folder / "metadata.json").write_text(json.dumps(told))
    common = {"args": argparse.Namespace(lr=0.1, dtype=torch.bfloat16), "iteration": 10, "checkpoint_version": 3.0}
    torch.save(common, folder / "common.pt")
    torch.save(state, tmp_path / "state.pt")
    return folder


def test_megatron_in(megatron: Path) -> None:
    state = torch.load(megatron.parent / "state.pt", weights_only=True)
    source = open_source(str(megatron))
    assert source.format == "megatron"
    assert source.tree["common"] == {"args": {"lr": 0.1}, "iteration": 10, "checkpoint_version": 3.0}
    assert source.skipped == ["common.pt: args.dtype is a dtype"]
    mapped = Mapped(source, default_rules(source))
    layer = "decoder.layers.mlp.linear_fc1.weight"
    assert mapped.tensors == {
        f"model/{layer}": ("F32", (4, 6, 2)),
        "model/embedding.word_embeddings.weight": ("BF16", (10, 2)),
        f"optim/{layer}/exp_avg": ("F32", (4, 6, 2)),
    }
    assert same(mapped.read_flat(f"model/{layer}", 0, 48), state[f"optimizer.state.fp32_param.{layer}"])
    assert mapped.unused() == [layer], "the weights of lower precision give way to the masters"


def test_megatron_that_is_not_whole_or_of_another_backend(megatron: Path) -> None:
    (megatron / "common.pt").unlink()
    assert any("common.pt" in said for said in open_source(str(megatron), "megatron").skipped)
    (megatron / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ForeignFormat, match="was saved with sharded_backend 'zarr', expected 'torch_dist'"):
        open_source(str(megatron), "megatron")
    (megatron / "metadata.json").write_text("[]")
    with pytest.raises(ForeignFormat, match=r"metadata\.json is not Megatron's"):
        open_source(str(megatron), "megatron")
    (megatron / "metadata.json").unlink()
    with pytest.raises(ForeignFormat, match=r"metadata\.json is not there: the save did not end"):
        open_source(str(megatron), "megatron")


# --- DeepSpeed universal ---


@pytest.fixture
def universal(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = {"embed.weight": torch.randn(100, 8), "head.weight": torch.randn(8, 100)}
    for number, (name, tensor) in enumerate(weights.items()):
        folder = tmp_path / "zero" / name
        folder.mkdir(parents=True)
        torch.save({"param": tensor, "cat_dim": 0}, folder / "fp32.pt")
        torch.save({"param": tensor * 2}, folder / "exp_avg.pt")
        torch.save(tensor * 3, folder / "exp_avg_sq.pt")
        torch.save(7 if number else torch.tensor(7.0), folder / "step.pt")
    torch.save({"args": Evil}, tmp_path / "mp_rank_00_model_states.pt")
    return tmp_path, weights


def test_universal_in(universal: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, weights = universal
    source = open_source(str(folder))
    assert source.format == "universal"
    assert source.skipped == ["mp_rank_00_model_states.pt: beside zero/, not read"]
    store = memory_store()
    reader = Reader(store, import_checkpoint(Mapped(source, default_rules(source)), store))
    for name, tensor in weights.items():
        assert same(reader.read(f"model/{name}"), tensor)
        assert same(reader.read(f"optim/{name}/exp_avg"), tensor * 2)
        assert same(reader.read(f"optim/{name}/exp_avg_sq"), tensor * 3)
        assert reader.tensors[f"optim/{name}/step"] == ("F32", ())
        assert same(reader.read(f"optim/{name}/step"), torch.tensor(7.0))
    assert len(reader.tensors) == 8


def test_opening_a_universal_checkpoint_reads_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "zero" / "w"
    folder.mkdir(parents=True)
    torch.save({"param": torch.zeros(1 << 20)}, folder / "fp32.pt")

    class Counted(Store):
        bytes = 0

        def read_into(self, path: str, start: int, out: memoryview) -> int:
            Counted.bytes += len(out)
            return super().read_into(path, start, out)

    from elastictrain_checkpoint.convert.in_universal import UniversalSource

    assert UniversalSource(Counted(tmp_path)).tensors == {"w/fp32": ("F32", (1 << 20,))}
    assert Counted.bytes < 300_000


def test_universal_that_is_damaged_or_needs_trust(universal: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, weights = universal
    path = folder / "zero" / "embed.weight" / "exp_avg.pt"
    raw = path.read_bytes()
    at = raw.index((weights["embed.weight"] * 2).numpy().tobytes())
    path.write_bytes(raw[: at + 5] + bytes([raw[at + 5] ^ 1]) + raw[at + 6 :])
    source = open_source(str(folder))
    with pytest.raises(CorruptData, match=r"the CRC-32 of .* differs"):
        source.read_flat("embed.weight/exp_avg", 0, 800)
    path.unlink()
    with pytest.raises(CorruptData, match="is missing"):
        source.read_flat("embed.weight/exp_avg", 0, 800)
    torch.save(torch.zeros(3), path)
    with pytest.raises(CorruptData, match="has changed since it was opened"):
        source.read_flat("embed.weight/exp_avg", 0, 800)
    for value, complaint in (
        (Evil(folder / "mark"), "cannot be read without trusting it"),
        ("text", "holds a str, expected a tensor"),
        ({"other": 1}, "holds a NoneType, expected a tensor"),
        (torch.zeros(1, dtype=torch.complex128), "is torch.complex128"),
    ):
        torch.save(value, path)
        with pytest.raises(ForeignFormat, match=complaint):
            open_source(str(folder))
    assert not (folder / "mark").exists()
    path.write_bytes(raw[:100])
    with pytest.raises(ForeignFormat, match="cannot be read without trusting it"):
        open_source(str(folder))
    path.write_bytes(raw)
    (folder / "zero" / "head.weight" / "fp32.pt").unlink()
    with pytest.raises(CorruptData, match=r"zero/head\.weight has no fp32\.pt"):
        open_source(str(folder))
    (folder / "other" / "zero").mkdir(parents=True)
    with pytest.raises(ForeignFormat, match=r"has no zero/<parameter>/fp32\.pt"):
        open_source(str(folder / "other"))
