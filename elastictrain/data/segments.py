"""Segments: files that arrive while training runs, in a manifest that only grows.

A manifest is a folder, on a disk or in an object store. Each segment is one file of data and one small numbered record:

    <url>/_segments/manifest.json      {"v": 1, "id": …}: made once, names the manifest for good
    <url>/_segments/0000000000.json    the first record
    <url>/data/…                       files that `append` has copied here; others lie where their writer put them

Records are numbered from 0 without gaps. One is created exactly once and appears whole or not at all, so two writers
never get one number, and a writer that dies leaves either nothing or a whole segment. Nothing is ever changed or
removed: the numbers are the order of arrival, the same for everybody who ever reads it. The record that closes a
manifest takes the next number like any other, so that nothing can come behind it. Whoever has read `n` records finds
the next one by one request, however many there are.
"""

from __future__ import annotations

import json
import posixpath
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from elastictrain.data.retry import Retry
from elastictrain.errors import DataError, StoreFailed
from elastictrain_checkpoint import Store

MANIFEST_VERSION = 1
FOLDER = "_segments"
_COPY_BYTES = 8 << 20
_MOST = 10**10


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of a manifest. `ordinal`: its number, from 0. `name`: its path below the manifest's folder, or a URL.
    `size_bytes`: of the file when it was appended. `checksum`: 16 hexadecimal digits, XXH3 of its bytes (64 bit); None
    where the writer did not have them at hand. `about`: whatever the writer wants to say of it; JSON, read by nobody.
    """

    ordinal: int
    name: str
    size_bytes: int
    checksum: str | None = None
    about: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """What the record holds."""
        record: dict[str, Any] = {"v": MANIFEST_VERSION, "ordinal": self.ordinal, "name": self.name}
        record["bytes"] = self.size_bytes
        if self.checksum is not None:
            record["xxh3"] = self.checksum
        return record if self.about is None else {**record, "about": dict(self.about)}


@dataclass(frozen=True, slots=True)
class Closed:
    """The record that closes a manifest: `ordinal` segments are all there will be."""

    ordinal: int


class SegmentLog:
    """The reading side of a manifest; keeps no state but what the store's client keeps."""

    def __init__(
        self, url: str | Path, *, storage_options: Mapping[str, Any] | None = None, retry: Retry | None = None
    ) -> None:
        """`storage_options`: for fsspec. `retry`: how often a store that fails is asked again."""
        self.url = str(url).rstrip("/")
        self.storage_options = dict(storage_options or {})
        self._retry = retry or Retry()
        self.store = open_folder(self.url, self.storage_options, "data.path")

    def identity(self) -> str | None:
        """The id that names this manifest for good; None when no writer has made it yet. Raises DataError."""
        path = f"{FOLDER}/manifest.json"
        data = self._read(path)
        return None if data is None else str(_parse(f"{self.url}/{path}", data)["id"])

    def get(self, ordinal: int) -> Segment | Closed | None:
        """The record with this number; None when it is not there yet. One request.

        Raises DataError: the store fails for longer than `retry` allows, or the record is no record.
        """
        path = record_path(ordinal)
        data = self._read(path)
        if data is None:
            return None
        where = f"{self.url}/{path}"
        record = _parse(where, data)
        if record.get("closed"):
            return Closed(ordinal)
        try:
            return Segment(
                int(record["ordinal"]), str(record["name"]), int(record["bytes"]), record.get("xxh3"),
                record.get("about"),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: not a segment's record ({error!r}). Write segments with SegmentWriter"
            ) from error

    def segments(self, start: int = 0) -> Iterator[Segment]:
        """Yield the segments that are there, from number `start` on."""
        while isinstance(found := self.get(start), Segment):
            yield found
            start += 1

    def count(self, known: int = 0) -> int:
        """How many records there are (the closing one counts), when `known` of them are known to be there.

        Takes a number of requests that grows with the logarithm of how many are new.
        """
        return count_records(self._is_there, known)

    def path_of(self, segment: Segment) -> str:
        """Where a segment's file lies: a path or URL for `data.path`."""
        return segment.name if "://" in segment.name or segment.name.startswith("/") else f"{self.url}/{segment.name}"

    def _is_there(self, ordinal: int) -> bool:
        path = record_path(ordinal)
        try:
            return self._retry.call(lambda: self.store.size(path), f"{self.url}/{path}") is not None
        except OSError as error:
            raise self._not_read(path, error) from error

    def _read(self, path: str) -> bytes | None:
        try:
            return self._retry.call(lambda: self.store.read_all(path), f"{self.url}/{path}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._not_read(path, error) from error

    def _not_read(self, path: str, error: OSError) -> StoreFailed:
        return StoreFailed(f"{self.url}/{path}: cannot be read ({error}). Look at the store behind data.path")


class SegmentWriter:
    """Appends files to a manifest; makes it if it is not there. Any number of writers may append at once."""

    def __init__(
        self, url: str | Path, *, storage_options: Mapping[str, Any] | None = None, retry: Retry | None = None
    ) -> None:
        """`storage_options`: for fsspec. Raises DataError when the store cannot be opened or written to."""
        self._log = SegmentLog(url, storage_options=storage_options, retry=retry)
        self._retry = retry or Retry()
        self._next = 0
        self._is_checked = False
        if self._log.identity() is None:
            made = {"v": MANIFEST_VERSION, "id": uuid.uuid4().hex}
            self._create(f"{FOLDER}/manifest.json", made)  # who comes second reads what the first has written

    @property
    def log(self) -> SegmentLog:
        """The manifest, to read."""
        return self._log

    def append(self, file: str | Path, *, about: Mapping[str, Any] | None = None) -> Segment:
        """Append a file that is complete; gives its segment, which is durable and visible on return.

        `file`: a path or URL, or a path relative to the manifest's folder. A file that lies in the manifest's folder
        stays where it is, and its writer must have synced it; any other is copied to `data/` first. It must not be
        written to any more. Raises DataError: no such file, the manifest is closed, or the store fails.
        """
        name, size_bytes, checksum = self._place(str(file))
        token = uuid.uuid4().hex
        while True:
            segment = Segment(self._tail(), name, size_bytes, checksum, about)
            if self._create(record_path(segment.ordinal), {**segment.as_json(), "token": token}):
                self._next = segment.ordinal + 1
                return segment

    def close(self) -> int:
        """Close the manifest: nothing comes any more. Gives the number of its segments; may be called again."""
        while True:
            try:
                ordinal = self._tail()
            except _IsClosed as closed:
                return closed.ordinal
            if self._create(record_path(ordinal), {"v": MANIFEST_VERSION, "ordinal": ordinal, "closed": True}):
                return ordinal

    def _tail(self) -> int:
        """The first number that is not taken. Raises DataError when the one before it closes the manifest."""
        self._next = self._log.count(self._next)
        if self._next and isinstance(self._log.get(self._next - 1), Closed):
            raise _IsClosed(self._log.url, self._next - 1)
        return self._next

    def _create(self, path: str, record: dict[str, Any]) -> bool:
        """Create a record; False when another has the name. A try whose answer was lost is told by its content."""
        data = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        try:
            if not self._is_checked:
                check_exclusive(self._log.store, FOLDER, self._retry, "the writer's url (data.path)")
                self._is_checked = True
            self._retry.call(lambda: self._log.store.publish(path, data), f"{self._log.url}/{path}")
        except FileExistsError:
            return self._log._read(path) == data
        except OSError as error:
            raise DataError(f"{self._log.url}/{path}: cannot be written ({error})") from error
        return True

    def _place(self, file: str) -> tuple[str, int, str | None]:
        """(name for the record, size in bytes, checksum) of a file, which is in the manifest's folder from now on."""
        folder = self._log.url
        relative = not _is_absolute(file)
        if relative and not Path(file).exists():
            file = f"{folder}/{file}"
        filesystem, path = _filesystem(file, self._log.storage_options)
        home_system, home = _filesystem(folder, self._log.storage_options)
        try:
            if type(filesystem) is type(home_system) and path.startswith(home.rstrip("/") + "/"):
                size_bytes = int(self._retry.call(lambda: filesystem.info(path), file)["size"])
                local = isinstance(filesystem, LocalFileSystem)
                return posixpath.relpath(path, home), size_bytes, _checksum(Path(path)) if local else None
            return self._copy(filesystem, path)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be appended to {folder} ({error}). Expected a file that is complete"
            ) from error

    def _copy(self, filesystem: Any, path: str) -> tuple[str, int, str]:
        name = f"data/{uuid.uuid4().hex[:12]}-{posixpath.basename(path)}"  # its own, so a torn copy harms nobody
        digest = xxhash.xxh3_64()

        def blocks(handle: BinaryIO) -> Iterator[memoryview]:
            while block := handle.read(_COPY_BYTES):
                digest.update(block)
                yield memoryview(block)

        with filesystem.open(path, "rb") as handle:
            size_bytes = self._log.store.create(name, blocks(cast("BinaryIO", handle)))
        return name, size_bytes, digest.hexdigest()


class _IsClosed(DataError):
    def __init__(self, url: str, ordinal: int) -> None:
        super().__init__(
            f"{url}: the manifest was closed after {ordinal} segments, nothing can be appended. Write to a new folder"
        )
        self.ordinal = ordinal


def count_records(is_there: Callable[[int], bool], known: int = 0) -> int:
    """How many records there are, numbered from 0 without gaps, when `known` of them are known to be there; pure."""
    low, step = known, 1
    while is_there(low + step - 1):
        low, step = low + step, step * 2
    high = low + step - 1  # is not there
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if is_there(middle) else (low, middle)
    return low


def record_path(ordinal: int) -> str:
    """The path of a record below the manifest's folder."""
    if not 0 <= ordinal < _MOST:
        raise DataError(f"segment {ordinal}: expected a number from 0 to {_MOST - 1}")
    return f"{FOLDER}/{ordinal:010d}.json"


def open_folder(url: str, options: Mapping[str, Any], setting: str) -> Store:
    """The store behind a folder that a setting names. Raises DataError."""
    try:
        return Store(url if "://" in url else Path(url).expanduser(), storage_options=options)
    except (ImportError, ValueError, TypeError, OSError) as error:
        raise DataError(
            f"{setting}: {url!r} cannot be opened ({error}). Expected a path or a URL of a file system that fsspec "
            "knows, with its package installed, and data.storage_options that it accepts"
        ) from error


def check_exclusive(store: Store, folder: str, retry: Retry, setting: str) -> None:
    """Try whether a store creates a file only where there is none: of all who write one number, one must be heard.

    `folder`: below the store's root, where it is tried. Raises DataError when it does not, OSError when it fails.
    """

    def probe() -> str:
        return store.probe_exclusive(f"{folder}/.probe-{uuid.uuid4().hex}")

    why = retry.call(probe, f"{store.url}/{folder}")
    if why:
        raise DataError(
            f"{store.url}: {why}. What is decided once needs a store that creates a file only if there is none: "
            f"set {setting} to a folder on a disk that all share, or in S3, Google Cloud Storage or Azure with their "
            "present clients"
        )


def _filesystem(place: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    if "://" not in place:
        place = str(Path(place).expanduser().absolute())
        options = {}
    system, path = fsspec.core.url_to_fs(place, **options)
    return system, str(path)


def _is_absolute(file: str) -> bool:
    return "://" in file or file.startswith(("/", "~"))


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as handle:
        while block := handle.read(_COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _parse(where: str, data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
        version = record["v"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: not a record of a manifest ({error!r}). Write segments with SegmentWriter"
        ) from error
    if version != MANIFEST_VERSION:
        raise DataError(f"{where}: version {version}; this version of elastictrain reads {MANIFEST_VERSION}")
    return dict(record)
