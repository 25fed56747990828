"""What a recipe's model costs, from tensors without data: nothing is computed and no memory is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from elastictrain.engine.anatomy import anatomy
from elastictrain.errors import ElasticTrainError, RecipeError
from elastictrain.job import Job
from elastictrain.planner.workload import Workload
from elastictrain.recipe import load_recipe


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many operations reach the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


class _Saved:
    """Bytes that the forward keeps for the backward: every storage once, parameters not."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


def describe(job: Job, batch: Mapping[str, np.ndarray[Any, Any]]) -> Workload:
    """The job's model as the planner sees it. `batch`: the samples of one lane.

    The recipe's model and loss run on device `meta`. Raises RecipeError when they need values (a loss that calls
    `.item()`, a model that reads a file into its parameters).
    """
    recipe = load_recipe(job.recipe, job.recipe_args)
    dtype = torch.bfloat16 if job.numerics.compute_dtype == "bf16" else torch.float32
    try:
        with torch.device("meta"):
            model = recipe.model().to(device="meta", dtype=dtype).train()
            samples = {
                name: torch.from_numpy(np.ascontiguousarray(array[: _part(job, array)])).to("meta")
                for name, array in batch.items()
            }
            saved, counted, flops = _Saved(model), _Counted(), FlopCounterMode(display=False)
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), flops, counted:
                loss = recipe.loss(model, samples)
                (loss[0] if isinstance(loss, tuple) else loss).backward()
            found = anatomy(model, lambda: recipe.loss(model, samples))
    except ElasticTrainError:
        raise
    except Exception as error:
        raise RecipeError(
            f"the recipe's model and loss could not be looked at without data (device meta): {type(error).__name__}: "
            f"{error}. Describe a decoder in a file instead: --model model.yaml"
        ) from error
    return Workload(
        params=sum(parameter.numel() for parameter in model.parameters()),
        lane_flops=float(flops.get_total_flops() * job.micro_batches),
        kept_bytes=float(saved.bytes),
        lanes=job.lanes,
        operations=counted.operations * job.micro_batches,
        dtype=job.numerics.compute_dtype,
        mirrors=job.mirrors,
        decoder=found.model,
        decoder_said=found.said,
    )


def _part(job: Job, array: np.ndarray[Any, Any]) -> int:
    return max(1, len(array) // job.micro_batches)
