"""SIGTERM is a notice, even while the main thread waits in foreign code."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import threading

import pytest

from elastictrain_actors.departure import on_sigterm


def test_every_sigterm_is_told_and_the_old_handler_comes_back() -> None:
    before, told = signal.getsignal(signal.SIGTERM), queue.SimpleQueue[int]()
    undo = on_sigterm(lambda: told.put(threading.get_ident()))
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert told.get(timeout=10.0) != threading.get_ident()
    finally:
        undo()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_it_is_told_while_the_main_thread_is_in_foreign_code() -> None:
    """`sem_wait` of the C library returns to Python only when the semaphore is posted, which being told does."""
    libc = ctypes.CDLL(None, use_errno=True)
    semaphore = ctypes.create_string_buffer(64)
    libc.sem_init(semaphore, 0, 0)
    undo = on_sigterm(lambda: libc.sem_post(semaphore))
    sender = threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        sender.start()
        while libc.sem_wait(semaphore) != 0:  # a signal may interrupt it: then the word is still to come
            pass
    finally:
        sender.join()
        undo()


def test_other_signals_are_not_meant() -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    undo = on_sigterm(lambda: told.append(1))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        undo()  # joins the listener: whatever has been sent has been read
        signal.signal(signal.SIGUSR1, before)
    assert told == []


def test_another_thread_cannot_listen() -> None:
    found: list[BaseException] = []

    def attempt() -> None:
        with pytest.raises(ValueError, match="main thread") as raised:
            on_sigterm(lambda: None)
        found.append(raised.value)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert found
