"""Code that was written for `torch.distributed.checkpoint`: its keywords, its stateful objects, its futures."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import InvalidPiece, Store
from elastictrain_checkpoint.errors import SaveFailed, StateMismatch
from tests.unit.checkpoint.test_torch import Gate, same


class Counter:
    """What DCP calls Stateful."""

    def __init__(self, count: int) -> None:
        self.count, self.fails = count, False

    def state_dict(self) -> dict[str, Any]:
        if self.fails:
            raise RuntimeError("not now")
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def objects(steps: int) -> dict[str, Any]:
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(steps):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return {"model": model, "optim": optimizer, "inner": {"scheduler": scheduler, "list": [Counter(steps)]}}


def told(state: dict[str, Any]) -> list[Any]:
    held = [state["model"], state["optim"], state["inner"]["scheduler"], state["inner"]["list"][0]]
    return [dict(one.state_dict()) for one in held]


def test_objects_that_keep_a_state_dict_are_asked_for_it_and_load_it(tmp_path: Path) -> None:
    state, other = objects(3), objects(0)
    weight = other["model"][0].weight
    checkpoint.save(state, checkpoint_id=tmp_path)
    kept = [other["model"], other["optim"], other["inner"]["scheduler"]]
    checkpoint.load(other, checkpoint_id=tmp_path)
    assert all(map(same, told(state), told(other)))
    assert [other["model"], other["optim"], other["inner"]["scheduler"]] == kept
    assert other["model"][0].weight is weight
    alone: dict[str, Any] = {"model": objects(0)["model"]}
    with pytest.raises(StateMismatch, match=r"optim/state/0/step is only in the checkpoint"):
        checkpoint.load(alone, checkpoint_id=tmp_path)
    checkpoint.load(alone, checkpoint_id=tmp_path, strict=False)
    assert same(dict(alone["model"].state_dict()), told(state)[0])


def test_one_that_raises_is_named(tmp_path: Path) -> None:
    state = objects(1)
    state["inner"]["list"][0].fails = True
    said = r"^state_dict\['inner'\]\['list'\]\[0\] \(Counter\): state_dict\(\) raised RuntimeError: not now$"
    with pytest.raises(InvalidPiece, match=said):
        checkpoint.save(state, tmp_path)


def test_the_place_is_given_once(tmp_path: Path) -> None:
    for call in (checkpoint.save, checkpoint.async_save, checkpoint.load):
        for places in ({}, {"path": tmp_path, "checkpoint_id": tmp_path}):
            with pytest.raises(TypeError, match="give one of the two"):
                call({"a": torch.ones(1)}, **places)  # type: ignore[operator]


def test_a_handle_is_asked_like_a_future(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    saver = checkpoint.AsyncSaver(Store(str(tmp_path), backend=gate))
    handle = saver.save({"a": torch.ones(1)})
    heard: list[Any] = []
    called = threading.Event()
    handle.add_done_callback(lambda _: 1 / 0)
    handle.add_done_callback(lambda one: (heard.append((one, one.done(), one.result(timeout=0).step)), called.set()))
    assert gate.reached.wait(30)
    assert (handle.done(), heard) == (False, [])
    with pytest.raises(TimeoutError):
        handle.result(timeout=0)
    gate.opened.set()
    assert handle.exception(timeout=30) is None
    assert called.wait(30)
    assert heard == [(handle, True, 0)]
    handle.add_done_callback(lambda one: heard.append(one))
    assert heard[1:] == [handle]
    gate.error = OSError(28, "No space left on device")
    failed = saver.save({"a": torch.ones(1)}).exception(30)
    assert isinstance(failed, SaveFailed)
    assert "No space left" in str(failed)
    saver.close()
