"""What a run has stored, and where: in the place that it commits to, and in those that it copies to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from elastictrain.engine.saving import open_stores
from elastictrain.errors import ClusterError, ConfigError, CorruptCheckpoint
from elastictrain.job import Checkpoint, Job
from elastictrain_checkpoint import (
    CheckpointError,
    Entry,
    Found,
    Manifest,
    Store,
    catalogue,
    find,
    happened,
    list_steps,
    load,
    newest_good,
    parse_manifest,
    reachable,
    verify,
)
from elastictrain_checkpoint.asking import Asked
from elastictrain_checkpoint.commit import has_no_packs
from elastictrain_checkpoint.paths import LATEST, manifest_path
from elastictrain_checkpoint.tiers import LAST_ANSWER_S

Note = tuple[str, dict[str, Any]]
"""A line for events.jsonl."""


def folder_of(path: str, step: int) -> str:
    """A step's folder in a place, for people and for the controller."""
    return f"{path.rstrip('/')}/step-{step:08d}"


def refuse_checkpoints(settings: Checkpoint) -> None:
    """A new run begins with empty places, all of which answer. Raises ConfigError or ClusterError."""
    places = {settings.path: "checkpoint.path"}
    places |= {copy.path: f"checkpoint.copy_to.{number}.path" for number, copy in enumerate(settings.copy_to)}
    first, *others = open_stores(settings)
    asked = {store.url: Asked(partial(list_steps, store)) for store in others}
    for url, setting in places.items():
        try:
            steps = asked[url].answer(LAST_ANSWER_S) if url in asked else list_steps(first)
        except OSError as error:
            if url == settings.path:
                raise
            raise ClusterError(
                f"{setting}={url!r} cannot be read: {error}. A run begins when all its places answer; see to it, "
                f"or set {setting} to another one"
            ) from error
        if steps:
            raise ConfigError(
                f"{setting}={url!r} already holds checkpoints (steps {_some(steps)}); go on with them (--resume), "
                f"or set {setting} to an empty folder"
            )


@dataclass(frozen=True)
class Stored:
    """What the places of a run hold. `stores`: those that answer, nearest first. `steps`: that have a manifest in any
    of them and belong to the run's history (or cannot be believed: then somebody must look), ascending. `entries`: of
    all manifests, by place. `notes`: about places that do not answer.
    """

    settings: Checkpoint
    stores: Sequence[Store]
    steps: list[int]
    entries: Mapping[str, Sequence[Entry]]
    listed: Mapping[str, Sequence[int]]
    notes: list[Note]

    @classmethod
    def of(cls, settings: Checkpoint) -> Stored:
        """Raises ClusterError when no place answers."""
        stores, silent = open_stores(settings), dict[str, str]()
        there = list(stores)
        if settings.copy_to:
            there, silent = reachable(stores)
        if not there:
            said = "; ".join(f"{url}: {why}" for url, why in silent.items())
            raise ClusterError(f"--resume: none of the places of the checkpoints answers: {said}")
        listed = {store.url: _listed(store) for store in there}
        entries = {store.url: catalogue(store) for store in there}
        left_behind = _left_behind(entries.values())
        steps = {step for found in listed.values() for step in found}
        if not settings.copy_to:  # retention removes them at once, if they are not late
            left_behind = {step for step in left_behind if _is_late(there[0], step)}
        steps -= left_behind  # in several places retention does not remove them at the same time
        notes: list[Note] = [("place_silent", {"path": url, "error": why}) for url, why in silent.items()]
        return cls(settings, there, sorted(steps), entries, listed, notes)

    @property
    def newest_generation(self) -> int:
        """The highest that has committed anything here: ours must be above it, or a commit would be refused."""
        return max((entry.generation for found in self.entries.values() for entry in found), default=0)

    def place_of(self, step: int) -> str:
        """The nearest place that lists a step."""
        return next(url for url, steps in self.listed.items() if step in steps)

    def _manifest(self, step: int) -> tuple[Manifest, str]:
        """Of a step, and the place that it is read from first. Raises CheckpointError, ClusterError."""
        if not self.settings.copy_to:
            return load(self.stores[0], step), self.stores[0].url
        try:
            found = find(self.stores, step)
        except OSError as error:
            raise ClusterError(f"checkpoint step {step} cannot be read: {error}") from error
        return found.manifest, found.stores[0].url

    def choose(self, step: int | None) -> tuple[Manifest, str]:
        """The newest one that is whole, or `step`; and the place that it is read from first.

        Raises ConfigError when there is none, CorruptCheckpoint when it is damaged (naming the newest that is not),
        ClusterError when it lies where nobody answers.
        """
        path = self.settings.path
        if step is not None and step not in self.steps:
            raise ConfigError(f"--resume-step {step}: {path} has steps {_some(self.steps)}; choose one of them")
        damaged = ""
        for candidate in [step] if step is not None else reversed(self.steps):
            try:
                manifest, place = self._manifest(candidate)
            except CheckpointError as error:
                if step is not None:
                    raise CorruptCheckpoint(f"checkpoint step {step}: {error}") from error
                damaged = damaged or f"checkpoint step {candidate} is damaged: {error}"
                continue
            if damaged:
                older = f"; the newest whole one is step {candidate}: take it with --resume-step {candidate}"
                raise CorruptCheckpoint(damaged + older)
            return manifest, place
        if damaged:
            raise CorruptCheckpoint(damaged)
        if self.notes:
            said = "; ".join(f"{data['path']} does not answer: {data['error']}" for _, data in self.notes)
            raise ClusterError(f"--resume: no checkpoint was found, and {said}")
        raise ConfigError(f"--resume: {path} holds no checkpoint yet; start without --resume, or set checkpoint.path")


def newest_anywhere(stores: Sequence[Store]) -> tuple[Found | None, dict[str, str]]:
    """The newest checkpoint of a run that is whole in any of its places, nearest first, or in all of them together; and
    which of them do not answer, by URL. Raises OSError when none does.
    """
    there, silent = reachable(stores)
    if not there:
        raise OSError("; ".join(f"{url} does not answer: {why}" for url, why in silent.items()))
    steps = {step for store in there for step in _listed(store)} - _left_behind(map(catalogue, there))
    for step in sorted(steps, reverse=True):
        with suppress(CheckpointError):
            return find(there, step), silent
    return None, silent


def older_offer(job: Job, step: int) -> str:
    """What to do when the workers find `step` damaged: the newest older one every byte of which is right, in words."""
    assert job.checkpoint is not None, "it was restored from there"
    try:
        if job.checkpoint.copy_to:
            there, _ = reachable(open_stores(job.checkpoint))
            found = newest_good(there, before=step) if there else None
            older = None if found is None else found.manifest.step
        else:
            store = open_stores(job.checkpoint)[0]
            older = next((s for s in sorted(list_steps(store), reverse=True) if s < step and _is_sound(store, s)), None)
    except OSError as error:
        return f"whether an older one is whole could not be found out: {error}"
    return (
        f"take the older step {older} with --resume-step {older}"
        if older is not None
        else "there is no older one that is whole"
    )


def _is_sound(store: Store, step: int) -> bool:
    try:
        return not verify(store, load(store, step))
    except CheckpointError:
        return False


def _left_behind(places: Iterable[Sequence[Entry]]) -> set[int]:
    """Steps that have not happened in the history of the newest, from what is in all places."""
    known = [entry for place in places for entry in place]
    return {entry.step for entry in known} - {entry.step for entry in happened(known)}


def _is_late(store: Store, step: int) -> bool:
    """Whether a step that was left behind came when its packs had been cleared away: it is not even damaged."""
    try:
        return has_no_packs(store, parse_manifest(store.read_all(manifest_path(step)), step, store.read_all))
    except (CheckpointError, FileNotFoundError):
        return False


def _listed(store: Store) -> list[int]:
    """Steps with a manifest; also the one that the hint names, which a stale listing may miss."""
    steps = set(list_steps(store))
    with suppress(OSError, ValueError):
        hint = int(store.read_all(LATEST))
        if store.size(manifest_path(hint)) is not None:
            steps.add(hint)
    return sorted(steps)


def _some(steps: list[int]) -> str:
    return ", ".join(map(str, steps[-5:])) if steps else "none"
