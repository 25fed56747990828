"""The commit: from the votes of the writers to a checkpoint that exists, and back to the newest one.

Protocol (torchsnapshot and Orbax commit with metadata last; here it is also created only once, and never
renamed over): writers make packs durable under names that are never used again, and vote; one coordinator
checks that the votes make a whole, and publishes the manifest. Before that call nothing exists, after it
everything does. A crash leaves garbage, never a torn checkpoint.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastictrain_checkpoint import sidecar
from elastictrain_checkpoint.collector import no_collections
from elastictrain_checkpoint.errors import (
    AlreadyCommitted,
    CorruptData,
    IncompleteCheckpoint,
    InvalidManifest,
    NoCheckpoint,
    StaleGeneration,
)
from elastictrain_checkpoint.hashing import (
    CELL_HASH_BYTES,
    SUM_BLOCK_BYTES,
    combine_digest,
    unbase64,
)
from elastictrain_checkpoint.manifest import Manifest, parse_manifest, read_own, write_manifest
from elastictrain_checkpoint.part import FileRecord, Part, PartTensor, SidecarRecord, check_names
from elastictrain_checkpoint.paths import LATEST, MANIFEST, manifest_path, parse_step_folder, step_folder
from elastictrain_checkpoint.store import Store


def commit(
    store: Store,
    *,
    step: int,
    attempt: str,
    generation: int,
    parts: Sequence[Part],
    tree: Any = None,
    aliases: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
    now: datetime.datetime | None = None,
    cells: bool = False,
) -> Manifest:
    """Make the parts of one attempt the checkpoint of ``step``.

    Args:
        store: where the parts were written.
        step: the step.
        attempt: as in every part.
        generation: grows with every new coordinator; a step committed under a newer one is never touched.
        parts: all votes, in any order.
        tree: state that is not tensors (see `elastictrain_checkpoint.tagged`).
        aliases: further name → tensor it is tied to.
        info: facts about the run (world, versions); readers need none of them.
        now: time of the commit; the clock's if not given.
        cells: store the cell hashes too (0.1 % more of fp32 data), so that later saves can have this one as their base
            without reading it.

    To commit the same attempt again, for example after a lost answer, is fine and gives the manifest that
    is there.

    Raises:
        IncompleteCheckpoint: a gap, an overlap, parts that disagree, a pack that is not as voted.
        AlreadyCommitted: the step has a manifest; the message says whose. `discard` removes a step.
        StaleGeneration: … and it is of a newer generation.
        InvalidPiece: the tree or a name cannot be written.

    """
    check_names(attempt=attempt)
    with no_collections():
        files, tensors = _join(parts, step, attempt)
        beside = _beside(attempt, tensors, cells=cells)
        records = {kind: record for kind, (record, _) in beside.items()}
        draft = write_manifest(
            step=step,
            attempt=attempt,
            generation=generation,
            time=now or datetime.datetime.now(datetime.UTC),
            info=info or {},
            block_bytes=SUM_BLOCK_BYTES,
            digest=_digest(tensors, aliases or {}),
            files=files,
            tensors=tensors,
            alias=aliases or {},
            tree=tree,
            **records,
        )
        contents = {f"{step_folder(step)}/{record.path}": data for record, data in beside.values()}
        try:
            manifest = read_own(draft, contents.__getitem__)
        except InvalidManifest as error:
            raise IncompleteCheckpoint(f"step {step}, attempt {attempt}: {error}") from None
    for complaint in wrong_sizes(store, manifest):
        raise IncompleteCheckpoint(f"step {step}, attempt {attempt}: {complaint}; nothing was committed")
    for path, data in contents.items():
        with contextlib.suppress(FileExistsError):  # named after its content: what is there is the same
            store.publish(path, data)
    return _publish(store, manifest)


def _beside(attempt: str, tensors: Mapping[str, PartTensor], *, cells: bool) -> dict[str, tuple[SidecarRecord, bytes]]:
    """Kind → (record, content) of the files that will lie beside the packs."""
    contents = {}
    if sum(len(record.chunks) for record in tensors.values()) > sidecar.TABLE_CHUNKS:
        contents[sidecar.CHUNKS] = sidecar.encode_chunks(tensors)
    if cells:
        contents[sidecar.CELLS] = sidecar.encode_cells(tensors)
    return {kind: (sidecar.record_of(kind, attempt, data), data) for kind, data in contents.items()}


def _publish(store: Store, manifest: Manifest) -> Manifest:
    with contextlib.suppress(FileExistsError):
        store.publish(manifest.path, manifest.raw)
    # Read back in any case: storage without a conditional create may have let two of us through.
    there = store.read_all(manifest.path)
    if there != manifest.raw:
        return _same_or_refuse(store, manifest, there)
    # Only a hint, and the checkpoint exists: nothing that happens to the hint may fail the commit.
    with contextlib.suppress(Exception):
        store.put(LATEST, f"{manifest.step}\n".encode())
    return manifest


def _same_or_refuse(store: Store, manifest: Manifest, there: bytes) -> Manifest:
    step = manifest.step
    try:
        other = parse_manifest(there, step, store.read_all)
    except InvalidManifest as error:
        raise AlreadyCommitted(
            f"step {step} has a manifest that cannot be read ({error}); it is not overwritten. "
            f"discard(store, {step}) removes that step"
        ) from None
    who = f"attempt {other.attempt} of generation {other.generation} at {other.time}"
    if other.generation > manifest.generation:
        raise StaleGeneration(f"step {step} was committed by {who}; generation {manifest.generation} is out of date")
    if _content(other) != _content(manifest):
        raise AlreadyCommitted(
            f"step {step} was committed by {who}; attempt {manifest.attempt} of generation "
            f"{manifest.generation} changes nothing. discard(store, {step}) removes that step"
        )
    return other


def _content(manifest: Manifest) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(manifest.raw)
    return {key: value for key, value in document.items() if key not in ("time", "self")}


def _join(parts: Sequence[Part], step: int, attempt: str) -> tuple[list[FileRecord], dict[str, PartTensor]]:
    """Put the parts together; chunks are renumbered to the joint list of files. A pack that was written belongs to one
    part, a pack of an earlier step that is referred to may be in many.
    """
    files: list[FileRecord] = []
    tensors: dict[str, PartTensor] = {}
    seen: dict[str, str] = {}
    referred: dict[str, int] = {}
    alone = len(parts) == 1  # then its numbers are those of the whole, and its records are only read
    for part in sorted(parts, key=lambda part: (part.writer, [file.path for file in part.files])):
        if (part.step, part.attempt) != (step, attempt):
            raise IncompleteCheckpoint(
                f"part of {part.writer} is of step {part.step}, attempt {part.attempt}; "
                f"expected step {step}, attempt {attempt}"
            )
        numbers = []
        for file in part.files:
            if file.path.startswith("../"):
                number = referred.setdefault(file.path, len(files))
                if number < len(files) and files[number] != file:
                    raise IncompleteCheckpoint(f"{part.writer} and others disagree on {file.path}, which they refer to")
            else:
                number = len(files)
                if file.path in seen:
                    raise IncompleteCheckpoint(f"{file.path} is in two parts ({seen[file.path]}, {part.writer})")
                seen[file.path] = part.writer
            if number == len(files):
                files.append(file)
            numbers.append(number)
        if alone and numbers == list(range(len(files))):
            last = max((chunk[0] for one in part.tensors.values() for chunk in one.chunks), default=-1)
            if last < len(files):
                return files, part.tensors
        for name, share in part.tensors.items():
            whole = tensors.get(name)
            if whole is None:
                whole = PartTensor(share.dtype, share.shape, [], [])
                tensors[name] = whole
            if (whole.dtype, whole.shape) != (share.dtype, share.shape):
                raise IncompleteCheckpoint(
                    f"{name}: {part.writer} has {share.dtype} {share.shape}, others have {whole.dtype} {whole.shape}"
                )
            for at, start, offsets, sizes in share.chunks:
                if at >= len(numbers):
                    raise IncompleteCheckpoint(f"{name}: {part.writer} has a chunk in file {at} of {len(numbers)}")
                whole.chunks.append((numbers[at], start, offsets, sizes))
            whole.cells.extend(share.cells)
    return files, tensors


def _digest(tensors: Mapping[str, PartTensor], aliases: Mapping[str, str]) -> str:
    whole = {}
    for name, record in tensors.items():
        cells = []
        reached = 0
        for first, text in sorted(record.cells) if len(record.cells) > 1 else record.cells:
            hashes = unbase64(text)
            if first != reached:
                gap = "missing" if first > reached else "twice"
                raise IncompleteCheckpoint(f"{name}: cells {sorted((reached, first))} of the digest are {gap}")
            reached += len(hashes) // CELL_HASH_BYTES
            cells.append(hashes)
        whole[name] = (record.dtype, record.shape, b"".join(cells))
    try:
        return combine_digest(whole, aliases)
    except ValueError as error:
        raise IncompleteCheckpoint(f"the parts do not cover every tensor: {error}") from None


def wrong_sizes(store: Store, manifest: Manifest) -> list[str]:
    """Complaints about packs that are missing or not of the size in the manifest."""
    out = []
    for file, path in zip(manifest.files, manifest.paths, strict=True):
        size = store.size(path)
        if size != file.size_bytes:
            out.append(f"{path} is {'missing' if size is None else f'{size} bytes'}, not {file.size_bytes} bytes")
    return out


@dataclass(frozen=True)
class Skipped:
    """A step that looks like a checkpoint and is none, and why."""

    step: int
    why: str


def list_steps(store: Store) -> list[int]:
    """Steps that have a manifest, ascending; whether it can be believed is another question."""
    steps = (parse_step_folder(name) for name in store.list())
    return sorted(step for step in steps if step is not None and MANIFEST in store.list(step_folder(step)))


def load(store: Store, step: int) -> Manifest:
    """The manifest of one step, checked, its packs present with their sizes.

    Raises:
        NoCheckpoint: there is no such step; the message lists those that are.
        InvalidManifest: the manifest cannot be believed.
        CorruptData: a pack is missing or cut short.

    """
    try:
        raw = store.read_all(manifest_path(step))
    except (FileNotFoundError, NotADirectoryError):
        there = ", ".join(map(str, list_steps(store)[-10:])) or "none"
        raise NoCheckpoint(f"{store.url} has no checkpoint of step {step}; steps there: {there}") from None
    manifest = parse_manifest(raw, step, store.read_all)
    for complaint in wrong_sizes(store, manifest):
        why = f"; {NO_PACKS}" if has_no_packs(store, manifest) else ""
        raise CorruptData(f"step {step}: {complaint}{why}")
    return manifest


NO_PACKS = (
    "none of the packs that were written for it is there: somebody has removed them, or it was committed by a run that "
    "had gone on without that worker and had cleared its packs away"
)


def has_no_packs(store: Store, manifest: Manifest) -> bool:
    """Whether all packs that this step does not share with earlier ones are missing. Not one byte was damaged then:
    they were removed, before the manifest came (a commit that was answered late) or after it.
    """
    return bool(manifest.own_paths) and all(store.size(path) is None for path in manifest.own_paths)


def newest(store: Store, skipped: list[Skipped] | None = None) -> Manifest | None:
    """The newest step that is whole: its manifest can be believed and its packs have their sizes.

    Bytes are checked when they are read (`Reader`) or by `verify`.

    Args:
        store: where.
        skipped: newer steps that were passed over are appended, with the reason.

    """
    steps = set(list_steps(store))
    # A stale listing may miss the last step. The hint is believed no further than that there may be such a
    # step.
    with contextlib.suppress(OSError, ValueError):
        hint = int(store.read_all(LATEST))
        if store.size(manifest_path(hint)) is not None:
            steps.add(hint)
    for step in sorted(steps, reverse=True):
        try:
            return load(store, step)
        except CorruptData as error:
            if skipped is not None:
                skipped.append(Skipped(step, str(error)))
    return None
