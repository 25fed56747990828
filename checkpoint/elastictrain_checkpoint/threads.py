"""A few threads that do the same to one item after the other, and one that waits for work."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import weakref
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


class _Hand:
    def __init__(self, name: str) -> None:
        self.coming: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.idle = threading.Event()
        self.idle.set()
        self.thread = threading.Thread(target=_serve, args=(self.coming, self.idle, name), name=name, daemon=True)
        self.thread.start()


def _serve(coming: queue.SimpleQueue[Callable[[], object] | None], idle: threading.Event, name: str) -> None:
    thread = threading.current_thread()
    while True:
        thread.name = f"{name}-idle"
        work = coming.get()
        if work is None:
            return
        thread.name = name
        work()
        work = None  # what it held on to goes with it
        idle.set()


class Standby:
    """A thread that waits for work. Whoever hands it over does not wait; whoever starts a thread waits until it runs,
    which on a busy machine takes milliseconds.

    Args:
        name: of the thread while it works.

    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._hand: _Hand | None = None
        self._new()

    def _new(self) -> _Hand:
        hand = self._hand = _Hand(self._name)
        self._end = weakref.finalize(self, hand.coming.put, None)
        self._end.atexit = False
        return hand

    def give(self, work: Callable[[], object]) -> None:
        """Have this called, which raises nothing, in a thread: another one if the first is still busy, or is gone (its
        process has forked).
        """
        hand = self._hand
        if hand is None or not (hand.idle.is_set() and hand.thread.is_alive()):
            self.close()
            hand = self._new()
        hand.idle.clear()
        hand.coming.put(work)

    def wait(self, timeout_s: float) -> bool:
        """Wait until what was given last is done; whether it is."""
        return self._hand is None or self._hand.idle.wait(timeout_s)

    def close(self) -> None:
        """Let the thread end, after what it does. Another one begins when work is given again: this one may say that it
        is idle a moment before it ends.
        """
        self._end()
        self._hand = None
