"""What signals do to the process that started a run: Ctrl-C and SIGTERM end the run in order, a terminal that goes away
does not end it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def sheltered() -> Iterator[None]:
    """A hang-up (SIGHUP) ends neither this process nor one that it starts meanwhile. A terminal that is closed sends it
    to all of them, an embedded Ray's too, and to ignore it is inherited, which no handler is.
    """
    if not _may_set_handlers() or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # else the terminal has gone, see `on_signals`
            signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def on_signals(stop: Callable[[], None], hang_up: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `stop`; a second one interrupts at once. A hang-up calls `hang_up`, once; later ones
    (the kernel sends one, a shell another) do nothing to this process for the rest of its life.
    """
    if not _may_set_handlers():
        yield
        return
    asked, alone = threading.Event(), threading.Event()

    def end(number: int, frame: object) -> None:
        del number, frame
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        stop()

    def leave(number: int, frame: object) -> None:
        del number, frame
        if not alone.is_set():
            alone.set()
            hang_up()

    handlers = {signal.SIGINT: end, signal.SIGTERM: end, signal.SIGHUP: leave}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, previous in before.items():
            if number != signal.SIGHUP or not alone.is_set():
                signal.signal(number, previous)


def output_to(path: Path, first_line: str) -> None:
    """From now on standard output and error go to `path`, which begins with `first_line`. One that goes to a file stays
    as it is: it outlives the terminal. Does not raise: a handler of signals calls it.
    """
    with contextlib.suppress(OSError):
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(log, first_line.encode() + b"\n")
        for descriptor in (1, 2):
            if not _is_file(descriptor):
                os.dup2(log, descriptor)
        os.close(log)


def _is_file(descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:  # closed
        return False


def _may_set_handlers() -> bool:
    return threading.current_thread() is threading.main_thread()
