"""Ranks that have written meet in the store: parts are left there as files, rank 0 commits. There is no collective, so
it runs in the background of any training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from elastictrain_checkpoint.commit import load
from elastictrain_checkpoint.errors import CheckpointError, IncompleteCheckpoint, NoCheckpoint, SaveTimeout
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.part import Part
from elastictrain_checkpoint.paths import step_folder
from elastictrain_checkpoint.store import Store

POLL_S = (0.01, 0.25)
"""Shortest and longest pause between two looks into the store."""
_Found = TypeVar("_Found")


class PeerDropped(IncompleteCheckpoint):
    """Another rank has given up."""


def writer_name(rank: int) -> str:
    """The name of a rank's packs."""
    return f"r{rank:05d}"


def _path(step: int, attempt: str, writer: str, kind: str) -> str:
    return f"{step_folder(step)}/{attempt}/{writer}.{kind}"


def say_dropped(store: Store, step: int, attempt: str, writer: str, error: BaseException | None) -> None:
    """Tell the other ranks that there is nothing to wait for. What one rank has said no other repeats."""
    if not isinstance(error, PeerDropped):
        with suppress(OSError, CheckpointError):  # then they wait until their deadline
            store.publish(_path(step, attempt, writer, "dropped"), str(error or "superseded").encode())


def meet(
    store: Store,
    part: Part,
    rank: int,
    world: int,
    commit: Callable[[Sequence[Part]], Manifest],
    deadline_s: float,
) -> Manifest:
    """Leave this rank's part, and wait for the manifest; rank 0 makes it.

    Raises:
        PeerDropped: another rank has given up; the message says why.
        SaveTimeout: another rank takes too long; the message says which.

    """
    step, attempt = part.step, part.attempt
    dropped = {other: _path(step, attempt, writer_name(other), "dropped") for other in range(world) if other != rank}
    if rank:
        store.publish(_path(step, attempt, part.writer, "part"), part.to_json().encode())

        def manifest() -> Manifest | None:
            try:
                found = load(store, step)
            except NoCheckpoint:
                return None
            return found if found.attempt == attempt else None

        return _poll(store, manifest, lambda: f"the manifest of step {step}, by rank 0", dropped, deadline_s)
    parts = [part]
    for other in range(1, world):
        path = _path(step, attempt, writer_name(other), "part")

        def arrived(path: str = path) -> Part | None:
            return Part.from_json(store.read_all(path)) if store.size(path) is not None else None

        what = f"the part of rank {other} for step {step}"
        parts.append(_poll(store, arrived, lambda what=what: what, dropped, deadline_s))  # type: ignore[misc]
    made = commit(parts)
    for other in range(1, world):
        with suppress(OSError):
            store.remove(_path(step, attempt, writer_name(other), "part"))
    return made


def _poll(
    store: Store,
    look: Callable[[], _Found | None],
    what: Callable[[], str],
    dropped: dict[int, str],
    deadline_s: float,
) -> _Found:
    """Look until something is there, another rank has given up, or the deadline has come."""
    begun, pause_s, never = time.monotonic(), POLL_S[0], threading.Event()
    while (found := look()) is None:
        for rank, path in dropped.items():
            if store.size(path) is not None:
                raise PeerDropped(
                    f"rank {rank} has not saved its share: {store.read_all(path).decode(errors='replace')}"
                )
        if time.monotonic() - begun > deadline_s:
            raise SaveTimeout(f"{what()} is not in {store.url} after {deadline_s:g} s")
        never.wait(pause_s)
        pause_s = min(POLL_S[1], pause_s * 1.5)
    return found
