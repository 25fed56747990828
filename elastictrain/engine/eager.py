"""torch without its compiler, for as long as nobody compiles.

Deterministic mode and torch's optimizers import `torch._dynamo` or `torch._inductor`, only to tell them something.
That takes more than half as long again as torch itself, in every worker, right when a run waits for a replacement.
What is told is told here without them; as soon as somebody has imported the compiler (a recipe that compiles does),
torch's own way is taken. The numbers are computed by the same functions either way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as _torch_optimizer

_SAVERS = "elastictrain_checkpoint.torch.optimizers"
"""Hears of every step of a script's optimizers; a run tells its saver by itself."""
_DISABLED = "__dynamo_disable"
"""Where torch keeps, on a method that its compiler must not trace, what to call instead."""


def set_deterministic(on: bool) -> None:
    """`torch.use_deterministic_algorithms(on)`."""
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(on)
    else:
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = str(int(on))  # read when it is imported
        torch.set_deterministic_debug_mode("error" if on else "default")


def spare_optimizers() -> None:
    """From now on making an optimizer imports no compiler."""
    if "torch._dynamo" in sys.modules:
        return
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(getattr(torch.optim.Optimizer, name, None), "__wrapped__", None)
        if method is not None and not hasattr(method, _DISABLED):
            setattr(method, _DISABLED, method)


def step(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`."""
    plain = None if "torch._dynamo" in sys.modules else plain_step(optimizer)
    if plain is None:
        optimizer.step()
    else:
        with torch.no_grad():
            plain(optimizer)


def plain_step(optimizer: torch.optim.Optimizer) -> Callable[[Any], object] | None:
    """What torch's `step` comes down to when gradients are off and nobody has hooked in; None when there is more to it,
    or when it is not torch's.
    """
    outer = type(optimizer).step
    switch = getattr(outer, "__wrapped__", None)  # below the profiler's wrapper: switches gradients, tells the compiler
    plain: Callable[[Any], object] | None = getattr(switch, "__wrapped__", None)
    own = type(optimizer).__module__.startswith("torch.optim.")
    switches = getattr(getattr(switch, "__code__", None), "co_name", "") == "_use_grad"
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        [
            one
            for one in _torch_optimizer._global_optimizer_pre_hooks.values()
            if getattr(one, "__module__", "") != _SAVERS
        ],
        _torch_optimizer._global_optimizer_post_hooks,
    )
    if not (own and switches) or "step" in vars(optimizer) or any(hooks) or optimizer.defaults.get("differentiable"):
        return None
    return plain
