"""What a store holds, in short: an entry for every manifest that can be believed, without asking for packs."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

from elastictrain_checkpoint.commit import list_steps
from elastictrain_checkpoint.errors import InvalidManifest
from elastictrain_checkpoint.manifest import Manifest, parse_manifest
from elastictrain_checkpoint.paths import manifest_path
from elastictrain_checkpoint.policies import Point
from elastictrain_checkpoint.store import Store


@dataclass(frozen=True)
class Entry:
    """A committed checkpoint: its step, who has committed it, the bytes of all its packs, and what policies see."""

    step: int
    generation: int
    attempt: str
    size_bytes: int
    point: Point


def catalogue(store: Store) -> list[Entry]:
    """Entries of all steps, ascending. A manifest that cannot be believed is left out.

    Raises:
        OSError: storage failed.

    """
    entries = []
    for step in list_steps(store):
        try:
            entries.append(entry_of(parse_manifest(store.read_all(manifest_path(step)), step, store.read_all)))
        except (FileNotFoundError, NotADirectoryError, InvalidManifest):
            continue
    return entries


def entry_of(manifest: Manifest) -> Entry:
    """The same of one manifest."""
    return Entry(manifest.step, manifest.generation, manifest.attempt, manifest.size_bytes, point_of(manifest))


def point_of(manifest: Manifest) -> Point:
    """What policies see of a checkpoint. A time that cannot be read counts as long ago."""
    try:
        time_s = datetime.datetime.fromisoformat(manifest.time).timestamp()
    except ValueError:
        time_s = 0.0
    return Point(manifest.step, time_s, manifest.info)


def happened(entries: Iterable[Entry]) -> list[Entry]:
    """The entries of one history, steps ascending. Pure.

    Generations grow with time, and steps do too but where a run goes back. So a step of a lower generation than an
    earlier step was left behind by a run that went back before it, and has not happened. Of several entries of one step
    (in different stores) that of the highest generation counts.
    """
    newest: dict[int, Entry] = {}
    for entry in entries:
        if entry.step not in newest or newest[entry.step].generation < entry.generation:
            newest[entry.step] = entry
    found: list[Entry] = []
    for _, entry in sorted(newest.items()):
        if not found or entry.generation >= found[-1].generation:
            found.append(entry)
    return found
