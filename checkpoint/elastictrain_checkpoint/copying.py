"""Copying checkpoints from one store to another, at once or in the background: hash-verified, manifest last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elastictrain_checkpoint.commit import list_steps, load
from elastictrain_checkpoint.errors import AlreadyCommitted, CheckpointError, CorruptData, InvalidManifest, NoCheckpoint
from elastictrain_checkpoint.hashing import block_sum
from elastictrain_checkpoint.manifest import Manifest, parse_manifest
from elastictrain_checkpoint.reader import corrupt
from elastictrain_checkpoint.retain import discard
from elastictrain_checkpoint.sidecar import check_sidecar
from elastictrain_checkpoint.store import Store

Pace = Callable[[int], None]
"""Called with the number of bytes before they are sent; returns when they may be, or raises."""


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
    """Copy a committed step, with the packs of other steps that it refers to. Every block is checked on its way.

    What an earlier call left in the target is checked and used; the manifest is published last, so that an unfinished
    copy is no checkpoint. A step of a lower generation in the target has not happened in the history of the source and
    is replaced.

    Args:
        source: where from.
        target: where to.
        step: the step.
        pace: bounds the rate.

    Raises:
        NoCheckpoint, CorruptData: the source does not have it whole; nothing was published.
        AlreadyCommitted: the target has another checkpoint of this step, of the same or a higher generation.
        OSError: storage failed; call again to go on.

    """
    manifest = load(source, step)
    there = _manifest_in(target, manifest)
    if there == manifest.raw and _complete(target, manifest):
        return manifest
    for number in range(len(manifest.files)):
        _copy_pack(source, target, manifest, number, pace)
    for path, record in manifest.sidecars:
        try:
            data = check_sidecar(record, source.read_all(path))
        except (FileNotFoundError, ValueError) as error:
            raise CorruptData(f"step {step}: {path}: {error}", file=path) from None
        _publish(target, path, data)
    _publish(target, manifest.path, manifest.raw)
    return manifest


def _manifest_in(target: Store, manifest: Manifest) -> bytes | None:
    """The manifest of this step in the target; one of a lower generation, or a damaged one, is removed."""
    try:
        raw = target.read_all(manifest.path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if raw == manifest.raw:
        return raw
    try:
        other = parse_manifest(raw, manifest.step, target.read_all)
    except InvalidManifest:
        other = None
    if other is not None and other.generation >= manifest.generation:
        raise AlreadyCommitted(
            f"{target.url} has step {manifest.step} of attempt {other.attempt}, generation {other.generation}; the one "
            f"to copy is of attempt {manifest.attempt}, generation {manifest.generation}. discard(store, "
            f"{manifest.step}) removes the one that is there"
        )
    discard(target, manifest.step, keep_attempt=manifest.attempt)
    return None


def _complete(target: Store, manifest: Manifest) -> bool:
    sizes = [(path, file.size_bytes) for path, file in zip(manifest.paths, manifest.files, strict=True)]
    sizes += [(path, record.size_bytes) for path, record in manifest.sidecars]
    return all(target.size(path) == size for path, size in sizes)


def _publish(target: Store, path: str, data: bytes) -> None:
    try:
        target.publish(path, data)
    except FileExistsError:
        if target.read_all(path) != data:
            target.replace(path, [memoryview(data)])


def _copy_pack(source: Store, target: Store, manifest: Manifest, number: int, pace: Pace | None) -> None:
    path, size = manifest.paths[number], manifest.files[number].size_bytes
    there = target.size(path)
    # The right size is not enough: after a loss of power, a file whose copying was not finished may be full of zeros.
    if there == size and all(found is not None for _, found in _blocks(target, manifest, number)):
        return

    def stream() -> Iterator[memoryview]:
        for block, data in _blocks(source, manifest, number):
            if data is None:
                raise corrupt(manifest, number, block, f"damaged in {source.url}; it is not copied")
            if pace is not None:
                pace(len(data))
            yield data

    if there is None:
        target.create(path, stream())
    else:
        target.replace(path, stream())


def _blocks(store: Store, manifest: Manifest, number: int) -> Iterator[tuple[int, memoryview | None]]:
    """Blocks of a pack, each checked; None for one that is not as it was written."""
    step, size = manifest.block_bytes, manifest.files[number].size_bytes
    buffer = memoryview(bytearray(min(step, size)))
    for block in range(len(manifest.sums[number])):
        view = buffer[: min(step, size - block * step)]
        try:
            got = store.read_into(manifest.paths[number], block * step, view)
        except FileNotFoundError:
            got = -1
        whole = got == len(view) and block_sum(view) == int(manifest.sums[number][block])
        yield block, view if whole else None


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
