"""File systems that misbehave, over memory: for `Store("faulty://…", storage_options={"mood": …})`."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass, field
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

WRITING = ("pipe_file", "rm_file", "open_w")


@dataclass
class Mood:
    """How a file system behaves; shared by all that are made with it.

    Attributes:
        every: each n-th call fails, whatever it is (0: none).
        room_bytes: so many can still be written.
        read_only: writing is refused.
        delay_s: each call takes so long.
        calls: names of the calls so far.

    """

    every: int = 0
    room_bytes: int | None = None
    read_only: bool = False
    delay_s: float = 0.0
    calls: list[str] = field(default_factory=list)

    def enter(self, call: str, size: int = 0) -> None:
        self.calls.append(call)
        time.sleep(self.delay_s)
        if self.every and len(self.calls) % self.every == 0:
            raise OSError(errno.EIO, f"call {len(self.calls)} ({call}) failed")
        if self.read_only and call in WRITING:
            raise PermissionError(errno.EACCES, "read-only")
        if self.room_bytes is not None and size:
            if size > self.room_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.room_bytes -= size


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Memory, in a mood."""

    protocol = "faulty"
    cachable = False

    def __init__(self, mood: Mood | None = None, **rest: Any) -> None:
        super().__init__(**rest)
        self.mood = mood or Mood()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("faulty://", "memory://")))

    def info(self, path: str, **kwargs: Any) -> Any:
        self.mood.enter("info")
        return super().info(path, **kwargs)

    def ls(self, path: str, **kwargs: Any) -> Any:
        self.mood.enter("ls")
        return super().ls(path, **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> Any:
        self.mood.enter("cat_file")
        return super().cat_file(path, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        self.mood.enter("pipe_file", len(value))
        return super().pipe_file(path, value, mode=mode, **kwargs)

    def rm_file(self, path: str) -> Any:
        self.mood.enter("rm_file")
        return super().rm_file(path)

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "wb" or "data" in kwargs:  # memory's own pipe_file comes by here
            return super().open(path, mode, **kwargs)
        self.mood.enter("open_w")
        return _Upload(self, path)


class _Upload:
    """Nothing of it is there before it is closed, as with an object store."""

    def __init__(self, system: FaultyFileSystem, path: str) -> None:
        self._system = system
        self._path = path
        self._data = bytearray()

    def write(self, data: Any) -> int:
        self._system.mood.enter("write", len(data))
        self._data += data
        return len(data)

    def close(self) -> None:
        self._system.mood.enter("close")
        MemoryFileSystem.pipe_file(self._system, self._path, bytes(self._data))

    def discard(self) -> None:
        self._data.clear()


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
