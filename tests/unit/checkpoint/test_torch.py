"""State dicts of plain PyTorch: what is saved comes back, in place, with its bits, ties and numbers."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import InvalidPiece, NoCheckpoint, Store, digest, list_steps, verify
from elastictrain_checkpoint import load as load_manifest
from elastictrain_checkpoint.errors import SaveDropped, SaveFailed, StateChanged, StateMismatch
from elastictrain_checkpoint.handle import SaveState
from elastictrain_checkpoint.store import _backend

ODD = [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex128]
PLAIN = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32,
    torch.uint32, torch.float32, torch.int64, torch.uint64, torch.float64, torch.complex64, torch.float8_e5m2,
    torch.float8_e4m3fn,
]  # fmt: skip


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def zeros_like(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return torch.zeros_like(tree)
    if isinstance(tree, dict):
        return {key: zeros_like(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(zeros_like(value) for value in tree)
    return None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@pytest.mark.parametrize("dtype", [*PLAIN, *ODD], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (70, 130)], ids=str)
def test_every_type_and_shape_comes_back_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    state = {"a": {"value": random_tensor(dtype, *shape)}}
    found = zeros_like(state)
    target = found["a"]["value"]
    manifest = checkpoint.save(state, tmp_path)
    assert checkpoint.load(found, tmp_path).step == manifest.step == 0
    assert found["a"]["value"] is target, "in place"
    assert same(state, found)
    empty: dict[str, Any] = {}
    checkpoint.load(empty, tmp_path)
    assert same(state, empty)
    assert verify(Store(tmp_path), manifest) == []


def test_numbers_strings_lists_and_odd_keys_come_back(tmp_path: Path) -> None:
    state = {
        "epoch": 3, "big": 1 << 70, "lr": [1e-3, math.inf, math.nan], "name": "täst", "none": None, "flag": True,
        "raw": b"\0\1", 7: {"a": torch.arange(3), (1, "x"): torch.ones(2)}, "pair": (1, torch.zeros(2, 2)),
        "a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "": torch.ones(1), "weird\n": torch.ones(2), "empty": {},
        "list": [], "nested": [[torch.ones(1)], {"x": 1}],
    }  # fmt: skip
    found: dict[Any, Any] = {}
    checkpoint.save(state, tmp_path, step=12)
    assert checkpoint.load(found, tmp_path).step == 12
    assert same(state, found)
    again = zeros_like(state)
    checkpoint.load(again, tmp_path)
    assert same(state, again)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.embed(x)))
        return out


def trained(seed: int = 0, steps: int = 2) -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        train(model, optimizer)
    return model, optimizer


def train(model: Tied, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(40)).square().mean().backward()
    optimizer.step()


def test_model_and_optimizer_resume_with_the_same_bits(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path, step=2)
    manifest = load_manifest(Store(tmp_path), 2)
    assert manifest.alias == {"model/head.weight": "model/embed.weight"}, "tied weights are stored once"
    other, fresh = trained(seed=1, steps=0)
    state = {"model": other.state_dict(), "optim": fresh.state_dict()}
    checkpoint.load(state, tmp_path)
    fresh.load_state_dict(state["optim"])
    assert other.head.weight.data_ptr() == other.embed.weight.data_ptr(), "still tied"
    for one, two in ((model, optimizer), (other, fresh)):
        train(one, two)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert same(optimizer.state_dict(), fresh.state_dict())


def test_ties_are_tied_again_where_tensors_are_made(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    checkpoint.save({"a": weight, "b": [weight, weight[1:]]}, tmp_path)
    found: dict[str, Any] = {}
    checkpoint.load(found, tmp_path)
    assert found["a"] is found["b"][0]
    assert torch.equal(found["b"][1], weight[1:]), "a part of a tensor is no tie"


def test_what_is_not_contiguous_is_saved_and_filled_in_its_own_strides(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    number = torch.randn(3, dtype=torch.complex64)
    state = {"t": base.t(), "every": base[:, ::2], "broad": torch.ones(3, 1).expand(3, 5), "conj": number.conj()}
    checkpoint.save(state, tmp_path)
    found = {
        "t": torch.zeros(6, 8).t(),
        "every": torch.zeros(6, 8)[:, ::2],
        "broad": torch.zeros(3, 5),
        "conj": torch.zeros_like(number).conj(),
    }
    checkpoint.load(found, tmp_path)
    for name, value in state.items():
        assert torch.equal(value, found[name]), name


def test_what_cannot_be_saved_is_refused_at_once_with_its_place(tmp_path: Path) -> None:
    for value, said in (
        (torch.eye(3).to_sparse(), r"^m/x is a tensor of kind torch\.sparse_coo; only dense tensors with data can be"),
        (torch.empty(3, device="meta"), r"^m/x is a tensor of kind meta; only dense tensors with data can be stored$"),
        (object(), r"^state_dict\['m'\]\['x'\] is a builtins\.object; the tree holds None, bool, "),
    ):
        with pytest.raises(InvalidPiece, match=said):
            checkpoint.save({"m": {"x": value}}, tmp_path)
    assert list_steps(Store(tmp_path)) == []


# --- what does not fit ---


def test_a_state_that_differs_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    checkpoint.save(
        {"m": {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1), "d": torch.ones(1), "n": 1}}, tmp_path
    )
    target = {
        "m": {
            "a": torch.zeros(2),
            "b": torch.zeros(4),
            "c": torch.zeros(1, dtype=torch.float64),
            "x": torch.zeros(1),
            "n": 5,
        }
    }
    with pytest.raises(StateMismatch) as error:
        checkpoint.load(target, tmp_path)
    assert str(error.value).splitlines() == [
        f"step 0 of {tmp_path} does not fit:",
        "  m/b is torch.float32 [4], in the checkpoint F32 [3]",
        "  m/c is torch.float64 [1], in the checkpoint F32 [1]",
        "  m/x is not in the checkpoint",
        "  m/d is only in the checkpoint",
        "(strict=True)",
    ]
    assert target["m"]["n"] == 5
    assert not any(t.any() for t in target["m"].values() if isinstance(t, torch.Tensor))
    del target["m"]["b"], target["m"]["c"]
    report = checkpoint.load(target, tmp_path, strict=False)
    assert (report.missing, report.unexpected) == (["m/x"], ["m/b", "m/c", "m/d"])
    assert torch.equal(target["m"]["a"], torch.ones(2))
    assert target["m"]["n"] == 1


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match=r" has no checkpoint$"):
        checkpoint.load({}, tmp_path / "none")


def test_steps_follow_each_other_and_an_old_one_can_be_loaded(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        checkpoint.save({"a": torch.full((2,), value)}, tmp_path)
    found = {"a": torch.zeros(2)}
    assert checkpoint.load(found, tmp_path).step == 1
    assert checkpoint.load(found, tmp_path, step=0).step == 0
    assert found["a"].tolist() == [1.0, 1.0]
    with pytest.raises(
        SaveFailed, match=r"^step 1 was not saved to .*: AlreadyCommitted: step 1 was committed by attempt"
    ):
        checkpoint.save({"a": torch.zeros(2)}, tmp_path, step=1)


# --- in the background ---


class Gate:
    """Storage that stops before its first byte until it is opened."""

    def __init__(self, path: Path) -> None:
        self._inner: Any = _backend(str(path), {})
        self.reached, self.opened, self.error = threading.Event(), threading.Event(), None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, path: str, blocks: Iterable[memoryview]) -> int:
        self.reached.set()
        assert self.opened.wait(30)
        if self.error is not None:
            raise self.error
        return int(self._inner.create(path, blocks))


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.fixture
def saver(gate: Gate, tmp_path: Path) -> Iterable[checkpoint.AsyncSaver]:
    made = checkpoint.AsyncSaver(Store(str(tmp_path), backend=gate))
    yield made
    gate.opened.set()
    made.close()


def test_training_goes_on_while_the_save_of_the_earlier_state_waits(saver, gate, tmp_path) -> None:
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    expected = {"model": {k: v.clone() for k, v in model.state_dict().items()}}
    handle = saver.save(state, step=2)
    handle.attach(optimizer)
    assert handle.attach(optimizer) is handle.attach(optimizer)
    assert gate.reached.wait(30)
    for _ in range(3):
        train(model, optimizer)
    assert (handle.state, handle.done()) == (SaveState.RUNNING, False)
    gate.opened.set()
    manifest = handle.result(30)
    assert handle.state is SaveState.COMMITTED
    assert 0 < handle.copied_bytes <= saver.extra_bytes
    found = {"model": OrderedDict((k, torch.zeros_like(v)) for k, v in state["model"].items())}
    checkpoint.load(found, tmp_path, strict=False)
    assert same(expected["model"], dict(found["model"])), "running statistics too, which a forward changes"
    assert not same(expected["model"], dict(model.state_dict()))
    assert digest(Store(tmp_path), manifest) == manifest.digest


def test_a_step_that_nobody_announced_fails_the_save(saver, gate) -> None:
    model, optimizer = trained()
    handle = saver.save({"model": model.state_dict()}, step=2)
    assert gate.reached.wait(30)
    train(model, optimizer)
    gate.opened.set()
    with pytest.raises(
        StateChanged, match=r"^step 2 was not saved: model/embed\.weight has changed while it was read\. "
    ):
        handle.result(30)
    assert saver.save({"model": model.state_dict()}, step=3).result(30).step == 3


def test_memory_that_was_exchanged_is_noticed(saver, gate) -> None:
    weight = nn.Parameter(torch.zeros(10))
    handle = saver.save({"w": weight}, step=1)
    assert gate.reached.wait(30)
    with torch.no_grad():
        weight.set_(torch.ones(10))  # type: ignore[call-overload]
    saver.before_mutation()
    gate.opened.set()
    assert handle.wait(30) is SaveState.FAILED


def test_eager_needs_no_announcement(saver, gate, tmp_path) -> None:
    weight = torch.arange(1000.0)
    handle = saver.save({"w": weight}, step=1, lazy=False)
    weight.zero_()
    gate.opened.set()
    handle.result(30)
    found = {"w": torch.zeros(1000)}
    checkpoint.load(found, tmp_path)
    assert torch.equal(found["w"], torch.arange(1000.0))


def test_loading_into_what_is_being_saved_spoils_nothing(saver, gate, tmp_path) -> None:
    checkpoint.save({"w": torch.full((9,), 5.0)}, tmp_path / "other", step=1)
    weight = torch.zeros(9)
    handle = saver.save({"w": weight}, step=1)
    assert gate.reached.wait(30)
    checkpoint.load({"w": weight}, tmp_path / "other")
    gate.opened.set()
    handle.result(30)
    found = {"w": torch.ones(9)}
    checkpoint.load(found, tmp_path)
    assert (found["w"].sum(), weight.sum()) == (0, 45)


def test_one_that_is_skipped_or_superseded_says_so(saver, gate) -> None:
    state = {"w": torch.zeros(9)}
    first = saver.save(state, step=1)
    assert gate.reached.wait(30)
    skipped = saver.save(state, step=2, when_busy="skip", lazy=False)
    assert skipped.state is SaveState.SKIPPED
    assert saver.extra_bytes == 0, "it copies nothing of the one that runs"
    with pytest.raises(SaveDropped, match=r"^the save of step 2 was skipped: another one ran at that time$"):
        skipped.result(0)
    second = saver.save(state, step=3, when_busy="supersede")
    assert first.state is SaveState.SUPERSEDED
    gate.opened.set()
    assert second.result(30).step == 3
    assert list_steps(saver.store) == [3]


def test_an_error_of_the_storage_is_never_lost(saver, gate) -> None:
    gate.error = OSError(28, "No space left on device")
    state = {"w": torch.zeros(9)}
    gate.opened.set()
    first = saver.save(state, step=1)
    assert first._handle._ended.wait(30)  # `wait` would count as having asked
    saver.before_mutation()  # not here: a step of training must not end by it
    said = r"^step 1 was not saved to .*: OSError: \[Errno 28\] No space left on device$"
    with pytest.raises(SaveFailed, match=said):
        saver.save(state, step=2)
    gate.error = None
    assert saver.save(state, step=2).result(30).step == 2, "said once"
    with pytest.raises(SaveFailed, match=said) as error:
        first.result(0)
    assert isinstance(error.value.__cause__, OSError)


def test_the_function_uses_one_saver_for_a_path(tmp_path) -> None:
    weight = nn.Parameter(torch.zeros(9))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones(9)
    handles = []
    for _ in range(3):
        handles.append(checkpoint.async_save({"w": weight}, tmp_path))
        checkpoint.before_mutation()
        optimizer.step()
    assert [handle.result(30).step for handle in handles] == [0, 1, 2]
    for step in range(3):
        found = {"w": torch.zeros(9)}
        checkpoint.load(found, tmp_path, step=step)
        assert found["w"].tolist() == [-float(step)] * 9
