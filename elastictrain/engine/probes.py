"""Where injected faults happen: in the middle of a phase of a step, on the worker they are addressed to."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

from elastictrain.faults import Fail, Kill


class InjectedFault(Exception):
    """Raised by a `fail` fault."""


class Probes:
    """Performs the faults of one worker. A fault fires at the first time its address is reached."""

    def __init__(self, worker: int, faults: Iterable[Kill | Fail]) -> None:
        self._waiting = [fault for fault in faults if fault.worker == worker]

    def at(self, step: int, phase: str) -> None:
        if not self._waiting:
            return
        for fault in self._waiting:
            if fault.step == step and fault.phase == phase:
                self._waiting.remove(fault)
                if isinstance(fault, Kill):
                    os.kill(os.getpid(), signal.SIGKILL)
                raise InjectedFault(f"injected: fail worker {fault.worker} at step {step} in {phase}")
