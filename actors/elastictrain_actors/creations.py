"""Actors that are being created. Ray's head is asked for each, and while it is away the call does not come back, or
fails after a minute; so it is made in a thread of its own and made again, and the controller does not wait for it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

GRACE_S = 0.5
"""So long the controller does wait: with a head that is there a handle takes some milliseconds."""
RETRY_S = 1.0
AWAY = (RayError, OSError)
"""What Ray raises when its head does not answer. Anything else is said where the handle would be."""


@dataclass(frozen=True, slots=True)
class Created:
    """`key`: of the call. Either a handle or an error that making the call again does not cure."""

    key: Any
    handle: Any = None
    error: Exception | None = None


def end_actor(handle: Any) -> None:
    """For good, whatever its restarts."""
    ray.kill(handle, no_restart=True)


class Creations:
    """`ask` and `take` from one thread. `create` is called again when it fails, so it must find what a call before it
    has made (a name, and `get_if_exists`). `end`: what to do with an actor that nobody wants any more.
    """

    def __init__(self, end: Callable[[Any], object] = end_actor, *, retry_s: float = RETRY_S) -> None:
        self._end, self._retry_s = end, retry_s
        self._asked: queue.SimpleQueue[tuple[Hashable, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Created] = queue.SimpleQueue()
        self._open: dict[Hashable, bool] = {}
        self._since_s: dict[Hashable, float] = {}
        self._closed, self._closing = threading.Event(), threading.Lock()
        threading.Thread(target=self._create_all, name="elastictrain-creations", daemon=True).start()

    def __contains__(self, key: Hashable) -> bool:
        return self._open.get(key, False)

    def ask(self, key: Hashable, create: Callable[[], Any]) -> None:
        """Have an actor created; `take` brings its handle."""
        self._open[key] = True
        self._since_s[key] = time.monotonic()
        self._asked.put((key, create))

    def drop(self, key: Hashable) -> None:
        """It is wanted no more: whenever it is there, it is ended."""
        if key in self._open:
            self._open[key] = False

    def late(self, after_s: float) -> list[Any]:
        """Those that are wanted and were asked for more than `after_s` ago; each is said once."""
        before_s = time.monotonic() - after_s
        found = [key for key, since_s in self._since_s.items() if since_s < before_s and self._open.get(key)]
        for key in found:
            del self._since_s[key]
        return found

    def take(self, wait_s: float = 0.0) -> list[Created]:
        """Those that are there. `wait_s`: how long to wait for all that have been asked for."""
        found: list[Created] = []
        until_s = time.monotonic() + wait_s
        while self._open:
            try:
                made = self._made.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                break
            self._since_s.pop(made.key, None)
            if self._open.pop(made.key):
                found.append(made)
            elif made.error is None:
                self._end(made.handle)
        return found

    def close(self) -> None:
        """Does not wait: an actor whose creation is under way is ended when it is there."""
        with self._closing:
            self._closed.set()
        self._asked.put(None)
        for made in self.take():
            if made.error is None:
                self._end(made.handle)

    def _create_all(self) -> None:
        while (asked := self._asked.get()) is not None:
            key, create = asked
            made = self._create(key, create)
            with self._closing:
                if made is not None and not self._closed.is_set():
                    self._made.put(made)
                elif made is not None and made.error is None:
                    self._end(made.handle)

    def _create(self, key: Hashable, create: Callable[[], Any]) -> Created | None:
        while not self._closed.is_set():
            try:
                return Created(key, handle=create())
            except AWAY:
                self._closed.wait(self._retry_s)
            except Exception as error:
                return Created(key, error=error)
        return None
