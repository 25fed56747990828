"""Plants for jobs that drop the slowest lanes: which are dropped then does not depend on how fast the machine is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

from elastictrain.engine import dropping, shares
from elastictrain.engine.shares import SharedLanes
from elastictrain.redundancy import Claim, Pace, Sharing
from tests.support.plants_sharing import SLOW, until_claimed


def late(steps: tuple[int, ...], *, when: str = "before", first: int | None = None) -> Callable[[int], None]:
    """In `steps` worker 1 is not done with its last lanes before they are dropped, and nobody else's are.

    `when`: "before" it has begun them; "within" the first of them, which it notices while it computes; "after" it has
    computed that one. `first`: while this worker is there nobody else drops them.
    """
    return partial(_late, steps, when, first)


def never(worker: int) -> None:
    """Nobody is late."""
    del worker
    dropping.drop_from_s = lambda *_: inf


def _late(steps: tuple[int, ...], when: str, first: int | None, worker: int) -> None:
    shares.LOOK_S, shares.LOOKS, shares.EACH_S = 0.0, 10**9, 0.0
    SharedLanes._from_s = lambda self, lane, begun: inf if when == "after" else 0.0  # type: ignore[method-assign]
    Pace.usual_s = lambda self: (1e-3,) * len(self._seen)  # type: ignore[method-assign]
    at: list[int] = [0]
    workers: list[int] = []

    def drop_from_s(sharing: Sharing, undone: Any, *_: Any) -> float:
        owners = {workers[sharing.owner(lane)[0]] for lane in undone}
        may = first in (None, worker) or first not in workers
        return -inf if may and at[0] in steps and owners == {SLOW} else inf

    dropping.drop_from_s = drop_from_s
    real_init, real_claim = SharedLanes.__init__, SharedLanes._claim
    real_run, real_drop, real_cut = SharedLanes._run, SharedLanes._drop, dropping.Dropper._cut
    check: list[Callable[[], None]] = [lambda: None]

    def init(self: SharedLanes, settings: Any, layout: Any, *rest: Any, **more: Any) -> None:
        workers[:] = layout.workers
        real_init(self, settings, layout, *rest, **more)

    def is_held(self: SharedLanes) -> bool:
        assert self.doing is not None
        return worker == SLOW and self.doing.step in steps

    def claim(self: SharedLanes, lane: int) -> Claim:
        # Of two that are dropped the second word may follow when this worker has come on: then it would begin that too.
        is_second = lane == self.own[-1] and len(self.sharing.droppable.intersection(self.own)) > 1
        if is_held(self) and (when == "before" or is_second):
            until_claimed(self, lane)
        return real_claim(self, lane)

    def run(self: SharedLanes, lane: int, begun: Claim | None) -> None:
        if is_held(self) and begun is not None and when != "before":
            until_claimed(self, lane, done=True)
        real_run(self, lane, begun)

    def drop(self: SharedLanes, doing: Any) -> None:
        at[0], check[0] = doing.step, self._check
        real_drop(self, doing)

    def cut(self: dropping.Dropper, step: int, probe: Callable[[str], None]) -> None:
        while when != "before" and self._board.read(dropping.lane_key(min(self._undone)), step) is None:
            check[0]()  # it has not begun them yet
            threading.Event().wait(0.001)
        real_cut(self, step, probe)

    SharedLanes.__init__ = init  # type: ignore[method-assign]
    SharedLanes._claim, SharedLanes._run, SharedLanes._drop = claim, run, drop  # type: ignore[method-assign]
    dropping.Dropper._cut = cut  # type: ignore[method-assign]
