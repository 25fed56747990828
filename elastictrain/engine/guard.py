"""A worker's watch over its own memory: sums before every vote, and (with `integrity.witness`) after every apply.

Apply and gather are the only writers of state, so between a gather and the next apply nothing may change. What is known
to have changed all the same names this worker, and nobody else, as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from elastictrain.engine.flat import FlatModel
from elastictrain.engine.held import HeldState
from elastictrain.engine.integrity import Views, held_sums, published_sum, sums
from elastictrain.engine.verdict import Claims
from elastictrain.layout import Layout, Shard


class Guard:
    """Sums of one worker, as they must be. What is not known (None) is not checked."""

    def __init__(self, flat: FlatModel, held: HeldState) -> None:
        self._flat, self._held = flat, held
        self._shards: list[Shard] = []
        self._state: tuple[int, ...] | None = None
        self._published: int | None = None
        self._reduced: dict[Shard, int] = {}
        self._views: Views = {}
        self.changed = ""

    def begin(self, layout: Layout, worker: int) -> Claims:
        """A layout is about to be in force, and its state is here. Returns its sums, for the seal."""
        self._shards = layout.by_holder().get(worker, [])
        self._reduced, self._views, self.changed = {}, {}, ""
        self.applied()
        self.gathered()
        return self._claims({}, 0)

    def forget(self) -> None:
        """Somebody with the right to do so is about to write."""
        self._state = self._published = None
        self._reduced, self.changed = {}, ""

    def applied(self) -> None:
        """Apply has ended."""
        self._state = held_sums(self._flat, self._held, self._shards, self._views)

    def gathered(self) -> None:
        """The published parameters are whole."""
        self._published = published_sum(self._flat)

    def reduced(self, owned: Mapping[Shard, torch.Tensor]) -> None:
        """The reduced gradients of owned shards are finished, and not yet sent to their mirrors."""
        self._reduced = self._sums_of(owned)

    def _sums_of(self, reduced: Mapping[Shard, torch.Tensor]) -> dict[Shard, int]:
        return dict(zip(reduced, sums([[t] for t in reduced.values()], self._flat.device), strict=True))

    def claims(self, reduced: Mapping[Shard, torch.Tensor], lane: int = 0) -> Claims:
        """Everything once more, for the vote; what has changed is then in `changed`."""
        now = self._sums_of(reduced)
        before_state, before_published = self._state, self._published
        self.applied()
        self.gathered()
        self.changed = self._change(before_state, before_published)
        spoilt = [shard for shard, before in self._reduced.items() if now.get(shard) != before]
        if spoilt and not self.changed:
            self.changed = f"the reduced gradient of blocks {spoilt[0].lo}..{spoilt[0].hi - 1}"
        return self._claims(now, lane)

    def _claims(self, reduced: Mapping[Shard, int], lane: int) -> Claims:
        state = self._state or ()
        return Claims(
            sound=not self.changed,
            published=self._published or 0,
            state={shard.lo: value for shard, value in zip(self._shards, state, strict=True)},
            reduced={shard.lo: value for shard, value in reduced.items()},
            lane=lane,
        )

    def verify(self) -> str:
        """What has changed since the last apply, in words; empty if nothing has that is known. Also what the claims of
        a vote have found that was never completed: they have taken the sums anew.
        """
        if self.changed:
            return self.changed
        before_state, before_published = self._state, self._published
        if before_published is not None:
            self.gathered()
        if before_state is not None:
            self.applied()
        return self._change(before_state, before_published)

    def _change(self, state: tuple[int, ...] | None, published: int | None) -> str:
        if published is not None and published != self._published:
            return "parameters or buffers that the forward reads"
        for shard, before, now in zip(self._shards, state or (), self._state or (), strict=False):
            if before != now:
                return f"masters, optimizer state or averages of blocks {shard.lo}..{shard.hi - 1}"
        return ""
