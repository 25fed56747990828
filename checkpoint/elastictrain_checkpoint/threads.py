"""A few threads that do the same to one item after the other."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

_Item = TypeVar("_Item")
_END = object()


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(threads: int, items: Iterable[_Item], work: Callable[[_Item], object]) -> None:
    """Call ``work`` with every item, in up to ``threads`` threads, the caller among them; returns when all is done.

    Items are taken in their order and one at a time, so ``items`` may be a generator that does the next piece of
    planning when it is asked. After an error nothing further is begun; what was begun is finished first. The error that
    is raised is that of the earliest item that failed, however the threads took turns: all items before it were begun.
    """
    if threads <= 1:
        for item in items:
            work(item)
        return
    coming, begun = iter(items), itertools.count()
    lock = threading.Lock()
    failed: list[tuple[int, BaseException]] = []

    def run() -> None:
        number = 0
        try:
            while True:
                with lock:
                    if failed:
                        return
                    number = next(begun)
                    item = next(coming, _END)
                if item is _END:
                    return
                work(item)  # type: ignore[arg-type]
        except BaseException as error:  # also what planning the next item raises
            with lock:
                failed.append((number, error))

    helpers = [threading.Thread(target=run, name="elastictrain-read", daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    run()
    for helper in helpers:
        helper.join()
    if failed:
        raise min(failed, key=lambda one: one[0])[1]
