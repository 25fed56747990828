"""What a worker has to say, kept until the controller has written it down. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from elastictrain.controller import events as ev
from elastictrain.controller.events import Message
from elastictrain.protocol import Row, StepSignals

MOST_SIGNALS = 500
"""They are advice: while no controller listens, those of later steps are not kept."""


class Outbox:
    """Messages stay here until the controller says that it has written them down: one that dies between hearing and
    writing has heard nothing, and its successor is told again. A long poll ends as soon as something urgent comes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._messages: list[tuple[Message, bool, float]] = []
        self._clock = clock
        self._first = 1
        self._progress_is_news = False
        self._signals = 0
        self._changed = threading.Condition()

    def put(self, message: Message) -> None:
        """Rows ride along with the next event or the end of the poll: metrics must not cost a call per step. The first
        commit after a seal is news: it ends a recovery.
        """
        with self._changed:
            if isinstance(message, StepSignals):
                if self._signals >= MOST_SIGNALS:
                    return
                self._signals += 1
            urgent = not isinstance(message, Row | StepSignals | ev.Progress)
            if isinstance(message, ev.Progress):
                urgent, self._progress_is_news = self._progress_is_news, False
            elif isinstance(message, ev.Sealed):
                self._progress_is_news = True
            self._messages.append((message, urgent, self._clock()))
            if urgent:
                self._changed.notify_all()

    def after(self, number: int, timeout_s: float) -> tuple[int, list[Message]]:
        """Messages are numbered from 1. Forget those up to `number`; wait up to `timeout_s` until something urgent
        comes; return the number of the newest message and all that wait. 0 asks for everything again.
        """
        with self._changed:
            written = max(0, number + 1 - self._first)
            self._signals -= sum(isinstance(message, StepSignals) for message, *_ in self._messages[:written])
            del self._messages[:written]
            self._first += written
            self._changed.wait_for(lambda: any(urgent for _, urgent, _ in self._messages), timeout=timeout_s)
            now_s = self._clock()
            return self._first + len(self._messages) - 1, [_aged(m, now_s - put_s) for m, _, put_s in self._messages]


def _aged(message: Message, age_s: float) -> Message:
    return replace(message, age_s=age_s) if isinstance(message, StepSignals) else message
