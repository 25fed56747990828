"""The commit of a checkpoint, beside training: one thread, one commit at a time, stopped where its generation ends.

When all shares of a checkpoint are durable, whoever publishes creates the manifest and then removes what retention lets
go. Both are calls to storage, and storage may be slow: the training thread hands them over and goes on. A failure waits
for the training thread, which asks at every step. When the generation ends, the thread may finish the call that it is
in, and begins no other: from there on whether the manifest exists can be seen in the store, and does not change.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from elastictrain.errors import ClusterError
from elastictrain_checkpoint import CheckpointError, Store, load


class GivenUp(Exception):
    """The generation that commits is over."""


class Committer:
    """Runs the commits of one worker, one by one, in the background.

    Args:
        store: the work gets it guarded, so that it ends at its next call when the commit is given up.

    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread: threading.Thread | None = None
        self._shut = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        self._committed: list[int] = []

    @property
    def is_busy(self) -> bool:
        """Whether a commit is under way."""
        return not self._idle.is_set()

    def begin(self, step: int, work: Callable[[Store], bool]) -> None:
        """Do `work` in the background; no other may be under way. It says whether `step` is committed."""
        assert not self.is_busy, "commits follow one another"
        self._shut = threading.Event()
        self._idle.clear()
        arguments = (step, work, self._shut)
        self._thread = threading.Thread(target=self._run, args=arguments, name="elastictrain-commit", daemon=True)
        self._thread.start()

    def _run(self, step: int, work: Callable[[Store], bool], shut: threading.Event) -> None:
        def go_on() -> None:
            if shut.is_set():
                raise GivenUp

        try:
            if work(self._store.guarded(go_on)):
                self._committed.append(step)
        except GivenUp:
            pass
        except BaseException as error:  # whatever it is, it must reach the thread that trains
            self._error = error
        finally:
            self._idle.set()

    def committed(self) -> list[int]:
        """Steps whose commits have ended well since the last call. Raises what a commit has failed with, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        steps, self._committed = self._committed, []
        return steps

    def wait(self, check: Callable[[], None], deadline_s: float) -> list[int]:
        """Wait until no commit is under way, and give what `committed` gives. `check` is called now and then, and may
        raise. Raises ClusterError when the storage takes longer than `deadline_s`.
        """
        waited_s, pause_s = 0.0, 0.1
        while not self._idle.wait(pause_s):
            check()
            waited_s += pause_s
            if waited_s >= deadline_s:
                raise ClusterError(
                    f"the commit of a checkpoint in {self._store.url!r} has taken {deadline_s:g} s and has not ended: "
                    "the storage does not answer. See to it, or set checkpoint.path to another one"
                )
        return self.committed()

    def give_up(self, deadline_s: float) -> None:
        """Begin no further call to the storage, and wait for the one that is under way. What has failed by then has
        failed with its generation: nobody is told.
        """
        self._shut.set()
        self._idle.wait(deadline_s)
        self._error, self._committed = None, []


@dataclass(frozen=True, slots=True)
class Begun:
    """The newest checkpoint that a worker has begun to write. `travelled`: all shares were durable, and whoever
    published had them.
    """

    step: int
    attempt: str
    generation: int
    travelled: bool = False

    def is_committed(self, store: Store) -> bool:
        """Whether its manifest is in the store. A store that cannot be asked does not have it."""
        with suppress(OSError, CheckpointError):
            return load(store, self.step).attempt == self.attempt
        return False


@dataclass(frozen=True, slots=True)
class Account:
    """What one member knows at a seal of a checkpoint that was under way: its `step` (0: of none), the generation in
    which it was begun, whether its shares had travelled, and whether its manifest is there (the publisher has looked).
    """

    step: int = 0
    generation: int = 0
    travelled: bool = False
    found: bool = False

    @classmethod
    def of(cls, begun: Begun | None, known_step: int, found: Callable[[Begun], bool]) -> Account:
        """Of a worker that has begun `begun`, where the controller knows of checkpoints up to `known_step`."""
        if begun is None or begun.step <= known_step:
            return cls()
        return cls(begun.step, begun.generation, begun.travelled, found(begun))

    def to_bytes(self) -> bytes:
        return json.dumps([self.step, self.generation, self.travelled, self.found]).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Account:
        values: list[Any] = json.loads(raw)
        return cls(*values)


def settled(accounts: Sequence[Account]) -> Account:
    """What has become of the newest checkpoint that was under way, from what all members know. A member that was slower
    than others may never have begun it.
    """
    newest = max(accounts, key=lambda one: (one.step, one.generation), default=Account())
    same = [one for one in accounts if (one.step, one.generation) == (newest.step, newest.generation)]
    return Account(newest.step, newest.generation, _any(same, "travelled"), _any(same, "found"))


def _any(accounts: Iterable[Account], name: str) -> bool:
    return any(getattr(one, name) for one in accounts)
