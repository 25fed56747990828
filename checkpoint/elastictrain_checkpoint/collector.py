"""A pause for Python's cyclic garbage collector, where very many small objects are made that form no cycles.

Every few hundred new objects the collector looks for cycles, and now and then through all objects of the process; with
torch imported that alone takes longer than planning a checkpoint.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_pauses = 0
_was_on = False


@contextmanager
def no_collections() -> Iterator[None]:
    """Pause the collector; may be nested, and used by several threads at once: the last to leave turns it on again."""
    global _pauses, _was_on
    with _lock:
        if not _pauses:
            _was_on = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if not _pauses and _was_on:
                gc.enable()
