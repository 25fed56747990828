"""Retention: what to remove, in which order, and what never.

A step goes manifest first, then data: a crash in between leaves garbage that a later call removes, never a manifest
without its data. Packs that another step refers to stay, without a manifest, until nobody refers to them any more.
Garbage (files of attempts that no manifest refers to) goes when its newest file is older than a lease, since it may be
an attempt that is still being written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from elastictrain_checkpoint.catalogue import point_of
from elastictrain_checkpoint.check import verify
from elastictrain_checkpoint.commit import Skipped, has_no_packs, list_steps, load, wrong_sizes
from elastictrain_checkpoint.errors import CorruptData, InvalidManifest, InvalidPiece, NoCheckpoint
from elastictrain_checkpoint.manifest import Manifest, parse_manifest
from elastictrain_checkpoint.part import check_names
from elastictrain_checkpoint.paths import LATEST, MANIFEST, PIN, manifest_path, parse_step_folder, step_folder
from elastictrain_checkpoint.policies import Newest, Policy
from elastictrain_checkpoint.store import Store

DEFAULT_LEASE_S = 24 * 3600.0


@dataclass
class Pruned:
    """What `prune` did.

    Attributes:
        kept: steps that remain, ascending.
        removed: steps that were removed, ascending.
        garbage: paths of attempts, packs and drafts that nobody refers to and that were removed, and of manifests that
            came when their packs had been removed.
        unsound: steps that look like checkpoints and are none; left for a person to look at.

    """

    kept: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    garbage: list[str] = field(default_factory=list)
    unsound: list[Skipped] = field(default_factory=list)


def pin(store: Store, step: int, why: str = "") -> None:
    """Keep a step whatever the policies of `prune` say, until `unpin`. Lasts; pinning twice changes nothing.

    Raises:
        NoCheckpoint: there is no such step.

    """
    if store.size(manifest_path(step)) is None:
        raise NoCheckpoint(f"{store.url} has no checkpoint of step {step} to pin")
    try:
        store.publish(f"{step_folder(step)}/{PIN}", f"{why}\n".encode())
    except FileExistsError:
        return


def unpin(store: Store, step: int) -> None:
    """Leave a step to the policies again; fine if it was not pinned."""
    store.remove(f"{step_folder(step)}/{PIN}")


def pinned(store: Store) -> list[int]:
    """Steps that are pinned, ascending."""
    return [step for step in list_steps(store) if store.size(f"{step_folder(step)}/{PIN}") is not None]


def prune(
    store: Store,
    keep: int | Policy,
    *,
    lease_s: float = DEFAULT_LEASE_S,
    verified: Collection[int] = (),
    protect: Collection[int] = (),
    current: int | None = None,
    now_s: float | None = None,
    abandoned: Callable[[str], bool] | None = None,
) -> Pruned:
    """Keep the sound checkpoints that ``keep`` asks for, remove the others, and garbage.

    Nothing is removed unless one of those kept is verified, every byte, first, and of its history nothing that is newer
    than that one. Pinned steps stay. Packs that a kept
    step refers to stay; the rest of a removed step goes. A step all of whose packs stay anyway stays too: it costs
    nothing.

    A run that goes back to an older step and goes on from there leaves later steps behind that have not happened in its
    history. They are known by their generations: ``current`` was committed after them.

    Not while somebody else saves with a base in this store, unless the base is pinned (see `PackWriter`).

    Args:
        store: where.
        keep: policies (see `elastictrain_checkpoint.policies`), or the number of newest ones, at least 1.
        lease_s: age in seconds from which on an attempt without a commit counts as given up.
        verified: steps that the caller has verified since they were written; they are not read again.
        protect: further steps to keep, for example those that are still being copied elsewhere.
        current: the step that was committed last; later steps of lower generations are removed.
        now_s: time in seconds since 1970; the clock's if not given.
        abandoned: says of the name of an attempt that nobody writes it any more. What nobody refers to in such an
            attempt goes at once, not only when its lease is over; and so does its manifest where all of its packs are
            gone: the call that created it was answered when they had been collected.

    Raises:
        InvalidPiece: ``keep`` is below 1.

    """
    if isinstance(keep, int) and keep < 1:
        raise InvalidPiece(f"keep={keep}: at least one checkpoint is always kept; pass 1 or more")
    policy = Newest(keep) if isinstance(keep, int) else keep
    now_s = time.time() if now_s is None else now_s
    result = Pruned()
    sound, foreign = _read_all(store, result, abandoned or (lambda _: False))
    given_up = _given_up(sound, current)
    counted = [manifest for manifest in sound if manifest not in given_up]
    stay = {*pinned(store), *protect}
    wanted = policy.keep([point_of(manifest) for manifest in counted], now_s)
    kept = [m for m in sound if m.step in stay or (m in counted and m.step in wanted)]
    # Whatever a policy says, the newest stays: a store is never emptied.
    kept = kept or counted[-1:]
    old = [manifest for manifest in sound if manifest not in kept]
    whole = _newest_verified(store, kept, verified, result) if old else None
    # What is newer than all that are known to be whole is what one would go back to (unless it has not happened).
    kept = kept + [m for m in old if whole is None or (m.step > whole.step and m not in given_up)]
    old = [m for m in old if m not in kept]
    used = {path for manifest in kept for path in manifest.paths} | foreign
    free = [m for m in old if m.own_paths and used.issuperset(m.paths)]
    kept = kept + free
    used |= {path for manifest in kept for path, _ in manifest.sidecars}
    for manifest in old:
        if manifest not in free:
            # Whoever writes this step anew (a run that went back) does so in an attempt beside this one.
            _remove_step(store, manifest.step, used, partial(_is_another, store, manifest))
            result.removed.append(manifest.step)
    result.kept = sorted(manifest.step for manifest in kept)
    result.removed.sort()
    _collect_garbage(store, used, _Due(now_s - lease_s, abandoned or (lambda _: False)), result)
    return result


@dataclass(frozen=True)
class _Due:
    """Which garbage goes: what was last written before ``before_s``, and all of attempts that are given up for sure."""

    before_s: float
    abandoned: Callable[[str], bool]

    def goes(self, store: Store, path: str, attempt: str = "") -> bool:
        return (bool(attempt) and self.abandoned(attempt)) or _newest_s(store, path) < self.before_s


def _read_all(store: Store, result: Pruned, abandoned: Callable[[str], bool]) -> tuple[list[Manifest], set[str]]:
    """Sound steps, ascending, and the packs that steps which are not whole refer to: those too are for a person. What
    an abandoned attempt has made of nothing is removed.
    """
    sound: list[Manifest] = []
    foreign: set[str] = set()
    for step in list_steps(store):
        try:
            sound.append(load(store, step))
        except CorruptData as error:
            manifest = _believed(store, step)
            if manifest is not None and abandoned(manifest.attempt) and has_no_packs(store, manifest):
                store.remove(manifest.path)
                result.garbage.append(manifest.path)
                continue
            result.unsound.append(Skipped(step, str(error)))
            foreign.update(manifest.paths if manifest is not None else ())
    return sound, foreign


def _newest_verified(
    store: Store, kept: Sequence[Manifest], verified: Collection[int], result: Pruned
) -> Manifest | None:
    """The newest of these of which every byte is as written; those before it, which are not, are added as unsound."""
    whole = None
    damaged: list[Skipped] = []
    for manifest in reversed(kept):
        if manifest.step in verified or not verify(store, manifest):
            whole = manifest
            break
        damaged.insert(0, Skipped(manifest.step, "its bytes are damaged"))
    result.unsound += damaged
    return whole


def _believed(store: Store, step: int) -> Manifest | None:
    """The manifest of a step, whole or not; None if there is none that can be believed."""
    try:
        return parse_manifest(store.read_all(manifest_path(step)), step, store.read_all)
    except (FileNotFoundError, InvalidManifest):
        return None


def _paths_of(store: Store, step: int) -> Iterable[str]:
    """Packs that a step refers to; none if its manifest cannot be believed."""
    manifest = _believed(store, step)
    return () if manifest is None else manifest.paths


def _given_up(sound: list[Manifest], current: int | None) -> list[Manifest]:
    newest = next((manifest for manifest in sound if manifest.step == current), None)
    if newest is None:
        return []
    return [m for m in sound if m.step > newest.step and m.generation < newest.generation]


def discard(store: Store, step: int, keep_attempt: str | None = None) -> None:
    """Remove a step, sound or not, pinned or not: its manifest first, then everything in its folder that no other step
    refers to.

    Args:
        store: where.
        step: the step.
        keep_attempt: an attempt whose packs stay, because it is about to be committed in the place of what goes.

    Raises:
        InvalidPiece: no attempt can have the name ``keep_attempt``; nothing was removed.

    """
    if keep_attempt is not None:
        check_names(keep_attempt=keep_attempt)
    folder = step_folder(step)
    used = {path for other in list_steps(store) if other != step for path in _paths_of(store, other)}
    _remove_step(
        store, step, {path for path in used if path.startswith(f"{folder}/")}, lambda name: name == keep_attempt
    )


def withdraw(store: Store, step: int, attempt: str, *, if_torn: bool = False) -> bool:
    """Remove the manifest of a step, if it is of this attempt; its packs are garbage then. For whoever has left the
    call that creates it, and finds that it has created it after all.

    Args:
        store: where.
        step: the step.
        attempt: the attempt; a manifest of another one stays.
        if_torn: only if packs that it refers to are missing or cut short.

    Returns:
        Whether there was one to be removed.

    """
    manifest = _believed(store, step)
    if manifest is None or manifest.attempt != attempt or (if_torn and not wrong_sizes(store, manifest)):
        return False
    store.remove(manifest.path)
    return True


def _is_another(store: Store, manifest: Manifest, name: str) -> bool:
    """Whether what lies in a step's folder is an attempt at that step that was not the one committed."""
    return name != manifest.attempt and _is_folder(store, f"{step_folder(manifest.step)}/{name}")


def _remove_step(store: Store, step: int, used: Collection[str], spared: Callable[[str], bool]) -> None:
    folder = step_folder(step)
    store.remove(manifest_path(step))
    for name in store.list(folder):
        if not spared(name):
            _remove_tree(store, f"{folder}/{name}", used)
    if not store.list(folder):
        store.remove(folder)


def _collect_garbage(store: Store, used: set[str], due: _Due, result: Pruned) -> None:
    for folder in store.list():
        if folder.startswith(f".{LATEST}.") and due.goes(store, folder):
            store.remove(folder)
            result.garbage.append(folder)
        step = parse_step_folder(folder)
        if step is None or (MANIFEST in store.list(folder) and step not in result.kept):
            continue  # not ours, or unsound, or committed while we were looking at the others
        for name in store.list(folder):
            path = f"{folder}/{name}"
            if name == MANIFEST or (name == PIN and step in result.kept):
                continue
            _collect_attempt(store, path, used, due, result)
        if not store.list(folder) and due.goes(store, folder):
            store.remove(folder)


def _collect_attempt(store: Store, path: str, used: set[str], due: _Due, result: Pruned) -> None:
    """Remove an attempt that nobody refers to, or what nobody refers to in an attempt that somebody does."""
    attempt = path.rpartition("/")[2]
    if not any(one.startswith(f"{path}/") for one in used):
        if due.goes(store, path, attempt):
            _remove_tree(store, path)
            result.garbage.append(path)
        return
    for name in store.list(path):
        inner = f"{path}/{name}"
        if inner not in used and due.goes(store, inner, attempt):
            _remove_tree(store, inner)
            result.garbage.append(inner)


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


def _remove_tree(store: Store, path: str, used: Collection[str] = ()) -> None:
    """Remove a file, or a folder with all in it, but for what is used."""
    if path in used:
        return
    if _is_folder(store, path):
        for name in store.list(path):
            _remove_tree(store, f"{path}/{name}", used)
        if used and store.list(path):
            return
    store.remove(path)
