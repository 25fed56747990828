"""Checking a checkpoint from end to end: every byte against its sum, and the digest from the bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.errors import CorruptData
from elastictrain_checkpoint.hashing import DIGEST_BLOCK_ELEMENTS, block_hashes, block_sum, combine_digest
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.reader import PARALLEL_BYTES, Reader, corrupt
from elastictrain_checkpoint.sidecar import check_sidecar
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.threads import in_threads

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

WINDOW_BYTES = 16 << 20


@dataclass(frozen=True)
class Problem:
    """One block (or file) that is not as written.

    Attributes:
        file: path in the store.
        block: number of the block in the file; None if the whole file is meant.
        tensors: names of the tensors with bytes in it; none if only the header is hit.
        message: all of it in a sentence.

    """

    file: str
    block: int | None
    tensors: tuple[str, ...]
    message: str


def verify(
    store: Store, manifest: Manifest, progress: Progress | None = None, *, threads: int | None = None
) -> list[Problem]:
    """Read every byte of every pack, and of the files beside them, and compare it with its sum; an empty list means
    sound.

    Args:
        store: where the checkpoint lies.
        manifest: of the checkpoint.
        progress: is called from one thread at a time, not always the same one.
        threads: read and hash at the same time where there are `PARALLEL_BYTES` or more; the store's own number if not
            given. Each holds one window.

    Raises:
        OSError: the storage cannot be read.

    """
    problems: dict[tuple[int, int], list[Problem]] = {}
    done, total, lock, own = 0, manifest.size_bytes, threading.Lock(), threading.local()
    several, most = 1, WINDOW_BYTES
    if total >= PARALLEL_BYTES:
        several = store.read_threads if threads is None else threads
        most = store.read_window_bytes
    most = max(1, most // manifest.block_bytes) * manifest.block_bytes  # whole blocks

    def windows() -> Iterator[tuple[int, int, int]]:
        for number, file in enumerate(manifest.files):
            there = _there(store, manifest, number, problems.setdefault((number, -1), []))
            for at in range(0, there, most):
                yield number, at, min(most, file.size_bytes - at)

    def check(window: tuple[int, int, int]) -> None:
        nonlocal done
        number, at, size = window
        if not hasattr(own, "buffer") or len(own.buffer) < size:
            own.buffer = memoryview(bytearray(size))
        found = _verify_window(store, manifest, number, at, own.buffer[:size])
        with lock:
            done += size
            problems[number, at] = found
            if progress:
                progress(done, total)

    in_threads(several, windows(), check)
    if progress:
        progress(total, total)
    return _once([one for _, found in sorted(problems.items()) for one in found]) + _verify_sidecars(store, manifest)


def _there(store: Store, manifest: Manifest, number: int, problems: list[Problem]) -> int:
    """How many bytes of a pack can be checked. That it is missing, or of another size, is a problem."""
    size, file = store.size(manifest.paths[number]), manifest.files[number]
    if size != file.size_bytes:
        why = "the file is missing" if size is None else f"the file has {size} bytes, not {file.size_bytes}"
        block = None if size is None or size > file.size_bytes else size // manifest.block_bytes
        problems.append(_problem(corrupt(manifest, number, block, why)))
    return min(size or 0, file.size_bytes)


def _verify_sidecars(store: Store, manifest: Manifest) -> list[Problem]:
    problems = []
    for path, record in manifest.sidecars:
        try:
            check_sidecar(record, store.read_all(path))
        except FileNotFoundError:
            problems.append(Problem(path, None, (), f"step {manifest.step}: {path}: the file is missing"))
        except ValueError as error:
            problems.append(Problem(path, None, (), f"step {manifest.step}: {path}: {error}"))
    return problems


def _verify_window(store: Store, manifest: Manifest, number: int, at: int, buffer: memoryview) -> list[Problem]:
    block = manifest.block_bytes
    got = store.read_into(manifest.paths[number], at, buffer)
    problems = []
    for offset in range(0, got, block):
        which = (at + offset) // block
        if block_sum(buffer[offset : min(offset + block, got)]) != int(manifest.sums[number][which]):
            error = corrupt(manifest, number, which, "its hash differs from the manifest's")
            problems.append(_problem(error))
    return problems


def _problem(error: CorruptData) -> Problem:
    return Problem(error.file, error.block, error.tensors, str(error))


def _once(problems: list[Problem]) -> list[Problem]:
    """A block that is cut short fails its hash too: say it once."""
    return list({(problem.file, problem.block): problem for problem in reversed(problems)}.values())[::-1]


def digest(store: Store, manifest: Manifest, progress: Progress | None = None) -> str:
    """The digest of the state, computed from the stored bytes (each checked against its sum on the way).

    Equal to ``manifest.digest`` for a sound checkpoint, and to `combine_digest` over the live state.

    Raises:
        CorruptData: bytes are not those that were written.

    """
    reader = Reader(store, manifest)
    total = sum(num_elements(shape) * item_bytes(dtype) for dtype, shape in manifest.tensors.values())
    done = 0
    whole: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name in manifest.table.names:
        dtype, shape = manifest.tensors[name]
        item, count = item_bytes(dtype), num_elements(shape)
        step = DIGEST_BLOCK_ELEMENTS * max(1, WINDOW_BYTES // (DIGEST_BLOCK_ELEMENTS * item))
        hashes = []
        for start in range(0, count, step):
            data = reader.read_flat(name, start, min(start + step, count))
            hashes.append(block_hashes(data, item))
            done += data.nbytes
            if progress:
                progress(done, total)
        whole[name] = (dtype, shape, b"".join(hashes))
    return combine_digest(whole, manifest.alias)
