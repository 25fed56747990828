"""The recipe: the user's code. It never mentions a machine, a rank or a world size."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from elastictrain.errors import RecipeError
from elastictrain.user_files import NotLoaded, load_file

Batch = Mapping[str, torch.Tensor]
Loss = torch.Tensor | tuple[torch.Tensor, torch.Tensor | float]
BufferRule = Literal["mean", "same", "max"]


class Recipe:
    """Subclass it, or give any object with the first three methods.

    `model`, `optimizer` and `loss` are required; the rest are hooks with defaults.
    """

    ema_decay: float | None = None
    """Keep an exponential moving average of the master weights, updated at every apply."""

    def model(self) -> nn.Module:
        """Build the model on the CPU. Called after the job's seed is set, on every worker alike."""
        raise NotImplementedError(f"{type(self).__name__}.model() is missing")

    def optimizer(self, params: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """One optimizer over `params`: (name, parameter) pairs as from `named_parameters()`.

        The parameters have their full shape but no data (device `meta`), so groups may be chosen by name, by `p.dim()`
        or by size. torch's optimizers take the pairs as they are: `AdamW(params, lr=3e-4)`, also inside groups.
        """
        raise NotImplementedError(f"{type(self).__name__}.optimizer() is missing")

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of one lane: a mean (all lanes weigh the same), or a pair (sum, weight), for instance the summed
        token loss and the number of valid tokens; the step's loss is then sum of sums / sum of weights.
        """
        raise NotImplementedError(f"{type(self).__name__}.loss() is missing")

    def schedule(self, step: int) -> float:
        """Factor on every group's learning rate at `step` (1 is the first). A pure function of the step."""
        del step
        return 1.0

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Metrics of the committed parameters; called at a commit, in eval mode, without gradients, on one worker."""
        del model
        return {}

    def buffer_rule(self, name: str) -> BufferRule:
        """How a buffer that the forward changes becomes the next committed buffer.

        Floating buffers take the mean of the lanes' changes ("mean"). Integer and boolean ones must come out the same
        in every lane ("same", the default), or take the largest value ("max").
        """
        del name
        return "same"


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, floor: float = 0.1) -> float:
    """Linear warm-up to 1, then half a cosine down to `floor` at `total_steps`. For `Recipe.schedule`."""
    if step <= warmup_steps:
        return step / max(1, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def load_recipe(reference: object, arguments: Mapping[str, Any] | None = None) -> Any:
    """The recipe object for `Job.recipe`: a "module:Class" or "file.py:Class", a class, or an object as it is.

    Raises RecipeError when it does not import, has no such class, cannot be built or lacks one of the three methods.
    """
    found = _find(reference) if isinstance(reference, str) else reference
    recipe = found
    if isinstance(found, type):
        try:
            recipe = found(**(arguments or {}))
        except Exception as error:
            raise RecipeError(
                f"recipe={reference!r}: {found.__name__}(**recipe_args) failed with "
                f"recipe_args={dict(arguments or {})}: {type(error).__name__}: {error}"
            ) from error
    missing = [name for name in ("model", "optimizer", "loss") if not _has(recipe, name)]
    if missing:
        raise RecipeError(
            f"recipe={reference!r}: {type(recipe).__name__} has no {', '.join(f'{name}()' for name in missing)}; "
            "expected model(), optimizer(params) and loss(model, batch)"
        )
    return recipe


def _has(recipe: object, method: str) -> bool:
    """The base class defines all three only to say what they are: inheriting its version is not having it."""
    found = getattr(recipe, method, None)
    return callable(found) and getattr(found, "__func__", found) is not getattr(Recipe, method)


def _find(reference: str) -> Any:
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise RecipeError(f'recipe={reference!r}: expected "module:Class" or "file.py:Class"')
    module = _load_file(Path(source), reference) if source.endswith(".py") else _import(source, reference)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            classes = sorted(
                n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__
            )
            raise RecipeError(
                f"recipe={reference!r}: {source} has no {name!r}; it defines {', '.join(classes) or 'no classes'}"
            )
        found = getattr(found, part)
    return found


def _import(module: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a module is the user's code: it may raise anything
        raise RecipeError(
            f"recipe={reference!r} does not import: {type(error).__name__}: {error}; expected a module on the Python "
            "path of the workers or a file, as in recipe: path/to/recipe.py:Class"
        ) from error


def _load_file(path: Path, reference: str) -> ModuleType:
    try:
        return load_file(path, "recipe")
    except NotLoaded as error:
        raise RecipeError(f"recipe={reference!r}{error}") from error.__cause__
