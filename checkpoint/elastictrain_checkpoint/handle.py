"""What has become of a save in the background: asked, waited for, never lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from elastictrain_checkpoint.errors import SaveDropped, SaveFailed, SaveTimeout

DEADLINE_S = 600.0
CHECK_S = 0.1
"""Whoever waits is asked this often whether it still wants to."""


class SaveState(StrEnum):
    """What has become of a save. WRITTEN: durable, and the commit is the caller's."""

    RUNNING = "running"
    WRITTEN = "written"
    COMMITTED = "committed"
    SKIPPED = "skipped"
    SUPERSEDED = "superseded"
    FAILED = "failed"


class SaveHandle:
    """What a caller holds of one save; any thread may ask.

    Attributes:
        step: the step.
        state: what has become of it.
        error: why it failed, if it has.
        total_bytes, written_bytes: of all packs, and of them in the hands of the storage.
        copied_bytes: what had to be copied before the state changed (the pool that this save needed).
        stall_s: how long `before_mutation` has taken for this save.
        awaited: whether somebody waits, or has waited, for the outcome.

    """

    def __init__(self, step: int, where: str) -> None:
        self.step = step
        self.state = SaveState.RUNNING
        self.error: BaseException | None = None
        self.total_bytes = self.written_bytes = self.copied_bytes = 0
        self.stall_s = 0.0
        self.awaited = False
        self._where = where
        self._started = time.monotonic()
        self._value: Any = None
        self._seen = False
        self._ended = threading.Event()
        self._ending = threading.Lock()
        self._calls: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        return f"SaveHandle(step={self.step}, state={self.state.value})"

    @property
    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._ended.is_set()

    def wait(self, timeout_s: float = DEADLINE_S) -> SaveState:
        """Wait for the outcome, and give it, whatever it is.

        Raises:
            SaveTimeout: it takes longer; the message says how far the save is.

        """
        self._wait(timeout_s)
        self._seen = True
        return self.state

    def _wait(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        until_s = time.monotonic() + timeout_s
        self.awaited = self.awaited or timeout_s > 0
        while not self._ended.wait(max(0.0, min(CHECK_S, until_s - time.monotonic()))):
            if time.monotonic() >= until_s:
                raise SaveTimeout(f"{self._progress()}; waited {timeout_s:g} s for it")
            check()

    def result(self, timeout_s: float = DEADLINE_S, check: Callable[[], None] = lambda: None) -> Any:
        """Wait for the outcome: the manifest (committed) or the part (written). ``check`` is called now and then while
        waiting, and may raise.

        Raises:
            SaveFailed: nothing was saved; the cause is chained.
            SaveDropped: the save was skipped or superseded.
            SaveTimeout: it takes longer; the message says how far the save is.

        """
        self._wait(timeout_s, check)
        self._seen = True
        if self.state is SaveState.FAILED:
            raise self._failure() from self.error
        if self.state in (SaveState.SKIPPED, SaveState.SUPERSEDED):
            raise SaveDropped(f"the save of step {self.step} was {self.state.value}: another one ran at that time")
        return self._value

    def _failure(self) -> SaveFailed:
        if isinstance(self.error, SaveFailed):
            return type(self.error)(str(self.error))
        return SaveFailed(f"step {self.step} was not saved to {self._where}: {type(self.error).__name__}: {self.error}")

    def _progress(self) -> str:
        spent_s = max(time.monotonic() - self._started, 1e-9)
        return (
            f"the save of step {self.step} to {self._where} has written {self.written_bytes / 1e6:.1f} of "
            f"{self.total_bytes / 1e6:.1f} MB in {spent_s:.1f} s ({self.written_bytes / 1e6 / spent_s:.1f} MB/s)"
        )

    def call_when_done(self, call: Callable[[], object]) -> None:
        """Call it once, when the outcome is known: by the thread that saves, or at once. What it raises is logged."""
        with self._ending:
            if not self._ended.is_set():
                self._calls.append(call)
                return
        _call(call)

    def _end(self, state: SaveState, value: Any = None, error: BaseException | None = None) -> None:
        with self._ending:
            if self._ended.is_set():
                return
            self.state, self._value, self.error = state, value, error
            self._ended.set()
            calls, self._calls = self._calls, []
        for call in calls:
            _call(call)


def _call(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:  # it must not fail the save, whose outcome is known
        logging.getLogger(__name__).exception("a callback of a save has failed")
