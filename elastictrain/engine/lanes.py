"""The lane tree of one worker: gradients of its lanes, summed in the one fixed order.

Gradients enter through post-accumulate hooks while `backward()` still runs, parameter by parameter: each is added into
its sibling's partial sum (and that into the next one up, as far as the tree is complete), and its own memory is freed.
A worker with `k` neighbouring lanes so needs about log2(k) buffers, not `k`, and no full extra copy.

Shapes: every partial sum is one flat fp32 tensor [active_elements] laid out by `Space`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import nn

from elastictrain.engine.space import ALIGN_ELEMENTS, Entry, Space
from elastictrain.errors import RecipeError
from elastictrain.tree import Node, path_up


class SpareBuffers:
    """fp32 buffers that are used again: large ones that come and go cost resident memory that is not theirs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_size: dict[int, list[torch.Tensor]] = {}

    def take(self, elements: int) -> torch.Tensor:
        """[elements] with any values."""
        found = self._by_size.get(elements)
        return found.pop() if found else torch.empty(elements, dtype=torch.float32, device=self._device)

    def give_back(self, buffers: Iterable[torch.Tensor]) -> None:
        """They will be overwritten."""
        for buffer in buffers:
            self._by_size.setdefault(buffer.numel(), []).append(buffer)


Seen = Callable[[int, int, torch.Tensor], None]
"""Is shown (first element, micro-batch, values) of every gradient and buffer change of a lane, as they arrive."""

Views = dict[nn.Parameter, torch.Tensor]
"""Where each parameter lies in one flat buffer, in the parameter's shape."""


class LaneTree:
    """Collects the gradients of lanes run in ascending order; `nodes` are then the worker's roots."""

    def __init__(self, space: Space, lane_count: int, device: torch.device, micro_batches: int) -> None:
        self._space, self._lane_count, self._device = space, lane_count, device
        self._micro_batches = micro_batches
        self._pool: list[torch.Tensor] = []
        self._lent: list[torch.Tensor] = []
        self._lent_room = 0
        self._entries: dict[nn.Parameter, Entry] = {}
        self.nodes: dict[Node, torch.Tensor] = {}
        self.interrupted: Callable[[], None] = lambda: None
        self._lane = -1
        self._targets: list[torch.Tensor] = []
        self._target_views: list[Views] = []
        self._views: dict[int, tuple[torch.Tensor, Views]] = {}
        self._adds_to_sibling = False
        self._micro = 0
        self._seen: set[nn.Parameter] = set()
        self._keeps, self._spoils = True, False
        self._show: Seen | None = None

    def watch(self, model: nn.Module) -> None:
        """Install the hooks; called once for the model whose gradients are to be collected."""
        for name, parameter in model.named_parameters():
            entry = self._space.by_name[name]
            if entry.kind == "param":
                self._entries[parameter] = entry
                parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Forget all partial sums; their memory is used again."""
        self._pool.extend(self.nodes.values())
        self._pool.extend(self._lent)
        self.nodes, self._lent, self._lent_room = {}, [], 0

    def keep(self, sums: int) -> None:
        """Let go of buffers beyond so many that lie unused: a worker that has fewer lanes now needs fewer."""
        while len(self._pool) > sums:
            self._views.pop(id(self._pool.pop()), None)

    def scratch(self, elements: int) -> torch.Tensor:
        """fp32 [elements] with any values, until the next `reset`: from a buffer that the tree needs no more in this
        step where one has room, else new memory. Lanes that are still to come would want those buffers back.
        """
        room = -(-elements // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
        if self._lent_room < room <= self._space.active_elements and self._pool:
            self._lent.append(self._pool.pop())
            self._lent_room = self._space.active_elements
        if self._lent_room < room:
            return torch.empty(elements, dtype=torch.float32, device=self._device)
        start = self._space.active_elements - self._lent_room
        self._lent_room -= room
        return self._lent[-1][start : start + elements]

    def borrow(self) -> torch.Tensor:
        """fp32 [active elements] with any values, until the next `reset`: a buffer that the tree needs no more in this
        step (every worker has a lane, and its sum has been sent). Every element then has its own place, so that no room
        is lost between ranges.
        """
        self._lent.insert(0, self._buffer())  # `scratch` cuts from the last one
        return self._lent[0]

    def release(self, node: Node) -> None:
        """Hand one partial sum's memory back (it has been sent)."""
        self._pool.append(self.nodes.pop(node))

    def begin(
        self, lane: int, *, merge: bool, keep: bool = True, show: Seen | None = None, spoil: bool = False
    ) -> None:
        """Start lane `lane`. `merge`: combine with siblings that are here (the local sum); else keep it a leaf. Without
        `keep` nothing of it stays and no buffer is taken: it is computed only to be shown. `spoil`: make its first
        gradient wrong (an injected fault).
        """
        self._lane, self._micro = lane, 0
        self._keeps, self._show, self._spoils = keep, show, spoil
        if not keep:
            self._targets, self._target_views = [], []
            return
        self._merged_node = Node(lane, lane + 1)
        chain: list[torch.Tensor] = []
        if merge:
            for sibling, parent in path_up(lane, self._lane_count):
                if sibling not in self.nodes:
                    break
                chain.append(self.nodes.pop(sibling))
                self._merged_node = parent
        # With several micro-batches the lane's own sum must be complete before it meets its sibling.
        self._adds_to_sibling = bool(chain) and self._micro_batches == 1
        self._targets = chain if self._adds_to_sibling else [self._buffer(), *chain]
        self._target_views = [self._views_of(target) for target in self._targets]

    def begin_micro_batch(self, index: int) -> None:
        self._micro = index
        self._seen.clear()

    def _buffer(self) -> torch.Tensor:
        if self._pool:
            return self._pool.pop()
        return torch.zeros(self._space.active_elements, dtype=torch.float32, device=self._device)

    def _views_of(self, buffer: torch.Tensor) -> Views:
        """Cut once per buffer: a hook runs for every parameter of every lane, and slicing costs more than adding."""
        known = self._views.get(id(buffer))
        if known is None:  # the buffer is kept with its views, so that its id stays its own
            views = {p: buffer[e.start : e.stop].view(e.shape) for p, e in self._entries.items()}
            known = self._views[id(buffer)] = (buffer, views)
        return known[1]

    def _take(self, parameter: nn.Parameter) -> None:
        # Taken before anything can raise: what stayed in .grad would be added to the next lane's gradient.
        gradient = parameter.grad
        parameter.grad = None
        self.interrupted()
        if gradient is None:
            return
        if parameter in self._seen:
            raise RecipeError(
                f"parameter {self._entries[parameter].name!r} gets its gradient in several parts in one backward pass; "
                "with activation checkpointing of a shared weight pass use_reentrant=False, and leave backward() to us"
            )
        self._seen.add(parameter)
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if self._spoils:
            self._spoils, gradient = False, gradient.contiguous().clone()
            gradient.view(-1)[-1] += 1.0
        if self._show is not None:
            self._show(self._entries[parameter].start, self._micro, gradient)
        if self._keeps:
            self._enter([views[parameter] for views in self._target_views], gradient)

    def _enter(self, places: list[torch.Tensor], values: torch.Tensor) -> None:
        """One parameter's gradient (or one buffer's change) of this lane, any float dtype. `places`: where it lies in
        each target, from the lane's own (or its sibling's) upwards.
        """
        own = places[0]
        if self._adds_to_sibling or self._micro > 0:
            own.add_(values.float() if values.dtype != torch.float32 else values)
        else:
            own.copy_(values)
        if self._micro_batches == 1:
            climb(places)

    def end_micro_batch(self) -> None:
        """A parameter without a gradient counts as +0.0: the same for all lanes, whoever computes them."""
        for parameter, entry in self._entries.items():
            if self._keeps and parameter not in self._seen:
                zeros = torch.zeros(entry.shape, device=self._device)
                self._enter([views[parameter] for views in self._target_views], zeros)

    def end(self, buffer_changes: dict[str, torch.Tensor]) -> None:
        """Finish the lane. `buffer_changes`: fp32 change of every floating buffer, [elements] each."""
        self._micro = 0
        if self._show is not None:
            for name, change in buffer_changes.items():
                self._show(self._space.by_name[name].start, 0, change)
        self._show = None
        if not self._keeps:
            return
        if self._micro_batches > 1:
            for name, change in buffer_changes.items():
                entry = self._space.by_name[name]
                self._targets[0][entry.start : entry.stop].copy_(change)
            climb(self._targets)
        else:
            for name, change in buffer_changes.items():
                entry = self._space.by_name[name]
                self._enter([target[entry.start : entry.stop] for target in self._targets], change)
        *spent, result = self._targets
        self._pool.extend(spent)
        self.nodes[self._merged_node] = result
        self._targets, self._target_views = [], []

    def join(self, lane: int) -> None:
        """Combine a lane that was kept a leaf with its siblings that are here: the same additions as with `merge`."""
        node = Node(lane, lane + 1)
        for sibling, parent in path_up(lane, self._lane_count):
            if sibling not in self.nodes:
                break
            lower, upper = self.nodes.pop(node), self.nodes.pop(sibling)
            climb([lower, upper])
            self._pool.append(lower)
            self.nodes[parent], node = upper, parent

    def give_up(self) -> None:
        """Give up the lane in progress, which was to be a leaf; what other lanes have left stays."""
        self._pool.extend(self._targets)
        self._targets, self._target_views = [], []
        for parameter in self._entries:
            parameter.grad = None

    def abandon(self) -> None:
        """Give up the lane in progress and all others; their buffers are used again."""
        self.give_up()
        self.reset()


def climb(places: list[torch.Tensor]) -> None:
    """Add each to the next one: a complete subtree's sum goes up as far as its siblings are there."""
    for lower, upper in pairwise(places):
        upper.add_(lower)
