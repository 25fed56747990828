"""Files of JSON lines that are only appended to, and that survive a process that dies in the middle of a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from elastictrain.errors import ClusterError


class LineWriter:
    """Appends one JSON object per line; every line is with the operating system when `append` returns.

    A line that the last writer left torn is closed first, so that what follows stands on a line of its own; readers
    pass over the torn piece. Write errors (full disk, no permission) raise ClusterError that names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("ab", buffering=0)
            self._torn = _ends_torn(path)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises ClusterError; then the file holds at most a torn line more."""
        line = ("\n" if self._torn else "") + encode(record) + "\n"
        data = line.encode()
        try:
            # One write call: a reader beside us sees the whole line or a prefix, never two lines mixed.
            written = self._file.write(data)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._torn = written != len(data)
        if self._torn:
            raise ClusterError(f"{self.path}: only {written} of {len(data)} bytes could be written; is the disk full?")

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a file of JSON lines, oldest first; torn lines are passed over, a missing file is empty."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ClusterError(f"{path}: cannot be read: {error.strerror or error}") from error
    for line in data.split(b"\n"):
        record = decode(line)
        if record is not None:
            yield record


def decode(line: bytes) -> dict[str, Any] | None:
    """One line as a record; None for a blank or torn one."""
    try:
        record = json.loads(line)
    except ValueError:  # bad JSON or bad UTF-8
        return None
    return record if isinstance(record, dict) else None


def encode(record: Mapping[str, Any]) -> str:
    """One line of standard JSON: NaN and infinities, which JSON has no word for, become null."""
    return json.dumps(_finite(record), separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)


def replace_file(path: Path, text: str) -> None:
    """Replace a small file whole: a reader sees the old text or the new one. Raises ClusterError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_finite(entry) for entry in value]
    return value


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _cannot_write(path: Path, error: OSError) -> ClusterError:
    return ClusterError(
        f"{path}: cannot be written: {error.strerror or error}; free space or permissions, or set run_dir elsewhere"
    )
