"""Copying a checkpoint from one store to another, byte for byte, every block checked on the way, the manifest last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elastictrain_checkpoint.errors import AlreadyCommitted, CorruptData
from elastictrain_checkpoint.hashing import block_sum
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.reader import corrupt
from elastictrain_checkpoint.store import Store

Progress = Callable[[int, int], None]
WINDOW_BYTES = 16 << 20


@dataclass(frozen=True)
class Copied:
    """What `copy_checkpoint` did.

    Attributes:
        step: the step.
        copied: paths of packs that were written.
        present: paths of packs that were there already, checked byte for byte.
        copied_bytes: bytes that were written.
        committed: whether the manifest was written now (else it was there).

    """

    step: int
    copied: tuple[str, ...]
    present: tuple[str, ...]
    copied_bytes: int
    committed: bool


def copy_checkpoint(
    source: Store, manifest: Manifest, target: Store, *, check: bool = False, progress: Progress | None = None
) -> Copied:
    """Copy one step, with the packs of other steps that it uses, under the same paths.

    May be called again after it was interrupted: packs that are whole in the target stay, one that is not is written
    anew. Nothing exists in the target before its manifest does, which comes last.

    Args:
        source: where the checkpoint is.
        manifest: which.
        target: where it goes; other steps there stay as they are.
        check: read back what was written, too. (What is written was checked before; this finds storage that loses it.)
        progress: called with (bytes done, bytes in all).

    Raises:
        AlreadyCommitted: the target has another checkpoint of that step.
        CorruptData: a block of the source differs from its sum, or with ``check`` one of the target.
        OSError: storage failed; call again to go on.

    """
    there = _published(target, manifest.path)
    if there is not None and there != manifest.raw:
        raise AlreadyCommitted(
            f"{target.url} has another checkpoint of step {manifest.step}; it is not overwritten. "
            f"discard(store, {manifest.step}) removes it"
        )
    copied: list[str] = []
    present: list[str] = []
    done, total = 0, manifest.size_bytes
    for number, path in enumerate(manifest.paths):

        def moved(count: int, before: int = done) -> None:
            if progress:
                progress(before + count, total)

        if _is_whole(target, manifest, number, moved):
            present.append(path)
        else:
            target.remove(path)
            target.create(path, _stream(source, manifest, number, moved))
            copied.append(path)
            if check and not _is_whole(target, manifest, number, lambda _: None):
                raise CorruptData(f"{target.url}/{path} does not hold what was just written to it", file=path)
        done += manifest.files[number].size_bytes
    if there is None:
        target.publish(manifest.path, manifest.raw)
    if target.read_all(manifest.path) != manifest.raw:
        raise AlreadyCommitted(f"{target.url} was given another checkpoint of step {manifest.step} meanwhile")
    written = sum(manifest.files[manifest.paths.index(path)].size_bytes for path in copied)
    return Copied(manifest.step, tuple(copied), tuple(present), written, there is None)


def _published(store: Store, path: str) -> bytes | None:
    try:
        return store.read_all(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_whole(store: Store, manifest: Manifest, number: int, moved: Callable[[int], None]) -> bool:
    path = manifest.paths[number]
    if store.size(path) != manifest.files[number].size_bytes:
        return False
    try:
        for window in _windows(store, manifest, number):
            moved(window)
    except (CorruptData, FileNotFoundError):
        return False
    return True


def _windows(store: Store, manifest: Manifest, number: int) -> Iterator[int]:
    done = 0
    for block in _stream(store, manifest, number, lambda _: None):
        done += len(block)
        yield done


def _stream(store: Store, manifest: Manifest, number: int, moved: Callable[[int], None]) -> Iterator[memoryview]:
    """Blocks of a pack, each compared with its sum before it is handed on."""
    size, block = manifest.files[number].size_bytes, manifest.block_bytes
    step = block * max(1, WINDOW_BYTES // block)
    for start in range(0, size, step):
        buffer = memoryview(bytearray(min(step, size - start)))
        try:
            got = store.read_into(manifest.paths[number], start, buffer)
        except FileNotFoundError:
            raise corrupt(manifest, number, None, "the file is missing") from None
        if got != len(buffer):
            raise corrupt(manifest, number, (start + got) // block, "the file is cut short")
        for at in range(0, got, block):
            which = (start + at) // block
            if block_sum(buffer[at : at + block]) != int(manifest.sums[number][which]):
                raise corrupt(manifest, number, which, "its hash differs from the manifest's")
        yield buffer
        moved(start + got)
