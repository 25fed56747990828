"""Building a worker's model from a job: recipe, address space, flat model, optimizer template. And the checks that are
made at submission, before any machine is asked for.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastictrain.engine.flat import COMPUTE_DTYPES, FlatModel
from elastictrain.engine.held import HeldState
from elastictrain.engine.one_lane import seed_everything
from elastictrain.engine.optimizers import check_optimizer, optimizer_template
from elastictrain.engine.space import Space
from elastictrain.errors import ElasticTrainError, RecipeError
from elastictrain.job import Job
from elastictrain.protocol import COUNTED_SUMS, ModelFacts
from elastictrain.recipe import Recipe, load_recipe


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
    try:
        model = recipe.model()
    except ElasticTrainError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RecipeError(
            f"recipe.model() failed at {place.filename}:{place.lineno}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise RecipeError(f"recipe.model() must return a torch.nn.Module, got {type(model).__name__}")
    return model


def build(job: Job, device: torch.device) -> WorkerModel:
    """The model of a worker, with the recipe's initial values and no block held yet."""
    recipe = load_recipe(job.recipe, job.recipe_args)
    model = build_initial(recipe, job.seed)
    space = Space(model, block_elements=job.block_elements, whole_parameters=job.ownership == "whole")
    template, params = optimizer_template(recipe, model)
    flat = FlatModel(
        model,
        space,
        params,
        dtype=COMPUTE_DTYPES[job.numerics.compute_dtype],
        device=device,
        buffer_rule=hook(recipe, "buffer_rule"),
    )
    return WorkerModel(recipe, space, flat, HeldState(flat, template, hook(recipe, "ema_decay")))


def bare_model(recipe: Any, seed: int) -> nn.Module:
    """The recipe's model for its names and shapes: on `meta` where the recipe's code allows it, else on the CPU."""
    try:
        with torch.device("meta"):
            model = recipe.model()
    except Exception:
        model = build_initial(recipe, seed)
    if not isinstance(model, nn.Module):
        raise RecipeError(f"recipe.model() must return a torch.nn.Module, got {type(model).__name__}")
    return model


def inspect(job: Job) -> ModelFacts:
    """Check recipe and optimizer, and measure the model. Raises RecipeError; needs no worker."""
    recipe = load_recipe(job.recipe, job.recipe_args)
    model = bare_model(recipe, job.seed)
    space = Space(model, block_elements=job.block_elements, whole_parameters=job.ownership == "whole")
    template, _ = optimizer_template(recipe, model)
    tensors = check_optimizer(template, sliced=job.ownership == "sliced")
    dtype = COMPUTE_DTYPES[job.numerics.compute_dtype]
    ema = hook(recipe, "ema_decay") is not None
    fixed = space.total_elements * dtype.itemsize + COUNTED_SUMS * space.active_elements * 4
    held = 4 * (tensors + ema + (dtype != torch.float32))
    return ModelFacts(
        block_elements=space.block_elements,
        parameters=sum(e.elements for e in space.entries if e.kind != "buffer"),
        optimizer=type(template).__name__,
        state_tensors=tensors,
        fixed_bytes=fixed,
        bytes_per_held_element=held + 4,
        active_blocks=space.active_blocks,
    )
