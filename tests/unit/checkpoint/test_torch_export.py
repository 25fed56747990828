"""A state dict that was saved here, for those who ask stock `torch.distributed.checkpoint` for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import Reader, Store
from elastictrain_checkpoint.convert import cast_floats, export_dcp
from elastictrain_checkpoint.mapping import Mapped, Rename
from tests.unit.checkpoint.test_torch import same, zeros_like

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 / steps)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_model_optimizer_and_values_are_where_dcp_asks_for_them(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3, "ema": [torch.ones(2), {"n": 1}]}
    manifest = checkpoint.save(state, tmp_path / "c")
    export_dcp(Reader(Store(tmp_path / "c"), manifest), Store(tmp_path / "out"))
    other, fresh = trained(1)
    into: dict[str, Any] = {"model": other.state_dict(), "optim": fresh.state_dict(), "step": 0, "ema": None}
    into["ema"] = [torch.zeros(2), {"n": 0}]
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    fresh.load_state_dict(into["optim"])
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(fresh.state_dict(), optimizer.state_dict())
    assert (into["step"], into["ema"][1]) == (3, {"n": 1})


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_types_that_are_stored_as_bytes_leave_as_what_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.arange(3.0).to(dtype)
    state = {"x": value, "tied": value, "none": torch.zeros(0, 2, dtype=dtype)}
    manifest = checkpoint.save(state, tmp_path / "c")
    export_dcp(Reader(Store(tmp_path / "c"), manifest), Store(tmp_path / "out"))
    into = zeros_like(state)
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    assert same(into, state)


def test_what_rules_have_renamed_goes_where_its_name_says_and_a_cast_stays_in_place(tmp_path: Path) -> None:
    state = {"optim": {"state": {0: {"m": torch.ones(2)}}}, "model": {"a": torch.ones(2)}}
    reader = Reader(Store(tmp_path / "c"), checkpoint.save(state, tmp_path / "c"))
    mapped = cast_floats(Mapped(reader, [Rename(match="model/a", to="model/b")]), "BF16")
    export_dcp(mapped, Store(tmp_path / "out"))
    into = {"optim": {"state": {0: {"m": torch.zeros(2).bfloat16()}}}, "model": {"b": torch.zeros(2).bfloat16()}}
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    assert into["optim"]["state"][0]["m"].eq(1).all()  # type: ignore[index]
    assert into["model"]["b"].eq(1).all()  # type: ignore[union-attr]
