"""Which optimizers are taken, which need whole parameters, which are refused, and with which words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from elastictrain.engine.optimizers import check_optimizer, fresh_copy, optimizer_template, state_keys
from elastictrain.engine.worker_model import inspect
from elastictrain.errors import RecipeError
from tests.unit.engine.optimizer_table import ELEMENT_WISE, Lion, MakeOptimizer
from tests.unit.engine.worlds import Net, NetRecipe, make_job


def template(make: MakeOptimizer, model: nn.Module | None = None) -> Optimizer:
    return optimizer_template(NetRecipe(make), model or Net())[0]


STATE_TENSORS = {
    "sgd": 0, "sgd-momentum": 1, "sgd-nesterov": 1, "sgd-foreach": 1, "sgd-fused": 1, "adam": 2, "adam-amsgrad": 3,
    "adam-foreach": 2, "adamw": 2, "adamw-foreach": 2, "adamw-fused": 2, "nadam": 2, "radam": 2, "adagrad": 1,
    "adagrad-fused": 1, "rmsprop": 3, "adamax": 2, "adadelta": 2, "rprop": 2, "asgd": 1, "lion": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_element_wise_optimizers_are_taken_on_either_ownership(name: str) -> None:
    made = template(ELEMENT_WISE[name])
    assert check_optimizer(made, sliced=True) == STATE_TENSORS[name]
    assert check_optimizer(made, sliced=False) == STATE_TENSORS[name]
    assert not any(isinstance(p, torch.Tensor) and not p.is_meta for p in made.state)


def matrices(cls: Any) -> MakeOptimizer:
    return lambda params: cls([(n, p) for n, p in params], lr=0.01)


class Layerwise(Optimizer):
    """LARS: every parameter's step is scaled by its norm."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * (group["lr"] * p.norm() / p.grad.norm()))


class RowState(Lion):
    """Element-wise in its result, but with a state that cannot be cut."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = torch.zeros(3)
                p.sub_(p.grad * group["lr"])


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Muon, "2D"),
        (Adafactor, "its result for a slice depends on the rest of the parameter"),
        (Layerwise, "its result for a slice depends on the rest of the parameter"),
        (RowState, "its state 'rows' of shape (3,) cannot be cut"),
    ],
)
def test_optimizers_of_whole_parameters_need_whole_ownership(cls: Any, why: str) -> None:
    made = template(matrices(cls), nn.Linear(4, 4, bias=False))
    with pytest.raises(RecipeError, match=r"does not work on slices of parameters .*set ownership: whole") as error:
        check_optimizer(made, sliced=True)
    assert why in str(error.value)
    assert check_optimizer(made, sliced=False) >= 0


def test_the_check_is_made_at_submission() -> None:
    class Matrix(NetRecipe):
        def model(self) -> nn.Module:
            return nn.Linear(4, 4, bias=False)

    recipe = Matrix(matrices(Muon))
    with pytest.raises(RecipeError, match="set ownership: whole"):
        inspect(make_job(recipe))
    facts = inspect(make_job(recipe, ownership="whole"))
    assert (facts.optimizer, facts.parameters, facts.state_tensors) == ("Muon", 16, 1)
    assert facts.block_elements == (16,)


class Clipped(Lion):
    """Divides by the norm of everything in the group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            norm = torch.stack([p.grad.square().sum() for p in group["params"]]).sum().sqrt()
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / norm)


class GroupState(Lion):
    """Counts in its group, as schedule-free ones do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                p.sub_(group["lr"] / group["k"] * p.grad)


class SelfState(Lion):
    """Counts on itself."""

    calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls = self.calls + 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] / self.calls * p.grad)


class OwnList(Lion):
    """Keeps its own list of parameters, which would still be the user's."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.mine = [p for g in self.param_groups for p in g["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.mine:
            if p.grad is not None:
                p.data.sub_(p.grad)


class OddState(Lion):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = {1, 2}
                p.sub_(p.grad)


class EarlyState(Lion):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["ready"] = torch.zeros_like(p)


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (
            torch.optim.SparseAdam,
            r"SparseAdam cannot be used: its step\(\) failed with .*dense.*no closure and takes de",
        ),
        (torch.optim.LBFGS, r"LBFGS cannot be used: its step\(\) failed with TypeError: .*closure.*needs no closure"),
        (Clipped, r"Clipped (cannot be used: its result for one tensor depends on the others).*set clip_grad_norm$"),
        (GroupState, r"GroupState cannot be used: its step\(\) changes group\['k'\], which cannot follow a block"),
        (SelfState, r"SelfState cannot be used: its step\(\) changes self\.calls, which cannot follow a block"),
        (OwnList, r"OwnList cannot be used: its step\(\) does not change the tensors in its param_groups"),
        (OddState, r"OddState cannot be used: it keeps a set as state 'history'; expected tensors and plain numbers"),
        (EarlyState, r"EarlyState makes its state 'ready' in the constructor.*make it in the first step\(\)$"),
    ],
)
def test_what_cannot_follow_a_block_is_refused(cls: Any, message: str, sliced: bool) -> None:
    made = template(lambda params: cls([p for _, p in params], lr=0.01))
    with pytest.raises(RecipeError, match=f"^optimizer {message}"):
        check_optimizer(made, sliced=sliced)


def lbfgs_groups(params: Sequence[Any]) -> Optimizer:
    return torch.optim.LBFGS([{"params": [p]} for _, p in params])


def with_hook(params: Sequence[Any]) -> Optimizer:
    made = SGD(params, lr=0.1)
    made.register_step_post_hook(lambda *_: None)
    return made


def with_scheduler(params: Sequence[Any]) -> Optimizer:
    made = SGD(params, lr=0.1)
    torch.optim.lr_scheduler.StepLR(made, 3)
    return made


def foreign(params: Sequence[Any]) -> Optimizer:
    return SGD([*(p for _, p in params), nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda params: [SGD(params, lr=1.0), SGD(params, lr=1.0)],
            r"returned 2 optimizers; expected one: use param gr",
        ),
        (lambda params: 3, r"must return a torch\.optim\.Optimizer, got int$"),
        (with_hook, r"has step hooks: a stateful callback cannot be cut into blocks; use recipe\.schedule"),
        (with_scheduler, r"has a learning rate scheduler or a wrapped step\(\).*give it as recipe\.schedule\(step\)$"),
        (foreign, r"holds a tensor that is not one of `params`; build it from the given pairs$"),
        (
            lambda params: SGD(params[:-7], lr=1.0),
            r"leaves out inp\.weight, inp\.bias, norm\.weight, norm\.bias, mid\.weight: give every",
        ),
        (lambda params: SGD(params, lr=-1), r"failed: ValueError: Invalid learning rate: -1$"),
        (lambda params: Lion(params, lr=None), r"group 0 of Lion has lr=None; expected a number"),  # type: ignore[arg-type]
        (lbfgs_groups, r"failed: ValueError: LBFGS doesn't support per-parameter options"),
    ],
)
def test_what_is_not_one_optimizer_over_every_parameter_is_refused(make: MakeOptimizer, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^recipe\.optimizer\(params\):? {message}"):
        template(make)


def test_our_own_errors_from_the_recipe_stay_as_they_are() -> None:
    def broken(params: Sequence[Any]) -> Optimizer:
        raise RecipeError("the user's own words")

    with pytest.raises(RecipeError, match=r"^the user's own words$"):
        template(broken)


def test_a_copy_keeps_every_setting_and_no_state() -> None:
    made = template(lambda params: Lion(params, lr=0.01))
    assert isinstance(made, Lion)
    made.betas[0] = 0.5
    copied = fresh_copy(made)
    assert isinstance(copied, Lion)
    assert copied.betas == [0.5, 0.99]
    assert copied.betas is not made.betas
    assert copied.param_groups[0]["lr"] == 0.01
    assert not copied.state


def test_a_learning_rate_of_zero_in_a_group_is_no_reason_to_refuse() -> None:
    assert check_optimizer(template(lambda params: AdamW(params, lr=0.0)), sliced=True) == 2


def test_the_keys_of_a_group_are_those_after_a_step() -> None:
    assert state_keys(template(ELEMENT_WISE["adamw"]), 0) == {"step", "exp_avg", "exp_avg_sq"}
    assert state_keys(template(ELEMENT_WISE["sgd"]), 1) == set()
    assert state_keys(template(ELEMENT_WISE["adagrad"]), 1) == {"step", "sum"}
