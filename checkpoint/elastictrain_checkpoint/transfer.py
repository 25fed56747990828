"""Copying a checkpoint from one store to another, byte for byte, every block checked on the way, the manifest last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from elastictrain_checkpoint.commit import wrong_sizes
from elastictrain_checkpoint.errors import AlreadyCommitted, CorruptData, InvalidManifest
from elastictrain_checkpoint.hashing import block_sum
from elastictrain_checkpoint.manifest import Manifest, parse_manifest
from elastictrain_checkpoint.reader import corrupt
from elastictrain_checkpoint.retain import discard
from elastictrain_checkpoint.sidecar import check_sidecar
from elastictrain_checkpoint.store import Store

Progress = Callable[[int, int], None]
Pace = Callable[[int], None]
"""Called with the number of bytes before they are sent; returns when they may be, or raises."""
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
    source: Store,
    manifest: Manifest,
    target: Store,
    *,
    check: bool = False,
    progress: Progress | None = None,
    pace: Pace | None = None,
    replace_older: bool = False,
) -> Copied:
    """Copy one step, with the packs of other steps and the files beside the manifest that it uses, to the same paths.

    May be called again after it was interrupted: packs that are whole in the target stay, one that is not is written
    anew. Nothing exists in the target before its manifest does, which comes last.

    Args:
        source: where the checkpoint is.
        manifest: which.
        target: where it goes; other steps there stay as they are.
        check: read back what was written, too. (What is written was checked before; this finds storage that loses it.)
        progress: called with (bytes done, bytes in all).
        pace: bounds the rate.
        replace_older: a checkpoint of that step in the target that is damaged, or of a lower generation, has not
            happened in the history of the source, and is replaced.

    Raises:
        AlreadyCommitted: the target has another checkpoint of that step.
        CorruptData: a block of the source differs from its sum, or with ``check`` one of the target.
        OSError: storage failed; call again to go on.

    """
    there = _published(target, manifest.path)
    if there is not None and there != manifest.raw:
        _make_way(target, there, manifest, replace_older)
        there = None
    copied: list[str] = []
    present: list[str] = []
    done, total = 0, manifest.size_bytes
    for number, path in enumerate(manifest.paths):

        def moved(count: int, before: int = done) -> None:
            if progress:
                progress(before + count, total)

        # The right size is not enough: after a loss of power a file may be full of zeros.
        if _is_whole(target, manifest, number, moved):
            present.append(path)
        else:
            # Never `create`: a call that hangs and fails late would remove, by its name, what another copier has put
            # there meanwhile; and a torn pack may be one that another step refers to.
            target.replace(path, _stream(source, manifest, number, moved, pace))
            copied.append(path)
            if check and not _is_whole(target, manifest, number, lambda _: None):
                raise CorruptData(f"{target.url}/{path} does not hold what was just written to it", file=path)
        done += manifest.files[number].size_bytes
    _copy_sidecars(source, manifest, target)
    if there is None:
        target.publish(manifest.path, manifest.raw)
        _take_back_if_torn(target, manifest)
    if target.read_all(manifest.path) != manifest.raw:
        raise AlreadyCommitted(f"{target.url} was given another checkpoint of step {manifest.step} meanwhile")
    written = sum(manifest.files[manifest.paths.index(path)].size_bytes for path in copied)
    return Copied(manifest.step, tuple(copied), tuple(present), written, there is None)


def _make_way(target: Store, there: bytes, manifest: Manifest, replace_older: bool) -> None:
    """Remove another checkpoint of the step, if it may go."""
    try:
        other = parse_manifest(there, manifest.step, target.read_all)
    except InvalidManifest:
        other = None
    if not replace_older or (other is not None and other.generation >= manifest.generation):
        what = "one that cannot be read" if other is None else f"attempt {other.attempt}, generation {other.generation}"
        raise AlreadyCommitted(
            f"{target.url} has another checkpoint of step {manifest.step}; it is not overwritten. It has step "
            f"{manifest.step} of {what}; the one to copy is of attempt {manifest.attempt}, generation "
            f"{manifest.generation}. In Python, elastictrain_checkpoint.discard(store, {manifest.step}) removes what "
            "is there"
        )
    discard(target, manifest.step, keep_attempt=manifest.attempt)


def _take_back_if_torn(target: Store, manifest: Manifest) -> None:
    """Somebody else's retention may have taken packs for garbage that had no manifest yet."""
    if complaints := wrong_sizes(target, manifest):
        target.remove(manifest.path)
        raise OSError(
            f"{target.url}, step {manifest.step}: removed by somebody else while it was copied: {complaints[0]}"
        )


def _copy_sidecars(source: Store, manifest: Manifest, target: Store) -> None:
    for path, record in manifest.sidecars:
        try:
            data = check_sidecar(record, source.read_all(path))
        except (FileNotFoundError, ValueError) as error:
            raise CorruptData(f"step {manifest.step}: {path}: {error}", file=path) from None
        try:
            target.publish(path, data)
        except FileExistsError:
            if target.read_all(path) != data:
                target.replace(path, [memoryview(data)])


def _published(store: Store, path: str) -> bytes | None:
    try:
        return store.read_all(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_whole(store: Store, manifest: Manifest, number: int, moved: Callable[[int], None]) -> bool:
    if store.size(manifest.paths[number]) != manifest.files[number].size_bytes:
        return False
    try:
        for _ in _stream(store, manifest, number, moved):
            pass
    except (CorruptData, FileNotFoundError):
        return False
    return True


def _stream(
    store: Store, manifest: Manifest, number: int, moved: Callable[[int], None], pace: Pace | None = None
) -> Iterator[memoryview]:
    """Blocks of a pack, each compared with its sum before it is handed on."""
    size, block = manifest.files[number].size_bytes, manifest.block_bytes
    step = block * max(1, WINDOW_BYTES // block)
    memory = memoryview(bytearray(min(step, size)))  # once: memory that is new costs more than the copy
    for start in range(0, size, step):
        buffer = memory[: min(step, size - start)]
        try:
            got = store.read_into(manifest.paths[number], start, buffer)
        except FileNotFoundError:
            raise corrupt(manifest, number, None, "the file is missing") from None
        if got != len(buffer):
            raise corrupt(manifest, number, (start + got) // block, "the file is cut short")
        for at in range(0, got, block):
            which, found = (start + at) // block, buffer[at : at + block]
            if block_sum(found) != int(manifest.sums[number][which]):
                why = f"its hash differs from the manifest's; damaged in {store.url}; it is not copied"
                raise corrupt(manifest, number, which, why)
            if pace is not None:
                pace(len(found))
            yield found
            moved(start + at + len(found))
