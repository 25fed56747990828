"""Delays and accidents of copying checkpoints to further places, to plant in a worker process (see `plants`)."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from elastictrain.engine import stepping
from elastictrain_checkpoint import Store, list_steps, posix, transfer


def dies_copying(victim: int, step: int, blocks: int) -> Callable[[int], None]:
    """`victim` is killed after so many blocks of checkpoint `step` have been handed to the further place."""
    return partial(_dies_copying, victim, step, blocks)


def _dies_copying(victim: int, step: int, blocks: int, worker: int) -> None:
    stream, copied = transfer._stream, itertools.count()

    def cut(store: Any, manifest: Any, number: int, moved: Any, pace: Any = None) -> Iterable[memoryview]:
        for block in stream(store, manifest, number, moved, pace):
            if manifest.step == step and next(copied) == blocks:
                os.kill(os.getpid(), signal.SIGKILL)
            yield block

    if worker == victim:
        transfer._stream = cut  # type: ignore[assignment]
        _goes_no_further(step)


def dies_before_the_copys_manifest(victim: int, step: int) -> Callable[[int], None]:
    """`victim` is killed when all packs of checkpoint `step` are in the further place, and its manifest is not."""
    return partial(_dies_before_the_copys_manifest, victim, step)


def _dies_before_the_copys_manifest(victim: int, step: int, worker: int) -> None:
    sidecars = transfer._copy_sidecars

    def die(source: Any, manifest: Any, target: Any) -> None:
        if manifest.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        sidecars(source, manifest, target)

    if worker == victim:
        transfer._copy_sidecars = die
        _goes_no_further(step)


def _goes_no_further(step: int) -> None:
    """This worker, who is to die in the copy of `step`, does so before the step after the next one: however slow
    copying is, it is not put off to the end of the run.
    """
    apply = stepping.apply_step

    def wait(owner: Any, pending: Any, *rest: Any) -> Any:
        if pending.step > step + 1:
            assert threading.Event().wait(60), f"the copy of step {step} has not killed this worker"
        return apply(owner, pending, *rest)

    stepping.apply_step = wait  # type: ignore[assignment]


def far_is_broken(folder: str, until: int) -> Callable[[int], None]:
    """Nothing can be written below `folder` before this worker has applied step `until`."""
    return partial(_far_is_broken, folder, until)


def _far_is_broken(folder: str, until: int, worker: int) -> None:
    del worker
    seen, apply, create = [0], stepping.apply_step, posix.PosixBackend.create

    def counted(owner: Any, pending: Any, *rest: Any) -> Any:
        tally = apply(owner, pending, *rest)
        seen[0] = pending.step
        return tally

    def refused(self: Any, path: str, blocks: Any) -> int:
        if str(self.root).startswith(folder) and seen[0] < until:
            raise OSError(30, "Read-only file system", path)
        return create(self, path, blocks)

    stepping.apply_step = counted  # type: ignore[assignment]
    posix.PosixBackend.create = refused  # type: ignore[method-assign]


def far_hangs(folder: str) -> Callable[[int], None]:
    """Whoever writes below `folder` never comes back."""
    return partial(_far_hangs, folder)


def _far_hangs(folder: str, worker: int) -> None:
    del worker
    create = posix.PosixBackend.create

    def held(self: Any, path: str, blocks: Any) -> int:
        if str(self.root).startswith(folder):
            threading.Event().wait()
        return create(self, path, blocks)

    posix.PosixBackend.create = held  # type: ignore[method-assign]


def waits_for_copies(step: int, folder: str) -> Callable[[int], None]:
    """Nobody applies a step after `step` before the checkpoint of `step` is below `folder`."""
    return partial(_waits_for_copies, step, folder)


def _waits_for_copies(step: int, folder: str, worker: int) -> None:
    del worker
    apply, store = stepping.apply_step, Store(folder)

    def wait(owner: Any, pending: Any, *rest: Any) -> Any:
        if pending.step > step + 1:
            pause = threading.Event()
            for _ in range(600):
                if step in list_steps(store) or owner.is_parked():
                    break
                pause.wait(0.05)
        return apply(owner, pending, *rest)

    stepping.apply_step = wait  # type: ignore[assignment]
