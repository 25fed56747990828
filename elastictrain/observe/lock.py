"""One writer per run directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.pulse import start_ticks


class RunLock:
    """Says in the file `lock` which process on which host writes to a run directory.

    The file's text decides, so that a holder on another host that shares the folder counts too; `flock` only guards the
    moment of reading and writing it. A holder on this host that is gone is replaced. Its start time tells a process
    from a later one that got the same number.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._held = False

    def take(self) -> None:
        """Raises ConfigError when a live process, or one on another host, holds the directory."""
        with self._guarded() as file:
            holder = _read(file)
            if holder is not None and not _gone(holder):
                raise ConfigError(
                    f"run_dir={str(self.path.parent)!r} is in use by process {holder['pid']} on {holder['host']}; "
                    f"stop that run, or set run_dir (--run-dir) to another folder (if that process is gone for sure, "
                    f"delete {self.path})"
                )
            _write(file, {"pid": os.getpid(), "host": socket.gethostname(), "started": start_ticks(os.getpid())})
        self._held = True

    def release(self) -> None:
        """Leaves an empty file: unlinking it could take away a lock that another process is just writing."""
        if not self._held:
            return
        self._held = False
        with contextlib.suppress(ClusterError), self._guarded() as file:
            _write(file, None)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[IO[str]]:
        try:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
        except OSError as error:
            raise ClusterError(f"{self.path}: cannot be written: {error.strerror}; set run_dir elsewhere") from error
        with file:
            with contextlib.suppress(OSError):  # some network file systems have no flock; the text still counts
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def holder_of(folder: Path) -> str | None:
    """The live holder of a run directory as "process P on host H"; None when nobody writes to it."""
    try:
        with (folder / "lock").open(encoding="utf-8") as file:
            holder = _read(file)
    except OSError:
        return None
    return None if holder is None or _gone(holder) else f"process {holder['pid']} on {holder['host']}"


def _read(file: IO[str]) -> dict[str, object] | None:
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:  # empty, or torn by a death in the middle of taking it: held by nobody
        return None
    return holder if isinstance(holder, dict) and {"pid", "host"} <= holder.keys() else None


def _write(file: IO[str], holder: dict[str, object] | None) -> None:
    file.seek(0)
    file.truncate()
    if holder is not None:
        file.write(json.dumps(holder))
    file.flush()


def _gone(holder: dict[str, object]) -> bool:
    if holder["host"] != socket.gethostname():
        return False  # cannot be known from here
    pid = holder["pid"]
    if not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    started = holder.get("started")
    return started is not None and start_ticks(pid) != started
