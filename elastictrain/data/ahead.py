"""Windows that are decoded before anybody asks for them, in a thread, within a budget of bytes.

Without this a lane that comes to the end of its window waits for the next one to be decoded, and as the lanes of a
source come there at about the same step, all of them wait then and none of them later. So the window that follows the
current one is decoded meanwhile, that of the lane which will need it first before the others. Who has to wait for one
that is being decoded decodes the one after it meanwhile: so at the start, when all windows are wanted at once, and
wherever batches are made faster than windows are decoded, two threads decode.

What is decoded here is only ever early: who asks for a window that is not here, or whose reading failed here, reads it
and gets the error that belongs to it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from elastictrain.data.order import Window
from elastictrain.data.windows import Key, Loaded, Place, key_of, place_of
from elastictrain.errors import DataError

_JOIN_S = 60.0
_LOOK_S = 1.0
_WINDOWS_READY = 4
"""Of a lane and source, whatever the budget: where row groups are small, thousands would fit into it."""

_ROUNDED = 1e-6
"""Steps: when a window is needed that others come before is a sum of fractions."""


class Ended(Exception):
    """The thread was told to end while it was reading."""


@dataclass(slots=True)
class _Coming:
    window: Window
    due: float  # the step that needs it
    reading: bool = False
    loaded: Loaded | None = None


class Ahead:
    """Reads windows in the order in which they are needed. Thread-safe.

    `load` reads one; it is called in the thread, and may call `check`. `after` says which one follows in a lane, and
    `steps_of` for how many steps a window lasts that is begun at some step. `budget_bytes`: what the blocks of windows
    that nobody uses yet may take; one window may always be ready, whatever its size, and at most four of a lane.
    """

    def __init__(
        self,
        load: Callable[[Window], Loaded],
        after: Callable[[Window], Window],
        steps_of: Callable[[Window, int], float],
        budget_bytes: int,
        *,
        helps: bool = False,
    ) -> None:
        """`helps`: who waits in `take` reads another window meanwhile, if one is queued. Then `load` must be safe to be
        called by several threads, and not last long.
        """
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes is {budget_bytes}; expected at least 1")
        self._load, self._after, self._steps_of, self._budget_bytes = load, after, steps_of, budget_bytes
        self._helps = helps
        self._changed = threading.Condition()
        self._coming: dict[Place, dict[Key, _Coming]] = {}
        self._largest_bytes = 0  # block that was seen
        self._until = math.inf
        self._ended = False
        self._thread: threading.Thread | None = None

    def expect(self, needed: Iterable[tuple[int, Window]], lanes: Iterable[int], until: float = math.inf) -> None:
        """Say which windows are needed at which steps. Of lanes that are not among `lanes` nothing is kept, and windows
        that no step before `until` needs are not read.
        """
        kept = set(lanes)
        with self._changed:
            self._until = until
            for place in [place for place in self._coming if place[0] not in kept]:
                del self._coming[place]
            for step, window in needed:
                self._add(window, step)
            self._changed.notify_all()

    def take(self, window: Window) -> Loaded | None:
        """Return a window if it is here, waiting for it while it is being read; None if the caller must read it."""
        place, key = place_of(window), key_of(window)
        while (other := self._wait_while_read(place, key)) is not None:
            self._read(other)
        with self._changed:
            here = self._coming.get(place, {})
            coming = here.get(key)
            for passed in [one for one in here if one <= key]:
                del here[passed]
            self._changed.notify_all()
        return coming.loaded if coming is not None else None

    def follow(self, window: Window, due: float) -> None:
        """Say that a window is being used, until step `due`: those after it are wanted."""
        following = self._following(window)
        if following is None:
            return
        with self._changed:
            if key_of(following) not in self._coming.get(place_of(window), {}):
                self._coming[place_of(window)] = {}
                self._add(following, due)
            self._changed.notify_all()

    def due(self, window: Window) -> float:
        """The step that needs a window; infinite if none does any more."""
        with self._changed:
            coming = self._coming.get(place_of(window), {}).get(key_of(window))
            return coming.due if coming is not None else math.inf

    def limit(self, budget_bytes: int) -> None:
        """From now on blocks may take so much; what is ready stays."""
        with self._changed:
            self._budget_bytes = max(1, budget_bytes)
            self._changed.notify_all()

    def check(self) -> None:
        """Raise Ended if the thread shall end."""
        if self._ended:
            raise Ended

    def close(self) -> None:
        """End the thread and drop what was read; may be called twice."""
        with self._changed:
            self._ended = True
            self._coming.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    @property
    def ready(self) -> list[Loaded]:
        """The windows that lie ready."""
        with self._changed:
            return [coming.loaded for coming in self._all() if coming.loaded is not None]

    def _following(self, window: Window) -> Window | None:
        """The window after one; None where nothing is known of it, which is no error of those before."""
        try:
            return self._after(window)
        except (DataError, IndexError):
            return None

    def _wait_while_read(self, place: Place, key: Key) -> _Coming | None:
        """Wait until a window is not being read any more; or return another one, to be read meanwhile."""
        with self._changed:
            while (coming := self._coming.get(place, {}).get(key)) is not None and coming.reading and not self._ended:
                other = self._next() if self._helps else None
                if other is not None:
                    other.reading = True
                    return other
                self._changed.wait(_LOOK_S)
        return None

    def _all(self) -> list[_Coming]:
        return [coming for here in self._coming.values() for coming in here.values()]

    def _add(self, window: Window, due: float) -> None:
        if self._ended or math.isinf(due) or due >= self._until - _ROUNDED:
            return
        self._coming.setdefault(place_of(window), {}).setdefault(key_of(window), _Coming(window, due))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="elastictrain-ahead", daemon=True)
            self._thread.start()

    def _next(self) -> _Coming | None:
        """The window to read now: the one that is needed first, if the budget has room for it.

        What other threads are reading counts as ready, each block with the bytes of the largest that was seen: nothing,
        until a first one was.
        """
        queued: list[_Coming] = []
        taken: dict[int, int] = {}
        for here in self._coming.values():
            begun = [coming for coming in here.values() if coming.reading or coming.loaded is not None]
            for coming in begun:
                if coming.loaded is not None:
                    taken.update((block.number, block.bytes) for block in coming.loaded.blocks)
                else:
                    for piece in coming.window.pieces:
                        taken.setdefault(piece.block, self._largest_bytes)
            if len(begun) < _WINDOWS_READY:
                queued += [coming for coming in here.values() if coming.loaded is None and not coming.reading]
        if not queued:
            return None
        first = min(queued, key=lambda coming: coming.due)
        more = {piece.block for piece in first.window.pieces} - taken.keys()
        if taken and sum(taken.values()) + len(more) * self._largest_bytes > self._budget_bytes:
            return None
        return first

    def _run(self) -> None:
        while (coming := self._wait_for_work()) is not None:
            with suppress(BaseException):  # the thread goes on, whatever a window was read with
                self._read(coming)
            del coming  # a window that was used up must not live on here

    def _wait_for_work(self) -> _Coming | None:
        with self._changed:
            while not self._ended and (coming := self._next()) is None:
                self._changed.wait()  # ended by expect, take, follow or close; nobody waits for this thread here
            if self._ended:
                return None
            assert coming is not None
            coming.reading = True
            return coming

    def _read(self, coming: _Coming) -> None:
        loaded: Loaded | None = None
        following: tuple[Window, float] | None = None
        try:
            loaded = self._load(coming.window)
            window = self._following(coming.window)
            if window is not None:
                following = window, coming.due + self._steps_of(coming.window, int(coming.due))
        except (KeyboardInterrupt, SystemExit):  # meant for whoever waits, if that reads here
            raise
        except BaseException:  # who asks for the window reads it, and gets the error if there still is one
            loaded = None
        finally:
            with self._changed:
                self._done(coming, loaded, following)

    def _done(self, coming: _Coming, loaded: Loaded | None, following: tuple[Window, float] | None) -> None:
        here = self._coming.get(place_of(coming.window), {})
        coming.reading = False
        if here.get(key_of(coming.window)) is coming:
            if loaded is None:
                del here[key_of(coming.window)]
            else:
                coming.loaded = loaded
                self._largest_bytes = max(self._largest_bytes, *(block.bytes for block in loaded.blocks))
            if following is not None:
                self._add(*following)
        self._changed.notify_all()
