"""Retention: what to remove, in which order, and what never.

A step goes manifest first, then data: a crash in between leaves garbage that a later call removes, never a
manifest without its data. Garbage (attempts that no manifest refers to) goes when its newest file is older
than a lease, since it may be an attempt that is still being written.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from elastictrain_checkpoint.check import verify
from elastictrain_checkpoint.commit import Skipped, list_steps, load
from elastictrain_checkpoint.errors import CorruptData, InvalidPiece
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.part import check_names
from elastictrain_checkpoint.paths import LATEST, MANIFEST, manifest_path, parse_step_folder, step_folder
from elastictrain_checkpoint.store import Store

DEFAULT_LEASE_S = 24 * 3600.0


@dataclass
class Pruned:
    """What `prune` did.

    Attributes:
        kept: steps that remain, ascending.
        removed: steps that were removed, ascending.
        garbage: paths of attempts and drafts that were removed.
        unsound: steps that look like checkpoints and are none; left for a person to look at.

    """

    kept: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    garbage: list[str] = field(default_factory=list)
    unsound: list[Skipped] = field(default_factory=list)


def prune(
    store: Store,
    keep: int,
    *,
    lease_s: float = DEFAULT_LEASE_S,
    verified: Collection[int] = (),
    current: int | None = None,
    now_s: float | None = None,
) -> Pruned:
    """Keep the newest ``keep`` sound checkpoints and remove older ones, and garbage.

    Nothing is removed unless one of those kept is verified, every byte, first; steps whose packs a kept one
    uses stay.

    A run that goes back to an older step and goes on from there leaves later steps behind that have not happened in its
    history. They are known by their generations: ``current`` was committed after them.

    Args:
        store: where.
        keep: at least 1.
        lease_s: age in seconds from which on an attempt without a commit counts as given up.
        verified: steps that the caller has verified since they were written; they are not read again.
        current: the step that was committed last; later steps of lower generations are removed.
        now_s: time in seconds since 1970; the clock's if not given.

    Raises:
        InvalidPiece: ``keep`` is below 1.

    """
    if keep < 1:
        raise InvalidPiece(f"keep={keep}: at least one checkpoint is always kept; pass 1 or more")
    result = Pruned()
    sound: list[Manifest] = []
    for step in list_steps(store):
        try:
            sound.append(load(store, step))
        except CorruptData as error:
            result.unsound.append(Skipped(step, str(error)))
    given_up = _given_up(sound, current)
    counted = [manifest for manifest in sound if manifest not in given_up]
    kept, old = counted[-keep:], [*counted[:-keep], *given_up]
    if old and not any(m.step in verified or not verify(store, m) for m in reversed(kept)):
        result.unsound += [Skipped(manifest.step, "its bytes are damaged") for manifest in kept]
        kept, old = sound, []
    pinned = {base for manifest in kept for base in manifest.base}
    kept += [manifest for manifest in old if manifest.step in pinned]
    for manifest in old:
        if manifest.step not in pinned:
            discard(store, manifest.step)
            result.removed.append(manifest.step)
    result.kept = sorted(manifest.step for manifest in kept)
    used = {path.rsplit("/", 1)[0] for manifest in kept for path in manifest.paths}
    _collect_garbage(store, used, (time.time() if now_s is None else now_s) - lease_s, result)
    return result


def _given_up(sound: list[Manifest], current: int | None) -> list[Manifest]:
    newest = next((manifest for manifest in sound if manifest.step == current), None)
    if newest is None:
        return []
    return [m for m in sound if m.step > newest.step and m.generation < newest.generation]


def discard(store: Store, step: int, keep_attempt: str | None = None) -> None:
    """Remove a step, sound or not: its manifest first, then everything in its folder.

    Args:
        store: where.
        step: the step.
        keep_attempt: an attempt whose packs stay, because it is about to be committed in the place of what goes.

    Raises:
        InvalidPiece: no attempt can have the name ``keep_attempt``; nothing was removed.

    """
    if keep_attempt is not None:
        check_names(keep_attempt=keep_attempt)
    store.remove(manifest_path(step))
    if keep_attempt is None:
        _remove_tree(store, step_folder(step))
        return
    for name in store.list(step_folder(step)):
        if name != keep_attempt:
            _remove_tree(store, f"{step_folder(step)}/{name}")


def _collect_garbage(store: Store, used: set[str], before_s: float, result: Pruned) -> None:
    for folder in store.list():
        if folder.startswith(f".{LATEST}.") and _newest_s(store, folder) < before_s:
            store.remove(folder)
            result.garbage.append(folder)
        step = parse_step_folder(folder)
        if step is None or (MANIFEST in store.list(folder) and step not in result.kept):
            continue  # not ours, or unsound, or committed while we were looking at the others
        for name in store.list(folder):
            path = f"{folder}/{name}"
            if name != MANIFEST and path not in used and _newest_s(store, path) < before_s:
                _remove_tree(store, path)
                result.garbage.append(path)
        if not store.list(folder) and _newest_s(store, folder) < before_s:
            store.remove(folder)


def _newest_s(store: Store, path: str) -> float:
    """When the youngest file below ``path`` was written; infinitely late if it vanishes while we look."""
    try:
        times = [store.modified_s(path)]
        times += [_newest_s(store, f"{path}/{name}") for name in store.list(path)] if _is_folder(store, path) else []
    except FileNotFoundError:
        return float("inf")
    return max(times)


def _is_folder(store: Store, path: str) -> bool:
    return store.size(path) is None


def _remove_tree(store: Store, path: str) -> None:
    if _is_folder(store, path):
        for name in store.list(path):
            _remove_tree(store, f"{path}/{name}")
    store.remove(path)
