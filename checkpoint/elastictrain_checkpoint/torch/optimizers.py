"""Optimizers that a script tells nobody of: which tensors a step of them changes, and that one is about to.

torch calls a hook before every step of any optimizer. Here it is heard for two things: whoever steps is remembered (a
script that saves `optimizer.state_dict()` never shows the optimizer itself), and the savers that want it hear of it in
time. What no known optimizer changes, a save that is to be safe by itself copies at the call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Listener(Protocol):
    """Who wants to hear that state is about to change."""

    def before_mutation(self) -> None:
        """An optimizer steps next, in this thread."""


_stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    _stepped.add(optimizer)
    for listener in list(_listeners):
        listener.before_mutation()


register_optimizer_step_pre_hook(_before_step)


def listen(listener: Listener) -> None:
    """Call its `before_mutation` before every step of any optimizer of this process, as long as it lives."""
    _listeners.add(listener)


def unlisten(listener: Listener) -> None:
    """The opposite; nothing happens to one that does not listen."""
    _listeners.discard(listener)


def memory_of(tensor: torch.Tensor) -> int:
    """The address of the memory that a tensor is a view of; 0 if it has none."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


def changed_by_steps(found: Iterable[torch.optim.Optimizer]) -> set[int]:
    """`memory_of` all that changes only in a step: parameters and state of these optimizers, and of all that have
    stepped in this process so far.
    """
    optimizers = {id(one): one for one in (*found, *_stepped)}
    return {memory_of(tensor) for one in optimizers.values() for tensor in _tensors(one)}


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, dict):
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
