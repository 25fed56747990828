"""A model whose parameters are views of one flat tensor, and whose buffers are set anew for every lane.

Two flat tensors: `values` [total_elements] in the compute dtype (what the forward sees) and `buffers` fp32 (the
committed floating buffers, replicated). Integer buffers ("counters") are a small dictionary. Forward runs on copies of
the committed buffers, so a lane that is thrown away leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import xxhash
from torch import nn

from elastictrain.engine.space import Block, Space
from elastictrain.errors import RecipeError

COMPUTE_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class FlatModel:
    """The model in compute form on one device."""

    def __init__(
        self,
        model: nn.Module,
        space: Space,
        meta_parameters: Mapping[str, nn.Parameter],
        *,
        dtype: torch.dtype,
        device: torch.device,
        buffer_rule: Callable[[str], str],
    ) -> None:
        self.space, self.device, self.dtype = space, device, dtype
        self.meta_parameters = dict(meta_parameters)
        self.values = torch.zeros(space.total_elements, dtype=dtype, device=device)
        size = space.active_elements - space.param_elements
        self.buffers = torch.zeros(size, dtype=torch.float32, device=device)
        self.counters: dict[str, torch.Tensor] = {}
        self._rules = {name: buffer_rule(name) for name in space.counters}
        self.model = model
        self.read_initial(model)
        self.model = model.to(device=device)
        # Not `.to(dtype)`: it would cut complex constants (rotary frequencies) down to their real part.
        self.model = model.bfloat16() if dtype == torch.bfloat16 else model.float()
        self._bind()
        self._new_counters: dict[str, torch.Tensor] = {}
        self._counters_before = self._new_counters

    def read_initial(self, model: nn.Module) -> None:
        """Take all values from a freshly built CPU model: parameters, buffers and counters."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for entry in self.space.entries:
            source = tensors[entry.name].detach().reshape(-1)
            if entry.kind == "buffer":
                self.committed_buffer(entry.name).copy_(source)
            else:
                self.values[entry.start : entry.stop].copy_(source)
        self.counters = {name: tensors[name].detach().clone().to(self.device) for name in self.space.counters}

    def _bind(self) -> None:
        for name, parameter in self.model.named_parameters():
            entry = self.space.by_name[name]
            parameter.data = self.values[entry.start : entry.stop].view(entry.shape)
        live = dict(self.model.named_buffers())
        self._working = {e.name: live[e.name] for e in self.space.entries if e.kind == "buffer"}
        self._working_counters = {name: live[name] for name in self.space.counters}
        self._transient = {name: live[name] for name in self.space.transient}
        self._places = {name: _place_of(self.model, name) for name in live}

    def committed_buffer(self, name: str) -> torch.Tensor:
        """The committed values of a floating buffer: fp32, [elements], a view."""
        entry = self.space.by_name[name]
        offset = self.space.param_elements
        return self.buffers[entry.start - offset : entry.stop - offset]

    def master_view(self, block: Block) -> torch.Tensor | None:
        """Where a block's fp32 master lies in the flat tensors; None when it needs memory of its own."""
        is_view = block.entry.kind == "buffer" or self.dtype == torch.float32
        return self.published(block) if is_view else None

    def published(self, block: Block) -> torch.Tensor:
        """A block as the forward reads it: [elements], a view. Buffers in fp32, all else in the compute dtype."""
        if block.entry.kind == "buffer":
            offset = self.space.param_elements
            return self.buffers[block.start - offset : block.stop - offset]
        return self.values[block.start : block.stop]

    def publish(self, number: int, master: torch.Tensor) -> None:
        """Bring the compute copy of a block up to its master (a no-op where the master is a view)."""
        block = self.space.blocks[number]
        if block.entry.kind != "buffer" and self.dtype != torch.float32:
            self.values[block.start : block.stop].copy_(master.reshape(-1))

    # --- lanes ---

    def before_lane(self) -> None:
        """Set the working buffers to the committed values.

        A lane that was given up half-way (or an evaluation) may have put other tensors in their places: ours go back.
        """
        for name, tensor in (self._working | self._working_counters | self._transient).items():
            module, key = self._places[name]
            module._buffers[key] = tensor
        for name, working in self._working.items():
            working.copy_(self.committed_buffer(name).view(working.shape))
        for name, working in self._working_counters.items():
            working.copy_(self.counters[name])
        self._versions = {name: tensor._version for name, tensor in self._transient.items()}

    def after_lane(self, first: bool) -> dict[str, torch.Tensor]:
        """What the forward changed: fp32 [elements] per floating buffer. Counters are collected by their rule.

        Raises RecipeError when a non-persistent buffer was written: lanes would then depend on each other.
        """
        for name, tensor in self._transient.items():
            if self._taken(name, tensor) is not tensor or tensor._version != self._versions[name]:
                raise RecipeError(
                    f"the forward writes the non-persistent buffer {name!r}; register it with persistent=True, "
                    "so that it belongs to the state, or compute it once in the constructor"
                )
        for name, working in self._working_counters.items():
            self._merge_counter(name, self._taken(name, working).detach().to(working.dtype, copy=True), first)
        changes = {}
        for name, working in self._working.items():
            # Against what the forward was given: in bf16 that is not the committed value, and a buffer that nobody
            # writes must not move.
            given = self.committed_buffer(name).to(working.dtype).float()
            changes[name] = self._taken(name, working).detach().float().reshape(-1) - given
        return changes

    @contextmanager
    def counters_kept(self) -> Iterator[None]:
        """Lanes that run in here leave the counters of this step as they were: they are computed to be compared."""
        kept = dict(self._new_counters)
        try:
            yield
        finally:
            self._new_counters = kept

    def mark_lane(self) -> None:
        """A lane begins of which it is not known whether it counts."""
        self._counters_before = dict(self._new_counters)

    def forget_lane(self) -> None:
        """The lane that was begun last does not count: counters are as at `mark_lane`."""
        self._new_counters = dict(self._counters_before)

    def _taken(self, name: str, working: torch.Tensor) -> torch.Tensor:
        """What the forward has left as buffer `name`, which may be another tensor (`self.mean = …`); ours goes back."""
        module, key = self._places[name]
        left = module._buffers[key]
        module._buffers[key] = working
        if left is None or left.shape != working.shape:
            raise RecipeError(
                f"the forward leaves the buffer {name!r} as {None if left is None else tuple(left.shape)}; expected "
                f"shape {tuple(working.shape)}: a buffer keeps its shape for the whole run"
            )
        return left

    def _merge_counter(self, name: str, value: torch.Tensor, first: bool) -> None:
        if first:
            self._new_counters[name] = value
        elif self._rules[name] == "max":
            self._new_counters[name] = torch.maximum(self._new_counters[name], value)
        elif not torch.equal(self._new_counters[name], value):
            raise RecipeError(counter_conflict(name))

    def counter_hash(self) -> int:
        """Of the new values of all counters under the rule "same", as a non-negative int64."""
        digest = xxhash.xxh3_64()
        for name in self.space.counters:
            if self._rules[name] != "max":
                digest.update(self._new_counters[name].cpu().contiguous().numpy().tobytes())
        return digest.intdigest() >> 1

    def largest_counters(self) -> tuple[int, ...]:
        """New values of all counters under the rule "max", flattened: they travel in the vote."""
        return tuple(
            int(v)
            for name in self.space.counters
            if self._rules[name] == "max"
            for v in self._new_counters[name].reshape(-1)
        )

    @property
    def largest_size(self) -> int:
        return sum(self.counters[n].numel() for n in self.space.counters if self._rules[n] == "max")

    def commit_counters(self, largest: tuple[int, ...]) -> None:
        """Make the new counters the committed ones; part of apply."""
        at = 0
        for name in self.space.counters:
            committed = self.counters[name]
            if self._rules[name] == "max":
                size = committed.numel()
                new = torch.tensor(largest[at : at + size], dtype=torch.int64, device=self.device)
                committed.copy_(new.view(committed.shape))
                at += size
            else:
                committed.copy_(self._new_counters[name])


def _place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, key = name.rpartition(".")
    return model.get_submodule(module), key


def counter_conflict(name: str) -> str:
    return (
        f"the integer buffer {name!r} comes out differently in different lanes; "
        f'return "max" for it in recipe.buffer_rule, or make it a floating buffer'
    )


def published_pieces(flat: FlatModel, a: int, b: int) -> list[torch.Tensor]:
    """Where elements `a .. b-1` of the flat range lie for the forward: parameters in the compute dtype, buffers in
    fp32, frozen parameters in the compute dtype. Views.
    """
    low, high = flat.space.param_elements, flat.space.active_elements
    pieces = [flat.values[a : min(b, low)]] if a < min(b, low) else []
    if max(a, low) < min(b, high):
        pieces.append(flat.buffers[max(a, low) - low : min(b, high) - low])
    if max(a, high) < b:
        pieces.append(flat.values[max(a, high) : b])
    return pieces
