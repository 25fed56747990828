"""A script for `torch.distributed.checkpoint` trains on after `async_save`, and tells nobody."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import Store
from elastictrain_checkpoint.torch import dropin, optimizers, taking
from elastictrain_checkpoint.torch.device import Bounced, Staging
from tests.support.late_engine import LateEngine
from tests.unit.checkpoint.test_torch import Gate

MODULES = [checkpoint, pytest.param(dcp, marks=pytest.mark.filterwarnings("ignore"))]


class Trained:
    """A model with statistics, a frozen part and an average that is kept by hand."""

    def __init__(self, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 5))
        self.model[2].requires_grad_(False)
        self.optimizer = kind([p for p in self.model.parameters() if p.requires_grad], lr=0.1)  # type: ignore[call-arg]
        self.average = {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 40)).square().mean().backward()
        self.optimizer.step()
        for name, value in self.model.named_parameters():
            self.average[name].lerp_(value.detach(), 0.1)

    def state(self, *, objects: bool) -> dict[str, Any]:
        if objects:
            return {"model": self.model, "optim": self.optimizer, "ema": self.average}
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict(), "ema": self.average}


@pytest.fixture
def gate(tmp_path: Path) -> Iterable[Gate]:
    made = Gate(tmp_path / "gated")
    yield made
    made.opened.set()


@pytest.fixture(autouse=True)
def nobody_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just begun."""
    optimizers._stepped.clear()
    monkeypatch.setattr(dropin, "_by_place", {})


def digest_of(state: Any, folder: Path) -> str:
    return checkpoint.save(copy.deepcopy(state), folder).digest


@pytest.mark.parametrize("module", MODULES, ids=["ours", "torch"])
@pytest.mark.parametrize("objects", [False, True], ids=["state dicts", "objects"])
def test_one_script_for_both(tmp_path: Path, module: Any, objects: bool) -> None:
    """Nothing but the module differs."""
    trained = Trained()
    for number in range(4):
        trained.step()
        state = trained.state(objects=objects)
        expected = digest_of(state, tmp_path / f"expected-{number}")
        future = module.async_save(state, checkpoint_id=tmp_path / f"step-{number}", process_group=None, no_dist=True)
        trained.step()
        trained.step()
        future.result()
        fresh = Trained()
        fresh.step()
        found = fresh.state(objects=objects)
        module.load(found, checkpoint_id=tmp_path / f"step-{number}", process_group=None, no_dist=True)
        assert digest_of(found, tmp_path / f"found-{number}") == expected


@pytest.mark.parametrize("objects", [False, True], ids=["state dicts", "objects"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_what_is_not_written_by_the_next_step_is_copied(
    tmp_path: Path, gate: Gate, objects: bool, steps_before: int
) -> None:
    trained = Trained()
    for _ in range(steps_before):
        trained.step()
    state = trained.state(objects=objects)
    expected = digest_of(state, tmp_path / "expected")
    handle = checkpoint.async_save(state, checkpoint_id=Store(tmp_path / "gated", backend=gate))
    assert gate.reached.wait(30)
    for _ in range(3):
        trained.step()
    is_known = objects or steps_before
    assert (handle.copied_bytes > 0) == bool(is_known), "else all of it was copied at the call"
    gate.opened.set()
    assert handle.result(30).digest == expected


def by_hand(trained: Trained) -> None:
    with torch.no_grad():
        for value in trained.model.parameters():
            value.mul_(0.9)


def of_another(trained: Trained) -> None:
    other = torch.optim.SGD(trained.model[2].parameters(), lr=1.0)
    for value in trained.model[2].parameters():
        value.grad = torch.ones_like(value)
    other.step()


def loading(trained: Trained) -> None:
    trained.model.load_state_dict({name: torch.zeros_like(v) for name, v in trained.model.state_dict().items()})


@pytest.mark.parametrize("change", [by_hand, of_another, loading])
def test_where_no_optimizer_is_known_all_is_copied_at_the_call(
    tmp_path: Path, gate: Gate, change: Callable[[Trained], None]
) -> None:
    trained = Trained()
    state = {"model": trained.model.state_dict()}
    expected = digest_of(state, tmp_path / "expected")
    handle = checkpoint.async_save(state, Store(tmp_path / "gated", backend=gate))
    change(trained)
    gate.opened.set()
    assert handle.result(30).digest == expected


def test_an_optimizer_that_updates_in_the_backward_is_heard_of(tmp_path: Path, gate: Gate) -> None:
    trained = Trained()
    for value in trained.model.parameters():
        if value.requires_grad:
            own = torch.optim.SGD([value], lr=0.1)
            value.register_post_accumulate_grad_hook(lambda _, own=own: own.step())  # type: ignore[misc]
    trained.model(torch.randn(8, 40)).square().mean().backward()
    state = {"model": trained.model.state_dict()}
    expected = digest_of(state, tmp_path / "expected")
    handle = checkpoint.async_save(state, Store(tmp_path / "gated", backend=gate))
    assert gate.reached.wait(30)
    trained.model(torch.randn(8, 40)).square().mean().backward()
    assert handle.copied_bytes
    gate.opened.set()
    assert handle.result(30).digest == expected


def test_a_folder_for_every_checkpoint_needs_no_memory_for_each(tmp_path: Path) -> None:
    trained = Trained(torch.optim.SGD)
    sizes = []
    for number in range(4):
        trained.step()
        handle = checkpoint.async_save(trained.state(objects=False), tmp_path / str(number))
        handle.result(30)
        sizes.append(handle._saver.extra_bytes)
        assert list(dropin._by_place) == [(str(tmp_path / str(number)), None, None)]
    assert [path.name for path in sorted(tmp_path.glob("*/step-*"))] == ["step-00000000"] * 4
    assert len(set(sizes)) == 1


def test_a_place_whose_save_runs_keeps_its_saver(tmp_path: Path, gate: Gate) -> None:
    held = Store(tmp_path / "gated", backend=gate)
    first = checkpoint.async_save({"a": torch.zeros(9)}, held)
    second = checkpoint.async_save({"a": torch.ones(9)}, tmp_path / "other")
    assert second.result(30).step == 0
    assert not first.done()
    gate.opened.set()
    first.result(30)
    assert checkpoint.async_save({"a": torch.zeros(9)}, held).result(30).step == 1


class OnDevice(checkpoint.AsyncSaver):
    """A device on the host, through which all tensors of rank 1 and more come."""

    engine: LateEngine

    def _new_staging(self, device: torch.device) -> Staging | Bounced:
        size = self._bounce_bytes
        return Staging(self.engine) if size is None else Bounced(self.engine, size, deadline_s=30)


@pytest.mark.parametrize("bounce_bytes", [None, 1 << 10])
@pytest.mark.parametrize("lazy", [None, False], ids=["lazy", "eager"])
def test_a_state_on_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounce_bytes: int | None, lazy: bool | None
) -> None:
    """Also statistics that the next forward changes, and what is averaged by hand."""
    monkeypatch.setattr(taking, "is_staged", lambda tensor: tensor.dim() > 0)
    monkeypatch.setattr(dropin, "AsyncSaver", OnDevice)
    engine = LateEngine()
    monkeypatch.setattr(OnDevice, "engine", engine, raising=False)
    trained = Trained()
    for number in range(3):
        trained.step()
        state = trained.state(objects=False)
        expected = digest_of(state, tmp_path / f"expected-{number}")
        if bounce_bytes is None:
            engine.gate.clear()  # what is not copied at once comes as late as it may
        handle = checkpoint.async_save(state, tmp_path / "a", lazy=lazy, bounce_bytes=bounce_bytes)
        assert isinstance(handle._saver._staging, Staging if bounce_bytes is None else Bounced)
        for value in trained.average.values() if lazy is None else trained.model.state_dict().values():
            value.zero_()
        trained.step()
        trained.step()
        engine.gate.set()
        assert handle.result(30).digest == expected
    assert list(dropin._by_place) == [(str(tmp_path / "a"), None, bounce_bytes)]


CALLS = [checkpoint.save, checkpoint.async_save, checkpoint.load]


@pytest.mark.parametrize("call", CALLS)
def test_what_has_no_meaning_here_says_what_to_use(tmp_path: Path, call: Any) -> None:
    state, name = {"a": torch.ones(1)}, call.__name__
    refused: dict[str, tuple[Any, str]] = {
        "storage_writer": (
            dcp.FileSystemWriter("there"),
            "a FileSystemWriter of 'there' has no use here: .* checkpoint_id",
        ),
        "storage_reader": (
            dcp.FileSystemReader("there"),
            "a FileSystemReader of 'there' has .*`elastictrain ckpt import`",
        ),
        "planner": (dcp.DefaultLoadPlanner(), "a DefaultLoadPlanner has .* strict=False loads what fits"),
        "async_stager": (object(), "a object has .* nothing is staged"),
    }
    for keyword, (value, said) in refused.items():
        with pytest.raises(TypeError, match=rf"^{name}\({keyword}=\): {said}"):
            call(state, tmp_path, **{keyword: value})
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'plannr'$"):
        call(state, tmp_path, plannr=None)
    with pytest.raises(TypeError, match=rf"^{name}\(group=, no_dist=\): give one of the two$"):
        call(state, tmp_path, group=None, no_dist=True)
    assert list(tmp_path.iterdir()) == []


def test_what_says_how_dcp_goes_about_it_means_nothing(tmp_path: Path) -> None:
    how: dict[str, Any] = {"use_collectives": False, "planner": None, "storage_writer": None}
    checkpoint.save({"a": torch.ones(1)}, checkpoint_id=tmp_path, **how)
    how["async_checkpointer_type"] = "thread"
    checkpoint.async_save({"a": torch.ones(1)}, checkpoint_id=tmp_path, **how).result(30)
    found = {"a": torch.zeros(1)}
    assert checkpoint.load(found, checkpoint_id=tmp_path, planner=None, storage_reader=None).step == 1
