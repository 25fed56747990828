"""Copying the checkpoints of a run to another store in the background, at a bounded rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from elastictrain_checkpoint.commit import list_steps, load
from elastictrain_checkpoint.errors import CheckpointError, NoCheckpoint
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.transfer import Pace, copy_checkpoint


class Stopped(CheckpointError):
    """A copy was given up because its copier is being closed; what was copied stays and is used next time."""


@dataclass
class Bucket:
    """Bounds a rate: pure, the clock is the caller's. After ``n`` bytes the next may go ``n / bytes_per_s`` later."""

    bytes_per_s: float
    free_s: float = 0.0

    def wait_s(self, size_bytes: int, now_s: float) -> float:
        """Take ``size_bytes`` and give how long to wait before they are sent."""
        start_s = max(self.free_s, now_s)
        self.free_s = start_s + size_bytes / self.bytes_per_s
        return start_s - now_s


def copy_step(source: Store, target: Store, step: int, pace: Pace | None = None) -> Manifest:
    """Copy a committed step as `transfer.copy_checkpoint` does. One of a lower generation in the target is replaced.

    Raises:
        NoCheckpoint, CorruptData: the source does not have it whole; nothing was published.
        AlreadyCommitted: the target has another checkpoint of this step, of the same or a higher generation.
        OSError: storage failed; call again to go on.

    """
    manifest = load(source, step)
    copy_checkpoint(source, manifest, target, pace=pace, replace_older=True)
    return manifest


class Copier:
    """Copies steps to another store in a thread of its own, newest first, one at a time.

    A copy that fails stays on the list and is tried again when the next step is submitted, or by `retry`. Steps that
    left the source meanwhile (by `prune`) are dropped: pass ``protect=copier.waiting`` to `prune` to keep them until
    they are copied.

    Args:
        source, target: where from and where to.
        bytes_per_s: bounds the rate, if given.
        copied: called in the thread after each step, for example to prune the target.

    Attributes:
        durable_step: the newest step that was copied.
        error: what the last copy failed with, or None.

    """

    def __init__(
        self,
        source: Store,
        target: Store,
        *,
        bytes_per_s: float | None = None,
        copied: Callable[[Manifest], None] | None = None,
    ) -> None:
        self._source, self._target, self._copied = source, target, copied
        self._bucket = None if bytes_per_s is None else Bucket(bytes_per_s)
        self._changed = threading.Condition()
        self._steps: set[int] = set()
        self._failed: set[int] = set()
        self._busy: int | None = None
        self._closing = threading.Event()
        self.durable_step: int | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-copier", daemon=True)
        self._thread.start()

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def waiting(self) -> set[int]:
        """Steps that are not copied yet, the one that is being copied included."""
        with self._changed:
            return self._steps | self._failed | ({self._busy} if self._busy is not None else set())

    def submit(self, step: int) -> None:
        """Copy this step; returns at once."""
        with self._changed:
            if self._closing.is_set():
                raise Stopped(f"step {step} was submitted to a copier that is closed")
            self._steps |= self._failed | {step}
            self._failed = set()
            self._changed.notify_all()

    def retry(self) -> None:
        """Try again what failed."""
        with self._changed:
            self._steps |= self._failed
            self._failed = set()
            self._changed.notify_all()

    def catch_up(self) -> list[int]:
        """Submit every step that the target does not have, as after a restart; gives them."""
        there = set(list_steps(self._target))
        missing = [step for step in list_steps(self._source) if step not in there]
        for step in missing:
            self.submit(step)
        return missing

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is left to copy but what failed; whether that came to be in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._steps and self._busy is None, timeout_s)

    def close(self, timeout_s: float = 60.0) -> bool:
        """Stop after the block that is being copied; whether the thread has ended in time. Nothing is lost: the next
        copier goes on from there.
        """
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing.is_set() or bool(self._steps))
                if self._closing.is_set():
                    return
                self._busy = max(self._steps)
                self._steps.discard(self._busy)
            failed = self._copy(self._busy)
            with self._changed:
                if failed:
                    self._failed.add(self._busy)
                self._busy = None
                self._changed.notify_all()

    def _copy(self, step: int) -> bool:
        """Copy one step; whether it is to be tried again."""
        try:
            manifest = copy_step(self._source, self._target, step, self._pace)
            with self._changed:
                self.durable_step = max(step, self.durable_step if self.durable_step is not None else step)
                self.error = None
            if self._copied is not None:
                self._copied(manifest)
        except NoCheckpoint:
            return False  # retention took it: nothing to copy any more
        except Exception as error:  # a thread has nobody to raise to
            self.error = error
            return True
        return False

    def _pace(self, size_bytes: int) -> None:
        wait_s = self._bucket.wait_s(size_bytes, time.monotonic()) if self._bucket else 0.0
        if self._closing.wait(wait_s) if wait_s > 0 else self._closing.is_set():
            raise Stopped("the copier is being closed")
