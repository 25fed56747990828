"""What one worker stores: its share of a checkpoint, written beside training, and for whoever publishes the commit."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from elastictrain.engine.committing import STORE_DEADLINE_S, Account, Begun, Committer, Open
from elastictrain.engine.copies import Copies
from elastictrain.engine.retention import policy_of
from elastictrain.engine.saving import Owned, open_store, stored_aliases
from elastictrain.engine.to_host import ToHost
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
    withdraw,
)
from elastictrain_checkpoint.errors import SaveFailed
from elastictrain_checkpoint.handle import SaveHandle
from elastictrain_checkpoint.lazy import LazySaver
from elastictrain_checkpoint.paths import parse_step_folder


def attempt_of(generation: int) -> str:
    """The name of a generation's attempts."""
    return f"g{generation:06d}"


def generation_of(attempt: str) -> int | None:
    """The generation behind the name of an attempt; None if it is not one of a run's."""
    digits = attempt.removeprefix("g")
    named = digits.isdecimal() and digits.isascii()
    return int(digits) if named and attempt_of(int(digits)) == attempt else None


UNDER_WAY = 3
"""Checkpoints at a time of which it may not be known what becomes of them: one's manifest is there and nobody has said
so, one's is being made, one is being written.
"""
INCREMENTS = "increments"
"""In a manifest's info: so many checkpoints in a row, this one included, refer to earlier ones; 0: it stands alone."""


class NotNow(Exception):
    """This checkpoint cannot be committed, and the run goes on without it."""


class BaseLost(NotNow):
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

    def share(self, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The share as JSON data, durable. `check` is called while waiting for it, and may raise. Raises ClusterError
        when it could not be written.
        """
        return self.saver.share_of(self, check)


class Saver:
    """Writes this worker's share of a checkpoint, and commits it when all shares are known to be durable."""

    def __init__(self, settings: Checkpoint, probe: Callable[[int, str], None] | None = None) -> None:
        """`probe(step, phase)` is called in the phases of storing, in whatever thread they happen."""
        self._settings = settings
        self._probe = probe or (lambda _step, _phase: None)
        self._store = open_store(settings)
        self._lazy = LazySaver(self._store if probe is None else ProbedStore(settings, probe), max_copy=1.0)
        self._to_host = ToHost()
        self._committer = Committer(self._store)
        self._bases = Bases(self._store, settings.full_every) if settings.incremental else None
        self.copies = Copies(settings, self._store)
        self.begun: tuple[Begun, ...] = ()
        """The newest checkpoints that this worker has begun to write, the oldest first; see `noted`."""
        self.lost: tuple[Account, ...] = ()
        """Checkpoints that have come to nothing and are not settled yet; see `committing.still_lost`."""
        self._distrusted: list[tuple[int, int]] = []

    def to_host(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Begin to copy state from a device, for the `begin` that comes next; see `Owned.to_host`."""
        return self._to_host.begin(tensors, fresh=self._lazy.is_busy)

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
                owned.pieces, step=step, attempt=attempt, writer=writer, stable=owned.copies, base=base,
                ready=self._to_host.copied() if owned.is_staged else None,
            )  # fmt: skip
        self.begun = (*self.begun[1 - UNDER_WAY :], Begun(step, attempt, generation))
        return Writing(self, handle, attempt, dict(owned.numbers))

    def before_apply(self) -> None:
        """The state is about to change: copy what is not written yet. Never waits for storage."""
        self._to_host.before_apply()
        self._lazy.before_mutation()

    def give_up(self) -> list[int]:
        """The generation is over: what it still writes will not be whole, and what it still commits may be, or not (see
        `open`). Nobody waits here. Gives the steps of what it still wrote.
        """
        given_up = [handle.step for handle in self._lazy.give_up()]
        self._committer.give_up()
        return given_up

    @property
    def open(self) -> Open | None:
        """The call to the storage that was left under way in a generation before this one, while it is not answered."""
        return self._committer.open

    def share_of(self, writing: Writing, check: Callable[[], None]) -> dict[str, Any]:
        """See `Writing.share`."""
        with self._storage(writing.handle.step):
            try:
                part: Part = writing.handle.result(STORE_DEADLINE_S, check)
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
        committed: Callable[[int, str], None],
        removed: Callable[[Sequence[int]], None],
        refused: Callable[[str], None],
        known_step: int = 0,
        late: Begun | None = None,
        elsewhere: Collection[Open] = (),
        final: bool = False,
        check: Callable[[], None],
        **facts: Any,
    ) -> None:
        """Create the manifest, in the background: from there on the checkpoint exists; then let retention remove what
        may go. Waits for the commit before it, if that is still under way.

        `committed` gets the step and the path as soon as the manifest is there, `removed` the steps that are in no
        store any more, if any; `refused` why nothing was committed, where the run goes on without it. All are called
        beside training.
        `check` is called while waiting, and may raise. `known_step` stays: the save that begins next may refer to it.
        `late`: a checkpoint whose manifest may have come to be after its generation; `committed` hears of it as well.
        `elsewhere`: calls that other members have left open. `final`: it is the last of the job. `facts`: step,
        generation, tree, aliases, info.
        """
        self.wait_for_commit(check)

        def work(store: Store) -> bool:
            there = late.step if late is not None and late.is_committed(store) else None
            if there is not None:
                committed(there, self.path_of(there))
            # A late manifest of this very step holds the same bits: to replace it would be to have none for a moment.
            if there != facts["step"]:
                try:
                    if any(call.step == facts["step"] for call in elsewhere):
                        raise NotNow("a call to the storage that an earlier generation made there is not answered yet")
                    committed(facts["step"], self._create(store, shares, **facts))
                except NotNow as error:
                    refused(str(error))
                    return False
            gone = self._prune(store, facts["step"], facts["generation"], known_step, elsewhere)
            if gone := self.copies.lost(gone):
                removed(gone)
            self.copies.look(facts["step"] if final else None)
            return True

        answered = partial(self._settle, facts["step"], facts["generation"])
        self._committer.begin(facts["step"], facts["generation"], work, answered)

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
        self.begun = tuple(replace(one, travelled=True) if one.step == step else one for one in self.begun)

    def noted(self, step: int) -> None:
        """All members know that the checkpoint of `step` is committed, and so what has become of older ones."""
        newer = tuple(one for one in self.begun if one.step >= step)
        self.begun = tuple(replace(one, noted=True) if one.step == step else one for one in newer)

    def is_committed(self, begun: Begun) -> bool:
        """Whether the manifest of a checkpoint that was begun is in the store."""
        return begun.is_committed(self._store)

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

    def _prune(
        self, store: Store, step: int, generation: int, known_step: int, elsewhere: Collection[Open]
    ) -> list[int]:
        """Gives the steps that are gone. What cannot be cleaned away now is cleaned away next time."""
        keep, spared = self._settings.keep, {call.generation for call in elsewhere}

        def is_abandoned(attempt: str) -> bool:
            """Nobody writes for an older generation any more: what it has left without a manifest is garbage, unless a
            call that is still open may create one.
            """
            made = generation_of(attempt)
            return made is not None and made < generation and made not in spared

        with suppress(OSError, CheckpointError):
            base = () if self._bases is None else (known_step,)
            return prune(
                store, keep=policy_of(keep), current=step, protect={*base, *self.copies.needed()},
                verified=() if isinstance(keep, Keep) and keep.verify else {step}, abandoned=is_abandoned,
            ).removed  # fmt: skip
        return []

    def _settle(self, step: int, generation: int) -> None:
        """A commit was given up in a call that is answered now. The manifest that it may have created must not stay if
        it is not to be trusted, or if its packs were removed meanwhile: who is out of reach is waited for by nobody.
        """
        places = [place for place in self._distrusted if step > place[0] and generation < place[1]]
        with self._storage(step) if places else suppress(OSError):
            if withdraw(self._store, step, attempt_of(generation), if_torn=not places) and places:
                self.copies.distrust(*places[-1])

    def distrust(self, step: int, generation: int) -> None:
        """What was stored after `step` before `generation` is not to be trusted: the calls that this worker has left
        open shall leave nothing of it. For every member, before whoever publishes discards what is there.
        """
        self._distrusted.append((step, generation))
        self._committer.see_to_the_answered()

    def discard_after(self, step: int, generation: int) -> None:
        """Remove every checkpoint newer than `step` that was stored before `generation`, wherever it lies: what it
        holds is not to be trusted, and nobody may resume it. (What a call may yet make that is not answered, whoever
        made it removes: see `distrust`.)
        """
        with self._storage(step):
            for newer in [found for found in list_steps(self._store) if found > step]:
                discard(self._store, newer)
        self.copies.distrust(step, generation)
