"""Whether a save has the time to be written slowly and cheaply. Pure.

What is written past the page cache costs the training little, but leaves the state no sooner than the disk has it. What
goes through the cache is out of the way sooner, at the price of processor time. So: past the cache as long as the
state, at the rate seen so far, is read before it changes; how long that takes is known from the last saves.
"""

from __future__ import annotations

from collections.abc import Collection

REMEMBERED = 4
"""So many last saves: steps are not all alike, and a wait costs more than a copy."""
PROBE_BYTES = 8 << 20
"""The rate is not known before."""
MARGIN = 0.8
"""Of the time that there is."""


def has_time(*, read_bytes: int, live_bytes: int, since_s: float, windows_s: Collection[float]) -> bool:
    """Whether what is still read from the live state will have been before it changes.

    Args:
        read_bytes: read so far, in ``since_s``.
        live_bytes: still to be read; no change waits if there are none.
        since_s: how long ago the save began.
        windows_s: how long each of the last saves had (`REMEMBERED`), until the state changed; the shortest counts.
            Nothing is known without them.

    """
    if not live_bytes:
        return True
    if not windows_s:
        return False
    window_s = MARGIN * min(windows_s)
    if read_bytes < PROBE_BYTES:
        return since_s < window_s
    return since_s * (1 + live_bytes / read_bytes) < window_s
