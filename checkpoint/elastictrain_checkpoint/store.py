"""Storage in ten verbs, none of which locks; only one, for healing, writes data over data.

What the commit protocol asks of storage is little, so that a local disk, NFS, memory and S3-like stores
behave alike: a file is created exactly once and is durable when the call returns; one small file can be
*published*, that is, appear whole or not at all, and only if it was not there. Paths are relative to the
store's root, with ``/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.posix import PosixBackend
from elastictrain_checkpoint.remote import RemoteBackend

REMOTE_WINDOW_BYTES = 16 << 20


class Backend(Protocol):
    """What a kind of storage must do; see `Store` for the meaning of each verb."""

    def create(self, path: str, blocks: Iterable[memoryview]) -> int: ...
    def publish(self, path: str, data: bytes) -> None: ...
    def put(self, path: str, data: bytes) -> None: ...
    def replace(self, path: str, blocks: Iterable[memoryview]) -> int: ...
    def read_into(self, path: str, start: int, out: memoryview) -> int: ...
    def read_all(self, path: str) -> bytes: ...
    def size(self, path: str) -> int | None: ...
    def modified_s(self, path: str) -> float: ...
    def list(self, path: str) -> list[str]: ...
    def remove(self, path: str) -> None: ...


class Store:
    """A folder on a local disk or any fsspec file system.

    Args:
        url: a path, ``file:///…``, ``memory://…``, ``s3://bucket/…`` or whatever fsspec knows.
        backend: storage of another kind; ``url`` is then only its name.
        storage_options: what the fsspec file system needs besides the URL (endpoint, credentials).

    """

    def __init__(
        self, url: str | Path, *, backend: Backend | None = None, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self.url = str(url)
        self._backend = backend or _backend(self.url, storage_options or {})

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def guarded(self, before: Callable[[str, str], None], after: Callable[[], None] = lambda: None) -> Store:
        """The same storage; `before(verb, path)` is called ahead of every verb and may raise: so whatever works on it
        (a commit, a prune) can be stopped between two verbs, where stopping is always safe. A verb that has begun is
        finished; `after` is called then, however it has ended.
        """
        return Store(self.url, backend=cast("Backend", _Guarded(self._backend, before, after)))

    def create(self, path: str, blocks: Iterable[memoryview]) -> int:
        """Stream ``blocks`` into a new file; durable on return. Gives its size in bytes.

        A block may be reused by its producer when the next one is asked for. If ``blocks`` has an attribute
        ``size_bytes``, a local disk sets aside that much room first; if it has a method ``past_cache``, the next block
        is written past the page cache while that gives true, where this can be; and if it has one ``lend``, that is
        called with memory of a block's length, into which it may put the blocks that follow, which saves a copy. If
        the stream fails, the file is removed as far as possible; a torn file can remain, under a name that nothing
        refers to.

        Raises:
            FileExistsError: the file is there; it is left as it is.
            OSError: storage failed (full, broken …).

        """
        return self._backend.create(_checked(path), blocks)

    def publish(self, path: str, data: bytes) -> None:
        """Make a small file appear whole and durable, only if there is none of that name.

        Raises:
            FileExistsError: there is one; it is left as it is.

        """
        self._backend.publish(_checked(path), data)

    def probe_exclusive(self, path: str) -> str:
        """Say why two processes that `publish` one name at the same time might both succeed; "" if they cannot.

        One coordinator at a time needs no such promise; whoever lets the quickest of several decide does. Writes and
        removes `path`, which must be a name that nobody else uses.

        Raises:
            OSError: storage failed.

        """
        probe: Callable[[str], str] | None = getattr(self._backend, "probe_exclusive", None)
        if probe is None:
            return f"{type(self._backend).__name__} does not say whether it creates a file only where there is none"
        return probe(_checked(path))

    def put(self, path: str, data: bytes) -> None:
        """Write a small file over whatever was there. Only for hints: not durable, last writer wins."""
        self._backend.put(_checked(path), data)

    def replace(self, path: str, blocks: Iterable[memoryview]) -> int:
        """Stream a new file and put it in the place of what is there, if anything; durable on return. Gives its size.

        Only to heal what is damaged: until the new file is whole, the old one stays as it is, also if the stream fails.
        """
        return self._backend.replace(_checked(path), blocks)

    def read_into(self, path: str, start: int, out: memoryview) -> int:
        """Fill ``out`` with the bytes from ``start`` on; gives how many there were (less only at the end of
        the file).

        Raises:
            FileNotFoundError: there is no such file.

        """
        return self._backend.read_into(_checked(path), start, out)

    @property
    def read_window_bytes(self) -> int:
        """Bytes that are best read at once: little where what was read is hashed from the processor's cache, much
        where every request waits for a network.
        """
        return int(getattr(self._backend, "read_window_bytes", REMOTE_WINDOW_BYTES))

    @property
    def read_threads(self) -> int:
        """How many threads best read at once; 1 where a backend does not say that it can serve several."""
        return int(getattr(self._backend, "read_threads", 1))

    def read_parts(
        self, path: str, start: int, outs: Sequence[memoryview], arrived: Callable[[int], None] | None = None
    ) -> int:
        """As `read_into`, for one run of bytes that goes to several buffers, one after the other.

        A backend may have a verb of this name; where it has not, the run is read in one piece and copied.

        Args:
            path: which file.
            start: its first byte that is read.
            outs: writable flat buffers.
            arrived: called with the number of bytes that are there, at the end and, where the backend
                `reads_in_portions`, before that: what has just come is in the processor's cache. What it raises is
                raised.

        Raises:
            FileNotFoundError: there is no such file.

        """
        if arrived is not None:
            if getattr(self._backend, "reads_in_portions", False):
                return int(self._backend.read_parts(_checked(path), start, outs, arrived))  # type: ignore[attr-defined]
            got = self.read_parts(path, start, outs)
            arrived(got)
            return got
        if len(outs) == 1:
            return self.read_into(path, start, outs[0])
        parts = getattr(self._backend, "read_parts", None)
        if parts is not None:
            return int(parts(_checked(path), start, outs))
        whole = memoryview(bytearray(sum(len(out) for out in outs)))
        got = self.read_into(path, start, whole)
        at = 0
        for out in outs:
            take = max(0, min(len(out), got - at))
            out[:take] = whole[at : at + take]
            at += len(out)
        return got

    def read_all(self, path: str) -> bytes:
        """Whole content of a small file.

        Raises:
            FileNotFoundError: there is no such file.

        """
        return self._backend.read_all(_checked(path))

    def size(self, path: str) -> int | None:
        """Bytes of a file; None if there is no such file."""
        return self._backend.size(_checked(path))

    def free_bytes(self) -> int | None:
        """What may still be written here; None where storage does not say (an object store)."""
        free = getattr(self._backend, "free_bytes", None)
        return None if free is None else int(free())

    def modified_s(self, path: str) -> float:
        """When the file (or folder, where there are folders) was last written, in seconds since 1970."""
        return self._backend.modified_s(_checked(path))

    def list(self, path: str = "") -> list[str]:
        """Names directly below a folder, sorted; empty if there is no such folder."""
        return sorted(self._backend.list(_checked(path) if path else ""))

    def remove(self, path: str) -> None:
        """Remove a file or an empty folder, durably; fine if it is not there."""
        self._backend.remove(_checked(path))


class _Guarded:
    """A backend whose verbs ask first. What is no verb (a number that it states) passes."""

    def __init__(self, backend: Backend, before: Callable[[str, str], None], after: Callable[[], None]) -> None:
        self._inner, self._before, self._after = backend, before, after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def verb(*args: Any, **kwargs: Any) -> Any:
            self._before(name, str(args[0]) if args else "")
            try:
                return found(*args, **kwargs)
            finally:
                self._after()

        return verb


def _backend(url: str, options: Mapping[str, Any]) -> Backend:
    system, root = fsspec.core.url_to_fs(url, **options)
    if isinstance(system, LocalFileSystem):
        return PosixBackend(Path(root))
    return RemoteBackend(system, root)


def _checked(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or "\0" in path:
        raise InvalidPiece(f"path {path!r} is not a plain relative path inside the store")
    return path
