"""Checkpoints that no state dict was saved to are loaded into one by the names of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import PackWriter, Piece, Store, commit, convert
from elastictrain_checkpoint.errors import StateMismatch
from elastictrain_checkpoint.mapping import Mapped


def commit_bare(folder: Path, tensors: dict[str, torch.Tensor], aliases: dict[str, str] | None = None) -> None:
    """Packs of one's own, and a tree of one's own."""
    store = Store(folder)
    pieces = [Piece(name, "F32", tuple(value.shape), 0, value.numpy()) for name, value in tensors.items()]
    part = PackWriter(store, step=3, attempt="a", writer="w").write(pieces)
    commit(store, step=3, attempt="a", generation=1, parts=[part], tree={"step": 3}, aliases=aliases)


class Model(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        with torch.no_grad():
            for one in self.state_dict().values():
                one.fill_(value)


def test_the_names_of_a_run_fit_nested_state_dicts(tmp_path: Path) -> None:
    stored = {
        "model/body.weight": torch.ones(3, 2), "model/norm.weight": torch.ones(3), "model/norm.bias": torch.ones(3),
        "buffer/norm.running_mean": torch.ones(3), "buffer/norm.running_var": torch.ones(3),
        "optim/body.weight/exp_avg": torch.ones(3, 2),
    }  # fmt: skip
    commit_bare(tmp_path, stored)
    model = Model(0)
    weights = {k: v for k, v in model.state_dict().items() if k != "norm.num_batches_tracked"}
    moments = torch.zeros(3, 2)
    state = {"model": weights, "optim": {"state": {"body.weight": {"exp_avg": moments}}}}
    assert checkpoint.load(state, tmp_path).step == 3
    assert all(value.eq(1).all() for value in [*weights.values(), moments])
    assert model.body.weight.eq(1).all(), "in place"


def test_what_is_not_there_or_nobody_asks_for_is_said(tmp_path: Path) -> None:
    commit_bare(tmp_path, {"a/b": torch.ones(2), "c": torch.ones(3), "d": torch.ones(1)}, {"tied": "c"})
    state: dict[str, Any] = {"a": {"b": torch.zeros(2), "x": torch.zeros(1)}, "c": torch.zeros(4), "lr": 0.1}
    with pytest.raises(StateMismatch) as refused:
        checkpoint.load(state, tmp_path)
    assert (refused.value.missing, refused.value.extra) == (("a/x", "lr"), ("d",))
    assert refused.value.different == ("c is torch.float32 [4], in the checkpoint F32 [3]",)
    assert not state["a"]["b"].any()
    report = checkpoint.load(state, tmp_path, strict=False)
    assert (report.missing, report.unexpected, list(report.different)) == (["a/x", "lr"], ["d"], ["c"])
    assert state["a"]["b"].all()


def test_what_is_empty_takes_all(tmp_path: Path) -> None:
    commit_bare(tmp_path, {"a/b/c": torch.ones(2), "a": torch.ones(3), "d/e": torch.ones(1)}, {"d/tied": "d/e"})
    state: dict[str, Any] = {}
    checkpoint.load(state, tmp_path)
    assert {key: len(value) for key, value in state.items()} == {"a": 3, "a/b/c": 2, "d": 2}
    assert state["d"]["tied"] is state["d"]["e"]
    part: dict[str, Any] = {"d": {}}
    assert checkpoint.load(part, tmp_path, strict=False).unexpected == ["a", "a/b/c"]
    assert set(part["d"]) == {"e", "tied"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("as_named", [True, False])
def test_an_import_of_dcp_comes_back_with_its_values(tmp_path: Path, *, as_named: bool) -> None:
    model = Model(1)
    dcp.save({"model": model.state_dict(), "extra": {"lr": 0.5, "name": "x"}}, checkpoint_id=tmp_path / "dcp")
    source: Any = convert.open_source(str(tmp_path / "dcp"))
    if not as_named:
        source = Mapped(source, convert.default_rules(source))
    convert.import_checkpoint(source, Store(tmp_path / "c"))
    other = Model(0)
    state = {"model": other.state_dict(), "extra": {"lr": 0.0, "name": ""}}
    checkpoint.load(state, tmp_path / "c")
    assert state["extra"] == {"lr": 0.5, "name": "x"}
    assert all(value.eq(1).all() for value in other.state_dict().values())


def test_an_import_of_safetensors_comes_back(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(Model(1).state_dict()), tmp_path / "model.safetensors")
    source = convert.open_source(str(tmp_path / "model.safetensors"))
    convert.import_checkpoint(source, Store(tmp_path / "c"))
    model = Model(0)
    checkpoint.load(model.state_dict(), tmp_path / "c")
    assert model.body.weight.eq(1).all()
