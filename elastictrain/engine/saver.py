"""What one worker stores: its share of a checkpoint, written beside training, and for whoever publishes the commit."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from elastictrain.engine.committing import Begun, Committer
from elastictrain.engine.saving import Owned, open_store, stored_aliases
from elastictrain.errors import ClusterError
from elastictrain.job import Checkpoint, Keep
from elastictrain_checkpoint import (
    AlreadyCommitted,
    Base,
    CheckpointError,
    CorruptData,
    IncompleteCheckpoint,
    Part,
    StaleGeneration,
    Store,
    commit,
    discard,
    list_steps,
    load,
    prune,
)
from elastictrain_checkpoint.errors import SaveFailed
from elastictrain_checkpoint.handle import SaveHandle
from elastictrain_checkpoint.lazy import LazySaver
from elastictrain_checkpoint.paths import parse_step_folder
from elastictrain_checkpoint.policies import Best, EverySteps, Newest, Policy, Spaced, Younger


def attempt_of(generation: int) -> str:
    """The name of a generation's attempts."""
    return f"g{generation:06d}"


def generation_of(attempt: str) -> int | None:
    """The generation behind the name of an attempt; None if it is not one of a run's."""
    digits = attempt.removeprefix("g")
    named = digits.isdecimal() and digits.isascii()
    return int(digits) if named and attempt_of(int(digits)) == attempt else None


def policy_of(keep: int | Keep) -> Policy:
    """The setting `checkpoint.keep` in the words of the library."""
    if isinstance(keep, int):
        return Newest(keep)
    found: Policy = Newest(keep.newest)
    if keep.every_steps is not None:
        found |= EverySteps(keep.every_steps)
    if keep.younger is not None:
        found |= Younger(keep.younger)
    if keep.spaced is not None:
        found |= Spaced(keep.spaced)
    if keep.best is not None:
        found |= Best(keep.best.metric, keep.best.n, keep.best.mode)
    return found


STORE_DEADLINE_S = 600.0
"""As long as peers wait for one that stores."""


INCREMENTS = "increments"
"""In a manifest's info: so many checkpoints in a row, this one included, refer to earlier ones; 0: it stands alone."""


class BaseLost(Exception):
    """Packs of earlier steps that a save refers to are gone, removed by somebody else."""


def refers(parts: Iterable[Part]) -> bool:
    """Whether any of the shares refers to packs of earlier steps."""
    return any(file.path.startswith("../") for part in parts for file in part.files)


class Bases:
    """What saves of one worker refer to: the last committed checkpoint, unless it is time for a full one."""

    def __init__(self, store: Store, full_every: int) -> None:
        self._store, self._full_every = store, full_every
        self._known: tuple[bytes, Base] | None = None
        self._increments = 0

    def of(self, step: int) -> Base | None:
        """The base that the checkpoint of `step` is. None: save in full, since it is time to, or since that checkpoint
        cannot be one (it is gone, damaged, or was committed without what a base needs).
        """
        self._increments = 0
        with suppress(OSError, CheckpointError):
            manifest = load(self._store, step)
            increments = manifest.info.get(INCREMENTS, 0)
            if not isinstance(increments, int) or increments + 1 >= self._full_every:
                return None
            if self._known is None or self._known[0] != manifest.raw:
                self._known = None
                self._known = manifest.raw, Base.read(self._store, manifest)
            self._increments = increments
            return self._known[1]
        return None

    def increments(self, parts: Iterable[Part]) -> int:
        """Of a checkpoint that is made of these shares, this worker's among them."""
        return self._increments + 1 if refers(parts) else 0


class ProbedStore(Store):
    """A store that says in which phase of storing it is: "store" in the middle of a file, "stored" when it is durable.
    Only where faults are addressed to these phases.
    """

    def __init__(self, settings: Checkpoint, probe: Callable[[int, str], None]) -> None:
        super().__init__(settings.path, storage_options=settings.storage_options)
        self._probe = probe

    def create(self, path: str, blocks: Iterable[memoryview]) -> int:
        step = parse_step_folder(path.partition("/")[0]) or 0

        def probed() -> Iterator[memoryview]:
            for number, block in enumerate(blocks):
                yield block
                if not number:
                    self._probe(step, "store")

        size = super().create(path, probed())
        self._probe(step, "stored")
        return size


@dataclass(slots=True)
class Writing:
    """One worker's share of a checkpoint, on its way to the storage."""

    saver: Saver
    handle: SaveHandle
    attempt: str
    numbers: dict[str, Any]

    @property
    def done(self) -> bool:
        """Whether `share` returns, or raises, at once."""
        return self.handle.done

    def share(self) -> dict[str, Any]:
        """The share as JSON data, durable. Raises ClusterError when it could not be written."""
        return self.saver.share_of(self)


class Saver:
    """Writes this worker's share of a checkpoint, and commits it when all shares are known to be durable."""

    def __init__(self, settings: Checkpoint, probe: Callable[[int, str], None] | None = None) -> None:
        """`probe(step, phase)` is called in the phases of storing, in whatever thread they happen."""
        self._settings = settings
        self._probe = probe or (lambda _step, _phase: None)
        self._store = open_store(settings)
        self._lazy = LazySaver(self._store if probe is None else ProbedStore(settings, probe), max_copy=1.0)
        self._committer = Committer(self._store)
        self._bases = Bases(self._store, settings.full_every) if settings.incremental else None
        self.begun: Begun | None = None
        """The newest checkpoint that this worker has begun to write."""

    def begin(self, owned: Owned, *, step: int, generation: int, worker: int, known_step: int = 0) -> Writing:
        """Begin to write this worker's packs, in the background: call `before_apply` before the state changes.
        `known_step`: the newest checkpoint that is known to be committed; with `checkpoint.incremental` what is
        unchanged since is referred to.
        """
        # Every generation is an attempt of its own, so nothing is ever overwritten; the suffix keeps a worker apart
        # from itself when it writes the same step again after the job went back.
        writer = f"w{worker:04d}-{uuid.uuid4().hex[:6]}"
        attempt = attempt_of(generation)
        base = None if self._bases is None else partial(self._bases.of, known_step)
        with self._storage(step):
            # Each name has pieces of one kind: a tensor lies on a device, or on the host.
            handle = self._lazy.save(
                owned.pieces, step=step, attempt=attempt, writer=writer, stable=owned.copies, base=base
            )
        self.begun = Begun(step, attempt, generation)
        return Writing(self, handle, attempt, dict(owned.numbers))

    def before_apply(self) -> None:
        """The state is about to change: copy what is not written yet. Never waits for storage."""
        self._lazy.before_mutation()

    def give_up(self) -> list[int]:
        """The generation is over: what it still writes will not be whole, and what it still commits may be, or not.
        Gives the steps of what it still wrote.
        """
        given_up = [handle.step for handle in self._lazy.give_up()]
        self._committer.give_up(STORE_DEADLINE_S)
        return given_up

    def share_of(self, writing: Writing) -> dict[str, Any]:
        """See `Writing.share`."""
        with self._storage(writing.handle.step):
            try:
                part: Part = writing.handle.result(STORE_DEADLINE_S)
            except SaveFailed as error:
                raise error.__cause__ or error from None  # what the storage said
        return {"attempt": writing.attempt, "part": part.to_json(), "numbers": writing.numbers}

    @contextmanager
    def _storage(self, step: int) -> Iterator[None]:
        """Storage that fails is the cluster's to mend, not the recipe's."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            raise ClusterError(
                f"checkpoint step {step} cannot be stored in checkpoint.path={self._settings.path!r}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def begin_commit(
        self,
        shares: Sequence[Mapping[str, Any]],
        *,
        committed: Callable[[str], None],
        removed: Callable[[Sequence[int]], None],
        baseless: Callable[[str], None],
        known_step: int = 0,
        check: Callable[[], None],
        **facts: Any,
    ) -> None:
        """As `commit`, in the background; waits for the commit before it, if that is still under way. `committed` gets
        the path as soon as the manifest is there, `removed` the steps that retention has let go of, if any;
        `baseless` why nothing was committed, where packs that the shares refer to are gone. All are called in the
        background. `check` is called while waiting, and may raise. `known_step` stays: the save that begins next may
        refer to it.
        """
        self.wait_for_commit(check)

        def work(store: Store) -> bool:
            try:
                committed(self._create(store, shares, **facts))
            except BaseLost as error:
                baseless(str(error))
                return False
            if gone := self._prune(store, facts["step"], facts["generation"], known_step):
                removed(gone)
            return True

        self._committer.begin(facts["step"], work)

    def committed(self) -> list[int]:
        """Steps that have been committed in the background since this was asked last. Raises ClusterError when one
        could not be.
        """
        return self._committer.committed()

    def wait_for_commit(self, check: Callable[[], None]) -> list[int]:
        """The same, when nothing is being committed any more. `check` is called while waiting, and may raise."""
        return self._committer.wait(check, STORE_DEADLINE_S)

    def travelled(self, step: int) -> None:
        """All shares of the checkpoint of `step` are durable, and the publisher has them."""
        if self.begun is not None and self.begun.step == step:
            self.begun = replace(self.begun, travelled=True)

    def is_committed(self, begun: Begun) -> bool:
        """Whether the manifest of a checkpoint that was begun is in the store."""
        return begun.is_committed(self._store)

    def commit(self, shares: Sequence[Mapping[str, Any]], **facts: Any) -> str:
        """Create the manifest: from here on the checkpoint exists; then let retention remove what may go. Returns its
        path. `facts`: step, generation, tree, aliases, info.
        """
        path = self._create(self._store, shares, **facts)
        self._prune(self._store, facts["step"], facts["generation"])
        return path

    def _create(
        self,
        store: Store,
        shares: Sequence[Mapping[str, Any]],
        *,
        step: int,
        generation: int,
        tree: Mapping[str, Any],
        aliases: Mapping[str, str],
        info: Mapping[str, Any],
    ) -> str:
        numbers = {name: value for share in shares for name, value in share["numbers"].items()}
        facts: dict[str, Any] = {
            "step": step,
            "attempt": shares[0]["attempt"],
            "generation": generation,
            "parts": [Part.from_json(share["part"]) for share in shares],
            "tree": {**tree, "numbers": numbers},
            "aliases": stored_aliases(aliases),
            "info": dict(info),
        }
        if self._bases is not None:
            facts |= {"cells": True, "info": facts["info"] | {INCREMENTS: self._bases.increments(facts["parts"])}}
        self._probe(step, "manifest")
        with self._storage(step):
            try:
                manifest = commit(store, **facts)
            except StaleGeneration:
                raise
            except IncompleteCheckpoint as error:
                if refers(facts["parts"]):
                    raise BaseLost(str(error)) from error
                raise
            except (AlreadyCommitted, CorruptData):
                # The job went back before this step, so what is stored there is damaged or has not happened. The new
                # packs lie in the same folder.
                discard(store, step, keep_attempt=facts["attempt"])
                manifest = commit(store, **facts)
        self._probe(step, "committed")
        return self.path_of(manifest.step)

    def path_of(self, step: int) -> str:
        """Where the checkpoint of a step is, for people and for the controller."""
        return f"{self._settings.path.rstrip('/')}/step-{step:08d}"

    def _prune(self, store: Store, step: int, generation: int, known_step: int = 0) -> list[int]:
        """Gives the steps that are gone. What cannot be cleaned away now is cleaned away next time."""
        keep = self._settings.keep
        with suppress(OSError, CheckpointError):
            # Nobody writes for an older generation any more: what it has left without a manifest is garbage.
            return prune(
                store, keep=policy_of(keep), current=step,
                protect=() if self._bases is None else {known_step},
                verified=() if isinstance(keep, Keep) and keep.verify else {step},
                abandoned=lambda attempt: (made := generation_of(attempt)) is not None and made < generation,
            ).removed  # fmt: skip
        return []

    def discard_after(self, step: int) -> None:
        """Remove every checkpoint newer than `step`: what it holds is not to be trusted, and nobody may resume it."""
        with self._storage(step):
            for newer in [found for found in list_steps(self._store) if found > step]:
                discard(self._store, newer)
