"""The warm cache: decoded, tokenised and packed blocks in memory-mapped files, written as they are first read.

A block's file lies in `$XDG_CACHE_HOME/elastictrain/warm/<key>`. The key is the hash of all that its content follows
from: the fingerprint of the data (files, schema, tokenizer, packing), without what only orders samples. So the same
data in another order, by another job or worker, find the same blocks; other data find none.

**File**: `ETWARM01`, the length of the header (8 bytes, little-endian), the XXH3 of the header and that of everything
behind it (8 bytes each), the header (JSON: block, and of each array name, dtype, shape and place), padding to 64 bytes,
then the arrays, each at a multiple of 64. Every byte that counts is checked when a block is opened; a damaged file is
removed and made again from the data. A file is written beside its place and renamed, so it is whole or not there.

The cache is only ever a shortcut: what cannot be written is not an error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
import struct
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from elastictrain.data.meter import Meter
from elastictrain.data.tokenizers import BytesTokenizer

Arrays = dict[str, npt.NDArray[Any]]

_MAGIC = b"ETWARM01"
_HEAD = struct.Struct("<8sQQQ")
_ALIGN = 64
_ORDER_ONLY = (
    "lanes", "lane_batch_size", "shuffle", "window_row_groups", "samples", "order_version", "ragged", "mixture_version",
    "hash", "files",
)  # fmt: skip
"""Keys of a fingerprint that say in which order samples come, and those that others imply."""
_NUMBERS = "biuf"
_DESCRIPTORS = os.sysconf("SC_OPEN_MAX")  # -1: no limit
_MAPPED_BLOCKS = 4096 if _DESCRIPTORS < 0 else min(4096, max(8, _DESCRIPTORS // 4))
"""Files that stay mapped; each holds a file descriptor, of which others need some too."""
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of a process or machine that has no more to give: they say nothing of the file."""

_log = logging.getLogger(__name__)


def cache_key(fingerprint: Mapping[str, Any]) -> str:
    """Return the name of the folder for data with this fingerprint (`content` of a source or of a mixture)."""
    content = {name: value for name, value in fingerprint.items() if name not in _ORDER_ONLY}
    if "sources" in content:
        content["sources"] = {name: cache_key(source) for name, source in content["sources"].items()}
    if content.get("tokenizer") == BytesTokenizer.fingerprint:
        content["in_a_byte_each"] = 1  # earlier versions kept such tokens in two
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cache_root() -> Path:
    """Return the folder that holds the warm caches of all data."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "elastictrain" / "warm"


class WarmCache:
    """Blocks of one source. All caches of `root` together take at most `limit_bytes`: those of other data that were
    used least recently go first, and when this one alone is full, no more blocks are added. Several threads may load
    and store different blocks at once.
    """

    def __init__(self, root: Path, fingerprint: Mapping[str, Any], limit_bytes: int) -> None:
        self.root, self.folder, self.limit_bytes = root, root / cache_key(fingerprint), limit_bytes
        self._full = False
        self._lock = threading.Lock()  # of what is mapped
        self._storing = threading.Lock()
        self._mapped: OrderedDict[int, Arrays] = OrderedDict()  # those that were used least recently first
        self.hits = self.stored = self.damaged = 0

    def load(self, block: int) -> Arrays | None:
        """Return the arrays of a block, read-only and mapped from its file; None if it is not there.

        A block that was opened stays mapped, which takes no memory that the kernel could not use otherwise: a second
        epoch neither opens nor checks it again.
        """
        with self._lock:
            arrays = self._mapped.pop(block, None)
        if arrays is None:
            arrays = self._open(block)
        with self._lock:
            while len(self._mapped) >= _MAPPED_BLOCKS:
                self._mapped.popitem(last=False)
            if arrays is not None:
                self._mapped[block] = arrays
                self.hits += 1
        return arrays

    def _open(self, block: int) -> Arrays | None:
        path = self._path(block)
        try:
            return _open(path, block)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, OSError) and error.errno in _SHORT:
                return None
            with self._lock:
                self.damaged += 1
            _log.warning("The warm cache %s is damaged (%s); the block is made again from the data", path, error)
            try:
                path.unlink(missing_ok=True)
            except OSError:
                self._full = True
            return None

    def store(self, block: int, arrays: Arrays) -> bool:
        """Write a block; False if it was not: no room, arrays that are no numbers, a folder that cannot be written."""
        if self._full or any(array.dtype.kind not in _NUMBERS for array in arrays.values()):
            return False
        content = _content(block, arrays)
        with self._storing:
            return self._write(block, content)

    def _write(self, block: int, content: list[bytes]) -> bool:
        size = sum(len(part) for part in content)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)
            if not self._make_room(size):
                self._full = True
                _log.warning(
                    "The warm cache is full (data.warm_cache_bytes is %d); the rest is decoded anew", self.limit_bytes
                )
                return False
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".block-")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    for part in content:
                        file.write(part)
                Path(temporary).replace(self._path(block))
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._full = True
            _log.warning("The warm cache %s cannot be written (%s); blocks are decoded anew", self.folder, error)
            return False
        self.stored += 1
        return True

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:08d}"

    def _make_room(self, size: int) -> bool:
        """Remove the caches of other data, the least recently used first, until `size` bytes more fit."""
        folders = {Path(entry.path): entry.stat().st_mtime for entry in os.scandir(self.root) if entry.is_dir()}
        sizes = {folder: _size_of(folder) for folder in folders}
        total = sum(sizes.values())
        for folder in sorted(folders, key=lambda folder: folders[folder]):
            if total + size <= self.limit_bytes:
                break
            if folder != self.folder:  # who has its files mapped keeps them
                shutil.rmtree(folder, ignore_errors=True)
                total -= sizes[folder]
        return total + size <= self.limit_bytes


def read_through(
    warm: WarmCache | None, block: int, decode: Callable[[int], Arrays], meter: Meter
) -> tuple[Arrays, bool]:
    """Return a block from the cache, or decoded (and then stored there), and whether it was decoded."""
    if warm is not None:
        with meter.stage("store"):
            arrays = warm.load(block)
        if arrays is not None:
            return arrays, False
    with meter.stage("decode"):
        arrays = decode(block)
    if warm is not None:
        with meter.stage("store"):
            warm.store(block, arrays)
    return arrays, True


def _size_of(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat().st_size
        except FileNotFoundError:  # another worker has just renamed or removed it
            continue
    return total


def _content(block: int, arrays: Arrays) -> list[bytes]:
    entries: list[dict[str, Any]] = []
    parts: list[bytes] = []
    at = 0
    for name, array in arrays.items():
        whole = np.ascontiguousarray(array)
        entries.append({"name": name, "dtype": whole.dtype.newbyteorder("<").str, "shape": whole.shape, "at": at})
        raw = whole.astype(whole.dtype.newbyteorder("<"), copy=False).tobytes()
        padding = bytes(-len(raw) % _ALIGN)
        parts += [raw, padding]
        at += len(raw) + len(padding)
    header = json.dumps({"block": block, "bytes": at, "arrays": entries}).encode()
    body = xxhash.xxh3_64()
    for part in parts:
        body.update(part)
    head = _HEAD.pack(_MAGIC, len(header), xxhash.xxh3_64_intdigest(header), body.intdigest())
    return [head, header, bytes(-(len(head) + len(header)) % _ALIGN), *parts]


def _open(path: Path, block: int) -> Arrays:
    """Map a block's file. Raises ValueError for one that is not what it should be."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(mapped) < _HEAD.size:
        raise ValueError(f"{len(mapped)} bytes are too few")
    magic, length, header_sum, body_sum = _HEAD.unpack_from(mapped)
    raw = mapped[_HEAD.size : _HEAD.size + length]
    if magic != _MAGIC or xxhash.xxh3_64_intdigest(raw) != header_sum:
        raise ValueError("its header is not one of ours")
    header = json.loads(raw)
    start = _HEAD.size + length + -(_HEAD.size + length) % _ALIGN
    if header["block"] != block or len(mapped) != start + header["bytes"]:
        raise ValueError(f"expected block {block} of {start + header['bytes']} bytes, got {len(mapped)}")
    view = memoryview(mapped)
    if xxhash.xxh3_64_intdigest(view[start:]) != body_sum:
        raise ValueError("its content differs from its checksum")
    return {
        entry["name"]: np.frombuffer(
            view, dtype=entry["dtype"], count=int(np.prod(entry["shape"], dtype=np.int64)), offset=start + entry["at"]
        ).reshape(entry["shape"])
        for entry in header["arrays"]
    }
