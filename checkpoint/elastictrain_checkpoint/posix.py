"""A local disk or a mounted file system: every call that must be durable is synced, files and folders
alike.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from elastictrain_checkpoint import disk
from elastictrain_checkpoint.direct_io import DirectFile
from elastictrain_checkpoint.hashing import SUM_BLOCK_BYTES
from elastictrain_checkpoint.threads import processors
from elastictrain_checkpoint.windows import in_blocks

WRITE_BACK_BYTES = 8 << 20
"""The device is told to begin after so many bytes: it works while the next blocks are hashed and copied."""
READ_WINDOW_BYTES = 4 << 20
"""What is planned and opened at once."""
READ_PORTION_BYTES = SUM_BLOCK_BYTES
"""What of that is read at once, so that it is still in the processor's cache when it is hashed."""
READ_THREADS = 4
"""So many threads, or as many as there are processors, read at once: more are held up by memory, not by work."""
_MOST_BUFFERS = 1024  # IOV_MAX
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_MAKE_TRIES = 5
"""To make a folder that somebody else may remove while it is empty."""


class PosixBackend:
    """See `elastictrain_checkpoint.store.Store` for the contract."""

    read_window_bytes = READ_WINDOW_BYTES
    read_threads = min(READ_THREADS, processors())
    reads_in_portions = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, path: str, blocks: Iterable[memoryview]) -> int:
        target = self.root / path
        made = self._make_folders(target.parent)
        file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        ours = os.fstat(file)
        try:
            try:
                size = _write_blocks(file, blocks)
                # An error here is final: after a failed fsync the kernel may have dropped the pages, so
                # that a second fsync would succeed without the data being anywhere.
                os.fsync(file)
            finally:
                os.close(file)
        except BaseException:
            # Only the file of this call: while it hung, somebody else may have put another one in its place.
            with contextlib.suppress(OSError):
                if _same_file(target.stat(), ours):
                    os.unlink(target)  # noqa: PTH108
            raise
        self._sync_folders(target.parent, made)
        return size

    def publish(self, path: str, data: bytes) -> None:
        target = self.root / path
        made = self._make_folders(target.parent)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            self._write_draft(draft, data, sync=True)
            os.link(draft, target)  # fails if the target is there, and shows it whole or not at all
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # No hard links here (FAT, some FUSE mounts): still created once; a torn file fails its own hash.
            self._write_draft(target, data, sync=True)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(draft)  # noqa: PTH108
        self._sync_folders(target.parent, made)

    def probe_exclusive(self, path: str) -> str:
        """Links and exclusive opening are promised by POSIX; some mounts do not keep that."""
        try:
            self.publish(path, b"the first")
            try:
                self.publish(path, b"the second")
            except FileExistsError:
                return ""
            return f"the file system of {self.root} makes a file that is there already"
        finally:
            with contextlib.suppress(OSError):
                (self.root / path).unlink()

    def put(self, path: str, data: bytes) -> None:
        target = self.root / path
        self._make_folders(target.parent)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        self._write_draft(draft, data, sync=False)
        os.replace(draft, target)  # noqa: PTH105

    def replace(self, path: str, blocks: Iterable[memoryview]) -> int:
        target = self.root / path
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        size = self.create(draft.relative_to(self.root).as_posix(), blocks)
        os.replace(draft, target)  # noqa: PTH105
        _sync_folder(target.parent)
        return size

    def read_into(self, path: str, start: int, out: memoryview) -> int:
        return self.read_parts(path, start, [out])

    def read_parts(
        self, path: str, start: int, outs: Sequence[memoryview], arrived: Callable[[int], None] | None = None
    ) -> int:
        """Fill the buffers, one after the other, with the bytes from ``start`` on; gives how many there were. With
        ``arrived`` in portions; it is told after each how many bytes are there.
        """
        file = os.open(self.root / path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            filled = 0
            for portion in [outs] if arrived is None else in_blocks(outs, READ_PORTION_BYTES):
                count = _fill(file, start + filled, portion)
                filled += count
                if arrived is not None:
                    arrived(filled)
                if count < sum(map(len, portion)):
                    break
            return filled
        finally:
            os.close(file)

    def read_all(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def size(self, path: str) -> int | None:
        try:
            found = (self.root / path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if stat.S_ISDIR(found.st_mode) else found.st_size

    def free_bytes(self) -> int:
        """Of the file system that the root is on, or will be."""
        folder = self.root.absolute()
        while not folder.is_dir():
            folder = folder.parent
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def modified_s(self, path: str) -> float:
        return (self.root / path).stat().st_mtime

    def list(self, path: str) -> list[str]:
        try:
            return os.listdir(self.root / path)  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, path: str) -> None:
        target = self.root / path
        with contextlib.suppress(FileNotFoundError):
            if target.is_dir() and not target.is_symlink():
                os.rmdir(target)  # noqa: PTH106
            else:
                os.unlink(target)  # noqa: PTH108
            _sync_folder(target.parent)

    def _write_draft(self, target: Path, data: bytes, *, sync: bool) -> None:
        file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            _write_all(file, memoryview(data))
            if sync:
                os.fsync(file)
        finally:
            os.close(file)

    def _make_folders(self, folder: Path) -> Path:
        """Make ``folder``; gives the topmost folder whose entries may be new."""
        top = folder
        while top != self.root.parent and not top.is_dir():
            top = top.parent
        for tries_left in reversed(range(_MAKE_TRIES)):
            try:
                os.makedirs(folder, exist_ok=True)  # noqa: PTH103
                break
            except FileNotFoundError:  # somebody has removed the step's folder, empty until now, under our hands
                if not tries_left:
                    raise
        return top

    def _sync_folders(self, folder: Path, made_below: Path) -> None:
        """Sync the entries of every folder from ``folder`` up to the root (or higher, where those were made).

        Also those that were there before: a writer that made them may have died before it synced them.
        """
        last = made_below if made_below == self.root.parent else self.root
        while True:
            _sync_folder(folder)
            if folder in (last, folder.parent):
                return
            folder = folder.parent


def _write_blocks(file: int, blocks: Iterable[memoryview]) -> int:
    """Write a stream from the start of an empty file; the device begins before the stream ends. Past the page cache as
    long as the stream says that it has the time. Where it has not, the device is left alone: whoever tells it to begin
    waits for room in its queue, so that a slow disk would hold up the stream, cache or not.
    """
    disk.reserve(file, int(getattr(blocks, "size_bytes", 0)))
    has_time: Callable[[], bool] | None = getattr(blocks, "past_cache", None)
    past_cache = has_time is not None
    lend: Callable[[memoryview], None] = getattr(blocks, "lend", lambda _: None)
    direct: DirectFile | None = None
    size = handed_on = 0
    try:
        for block in blocks:
            hurries = has_time is not None and not has_time()
            slow = past_cache and not hurries and len(block) <= SUM_BLOCK_BYTES
            if slow and direct is None:
                direct = DirectFile.of(file, SUM_BLOCK_BYTES)
                past_cache = direct is not None
            if slow and direct is not None:
                disk.start_writing_back(file, handed_on, size - handed_on)
                direct.write(size, block)
                size = handed_on = size + len(block)
                lend(direct.lend())
                continue
            size += _write_all(file, block, size)
            if not hurries and size - handed_on >= WRITE_BACK_BYTES:
                disk.start_writing_back(file, handed_on, size - handed_on)
                handed_on = size
    finally:
        if direct is not None:
            direct.close()
    return size


def _fill(file: int, start: int, outs: Sequence[memoryview]) -> int:
    """Fill the buffers from ``start`` on, or up to the end of the file; gives how many bytes there were."""
    filled = 0
    for at in range(0, len(outs), _MOST_BUFFERS):
        batch: Sequence[memoryview] = outs[at : at + _MOST_BUFFERS]
        while batch:
            count = os.preadv(file, batch, start + filled)
            if count == 0:
                if not any(len(out) for out in batch):
                    break
                return filled
            filled += count
            batch = _behind(batch, count)
    return filled


def _behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What of the buffers is left when the first ``count`` bytes are filled."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []


def _write_all(file: int, data: memoryview, start: int = 0) -> int:
    size = len(data)
    while len(data):
        count = os.pwrite(file, data, start)
        start, data = start + count, data[count:]
    return size


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
