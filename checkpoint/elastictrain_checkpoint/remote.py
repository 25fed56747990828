"""Any fsspec file system: object stores and memory.

An object appears whole when its upload ends, so there is nothing to sync. Where the file system offers a
conditional create (S3 since 2024, GCS, memory) a manifest is published with it. Elsewhere there remains a
window between look and put; it is harmless while one coordinator, fenced by its generation, commits, which
the commit checks by reading back. All errors of a store that no caller could know are OSErrors here (`network`).
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import threading
from collections.abc import Iterable
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from elastictrain_checkpoint.network import errors_of_the_system

_publishing = threading.Lock()
"""Serialises look and put inside one process, for file systems whose own create is not atomic (memory)."""


_LOOKING = (AbstractFileSystem.pipe_file, AsyncFileSystem._pipe_file)
"""What fsspec gives to file systems that have no conditional create of their own."""


class RemoteBackend:
    """See `elastictrain_checkpoint.store.Store` for the contract."""

    def __init__(self, system: Any, root: str) -> None:
        self.system = system
        self.root = root.rstrip("/")

    @errors_of_the_system()
    def create(self, path: str, blocks: Iterable[memoryview]) -> int:
        full = self._full(path)
        if self._is_there(full):
            raise FileExistsError(f"{full} exists; pack names are used once")
        return self._stream(full, blocks, undo=True)

    @errors_of_the_system()
    def replace(self, path: str, blocks: Iterable[memoryview]) -> int:
        # An upload that is not completed leaves the old object. Where the file system writes in place (memory does not
        # until it is closed), a stream that fails must not remove what there was.
        return self._stream(self._full(path), blocks, undo=False)

    def _stream(self, full: str, blocks: Iterable[memoryview], *, undo: bool) -> int:
        file = self.system.open(full, "wb")
        size = 0
        try:
            for block in blocks:
                size += len(block)
                file.write(block)
        except BaseException:
            # close() would complete the upload: throw the parts away instead.
            with contextlib.suppress(Exception):
                file.discard()
            with contextlib.suppress(Exception):
                file.closed = True  # or the end of the object would try to complete what was thrown away
            if undo:
                with contextlib.suppress(Exception):
                    self.system.rm_file(full)
            raise
        file.close()
        return size

    @errors_of_the_system()
    def publish(self, path: str, data: bytes) -> None:
        full = self._full(path)
        with _publishing:
            self.system.invalidate_cache()
            if self._is_there(full):
                raise FileExistsError(full)
            if self._has_modes():
                self.system.pipe_file(full, data, mode="create")
            else:
                self.system.pipe_file(full, data)

    @errors_of_the_system()
    def probe_exclusive(self, path: str) -> str:
        """Some stores take the condition of a create and do not look at it, so that is tried out, without a look."""
        name = type(self.system).__name__
        pipe = self._pipe()
        if not self._has_modes() or getattr(pipe, "__func__", pipe) in _LOOKING:
            return f"{name} offers no conditional create, it looks first and then writes"
        full = self._full(path)
        first, second = b"the first", b"the second"
        try:
            try:
                self.system.pipe_file(full, first, mode="create")
            except FileExistsError:  # where the answer to a create was lost and its client has asked again
                if self.read_all(path) != first:
                    raise
            try:
                self.system.pipe_file(full, second, mode="create")
            except FileExistsError:
                return ""
            return f"the store behind {name} takes a conditional create and writes over what is there"
        except (NotImplementedError, TypeError, ValueError) as error:
            return f"{name} refuses a conditional create ({error!r})"
        finally:
            with contextlib.suppress(Exception):
                self.system.rm_file(full)

    @errors_of_the_system()
    def put(self, path: str, data: bytes) -> None:
        self.system.pipe_file(self._full(path), data)

    @errors_of_the_system()
    def read_into(self, path: str, start: int, out: memoryview) -> int:
        data = self.system.cat_file(self._full(path), start=start, end=start + len(out))
        out[: len(data)] = data
        return len(data)

    @errors_of_the_system()
    def read_all(self, path: str) -> bytes:
        return bytes(self.system.cat_file(self._full(path)))

    @errors_of_the_system()
    def size(self, path: str) -> int | None:
        self.system.invalidate_cache()
        try:
            info = self.system.info(self._full(path))
        except FileNotFoundError:
            return None
        return None if info["type"] == "directory" else int(info["size"])

    @errors_of_the_system()
    def modified_s(self, path: str) -> float:
        info = self.system.info(self._full(path))
        if info["type"] == "directory":
            return 0.0  # an object store's folder has no age of its own: only what lies in it counts
        when = self.system.modified(self._full(path))
        if when.tzinfo is None:
            when = when.replace(tzinfo=datetime.UTC)
        return float(when.timestamp())

    @errors_of_the_system()
    def list(self, path: str) -> list[str]:
        self.system.invalidate_cache()
        try:
            found = self.system.ls(self._full(path) if path else self.root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [name.rstrip("/").rsplit("/", 1)[-1] for name in found]

    @errors_of_the_system()
    def remove(self, path: str) -> None:
        full = self._full(path)
        with contextlib.suppress(FileNotFoundError):
            if self.system.isdir(full):
                self.system.rmdir(full)
            else:
                self.system.rm_file(full)

    def _is_there(self, full: str) -> bool:
        """Unlike fsspec's `exists`, which takes every error for a no: what cannot be seen is not written over."""
        try:
            self.system.info(full)
        except FileNotFoundError:
            return False
        return True

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _has_modes(self) -> bool:
        return "mode" in inspect.signature(self._pipe()).parameters

    def _pipe(self) -> Any:
        return getattr(self.system, "_pipe_file", self.system.pipe_file)
