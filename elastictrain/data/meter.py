"""Where the time of feeding goes: reading bytes from the store, decoding, tokenising, packing, copying to the device.

A thread that works for a meter says what it is at with `stage`; what lies deeper (a tokenizer, a file) says it with
`timed`, which reaches the meter of its thread, or none. A stage inside another one stops the outer one's clock, so no
second is counted twice. Who waits for the thread takes the clocks before and after: what they have gone on by between
is what was waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

STAGES = ("store", "retry", "decode", "tokenise", "pack", "copy", "arrival", "feeder")
"""`retry`: a store that failed was asked again; `arrival`: the next segment of a live source was not there yet;
`feeder`: the node's feeder was asked for a decoded block."""
OTHER = "other"
"""Waited for nothing that a stage says: the interpreter's lock, a thread that had no processor."""
CALL = "call"
"""Not waited for: what it takes to ask for a batch and to be handed it."""

_thread = threading.local()


class Meter:
    """Clocks of the stages, in seconds. Any thread may be in a stage, and any may read."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._active: dict[int, tuple[str, float]] = {}  # by thread: the innermost stage, and since when it counts

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Within it this thread's time counts for `name`, and `timed` of this thread reaches this meter."""
        return _Stage(self, name)

    def read(self) -> dict[str, float]:
        """Return the seconds of every stage until now."""
        with self._lock:
            seconds, now = dict(self._seconds), self._clock()
            for name, since in self._active.values():
                seconds[name] += now - since
        return seconds

    def _turn(self, name: str | None) -> str | None:
        """Let this thread be in another stage, or (None) in none; returns the one that it was in."""
        me = threading.get_ident()
        with self._lock:
            now = self._clock()
            before, since = self._active.pop(me, (None, now))
            if before is not None:
                self._seconds[before] += now - since
            if name is not None:
                self._active[me] = (name, now)
        return before


class _Stage:
    """A class, because entering a generator's context takes several times as long, and every batch enters one."""

    __slots__ = ("_before", "_meter", "_name", "_outer")

    def __init__(self, meter: Meter, name: str) -> None:
        self._meter, self._name = meter, name

    def __enter__(self) -> None:
        self._before = getattr(_thread, "meter", None)
        _thread.meter = self._meter
        self._outer = self._meter._turn(self._name)

    def __exit__(self, *error: object) -> None:
        self._meter._turn(self._outer)
        _thread.meter = self._before


def timed(name: str) -> AbstractContextManager[None]:
    """Count the body's time for stage `name` of the meter that this thread works for, if it works for one."""
    meter: Meter | None = getattr(_thread, "meter", None)
    return nullcontext() if meter is None else meter.stage(name)


def waited_for(before: Mapping[str, float], after: Mapping[str, float], waited_s: float) -> dict[str, float]:
    """Say what `waited_s` seconds of waiting were for, from the clocks before and after; pure. Stages that got nothing
    are left out, and the parts sum up to `waited_s`.
    """
    gone = {name: max(0.0, after[name] - before.get(name, 0.0)) for name in after}
    total = sum(gone.values())
    factor = min(1.0, waited_s / total) if total > 0 else 0.0
    parts = {name: seconds * factor for name, seconds in gone.items()}
    parts[OTHER] = max(0.0, waited_s - sum(parts.values()))
    return {name: seconds for name, seconds in parts.items() if seconds > 0}


class TimedFile:
    """A file whose reads count for the stage "store"."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def read(self, *size: int) -> Any:
        with timed("store"):
            return self._handle.read(*size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> TimedFile:
        self._handle.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.__exit__(*error)
