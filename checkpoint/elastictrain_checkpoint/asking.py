"""Asking a store that may not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Answer = TypeVar("_Answer")


class Asked(Generic[_Answer]):
    """A question that is under way, in a thread of its own."""

    def __init__(self, question: Callable[[], _Answer]) -> None:
        self._question = question
        self._answer: list[_Answer] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="elastictrain-ask", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer.append(self._question())
        except Exception as error:  # whatever a file system raises: fsspec's do not keep to OSError
            self._error = error

    def answer(self, timeout_s: float) -> _Answer:
        """Wait for it.

        Raises:
            OSError: it could not be answered, or not in time; the message says which.

        """
        self._thread.join(timeout_s)
        if self._error is not None:
            raise OSError(f"{type(self._error).__name__}: {self._error}") from self._error
        if not self._answer:
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        return self._answer[0]
