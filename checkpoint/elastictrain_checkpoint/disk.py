"""Two calls of Linux that Python does not have, both only for speed: room before data, and writing back early.

Neither is needed for durability, which is fsync's alone: where a call is missing or the file system does not know it,
nothing happens.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: a file that is cut off by a crash must not look as long as a whole one
_START_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, do not wait, leave errors to fsync
_UNKNOWN = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.ENODEV, errno.EPERM}


def _function(name: str, *arguments: Any) -> Any:
    found = getattr(ctypes.CDLL(None, use_errno=True), name, None) if os.name == "posix" else None
    if found is not None:
        found.argtypes = arguments
    return found


_fallocate = _function("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_range = _function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def reserve(file: int, size_bytes: int) -> None:
    """Set aside room for a file; its size stays as it is.

    The C library's own `posix_fallocate` is not used: where the file system cannot do it, that writes to every page.

    Raises:
        OSError: there is no such room (full disk, quota, a broken device).

    """
    if _fallocate is not None and size_bytes and _fallocate(file, _KEEP_SIZE, 0, size_bytes):
        code = ctypes.get_errno()
        if code not in _UNKNOWN:
            raise OSError(code, f"{os.strerror(code)} ({size_bytes} bytes)")


def start_writing_back(file: int, start: int, size_bytes: int) -> None:
    """Let the device begin to write bytes that were handed to the kernel. Says nothing about their fate: fsync does."""
    if _sync_range is not None and size_bytes:
        _sync_range(file, start, size_bytes, _START_WRITE)
