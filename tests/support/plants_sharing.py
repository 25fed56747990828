"""Plants for jobs whose lanes are shared: who takes over what then does not depend on how fast the machine is."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from elastictrain.engine import shares
from elastictrain.engine.claims import ANSWER_S, ClaimBoard
from elastictrain.engine.host import StageFeeder
from elastictrain.engine.probes import Probes
from elastictrain.engine.shares import Doing, SharedLanes
from elastictrain.faults import Freeze
from elastictrain.redundancy import Claim, Sharing

SLOW = 1
"""The worker whose lanes others get."""


def eager(worker: int) -> None:
    """Whoever is done tries to claim every lane that it may have, whatever the clock says."""
    del worker

    def to_take(sharing: Sharing, rank: int, tried: Any, now_s: float, usual_s: Any) -> tuple[int, ...]:
        del now_s, usual_s
        return tuple(lane for lane in sharing.second[rank] if lane not in tried)

    shares.to_take = to_take
    StageFeeder.ready = lambda self, step, lane: True  # type: ignore[method-assign]


def _until(lanes: SharedLanes, key: str, found: Callable[[Claim | None], bool]) -> None:
    """Wait until the claim of `key` in this step is one like that, or the generation is over."""
    assert lanes.doing is not None
    while not found(lanes._board.read(key, lanes.doing.step)):
        lanes._check()
        threading.Event().wait(0.001)


def until_claimed(lanes: SharedLanes, lane: int, *, done: bool = False) -> None:
    """Wait until somebody has claimed `lane` in this step. `done`: until its result counts, or is nobody's."""
    _until(lanes, f"lane/{lane}", lambda there: there is not None and (there.done or not done))


def held_up(steps: tuple[int, ...], *, dies_at: int | None = None, helper: int = 2) -> Callable[[int], None]:
    """Worker 1 begins no shared lane of its own in `steps` before somebody else has claimed it; the others are eager.
    `dies_at`: in that step `helper` dies as soon as it has claimed a lane of another one."""
    return partial(_held_up, steps, dies_at, helper)


def _held_up(steps: tuple[int, ...], dies_at: int | None, helper: int, worker: int) -> None:
    eager(worker)
    real = SharedLanes._claim

    def claim(self: SharedLanes, lane: int) -> Claim:
        assert self.doing is not None
        if worker == SLOW and lane in self.own and self.doing.step in steps:
            _until(self, f"lane/{lane}", lambda there: there is not None)
        found = real(self, lane)
        if worker == helper and self.doing.step == dies_at and lane not in self.own and found.rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    SharedLanes._claim = claim  # type: ignore[method-assign]


def behind(step: int, mate: int) -> Callable[[int], None]:
    """In the first generation `mate` begins `step` when another one of its group has given their lanes, and not at all
    if that one dies before."""
    return partial(_behind, step, mate)


def _behind(step: int, mate: int, worker: int) -> None:
    real, boards = SharedLanes._whole_group, []

    def whole_group(self: SharedLanes, doing: Doing) -> None:
        boards[1:] = [self._board]  # that of the first generation, and that of this one
        if worker == mate and doing.step == step and self._board is boards[0]:
            _until(self, f"group/{self.group[0]}", lambda there: there is not None)
        real(self, doing)

    SharedLanes._whole_group = whole_group  # type: ignore[method-assign]


def overtaken(steps: tuple[int, ...], *, looks: bool) -> Callable[[int], None]:
    """In `steps` worker 1 claims its last lane, and computes it when a copy of it is done. `looks`: it sees that while
    it computes; else when it has."""
    return partial(_overtaken, steps, looks)


def _overtaken(steps: tuple[int, ...], looks: bool, worker: int) -> None:
    shares.to_take = lambda *_: ()
    shares.is_late = lambda sharing, lane, *_: worker != SLOW
    StageFeeder.ready = lambda self, step, lane: True  # type: ignore[method-assign]
    shares.LOOK_S, shares.LOOKS, shares.EACH_S = 0.0, 10**9, 0.0
    real = SharedLanes._run

    def run(self: SharedLanes, lane: int, begun: Claim | None) -> None:
        assert self.doing is not None
        last = lane == self.own[-1] and self.doing.step in steps
        if worker == SLOW and last:
            _until(self, f"lane/{lane}", lambda there: there is not None and there.done)
        elif worker != SLOW and lane not in self.own and self.doing.step not in steps:
            return  # a copy that nobody asked for in this test
        real(self, lane, begun)

    def watch(self: SharedLanes, doing: Any) -> None:
        """Only the lane of the slow one is waited for."""
        slow = [lane for lane in self.second if lane == self.sharing.lanes[SLOW][-1]]
        for lane in slow if doing.step in steps and worker != SLOW else ():
            _until(self, f"lane/{lane}", lambda there: there is not None)
            begun = self._board.read(f"lane/{lane}", doing.step)
            assert begun is not None
            if not begun.done:
                real(self, lane, begun)

    SharedLanes._run = run  # type: ignore[method-assign]
    SharedLanes._watch = watch  # type: ignore[method-assign]
    SharedLanes._from_s = lambda self, lane, begun: 0.0 if looks else float("inf")  # type: ignore[method-assign]


def impatient(since: Path) -> Callable[[int], None]:
    """The first member's store is given half a second for an answer from when it is about to be frozen on (`since` is
    there then): before that it lives, and a busy machine may take longer."""
    return partial(_impatient, since)


def _impatient(since: Path, worker: int) -> None:
    real = Probes.at

    def at(self: Probes, step: int, phase: str) -> None:
        if any(isinstance(fault, Freeze) and (fault.step, fault.phase) == (step, phase) for fault in self._waiting):
            since.touch()
        real(self, step, phase)

    Probes.at = at  # type: ignore[method-assign]
    answer_s = property(lambda self: 0.5 if since.exists() else ANSWER_S, lambda self, _: None)
    ClaimBoard._answer_s = answer_s  # type: ignore[assignment]
    del worker
