"""A checkpoint of another structure: strictly refused before anything is touched, else all that is left is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import Store
from elastictrain_checkpoint.errors import InvalidPiece, StateChanged, StateMismatch
from tests.unit.checkpoint.test_torch import Gate


def ones(number: int) -> list[Any]:
    return [torch.ones(2) for _ in range(number)]


KINDS: dict[str, tuple[Any, Any, list[str], list[str], list[str]]] = {
    # what: (stored, target, missing, unexpected, different)
    "longer there": (ones(4), [torch.zeros(2), torch.zeros(2)], [], ["x/2", "x/3"], []),
    "shorter there": (ones(1), [torch.zeros(2), torch.zeros(2)], ["x/1"], [], []),
    "longer tuple": (tuple(ones(3)), (torch.zeros(2),), [], ["x/1", "x/2"], []),
    "groups": ([{"lr": 1.0}] * 2, [{"lr": 0.0}], [], ["x/1/lr"], []),
    "number there, tensors here": (1, {"a": torch.zeros(2)}, [], [], ["x is a dict of 1, in the checkpoint 1"]),
    "list there, tensors here": (
        ones(2), {"a": torch.zeros(2)}, [], [], ["x is a dict of 1, in the checkpoint a list of 2"],
    ),
    "tensors there, number here": ({"a": torch.ones(2)}, 1, [], [], ["x is 1, in the checkpoint a dict of 1"]),
    "tensors there, list here": (
        {"a": torch.ones(2)}, [torch.zeros(2)], [], [], ["x is a list of 1, in the checkpoint a dict of 1"],
    ),
    "tensor there, mapping here": (
        torch.ones(3), {"a": torch.zeros(2)}, [], [],
        ["x is a dict of 1, in the checkpoint a tensor, F32 [3]"],
    ),
    "tensor there, None here": (torch.ones(3), None, [], [], ["x is None, in the checkpoint a tensor, F32 [3]"]),
    "number there, tensor here": (
        5, torch.zeros(2), [], [], ["x is a tensor, torch.float32 [2], in the checkpoint 5"],
    ),
    "list of numbers there, tensors here": (
        [1, 2], [torch.zeros(1), 3], [], [], ["x/0 is a tensor, torch.float32 [1], in the checkpoint 1"],
    ),
    "odd type": (
        torch.ones(3, dtype=torch.complex128), torch.zeros(4), [], [],
        ["x is torch.float32 [4], in the checkpoint complex128 [3]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", KINDS)
def test_other_lengths_and_kinds_are_refused_and_otherwise_said(what: str, tmp_path: Path) -> None:
    stored, target, missing, unexpected, different = KINDS[what]
    checkpoint.save({"x": stored, "a": torch.ones(2), "n": 7}, tmp_path)
    state = {"x": copy.deepcopy(target), "a": torch.zeros(2), "n": 0}
    live = state["x"]
    with pytest.raises(StateMismatch) as refused:
        checkpoint.load(state, tmp_path)
    assert (refused.value.missing, refused.value.extra) == (tuple(missing), tuple(unexpected))
    assert list(refused.value.different) == different
    assert state["n"] == 0
    assert not state["a"].any(), "nothing was touched"
    report = checkpoint.load(state, tmp_path, strict=False)
    assert (report.missing, report.unexpected, list(report.different.values())) == (missing, unexpected, different)
    assert state["n"] == 7
    assert state["a"].all()
    assert state["x"] is live or isinstance(target, int)
    if isinstance(live, list | tuple):
        assert len(live) == len(target)


class Pair(NamedTuple):
    weight: torch.Tensor
    count: int


def test_named_tuples_are_saved_and_filled(tmp_path: Path) -> None:
    checkpoint.save({"p": Pair(torch.ones(2), 3)}, tmp_path)
    live = torch.zeros(2)
    state = {"p": Pair(live, 0)}
    checkpoint.load(state, tmp_path)
    assert isinstance(state["p"], Pair)
    assert state["p"].weight is live
    assert (live.tolist(), state["p"].count) == ([1.0, 1.0], 3)
    assert checkpoint.load({"p": Pair(torch.zeros(3), 0)}, tmp_path, strict=False).different.keys() == {"p/0"}


def test_a_cycle_is_refused_with_its_place(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.zeros(1)}
    state["again"] = [state]
    with pytest.raises(InvalidPiece, match=r"^state_dict\['again'\]\[0\].*: nested deeper than 98 levels"):
        checkpoint.save(state, tmp_path)


def test_what_averages_weights_counts_between_steps(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    gate = Gate(tmp_path)
    saver = checkpoint.AsyncSaver(Store(str(tmp_path), backend=gate))
    handle = saver.save({"ema": averaged.state_dict()}, step=1)
    assert gate.reached.wait(30)
    averaged.n_averaged.add_(1)
    gate.opened.set()
    handle.result(30)
    found: dict[str, Any] = {}
    checkpoint.load(found, tmp_path)
    assert found["ema"]["n_averaged"] == 0
    gate.reached.clear()
    gate.opened.clear()
    handle = saver.save({"ema": averaged.state_dict()}, step=2)
    assert gate.reached.wait(30)
    averaged.update_parameters(model)
    gate.opened.set()
    with pytest.raises(StateChanged, match=r"ema/module\.\w+ has changed .*, name what changes in between \(eager="):
        handle.result(30)
    saver.close()


def test_live_tensors_of_a_list_are_filled_as_far_as_they_go(tmp_path: Path) -> None:
    checkpoint.save({"ema": [torch.full((2,), float(n)) for n in range(4)]}, tmp_path)
    live = [torch.zeros(2), torch.zeros(2)]
    state = {"ema": list(live)}
    checkpoint.load(state, tmp_path, strict=False)
    assert [a is b for a, b in zip(state["ema"], live, strict=True)] == [True, True]
    assert live[1].tolist() == [1.0, 1.0]


def test_another_shape_is_skipped_and_said_and_the_rest_is_loaded(tmp_path: Path) -> None:
    checkpoint.save({"head": torch.ones(5, 2), "body": torch.ones(3), "half": torch.ones(1)}, tmp_path)
    state = {"head": torch.zeros(4, 2), "body": torch.zeros(3), "half": torch.zeros(1, dtype=torch.float16)}
    report = checkpoint.load(state, tmp_path, strict=False)
    assert report.different == {
        "head": "head is torch.float32 [4, 2], in the checkpoint F32 [5, 2]",
        "half": "half is torch.float16 [1], in the checkpoint F32 [1]",
    }
    assert not state["head"].any()
    assert state["body"].all()


def test_what_can_never_be_filled_is_refused_in_any_case(tmp_path: Path) -> None:
    checkpoint.save({"a": torch.ones(2)}, tmp_path)
    with pytest.raises(StateMismatch, match=r"\n  a is on the meta device\n"):
        checkpoint.load({"a": torch.empty(2, device="meta")}, tmp_path, strict=False)


def test_lists_of_values_are_values_and_empty_ones_take_all(tmp_path: Path) -> None:
    state = {"history": [1.0, 2.0, 3.0], "betas": (0.9, 0.99), "ema": ones(2), "none": [], "size": torch.Size([2, 3])}
    checkpoint.save(state, tmp_path)
    history: list[float] = [5.0]
    found: dict[str, Any] = {"history": history, "betas": None, "ema": [], "none": [1], "size": torch.Size([1])}
    checkpoint.load(found, tmp_path)
    assert found["history"] is history
    assert history == [1.0, 2.0, 3.0]
    assert (found["betas"], found["none"], found["size"]) == ((0.9, 0.99), [], torch.Size([2, 3]))
    assert isinstance(found["size"], torch.Size)
    assert [value.tolist() for value in found["ema"]] == [[1.0, 1.0]] * 2
