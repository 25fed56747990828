"""Listing a store: whole, or a failure.

fsspec's own `exists`, `isdir`, `find` and `glob` take a request that fails for "nothing there", so a folder whose
listing breaks in the middle would be listed by half, and a run would train on that half. Here each request is tried
again (`data.retry`), and what fails for good is raised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from elastictrain.data.retry import Retry

_LISTS_AT_ONCE = frozenset({"gcsfs", "s3fs"})
"""Packages whose `find` lists all that lies under a prefix, page after page, and raises what goes wrong. All others are
listed folder by folder."""
_MAGIC = re.compile(r"[*?[]")


def patient(filesystem: Any, retry: Retry) -> Any:
    """What `data.files` asks of a file system to list it, with every single request tried again. A local one is itself.

    All raise OSError for a store that fails for longer than `retry` allows.
    """
    return filesystem if isinstance(filesystem, LocalFileSystem) else _Patient(filesystem, retry)


class _Patient:
    def __init__(self, filesystem: Any, retry: Retry) -> None:
        self._inner, self._retry = filesystem, retry

    def info(self, path: str) -> dict[str, Any]:
        return dict(self._retry.call(lambda: self._inner.info(path), path))

    def exists(self, path: str) -> bool:
        try:
            self.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def isdir(self, path: str) -> bool:
        try:
            return bool(self.info(path)["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def find(self, path: str) -> list[str]:
        """All files below a folder."""
        if self._lists_at_once:
            return list(self._retry.call(lambda: self._inner.find(path), path))
        return list(self._files(path, lambda _: True))

    def glob(self, pattern: str) -> list[str]:
        """The files that a pattern fits. Only folders that its beginning fits are listed, or, where the store lists all
        below a folder at once and files of several folders may fit, all that lies behind the part without wildcards: a
        request for each thousand files and not for each folder.
        """
        parts = pattern.split("/")
        first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
        deep = next((i for i, part in enumerate(parts) if "**" in part), len(parts))
        fits = re.compile(glob_translate(pattern))
        root = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "")
        several = 0 < first < len(parts) - 1  # 0: not even the bucket is named
        if (deep < len(parts) and deep == first) or (several and self._lists_at_once):
            return [name for name in self.find(root) if fits.match(name)]
        of_depth = [
            re.compile(glob_translate("/".join(parts[: depth + 1]))) for depth in range(min(deep, len(parts) - 1))
        ]

        def is_wanted(folder: str) -> bool:
            depth = folder.count("/")
            return depth >= deep or (depth < len(of_depth) and of_depth[depth].match(folder) is not None)

        return [name for name in self._files(root, is_wanted) if fits.match(name)]

    @property
    def _lists_at_once(self) -> bool:
        return type(self._inner).__module__.partition(".")[0] in _LISTS_AT_ONCE

    def cat_file(self, path: str) -> bytes:
        return bytes(self._retry.call(lambda: self._inner.cat_file(path), path))

    def _files(self, root: str, is_wanted: Callable[[str], bool]) -> Iterator[str]:
        """Yield the files in a folder and in those below it that are wanted; none if it is not there."""
        folders = [root]
        while folders:
            folder = folders.pop()
            above = f"{folder.rstrip('/')}/" if folder else ""
            for entry in self._ls(folder, root):
                name = str(entry["name"])
                inside = name.rstrip("/")
                if entry["type"] != "directory":
                    yield name
                elif inside.startswith(above) and inside != above and is_wanted(inside):  # some list the folder itself
                    folders.append(inside)

    def _ls(self, folder: str, root: str) -> list[dict[str, Any]]:
        try:
            return list(self._retry.call(lambda: self._inner.ls(folder, detail=True), folder))
        except (FileNotFoundError, NotADirectoryError):
            if folder == root:
                return []
            raise  # it was listed a moment ago
