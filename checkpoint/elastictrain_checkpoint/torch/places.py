"""Which checkpoint a load takes, of which stores, and what else there would be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elastictrain_checkpoint.commit import Skipped, newest
from elastictrain_checkpoint.commit import load as load_manifest
from elastictrain_checkpoint.errors import CorruptData, NoCheckpoint
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.tiers import Found, find, newest_in, newest_older


def place_of(path: str | Path | Store | None, checkpoint_id: str | Path | Store | None) -> str | Path | Store:
    """The one of the two that is given.

    Raises:
        TypeError: both, or none.

    """
    given = [one for one in (path, checkpoint_id) if one is not None]
    if len(given) != 1:
        raise TypeError(f"path={path!r}, checkpoint_id={checkpoint_id!r}: give one of the two")
    return given[0]


def choose(stores: Sequence[Store], step: int | None, passed_over: dict[int, str]) -> Found:
    """A step, or the newest that is whole in any of the stores, or in all of them together.

    Args:
        stores: nearest first.
        step: which; the newest if None.
        passed_over: newer steps that are not whole are added, with the reason.

    Raises:
        NoCheckpoint: there is none, or not at that step; the message says what was passed over.
        CorruptData: the step is not whole.

    """
    if step is not None:
        return find(stores, step) if len(stores) > 1 else Found(load_manifest(stores[0], step), tuple(stores))
    skipped: list[Skipped] = []
    if len(stores) > 1:
        found = newest_in(stores, skipped)
    else:
        manifest = newest(stores[0], skipped)
        found = None if manifest is None else Found(manifest, tuple(stores))
    passed_over |= {one.step: one.why for one in skipped}
    if found is None:
        why = "".join(f"; step {one.step} is not whole: {one.why}" for one in skipped)
        raise NoCheckpoint(f"{', '.join(store.url for store in stores)} has no checkpoint{why}")
    return found


def with_older(error: CorruptData, stores: Sequence[Store], manifest: Manifest) -> CorruptData:
    """The same error, naming the newest older step that is whole and does not refer to what is damaged."""
    older = newest_older(stores, manifest.step, [error.file])
    offer = "no older step is whole"
    if older is not None:
        offer = f"the newest older step that is whole is {older} (pass step={older})"
    told = f"{error}. Tensors of the state dict may be partly filled; {offer}"
    return type(error)(told, file=error.file, block=error.block, tensors=error.tensors)
