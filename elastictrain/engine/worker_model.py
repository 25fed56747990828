"""Building a worker's model from a job: recipe, address space, flat model, optimizer template. And the checks that are
made at submission, before any machine is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastictrain.engine.flat import COMPUTE_DTYPES, FlatModel
from elastictrain.engine.held import HeldState
from elastictrain.engine.space import Space
from elastictrain.engine.step import seed_everything
from elastictrain.errors import ElasticTrainError, RecipeError
from elastictrain.job import Job
from elastictrain.recipe import Recipe, load_recipe


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the controller and the user need to know of a model; from `meta` tensors, without its memory."""

    block_elements: tuple[int, ...]
    parameters: int
    optimizer: str
    state_tensors: int
    fixed_bytes: int
    bytes_per_held_element: int


@dataclass(slots=True)
class WorkerModel:
    """Everything about the model that one worker keeps."""

    recipe: Any
    space: Space
    flat: FlatModel
    held: HeldState


def hook(recipe: Any, name: str) -> Any:
    """A recipe's hook, or the default of `Recipe` for recipes that do not subclass it."""
    found = getattr(recipe, name, None)
    return found if found is not None else getattr(Recipe(), name)


def build_initial(recipe: Any, seed: int) -> nn.Module:
    """The recipe's model on the CPU with its initial values: the same bits on every worker."""
    seed_everything(seed)
    model = recipe.model()
    if not isinstance(model, nn.Module):
        raise RecipeError(f"recipe.model() must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _optimizer_template(recipe: Any, model: nn.Module) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """The user's optimizer over full-shape parameters on `meta`."""
    params = {
        name: nn.Parameter(torch.empty(p.shape, dtype=torch.float32, device="meta"))
        for name, p in model.named_parameters()
        if p.requires_grad
    }
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
    held = {id(p) for group in template.param_groups for p in group["params"]}
    left_out = [name for name, p in params.items() if id(p) not in held]
    if left_out:
        raise RecipeError(
            f"recipe.optimizer(params) leaves out {', '.join(left_out[:5])}: give every trainable parameter a group, "
            "or set requires_grad=False in recipe.model()"
        )
    return template, params


def build(job: Job, device: torch.device) -> WorkerModel:
    """The model of a worker, with the recipe's initial values and no block held yet."""
    recipe = load_recipe(job.recipe, job.recipe_args)
    model = build_initial(recipe, job.seed)
    space = Space(model, block_elements=job.block_elements, whole_parameters=job.ownership == "whole")
    template, params = _optimizer_template(recipe, model)
    flat = FlatModel(
        model,
        space,
        params,
        dtype=COMPUTE_DTYPES[job.numerics.compute_dtype],
        device=device,
        buffer_rule=hook(recipe, "buffer_rule"),
    )
    return WorkerModel(recipe, space, flat, HeldState(flat, template, hook(recipe, "ema_decay")))


def inspect(job: Job) -> ModelFacts:
    """Check recipe and optimizer, and measure the model. Raises RecipeError; needs no worker.

    The model is built on `meta` where the recipe's code allows it, else on the CPU.
    """
    recipe = load_recipe(job.recipe, job.recipe_args)
    try:
        with torch.device("meta"):
            model = recipe.model()
    except Exception:
        model = build_initial(recipe, job.seed)
    if not isinstance(model, nn.Module):
        raise RecipeError(f"recipe.model() must return a torch.nn.Module, got {type(model).__name__}")
    space = Space(model, block_elements=job.block_elements, whole_parameters=job.ownership == "whole")
    template, _ = _optimizer_template(recipe, model)
    tensors = check_optimizer(template, sliced=job.ownership == "sliced")
    dtype = COMPUTE_DTYPES[job.numerics.compute_dtype]
    ema = hook(recipe, "ema_decay") is not None
    fixed = space.total_elements * dtype.itemsize + 2 * space.active_elements * 4
    held = 4 * (tensors + ema + (dtype != torch.float32))
    return ModelFacts(
        block_elements=space.block_elements,
        parameters=sum(e.elements for e in space.entries if e.kind != "buffer"),
        optimizer=type(template).__name__,
        state_tensors=tensors,
        fixed_bytes=fixed,
        bytes_per_held_element=held + 4,
    )


def check_optimizer(template: torch.optim.Optimizer, *, sliced: bool) -> int:
    """Try the optimizer on a small parameter, whole and cut in two: an element-wise one cannot tell the difference.

    Returns how many full-size state tensors it keeps per element. Raises RecipeError for one that needs whole matrices
    on sliced ownership, or that cannot step at all.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(128, 64, generator=generator)
    gradients = [torch.randn(128, 64, generator=generator) * 10.0**-n for n in range(3)]
    kept = 0
    for index in range(len(template.param_groups)):
        if not template.param_groups[index]["params"]:
            continue
        try:
            whole, state = _try(template, index, [start.clone()], [[g] for g in gradients])
            kept = max(kept, sum(v.numel() == start.numel() for v in state.values() if isinstance(v, torch.Tensor)))
            if not sliced:
                continue
            cut, _ = _try(
                template,
                index,
                list(start.flatten().clone().tensor_split(2)),
                [g.flatten().tensor_split(2) for g in gradients],
            )
        except Exception as error:
            raise RecipeError(_needs_whole(template, f"{type(error).__name__}: {error}")) from error
        if not torch.allclose(torch.cat([p.flatten() for p in whole]), torch.cat(cut), rtol=1e-5, atol=1e-7):
            raise RecipeError(_needs_whole(template, "its result for a slice depends on the rest of the parameter"))
    return kept


def _needs_whole(template: torch.optim.Optimizer, why: str) -> str:
    return (
        f"optimizer {type(template).__name__} does not work on slices of parameters ({why}); "
        "set ownership: whole so that blocks are whole parameters, or use an element-wise "
        "optimizer (SGD, Adam, AdamW, …)"
    )


def _try(
    template: torch.optim.Optimizer, index: int, params: list[torch.Tensor], gradients: Sequence[Sequence[torch.Tensor]]
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    trial = copy.deepcopy(template)
    trial.state.clear()
    trial.param_groups = [{**trial.param_groups[index], "params": params}]
    trial.param_groups[0].pop("param_names", None)
    for step in gradients:
        for parameter, gradient in zip(params, step, strict=True):
            parameter.grad = gradient.clone()
        trial.step()
    return params, dict(trial.state[params[0]])
