"""The state that one worker keeps: master weights and optimizer state of the blocks it owns or mirrors.

Every block is a tensor of its own to the optimizer (see `space`). In fp32 a block's master is a view into the worker's
flat parameters, so a mirror's apply brings the parameters up to date as well and costs no gather; with a lower compute
dtype masters are separate fp32 tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from elastictrain.engine import eager
from elastictrain.engine.flat import FlatModel
from elastictrain.engine.optimizers import fresh_copy, initial_state, state_keys
from elastictrain.engine.space import Block
from elastictrain.errors import InternalError, RecipeError

State = dict[str, Any]


class HeldState:
    """Blocks held here, and the one way they change: `apply`."""

    def __init__(self, flat: FlatModel, template: torch.optim.Optimizer, ema_decay: float | None) -> None:
        self.flat = flat
        self.ema_decay = ema_decay
        self.masters: dict[int, torch.Tensor] = {}
        self.ema: dict[int, torch.Tensor] = {}
        self._template = template
        self._group_of = _groups_by_name(template, flat)
        # A copy of the optimizer built on full-shape `meta` parameters keeps its class and every setting; only the
        # tensors are ours. Slices never see the constructor, so groups chosen by p.dim() are right.
        self.optimizer = fresh_copy(template)
        self._base_lr = [float(group["lr"]) for group in template.param_groups]

    # --- holding ---

    def hold(self, blocks: Iterable[int]) -> None:
        """Take up blocks whose master values are to be filled in by the caller (`load`, or from the flat values)."""
        for number in blocks:
            if number not in self.masters:
                block = self.flat.space.blocks[number]
                self.masters[number] = self._master_for(block)
                if self.ema_decay is not None and block.entry.kind == "param":
                    self.ema[number] = self.masters[number].clone()
        self._regroup()

    def keep_only(self, blocks: Iterable[int]) -> None:
        """Let go of every other block."""
        kept = set(blocks)
        for number in [n for n in self.masters if n not in kept]:
            self.optimizer.state.pop(self.masters.pop(number), None)
            self.ema.pop(number, None)
        self._regroup()

    def start_from(self, model: nn.Module) -> None:
        """Set every held block to the recipe's initial values (a freshly built CPU model), optimizer state empty."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.optimizer.state.clear()
        for number, master in self.masters.items():
            block = self.flat.space.blocks[number]
            source = tensors[block.entry.name].detach().reshape(-1)[block.offset : block.offset + block.elements]
            master.copy_(source.view(master.shape))
            if number in self.ema:
                self.ema[number].copy_(master)
            if block.entry.kind == "param" and self._template.state:
                parameter = self.flat.meta_parameters[block.entry.name]
                group = self._template.param_groups[self._group_of[block.entry.name]]
                self.optimizer.state[master] = initial_state(self._template, group, parameter, master)

    def state_keys(self) -> dict[str, frozenset[str]]:
        """For every trainable parameter the names of what its optimizer keeps for it."""
        found = [
            state_keys(self._template, i) if g["params"] else None for i, g in enumerate(self._template.param_groups)
        ]
        return {name: found[group] or frozenset() for name, group in self._group_of.items()}

    def _master_for(self, block: Block) -> torch.Tensor:
        view = self.flat.master_view(block)
        master = view if view is not None else torch.empty(block.elements, device=self.flat.device)
        if block.entry.kind == "param" and (self.flat.space.whole_parameters or not block.entry.shape):
            master = master.view(block.entry.shape)
        return master.detach()

    def _regroup(self) -> None:
        groups: list[list[torch.Tensor]] = [[] for _ in self._template.param_groups]
        for number in sorted(self.masters):
            entry = self.flat.space.blocks[number].entry
            if entry.kind == "param":
                groups[self._group_of[entry.name]].append(self.masters[number])
        for group, tensors in zip(self.optimizer.param_groups, groups, strict=True):
            group["params"] = tensors
            group.pop("param_names", None)

    # --- the only writer of state ---

    def apply(self, gradients: Mapping[int, torch.Tensor], *, scale: float, lanes: int, lr_factor: float) -> None:
        """Bring every held block forward by one step. `gradients`: per block its reduced gradient (fp32, [elements]),
        overwritten here; the optimizer sees it times `scale`. Buffers take the mean of the lanes' changes.
        """
        active = [n for n in sorted(self.masters) if n < self.flat.space.active_blocks]
        missing = [n for n in active if n not in gradients]
        if missing:
            raise InternalError(f"apply without the reduced gradient of held blocks {missing[:5]}")
        params = [n for n in active if self.flat.space.blocks[n].entry.kind == "param"]
        for number in active[len(params) :]:
            # Two roundings on purpose: a fused multiply-add would differ between vector body and tail.
            self.masters[number].add_(gradients[number].mul_(1.0 / lanes))
        if params:
            torch._foreach_mul_([gradients[n] for n in params], scale)
        for number in params:
            master, gradient = self.masters[number], gradients[number]
            master.grad = gradient if master.dim() == 1 else gradient.view(master.shape)
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * lr_factor
        eager.step(self.optimizer)
        for number in params:
            self.masters[number].grad = None
        if self.ema:
            numbers = sorted(self.ema)
            torch._foreach_lerp_(
                [self.ema[n] for n in numbers], [self.masters[n] for n in numbers], 1.0 - (self.ema_decay or 0.0)
            )

    # --- reading and writing a block's tensors ---

    def tensors(self, number: int) -> Iterator[tuple[str, Any]]:
        """Everything kept for a block: ("master", …), ("ema", …), ("optim/<key>", tensor or number), sorted."""
        yield "master", self.masters[number]
        if number in self.ema:
            yield "ema", self.ema[number]
        state = self.optimizer.state.get(self.masters[number], {})
        for key in sorted(state):
            yield f"optim/{key}", state[key]

    def load(self, number: int, values: Mapping[str, Any]) -> None:
        """Set a held block's tensors from what `tensors` named. Masters and EMA are copied in place, unless they are
        the very tensors that are held.
        """
        master = self.masters[number]
        if values["master"] is not master:
            master.copy_(values["master"].reshape(master.shape))
        if number in self.ema and (ema := values.get("ema", master)) is not self.ema[number]:
            self.ema[number].copy_(ema.reshape(master.shape))  # one that starts only now starts from the weights
        state = {k.removeprefix("optim/"): v for k, v in values.items() if k.startswith("optim/")}
        if state:
            self.optimizer.state[master] = state

    def placed(self, key: str, value: Any) -> Any:
        """A state value where the optimizer expects it: step counters live on the CPU unless it is fused."""
        if not isinstance(value, torch.Tensor):
            return value
        on_device = any(g.get("fused") or g.get("capturable") for g in self.optimizer.param_groups)
        return value.to("cpu" if key == "optim/step" and not on_device else self.flat.device)


def _groups_by_name(template: torch.optim.Optimizer, flat: FlatModel) -> dict[str, int]:
    found: dict[str, int] = {}
    names = {id(p): n for n, p in flat.meta_parameters.items()}
    for index, group in enumerate(template.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise RecipeError(
                    "recipe.optimizer(params) holds a tensor that is not one of `params`; build it from the given pairs"
                )
            found[names[id(parameter)]] = index
    return found
