"""Saving state that lives on a CUDA device: copied beside the computation, and never torn by it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import Store
from elastictrain_checkpoint import load as load_manifest
from elastictrain_checkpoint.errors import StateChanged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 512)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(64, 512, device="cuda")).square().mean().backward()
    optimizer.step()


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": optimizer.state_dict()}


@pytest.mark.parametrize("bounce_bytes", [None, 1 << 20])
def test_steps_that_follow_at_once_are_not_in_it(tmp_path: Path, bounce_bytes: int | None) -> None:
    model, optimizer = trained()
    saver = checkpoint.AsyncSaver(tmp_path, bounce_bytes=bounce_bytes)
    saver.attach(optimizer)
    for step in range(3):  # the pinned memory is used again
        expected = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        handle = saver.save(state_of(model, optimizer), step=step)
        for _ in range(5):
            train(model, optimizer)
        handle.result(60)
        other, fresh = trained()
        state = state_of(other, fresh)
        checkpoint.load(state, tmp_path, step=step)
        for name, value in expected.items():
            assert torch.equal(state["model"][name].cpu(), value), name
            assert state["model"][name].is_cuda
    size = sum(t.nbytes for t in model.state_dict().values()) * 3
    assert saver.extra_bytes < 1.1 * size
    saver.close()


def test_a_device_and_a_host_resume_each_other(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save(state_of(model, optimizer), tmp_path / "device", step=1)
    on_host = {
        "model": {name: torch.zeros_like(v, device="cpu") for name, v in model.state_dict().items()},
        "optim": {},
    }
    checkpoint.load(on_host, tmp_path / "device")
    checkpoint.save(on_host, tmp_path / "host", step=1)
    digests = {load_manifest(Store(tmp_path / name), 1).digest for name in ("device", "host")}
    assert len(digests) == 1
    other, fresh = trained()
    train(other, fresh)
    state = state_of(other, fresh)
    checkpoint.load(state, tmp_path / "host")
    fresh.load_state_dict(state["optim"])
    train(model, optimizer)
    train(other, fresh)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("bounce_bytes", [None, 1 << 20])
def test_a_step_that_nobody_announced_fails_the_save(tmp_path: Path, bounce_bytes: int | None) -> None:
    model, optimizer = trained()
    saver = checkpoint.AsyncSaver(tmp_path, bounce_bytes=bounce_bytes)
    busy = torch.ones(8192, 8192, device="cuda")
    for _ in range(200):  # the copy waits for what the device has to do first
        busy = busy @ busy
    handle = saver.save(state_of(model, optimizer), step=1)
    train(model, optimizer)
    with pytest.raises(StateChanged, match=r"has changed while it was copied from its device\. Call before_mutation"):
        handle.result(60)
    saver.close()


@pytest.mark.parametrize("lazy", [None, False])
@pytest.mark.parametrize("bounce_bytes", [None, 1 << 20])
def test_a_script_for_dcp_trains_on_at_once(tmp_path: Path, bounce_bytes: int | None, lazy: bool | None) -> None:
    """Nothing is announced: not the steps, not the statistics that a forward changes, not what is averaged by hand."""
    model, optimizer = trained()
    norm = torch.nn.BatchNorm1d(512).cuda()
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    for number in range(3):
        state = state_of(model, optimizer) | {"norm": norm.state_dict(), "ema": average}
        expected = checkpoint.save(copy.deepcopy(state), tmp_path / str(number), step=1).digest
        handle = checkpoint.async_save(
            state, checkpoint_id=tmp_path / "a", no_dist=True, lazy=lazy, bounce_bytes=bounce_bytes
        )
        norm(torch.randn(64, 512, device="cuda"))
        for value in average.values():
            value.mul_(0.9)
        for _ in range(5):
            train(model, optimizer)
        assert handle.result(60).digest == expected
