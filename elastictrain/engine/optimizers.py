"""The user's optimizer: built once over full-shape `meta` parameters, tried at submission, copied for the blocks that a
worker holds.

Built on full shapes, so that groups chosen by `p.dim()` or by name are right; stepped on blocks, each a tensor of its
own. That is the same only for an optimizer whose result for a block depends on nothing but that block:
`check_optimizer` tries it, for unknown optimizers too, before any machine is asked for.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastictrain.engine import eager
from elastictrain.errors import ElasticTrainError, RecipeError

_TRIAL_LR = 1e-2
_NOT_STATE = {"state", "param_groups", "_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused"}


def optimizer_template(recipe: Any, model: nn.Module) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """The user's optimizer over full-shape parameters on `meta`, and those parameters by name.

    Raises RecipeError for what is not one optimizer over every trainable parameter and nothing else.
    """
    params = {
        name: nn.Parameter(torch.empty(p.shape, dtype=torch.float32, device="meta"))
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    eager.spare_optimizers()
    try:
        template = recipe.optimizer(list(params.items()))
    except ElasticTrainError:
        raise
    except Exception as error:
        raise RecipeError(f"recipe.optimizer(params) failed: {type(error).__name__}: {error}") from error
    if isinstance(template, list | tuple | dict):
        raise RecipeError(
            f"recipe.optimizer(params) returned {len(template)} optimizers; expected one: use param groups, "
            "or one optimizer class that dispatches on the group"
        )
    if not isinstance(template, torch.optim.Optimizer):
        raise RecipeError(
            f"recipe.optimizer(params) must return a torch.optim.Optimizer, got {type(template).__name__}"
        )
    if template._optimizer_step_pre_hooks or template._optimizer_step_post_hooks:
        raise RecipeError(
            "recipe.optimizer(params) has step hooks: a stateful callback cannot be cut into blocks; "
            "use recipe.schedule, recipe.ema_decay or recipe.evaluate"
        )
    if "step" in vars(template) or any("initial_lr" in group for group in template.param_groups):
        raise RecipeError(
            "recipe.optimizer(params) has a learning rate scheduler or a wrapped step(): the learning rate is a "
            "function of the step alone; give it as recipe.schedule(step)"
        )
    _check_members(template, params)
    return template, params


def _check_members(template: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]) -> None:
    given = {id(p) for p in params.values()}
    held = {id(p) for group in template.param_groups for p in group["params"]}
    if held - given:
        raise RecipeError(
            "recipe.optimizer(params) holds a tensor that is not one of `params`; build it from the given pairs"
        )
    left_out = [name for name, p in params.items() if id(p) not in held]
    if left_out:
        raise RecipeError(
            f"recipe.optimizer(params) leaves out {', '.join(left_out[:5])}: give every trainable parameter a group, "
            "or set requires_grad=False in recipe.model()"
        )
    for index, group in enumerate(template.param_groups):
        if not isinstance(group.get("lr"), int | float | torch.Tensor):
            raise RecipeError(
                f"recipe.optimizer(params): group {index} of {type(template).__name__} has lr={group.get('lr')!r}; "
                "expected a number, which recipe.schedule multiplies"
            )


def fresh_copy(template: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same class with every setting, and no state."""
    made = copy.deepcopy(template)
    # torch's __getstate__ keeps three attributes and drops whatever a subclass has set on itself.
    for name, value in vars(template).items():
        if name not in vars(made):
            setattr(made, name, copy.deepcopy(value))
    made.state = defaultdict(dict)
    return made


def initial_state(
    template: torch.optim.Optimizer, group: Mapping[str, Any], parameter: nn.Parameter, block: torch.Tensor
) -> dict[str, Any]:
    """What the constructor has already put into the state of `parameter` (Adagrad does), for one of its blocks.

    Raises RecipeError for tensors of an unknown optimizer: on `meta` they have no values.
    """
    state: dict[str, Any] = {}
    for key, value in template.state.get(parameter, {}).items():
        if not isinstance(value, torch.Tensor):
            state[key] = copy.deepcopy(value)
        elif isinstance(template, torch.optim.Adagrad) and key == "sum":
            state[key] = torch.full_like(block, group["initial_accumulator_value"])
        elif isinstance(template, torch.optim.Adagrad) and key == "step" and value.is_meta:
            state[key] = torch.zeros((), dtype=value.dtype, device=block.device)
        elif value.is_meta or value.dim():
            raise RecipeError(
                f"optimizer {type(template).__name__} makes its state {key!r} in the constructor, where parameters "
                "have no data and their full shape; make it in the first step()"
            )
        else:
            state[key] = value.clone()
    return state


# --- the trial at submission ---


@dataclass(frozen=True, slots=True)
class _Trial:
    params: list[torch.Tensor]
    state: dict[str, Any]
    moved: list[str]
    """Settings outside the parameters' state that the steps have changed."""


def check_optimizer(template: torch.optim.Optimizer, *, sliced: bool) -> int:
    """Try every param group on small parameters: whole, cut in two, each alone and together with another.

    Returns how many full-size state tensors it keeps per element. Raises RecipeError for an optimizer that cannot step,
    whose result depends on what else a worker holds, that keeps state where it cannot follow a block, or that needs
    whole matrices on sliced ownership.
    """
    used = [index for index, group in enumerate(template.param_groups) if group["params"]]
    return max((_check_group(template, index, sliced=sliced) for index in used), default=0)


def _check_group(template: torch.optim.Optimizer, index: int, *, sliced: bool) -> int:
    name = type(template).__name__
    generator = torch.Generator().manual_seed(0)
    start, other = (torch.randn(128, 64, generator=generator) for _ in range(2))
    slopes = [torch.randn(2, 128, 64, generator=generator) * 10.0**-n for n in range(3)]
    try:
        whole = _try(template, index, [start], [[g[0]] for g in slopes])
        if not sliced:
            pair = _try(template, index, [start, other], [list(g) for g in slopes])
            second = _try(template, index, [other], [[g[1]] for g in slopes])
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"optimizer {name} cannot be used: its step() failed with {type(error).__name__}: {error}; expected an "
            "optimizer whose step() needs no closure and takes dense gradients (SGD, Adam, AdamW, …)"
        ) from error
    _check_trial(name, start, whole)
    kept = sum(v.numel() == start.numel() for v in whole.state.values() if isinstance(v, torch.Tensor))
    if not sliced:
        _check_alone(name, pair.params, [whole.params[0], second.params[0]])
        return kept
    halves = start.flatten().tensor_split(2)
    cuts = [g[0].flatten().tensor_split(2) for g in slopes]
    try:
        both = _try(template, index, halves, cuts)
        alone = [_try(template, index, [half], [[cut[i]] for cut in cuts]) for i, half in enumerate(halves)]
    except Exception as error:
        raise RecipeError(_needs_whole(name, f"{type(error).__name__}: {error}")) from error
    if not torch.allclose(whole.params[0].flatten(), torch.cat(both.params), rtol=1e-5, atol=1e-7):
        raise RecipeError(_needs_whole(name, "its result for a slice depends on the rest of the parameter"))
    _check_alone(name, both.params, [trial.params[0] for trial in alone])
    for key, value in both.state.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.numel() != halves[0].numel():
            raise RecipeError(_needs_whole(name, f"its state {key!r} of shape {tuple(value.shape)} cannot be cut"))
    return kept


def _check_trial(name: str, start: torch.Tensor, trial: _Trial) -> None:
    if torch.equal(trial.params[0], start):
        raise RecipeError(
            f"optimizer {name} cannot be used: its step() does not change the tensors in its param_groups; it must "
            "read its parameters from there, and nowhere else"
        )
    if trial.moved:
        raise RecipeError(
            f"optimizer {name} cannot be used: its step() changes {', '.join(trial.moved)}, which cannot follow a "
            "block to another worker or into a checkpoint; keep it in the state of the parameters"
        )
    for key, value in trial.state.items():
        if not isinstance(value, torch.Tensor) and not _is_plain(value):
            raise RecipeError(
                f"optimizer {name} cannot be used: it keeps a {type(value).__name__} as state {key!r}; expected "
                "tensors and plain numbers"
            )


def _check_alone(name: str, together: Sequence[torch.Tensor], alone: Sequence[torch.Tensor]) -> None:
    if not all(torch.equal(a, b) for a, b in zip(together, alone, strict=True)):
        raise RecipeError(
            f"optimizer {name} cannot be used: its result for one tensor depends on the others, so it would depend on "
            "which worker holds what; for a global gradient norm set clip_grad_norm"
        )


def _is_plain(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def _needs_whole(name: str, why: str) -> str:
    return (
        f"optimizer {name} does not work on slices of parameters ({why}); "
        "set ownership: whole so that blocks are whole parameters, or use an element-wise "
        "optimizer (SGD, Adam, AdamW, …)"
    )


def state_keys(template: torch.optim.Optimizer, index: int) -> frozenset[str]:
    """What group `index` keeps for every parameter after its first step."""
    generator = torch.Generator().manual_seed(0)
    tensor, gradient = (torch.randn(8, 8, generator=generator) for _ in range(2))
    return frozenset(_try(template, index, [tensor], [[gradient]]).state)


def _try(
    template: torch.optim.Optimizer,
    index: int,
    starts: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor]],
) -> _Trial:
    """Step copies of `starts` with a fresh copy of the optimizer that has group `index` alone."""
    trial = fresh_copy(template)
    params = [start.clone() for start in starts]
    group = trial.param_groups[index]
    trial.param_groups = [group]
    group |= {"params": params, "lr": _TRIAL_LR}
    group.pop("param_names", None)
    first = template.param_groups[index]["params"][0]
    for parameter in params:
        trial.state[parameter] = initial_state(template, group, first, parameter)
    before = _settings(trial)
    for step in gradients:
        for parameter, gradient in zip(params, step, strict=True):
            parameter.grad = gradient.clone()
        eager.step(trial)
    after = _settings(trial)
    moved = [name for name in after if not _same(before.get(name), after[name])]
    return _Trial(params, dict(trial.state[params[0]]), moved)


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything an optimizer knows besides its parameters and their state; a copy."""
    found = {f"self.{name}": value for name, value in vars(optimizer).items() if name not in _NOT_STATE}
    found |= {f"group[{key!r}]": v for key, v in optimizer.param_groups[0].items() if key != "params"}
    return {name: copy.deepcopy(v) for name, v in found.items() if _is_plain(v) or isinstance(v, torch.Tensor)}


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return before.is_meta or torch.equal(before, after)
    return type(before) is type(after) and bool(before == after)
