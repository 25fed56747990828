"""What torch's compiler does in this process, heard from the compiler itself: a recipe may compile its model, and a
shape that is new in step 5,000 is compiled then. Such a step measures nobody, and minutes in it are no sign of trouble.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastictrain.pulse import Pulse
from elastictrain.signs import Activity

_CALLBACKS = "torch._dynamo.callback"


class _Compiler:
    """Compilations of this process since the first who asked.

    Attributes:
        count: how many have begun.

    """

    def __init__(self) -> None:
        self.count = 0
        self._listens = False
        self._pulses: dict[int, Pulse] = {}
        self._interrupted: list[tuple[Pulse, Activity]] = []

    def listen(self) -> None:
        """Hear of compilations from now on. Asked at every step: the compiler is not loaded before somebody needs it,
        and loading it takes seconds.
        """
        callbacks = None if self._listens else sys.modules.get(_CALLBACKS)
        handler = getattr(callbacks, "callback_handler", None)
        if handler is not None:
            self._listens = True
            handler.register_start_callback(self._begins)
            handler.register_end_callback(self._ends)

    @contextmanager
    def shown_in(self, pulse: Pulse) -> Iterator[None]:
        """Compilations in the calling thread are an activity in this pulse."""
        thread = threading.get_ident()
        self._pulses[thread] = pulse
        try:
            yield
        finally:
            del self._pulses[thread]

    def _begins(self, _: Any) -> None:
        self.count += 1
        # What backward compiles is heard in a thread of autograd's.
        pulse = self._pulses.get(threading.get_ident()) or (
            next(iter(self._pulses.values())) if len(self._pulses) == 1 else None
        )
        if pulse is not None:
            self._interrupted.append((pulse, pulse.activity))
            pulse.enter(Activity.COMPILE)

    def _ends(self, _: Any) -> None:
        if self._interrupted:
            pulse, activity = self._interrupted.pop()
            pulse.enter(activity)


COMPILER = _Compiler()
