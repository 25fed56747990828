"""Where injected faults happen: in the middle of a phase of a step, on the worker they are addressed to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from elastictrain.engine.verdict import mix
from elastictrain.faults import (
    STORING,
    AtPhase,
    Fail,
    Flip,
    Freeze,
    Kill,
    LoseNode,
    Miscompute,
    OwnFault,
    Slow,
    Terminate,
)

if TYPE_CHECKING:
    from elastictrain.engine.session import Session


class InjectedFault(Exception):
    """Raised by a `fail` fault, and by one that cannot happen where it is addressed to."""


SIGNALS = {Kill: signal.SIGKILL, Freeze: signal.SIGSTOP, Terminate: signal.SIGTERM}


class Probes:
    """Performs the faults of one worker. A fault fires at the first time its address is reached. `lose_node`: stops or
    kills all that the run has on this worker's node; None: nobody here knows what a node is.
    """

    def __init__(
        self, worker: int, faults: Iterable[OwnFault], lose_node: Callable[[LoseNode], None] | None = None
    ) -> None:
        self._lose_node = lose_node
        mine = [fault for fault in faults if fault.worker == worker]
        self._waiting = [fault for fault in mine if isinstance(fault, AtPhase)]
        self._flips = [fault for fault in mine if isinstance(fault, Flip)]
        self._miscomputes = [fault for fault in mine if isinstance(fault, Miscompute)]
        self._slow = [fault for fault in mine if isinstance(fault, Slow)]
        self._lanes = 0

    def at(self, step: int, phase: str) -> None:
        if not self._waiting:
            return
        for fault in tuple(self._waiting):  # storing happens in threads of its own
            if fault.step == step and fault.phase == phase:
                self._waiting.remove(fault)
                if isinstance(fault, Fail):
                    raise InjectedFault(f"injected: fail worker {fault.worker} at step {step} in {phase}")
                if isinstance(fault, LoseNode):
                    self._lose(fault)
                else:
                    os.kill(os.getpid(), SIGNALS[type(fault)])
                return

    @property
    def storing(self) -> Callable[[int, str], None] | None:
        """`at`, if a fault is addressed to a phase of storing; None: nobody has to ask."""
        return self.at if any(fault.phase in STORING for fault in self._waiting) else None

    def _lose(self, fault: LoseNode) -> None:
        if self._lose_node is None:
            raise InjectedFault(f"{fault}: only workers on Ray have a node that can be lost; use kill or freeze")
        self._lose_node(fault)

    def flips(self, session: Session, step: int, when: str) -> None:
        """Flip the bits that are addressed to this moment."""
        for fault in [f for f in self._flips if (f.step, f.when) == (step, when)]:
            self._flips.remove(fault)
            flip_bit(_victim(session, fault), fault.bit)

    def spoils_lane(self, step: int) -> bool:
        """Whether the lane that is computed now comes out wrong. Counts lanes: the same lane, computed again, may come
        out right.
        """
        self._lanes += bool(self._miscomputes)
        return any(f.step <= step and mix(f.seed, self._lanes) % f.one_in == 0 for f in self._miscomputes)

    def drags(self, step: int, what: str, took_s: float) -> float:
        """How many seconds more this worker's "compute", "data" or "link" take in `step`, where they took `took_s`."""
        factor, more_s = 1.0, 0.0
        for fault in self._slow:
            if fault.what == what and fault.step <= step and (fault.steps is None or step < fault.step + fault.steps):
                factor *= fault.factor if fault.delay_s is None else 1.0
                more_s += fault.delay_s or 0.0
        return (factor - 1.0) * took_s + more_s


def flip_bit(tensor: torch.Tensor, bit: int) -> None:
    """Flip one bit of a tensor's first element, counted from the lowest one (modulo its size)."""
    memory = tensor.detach().view(-1)[:1].view(torch.uint8)
    memory[bit // 8 % tensor.element_size()] ^= 1 << bit % 8


def _victim(session: Session, fault: Flip) -> torch.Tensor:
    """The tensor whose first element is hit: of the lowest parameter block that is held as the fault says."""
    flat, held, layout = session.model.flat, session.model.held, session.layout
    assert layout is not None
    owned = {n for shard in layout.owned(session.worker) for n in range(shard.lo, shard.hi)}
    kept = layout.held(session.worker)
    wanted = {"owned": owned, "mirrored": kept - owned, "other": set(range(layout.blocks)) - kept}[fault.of]
    blocks = [flat.space.blocks[n] for n in sorted(wanted) if flat.space.blocks[n].entry.kind == "param"]
    for block in blocks:
        if fault.what == "parameter":
            return flat.published(block)
        if fault.what == "master":
            return held.masters[block.number]
        if fault.what == "optimizer":
            found = [v for k, v in held.tensors(block.number) if k.startswith("optim/") and isinstance(v, torch.Tensor)]
            if found:
                return found[0]
        elif session.pending is not None:
            for shard, reduced in session.pending.reduced.items():
                if shard.lo <= block.number < shard.hi:
                    return reduced
    raise InjectedFault(f"{fault}: worker {session.worker} has no such memory at that moment")
