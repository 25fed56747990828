"""How a save is written: past the page cache, or through it. Pure: whoever asks says what time it is.

What is written past the page cache costs the training little, but leaves the state no sooner than the disk has it. What
goes through the cache costs processor time, and is mostly out of the way sooner. Mostly: where the kernel must first
get its pages (a virtual machine whose free memory has gone back to its host), the cache may be the slower way. So: past
the cache as long as the state, at the rate of that way, is read before it changes; and also if it is not, where the
cache is known to be no faster. How long the state stays as it is, and how fast either way is, is known from the last
saves, and from this one.
"""

from __future__ import annotations

from collections import deque

REMEMBERED = 4
"""So many last saves: steps are not all alike, and a wait costs more than a copy. A way that none of them has taken is
not known any more: a disk or a machine changes its pace.
"""
AHEAD_BYTES = 8 << 20
"""What lies ahead of the device: the first bytes of a stretch say nothing about its rate."""
PROBE_BYTES = 16 << 20
"""The rate of a way is not known from less."""
KNOWN_BYTES = 64 << 20
"""What is known of the last saves counts as so many bytes of this one: a disk may hesitate for a moment."""
PROBE_SHARE = 0.2
"""Of the time that there is: so long the disk is tried anew that was too slow in the last saves."""
MARGIN = 0.8
"""Of the time that there is."""


class Course:
    """The way of one save.

    Args:
        begun_s: when it has begun.
        windows_s: how long each of the last saves had, until the state changed; the shortest counts. Nothing is known
            without them.
        cached, direct: bytes/s of the last saves through the cache and past it; None if not known.

    Attributes:
        begun_s: as given.

    """

    def __init__(
        self,
        begun_s: float,
        windows_s: tuple[float, ...] = (),
        cached: float | None = None,
        direct: float | None = None,
    ) -> None:
        self.begun_s = begun_s
        self._window_s = MARGIN * min(windows_s) if windows_s else None
        self._known = (cached, direct)
        self._bytes, self._seconds = [0, 0], [0.0, 0.0]
        self._is_past, self._settled_bytes = False, AHEAD_BYTES
        self._last: tuple[int, float] | None = None

    def has_measured(self, past_cache: bool) -> bool:
        """Whether enough went this way in this save."""
        return self._bytes[past_cache] >= PROBE_BYTES and self._seconds[past_cache] > 0

    def rate(self, past_cache: bool) -> float | None:
        """Bytes/s of a way, in this save and, as if they were a part of it, in the last ones; None if not known."""
        known = self._known[past_cache]
        if not self.has_measured(past_cache):
            return known
        size, seconds = self._bytes[past_cache], self._seconds[past_cache]
        return size / seconds if not known else (size + KNOWN_BYTES) / (seconds + KNOWN_BYTES / known)

    def past_cache(self, *, read_bytes: int, live_bytes: int, now_s: float, hurries: bool = False) -> bool:
        """Whether to go on past the page cache.

        Args:
            read_bytes: read so far.
            live_bytes: still to be read from the live state; no change waits if there are none.
            now_s: by the clock of ``begun_s``.
            hurries: somebody waits already.

        """
        self._measure(read_bytes, now_s)
        is_past = self._choose(live_bytes, now_s - self.begun_s, hurries)
        if is_past != self._is_past:
            self._is_past, self._settled_bytes, self._last = is_past, read_bytes + AHEAD_BYTES, None
        return is_past

    def _measure(self, read_bytes: int, now_s: float) -> None:
        if read_bytes < self._settled_bytes:
            return
        if self._last is not None:
            self._bytes[self._is_past] += read_bytes - self._last[0]
            self._seconds[self._is_past] += now_s - self._last[1]
        self._last = read_bytes, now_s

    def _choose(self, live_bytes: int, since_s: float, hurries: bool) -> bool:
        direct, cached = self.rate(True), self.rate(False)
        if direct and cached and cached <= direct:
            return True
        if hurries:
            return False
        if not live_bytes:
            return True
        if self._window_s is None or since_s >= self._window_s:
            return False
        if direct is None or since_s + live_bytes / direct < self._window_s:
            return True
        return not self.has_measured(True) and since_s < PROBE_SHARE * self._window_s


class Pace:
    """What a saver has learned from its last saves.

    Attributes:
        windows_s: how long the state stayed as it was after they had begun.

    """

    def __init__(self) -> None:
        self.windows_s: deque[float] = deque(maxlen=REMEMBERED)
        self._saves: deque[Course] = deque(maxlen=REMEMBERED)

    def begin(self, now_s: float) -> Course:
        """The course of the next save."""
        cached, direct = (
            next((one.rate(past) for one in reversed(self._saves) if one.has_measured(past)), None)
            for past in (False, True)
        )
        self._saves.append(Course(now_s, tuple(self.windows_s), cached, direct))
        return self._saves[-1]
