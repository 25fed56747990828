"""Asking a store again when it fails: exponential back-off with limits.

What another try cannot change (no such file, no permission, a file where a folder should be) is said at once. All other
failures of a store (a connection that breaks, "slow down", a time-out) are tried again after `first_s`, twice that, and
so on up to `longest_s` each, until `limit_s` seconds have gone since the first failure. Time spent so counts for the
stage "retry" of the meter (`data.meter`), which the metrics and the status show.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from elastictrain.data.meter import timed
from elastictrain.errors import StoreFailed
from elastictrain_checkpoint.network import errors_of_the_system

T = TypeVar("T")

FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""What the store has decided, and will decide again."""
RETRY_LIMIT_S = 120.0
_log = logging.getLogger(__name__)


def backoff_s(first_s: float, longest_s: float) -> Iterator[float]:
    """Yield the waits before the second try, the third, and so on; pure."""
    wait_s = first_s
    while True:
        yield min(wait_s, longest_s)
        wait_s = min(2 * wait_s, longest_s)


@dataclass(frozen=True, slots=True)
class Retry:
    """How long a store that fails is asked again. `limit_s` 0: not at all. Seconds."""

    limit_s: float = RETRY_LIMIT_S
    first_s: float = 0.1
    longest_s: float = 15.0
    clock: Callable[[], float] = field(default=time.monotonic, compare=False)
    sleep: Callable[[float], object] | None = field(default=None, compare=False)

    def call(self, action: Callable[[], T], what: str) -> T:
        """Return what `action` returns. Raises what it raised last; `what` (a file's name) is for the log."""
        try:
            with errors_of_the_system():
                return action()
        except FINAL:
            raise
        except OSError as error:
            return self._again(action, what, error)

    def _again(self, action: Callable[[], T], what: str, error: OSError) -> T:
        begun_s, tries = self.clock(), 1
        with timed("retry"):
            for wait_s in backoff_s(self.first_s, self.longest_s):
                if self.clock() - begun_s + wait_s > self.limit_s:
                    raise _tired(error, tries, self.limit_s)
                _log.warning("%s: %s; trying again in %.1f s", what, error, wait_s)
                (self.sleep or _pause)(wait_s)
                tries += 1
                try:
                    with errors_of_the_system():
                        return action()
                except FINAL:
                    raise
                except OSError as another:
                    error = another
        raise AssertionError("the waits never end")


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _tired(error: OSError, tries: int, limit_s: float) -> OSError:
    return OSError(f"{error}; given up after {tries} tries within {limit_s:.0f} s (data.retry_s)")


class DecodedFile:
    """What decoders ask of a file that is read, but for `read` and `seek`."""

    _handle: Any
    _at: int

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._handle.close()

    @property
    def closed(self) -> bool:
        return bool(self._handle.closed)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False


class RetryingFile(DecodedFile):
    """A file for reading whose failed reads are tried again, on a handle that is opened anew.

    `reopen`: opens the file at its start. Not thread-safe, as files are. What a store refuses, or fails to give for too
    long, is raised as StoreFailed: decoders take an OSError for damage of the content.
    """

    def __init__(self, reopen: Callable[[], Any], retry: Retry, what: str) -> None:
        self._reopen, self._retry, self._what = reopen, retry, what
        self._handle = retry.call(reopen, what)
        self._at = 0
        self._is_broken = False

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes, all for -1."""
        data = bytes(self._call(lambda handle: handle.read(size)))
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the position; returns it."""
        self._at = int(self._call(lambda handle: handle.seek(offset, whence)))
        return self._at

    def _call(self, action: Callable[[Any], Any]) -> Any:
        try:
            return self._retry.call(lambda: self._try(action), self._what)
        except OSError as error:
            raise StoreFailed(
                f"{self._what}: could not be read ({error}). The file was there when the run opened data.path"
            ) from error

    def _try(self, action: Callable[[Any], Any]) -> Any:
        if self._is_broken:
            with suppress(OSError):
                self._handle.close()
            handle = self._reopen()
            handle.seek(self._at)
            self._handle, self._is_broken = handle, False
        try:
            return action(self._handle)
        except OSError:
            self._is_broken = True  # where a failed read has left the handle nobody knows
            raise

    def __enter__(self) -> RetryingFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
