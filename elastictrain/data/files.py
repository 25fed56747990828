"""Finding the files of a source through fsspec: a file, a folder, a glob, or a list of those."""

from __future__ import annotations

import itertools
import json
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from elastictrain.data.listing import patient
from elastictrain.data.meter import TimedFile, timed
from elastictrain.data.retry import FINAL, RETRY_LIMIT_S, Retry, RetryingFile
from elastictrain.errors import DataError, StoreFailed

CODEC_SUFFIXES = (".gz", ".zst", ".bz2", ".lz4")
"""Compression that is undone while reading (see `unpacked`)."""
_UNREADABLE = (".xz", ".zip", ".7z")


def _and_compressed(*suffixes: str) -> tuple[str, ...]:
    return (*suffixes, *(suffix + codec for suffix in suffixes for codec in CODEC_SUFFIXES))


SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "jsonl": _and_compressed(".jsonl", ".ndjson", ".json"),
    "csv": _and_compressed(".csv"),
    "arrow": (".arrow", ".feather", ".ipc", ".arrows"),
    "huggingface": (".arrow",),
    "webdataset": (*_and_compressed(".tar"), ".tgz"),
    "text": _and_compressed(".txt", ".text", ".md"),
}
WALK_BYTES = 1 << 20
"""Read ahead in a walk over a file's headers."""
_STATE, _SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class DataFile:
    """One file. `name` is relative to what all files share, so that moved data keep their fingerprint."""

    path: str
    name: str
    size_bytes: int
    version: str  # changes when the file is written again; local to this store, not part of the fingerprint


@dataclass(frozen=True)
class FileSet:
    """The files of a source, sorted by path, and the file system they lie on."""

    filesystem: Any
    files: tuple[DataFile, ...]
    retry_s: float = RETRY_LIMIT_S
    """How long a store that fails is asked again; a local disk never is."""

    @property
    def is_local(self) -> bool:
        """Whether `path` of every file is one that the operating system opens."""
        return isinstance(self.filesystem, LocalFileSystem)

    def open(self, number: int, read_ahead_bytes: int = 0) -> Any:
        """Open a file for reading. Raises StoreFailed if it cannot be reached, DataError if its size has changed since
        it was listed; reading from it raises StoreFailed where the store fails.

        `read_ahead_bytes`: what a remote store is asked for beyond a read, for many small reads in a row; with 0 every
        read is a request of its own.
        """
        file = self.files[number]
        try:
            handle = self._handle(file.path, read_ahead_bytes)
            size = int(handle.seek(0, 2))
        except OSError as error:
            raise StoreFailed(
                f"{file.path}: could not be read ({error}). The file was there when the run opened data.path"
            ) from error
        if size != file.size_bytes:
            handle.close()
            raise DataError(
                f"{file.path}: changed since the run opened it (expected {file.size_bytes} bytes, got {size}). "
                "Data must not be written to while a run reads them: restore the file, or write to a new data.path"
            )
        handle.seek(0)
        return TimedFile(handle)

    def read_range(self, number: int, start: int, stop: int) -> bytes:
        """Read bytes `[start, stop)` of a file, with one request where the store can. Raises as `open`.

        A file that was written again since is not noticed here, unless it has another size: compare a checksum.
        """
        if isinstance(self.filesystem, AsyncFileSystem):  # others' `cat_file` opens a file that reads ahead
            path = self.files[number].path
            try:
                with timed("store"):
                    content = Retry(self.retry_s).call(
                        lambda: self.filesystem.cat_file(path, start=start, end=stop), path
                    )
            except NotImplementedError:
                content = b""
            except OSError as error:
                raise StoreFailed(
                    f"{path}: could not be read ({error}). The file was there when the run opened data.path"
                ) from error
            if len(content) == stop - start:  # else it is shorter now, or the store gives whole files only
                return bytes(content)
        with self.open(number) as handle:
            handle.seek(start)
            return bytes(handle.read(stop - start))

    def _handle(self, path: str, read_ahead_bytes: int) -> Any:
        if isinstance(self.filesystem, LocalFileSystem):
            return self.filesystem.open(path, "rb")
        how: dict[str, Any] = {"cache_type": "none"}
        if read_ahead_bytes:
            how = {"cache_type": "readahead", "block_size": read_ahead_bytes}

        def fresh() -> Any:
            try:
                return self.filesystem.open(path, "rb", **how)
            except TypeError:  # a file system that does not know the setting
                return self.filesystem.open(path, "rb")

        return RetryingFile(fresh, Retry(self.retry_s), path)


def find_files(
    path: str | Sequence[str],
    kind: str,
    storage_options: dict[str, Any] | None = None,
    retry_s: float = RETRY_LIMIT_S,
) -> FileSet:
    """List the files of `path`, sorted by path.

    In a folder, files with the suffixes of `kind` count, at any depth; names that start with `.` or `_` do not.
    Raises DataError: nothing there, nothing of that kind there, files on two file systems, a file named twice.
    """
    patterns = [path] if isinstance(path, str) else list(path)
    if not patterns:
        raise DataError("data.path is an empty list. Expected a file, a folder, a glob, or a list of them")
    filesystem: Any = None
    found: list[str] = []
    retry = Retry(retry_s)
    for pattern in patterns:
        fs, found_here = _expand(str(pattern), kind, storage_options or {}, retry)
        if filesystem is not None and fs.protocol != filesystem.protocol:
            raise DataError(f"data.path lies on two file systems ({filesystem.protocol} and {fs.protocol})")
        filesystem = fs
        found += found_here
    found.sort()
    for one, other in itertools.pairwise(found):
        if one == other:
            raise DataError(f"data.path names {one} twice: its samples would be used twice. Name it once")
    if isinstance(filesystem, LocalFileSystem):
        _check_real_paths(found)
    root = posixpath.commonpath([posixpath.dirname(name) for name in found]) if found else ""
    asked = patient(filesystem, retry)
    try:
        return FileSet(filesystem, tuple(_describe(asked, name, root) for name in found), retry_s)
    except OSError as error:
        raise _not_listed(patterns[0], error) from error


def _check_real_paths(paths: Sequence[str]) -> None:
    """Raise DataError for two paths of one file: through a link, or written in another way."""
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(
                f"data.path names {real} twice, as {seen[real]} and as {path}: its samples would be used twice. Name "
                "it once"
            )
        seen[real] = path


def _expand(pattern: str, kind: str, storage_options: dict[str, Any], retry: Retry) -> tuple[Any, list[str]]:
    if "://" not in pattern:
        pattern = str(Path(pattern).expanduser())
    try:
        fs, name = fsspec.core.url_to_fs(pattern, **storage_options)
    except (ImportError, ValueError, TypeError) as error:
        raise DataError(
            f"data.path: {pattern!r} cannot be opened ({error}). "
            "Expected a path or a URL of a file system that fsspec knows, with its package installed, "
            "and data.storage_options that it accepts"
        ) from error
    try:
        return fs, _list(patient(fs, retry), name, pattern, kind)
    except OSError as error:
        raise _not_listed(pattern, error) from error


def _not_listed(pattern: str, error: OSError) -> DataError:
    """Nothing is known of what lies there, unless the store has said that it does not."""
    gone = isinstance(error, FINAL) and not isinstance(error, PermissionError)
    return (DataError if gone else StoreFailed)(f"data.path: {pattern!r} cannot be listed ({error})")


def _list(fs: Any, name: str, pattern: str, kind: str) -> list[str]:
    suffixes = SUFFIXES[kind]
    if kind == "huggingface" and fs.isdir(name):
        return _list_saved_dataset(fs, name, pattern)
    if any(character in name for character in "*?[") and not fs.exists(name):
        try:
            hits = fs.glob(name)
        except ValueError as error:
            raise DataError(f"data.path: {pattern!r} is no pattern ({error})") from error
        found = sorted(str(hit) for hit in hits if not fs.isdir(hit))
        if not found:
            raise DataError(f"data.path: no file matches {pattern!r}")
    elif fs.isdir(name):
        inside = sorted(str(hit) for hit in fs.find(name))
        found = [hit for hit in inside if hit.lower().endswith(suffixes) and not _is_hidden(hit, name)]
        if not found:
            there = ", ".join(posixpath.basename(hit) for hit in inside[:5]) or "nothing"
            raise DataError(
                f"data.path: the folder {pattern!r} holds no file ending in {' or '.join(suffixes)} "
                f"(it holds {there}). Set data.path to the folder of the data, or data.kind to its format"
            )
    elif fs.exists(name):
        found = [str(name)]
    else:
        raise DataError(f"data.path: {pattern!r} does not exist")
    for hit in found:
        if kind != "parquet" and hit.lower().endswith(_UNREADABLE):
            raise DataError(
                f"{hit}: compressed {'JSON lines' if kind == 'jsonl' else kind} of this kind cannot be read. Compress "
                f"it with one of {', '.join(CODEC_SUFFIXES)}, unpack it, or convert it to Parquet and set "
                "data.kind: parquet"
            )
    return found


def _list_saved_dataset(fs: Any, folder: str, pattern: str) -> list[str]:
    """List the files of what Hugging Face's `Dataset.save_to_disk` wrote."""
    if fs.exists(f"{folder}/{_SPLITS}"):
        splits = json.loads(fs.cat_file(f"{folder}/{_SPLITS}")).get("splits", [])
        raise DataError(
            f"data.path: {pattern!r} holds several datasets ({', '.join(splits)}); name the folder of one, as in "
            f"{pattern.rstrip('/')}/{splits[0] if splits else 'train'}"
        )
    if not fs.exists(f"{folder}/{_STATE}"):
        raise DataError(
            f"data.path: {pattern!r} has no {_STATE}; expected the folder of a dataset that was saved with "
            "Dataset.save_to_disk. For loose Arrow files set data.kind: arrow"
        )
    try:
        state = json.loads(fs.cat_file(f"{folder}/{_STATE}"))
        found = [f"{folder}/{file['filename']}" for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/{_STATE}: cannot be read ({error}). Save the dataset again") from error
    if state.get("_indices_files"):
        raise DataError(
            f"data.path: {pattern!r} is a selection whose rows lie elsewhere. Call flatten_indices() on the dataset, "
            "and save it again"
        )
    missing = [path for path in found if not fs.exists(path)]
    if missing or not found:
        raise DataError(f"data.path: {pattern!r}: {missing[0] if missing else 'no file'} is missing; save it again")
    return found


def _is_hidden(path: str, folder: str) -> bool:
    relative = path[len(folder) :] if path.startswith(folder) else path
    return any(part.startswith((".", "_")) for part in relative.split("/") if part)


def _describe(fs: Any, path: str, root: str) -> DataFile:
    info = fs.info(path)
    marks = ("ETag", "etag", "md5Hash", "versionId", "mtime", "LastModified", "last_modified", "created")
    version = "|".join(f"{mark}={info[mark]}" for mark in marks if info.get(mark) is not None)
    name = posixpath.relpath(path, root) if root else path
    return DataFile(path, name, int(info["size"]), version)
