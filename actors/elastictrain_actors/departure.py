"""SIGTERM as a notice: whoever is told to go says so, hands over and leaves, instead of dying at once."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from typing import Any


def on_sigterm(then: Callable[[], object]) -> Callable[[], None]:
    """Have `then` called, in a thread of its own, at every SIGTERM to this process; returns what puts the old handler
    back. To be called in the main thread (ValueError elsewhere).

    A handler of Python's runs in the main thread, which may be waiting in foreign code for hours (that of a Ray actor
    is); the wake-up socket is written to at once, whatever the main thread does.
    """
    previous = signal.signal(signal.SIGTERM, _handled)
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)

    thread = threading.Thread(target=_listen, args=(ours, pythons, then), name="elastictrain-sigterm", daemon=True)

    def undo() -> None:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, previous)
        pythons.close()
        thread.join()

    thread.start()
    return undo


def _listen(ours: socket.socket, pythons: socket.socket, then: Callable[[], object]) -> None:
    """Holds on to both ends, also for a caller who does not keep `undo`: collected, Python's would be closed."""
    with ours, pythons:
        while received := ours.recv(64):
            if signal.SIGTERM in received:
                then()


def _handled(signum: int, frame: Any) -> None:
    """Something has to be there, or the process would end."""
