"""The commit of a checkpoint, beside training: one thread, one commit at a time, stopped where its generation ends.

When all shares of a checkpoint are durable, whoever publishes creates the manifest and then removes what retention lets
go. Both are calls to storage, and storage may be slow: the training thread hands them over and goes on. A failure waits
for the training thread, which asks at every step.

When the generation ends, the thread begins no further call, and nobody waits for the one that it is in. Usually it is
in none that changes anything; then whether the manifest exists can be seen in the store, and does not change any more.
A call that is still open may yet create that manifest. That tears nothing, as long as nobody removes its packs: so the
next commit of this worker begins when the call is answered, and another worker that publishes spares that attempt, and
commits nothing in the folder that the call is about, while it is open (`Open`, said at the seal). Whoever made the call
sees to what came of it when it is answered: what shall not be there by then is withdrawn.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass

from elastictrain.errors import ClusterError
from elastictrain_checkpoint import CheckpointError, Store, load
from elastictrain_checkpoint.paths import parse_step_folder

STORE_DEADLINE_S = 600.0
"""As long as peers wait for one that stores."""


class GivenUp(Exception):
    """The generation that commits is over."""


CHANGES = frozenset({"create", "publish", "put", "replace", "remove"})
"""Verbs of a store after which it may be another one than before."""


@dataclass(frozen=True, slots=True)
class Open:
    """A call that has begun in a generation that is over, and was not answered by then. It may still change something
    in the folder of `step` (0: in none), for the attempt of `generation`.
    """

    step: int
    generation: int


class _Work:
    """One commit in the background. `answered`: see `Committer.begin`."""

    def __init__(self, generation: int, answered: Callable[[], None]) -> None:
        self.generation, self.answered = generation, answered
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._is_over = False
        self._changing: int | None = None

    def before(self, verb: str, path: str) -> None:
        with self._lock:
            if self._is_over:
                raise GivenUp
            self._changing = parse_step_folder(path.partition("/")[0]) or 0 if verb in CHANGES else None

    def after(self) -> None:
        with self._lock:
            if not self._is_over:  # else it is open until what came of it was seen to
                self._changing = None

    def give_up(self) -> None:
        """Begin no further call."""
        with self._lock:
            self._is_over = True

    @property
    def left(self) -> Open | None:
        """The call that may change something and is under way, or was when this was given up."""
        with self._lock:
            return None if self._changing is None else Open(self._changing, self.generation)

    @property
    def open(self) -> Open | None:
        """The same while it is not answered, and what came of it not seen to."""
        return None if self.ended.is_set() else self.left


class Committer:
    """Runs the commits of one worker, one by one, in the background.

    Args:
        store: the work gets it guarded, so that it ends at its next call when the commit is given up.

    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._work: _Work | None = None
        self._left: list[_Work] = []
        self._error: BaseException | None = None
        self._committed: list[int] = []
        self._asked = 0

    @property
    def is_busy(self) -> bool:
        """Whether a commit is under way, of this generation."""
        return self._work is not None and not self._work.ended.is_set()

    def begin(
        self, step: int, generation: int, work: Callable[[Store], bool], answered: Callable[[], None] = lambda: None
    ) -> None:
        """Do `work` in the background; no other of this generation may be under way. It says whether `step` is
        committed. It begins when the calls that were left open are answered: from then on what they were to do is done
        or will never be. `answered` is called, in the background, when the work was given up in a call that may have
        changed something, and that call is answered.
        """
        assert not self.is_busy, "commits follow one another"
        self._work, left = _Work(generation, answered), [one for one in self._left if not one.ended.is_set()]
        arguments = (step, work, self._work, left)
        threading.Thread(target=self._run, args=arguments, name="elastictrain-commit", daemon=True).start()

    def _run(self, step: int, work: Callable[[Store], bool], mine: _Work, left: Sequence[_Work]) -> None:
        error, is_committed = None, False
        try:
            for one in left:
                if not one.ended.wait(STORE_DEADLINE_S):
                    raise ClusterError(_no_answer(self._store, STORE_DEADLINE_S))
            is_committed = work(self._store.guarded(mine.before, mine.after))
        except GivenUp:
            pass
        except BaseException as found:  # whatever it is, it must reach the thread that trains
            error = found
        with self._lock:
            if self._work is mine:
                self._error = error
                self._committed += [step] if is_committed else []
        while not mine.ended.is_set():
            asked = self._asked
            self._see_to(mine)
            with self._lock:
                if asked == self._asked:  # else it was asked for once more meanwhile
                    mine.ended.set()

    def _see_to(self, work: _Work) -> None:
        if work.left is None:
            return
        try:
            work.answered()
        except BaseException as error:  # of no generation: whichever trains is told
            with self._lock:
                self._error = error

    def see_to_the_answered(self) -> None:
        """What was left open by the generation before this one and is answered is seen to once more: what `answered`
        goes by may have changed since.
        """
        with self._lock:
            self._asked += 1
            answered = [one for one in self._left if one.ended.is_set()]
        for one in answered:
            self._see_to(one)

    def committed(self) -> list[int]:
        """Steps whose commits have ended well since the last call. Raises what a commit has failed with, once."""
        with self._lock:
            error, self._error = self._error, None
            if error is not None:
                raise error
            steps, self._committed = self._committed, []
        return steps

    def wait(self, check: Callable[[], None], deadline_s: float) -> list[int]:
        """Wait until no commit is under way, and give what `committed` gives. `check` is called now and then, and may
        raise. Raises ClusterError when the storage takes longer than `deadline_s`.
        """
        waited_s, pause_s, work = 0.0, 0.1, self._work
        while work is not None and not work.ended.wait(pause_s):
            check()
            waited_s += pause_s
            if waited_s >= deadline_s:
                raise ClusterError(_no_answer(self._store, deadline_s))
        return self.committed()

    def give_up(self) -> None:
        """The generation is over: begin no further call to the storage. Nobody waits for the one that is under way (see
        `open`). What has failed by then has failed with its generation: nobody is told.
        """
        with self._lock:
            work, self._work = self._work, None
            self._error, self._committed = None, []
        self._left = [one for one in self._left if not one.ended.is_set()]
        if work is not None:
            work.give_up()
            if not work.ended.is_set():
                self._left.append(work)

    @property
    def open(self) -> Open | None:
        """The call that was left under way and may still change something; the newest, if there are several."""
        found = [one.open for one in self._left]
        return next((one for one in reversed(found) if one is not None), None)


def _no_answer(store: Store, deadline_s: float) -> str:
    return (
        f"the commit of a checkpoint in {store.url!r} has taken {deadline_s:g} s and has not ended: "
        "the storage does not answer. See to it, or set checkpoint.path to another one"
    )


@dataclass(frozen=True, slots=True)
class Begun:
    """A checkpoint that a worker has begun to write. `travelled`: all shares were durable, and whoever published had
    them. `noted`: all members know that it was committed; whoever has committed it may die before the controller does.
    """

    step: int
    attempt: str
    generation: int
    travelled: bool = False
    noted: bool = False

    def is_committed(self, store: Store) -> bool:
        """Whether its manifest is in the store. A store that cannot be asked does not have it."""
        with suppress(OSError, CheckpointError):
            return load(store, self.step).attempt == self.attempt
        return False


@dataclass(frozen=True, slots=True)
class Account:
    """What one member knows at a seal of a checkpoint that was under way: its `step`, the generation in which it was
    begun, whether its shares had travelled, and whether its manifest is there (the publisher has looked).
    """

    step: int
    generation: int
    travelled: bool = False
    found: bool = False

    @classmethod
    def of(cls, begun: Sequence[Begun], known_step: int, found: Callable[[Begun], bool]) -> tuple[Account, ...]:
        """Of a worker that has begun `begun`, where the controller knows of checkpoints up to `known_step`. What was
        committed and is not found is not lost: it was removed since.
        """
        unknown = ((one, found(one)) for one in begun if one.step > known_step)
        return tuple(cls(one.step, one.generation, one.travelled, it) for one, it in unknown if it or not one.noted)


@dataclass(frozen=True, slots=True)
class Statement:
    """All that one member says at a seal of what was stored: its accounts, what else has come to nothing that the
    controller may not have heard of (see `lost`), and the call that it has left open.
    """

    accounts: tuple[Account, ...] = ()
    lost: tuple[Account, ...] = ()
    open: Open | None = None

    def to_bytes(self) -> bytes:
        left = None if self.open is None else [self.open.step, self.open.generation]
        return json.dumps([*([astuple(one) for one in these] for these in (self.accounts, self.lost)), left]).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Statement:
        of, lost, left = json.loads(raw)
        accounts = tuple(Account(*one) for one in of)
        return cls(accounts, tuple(Account(*one) for one in lost), None if left is None else Open(*left))


def settled(said: Iterable[Statement]) -> tuple[Account, ...]:
    """What has become of each checkpoint that was under way, the oldest first, from what all members know. More than
    one may have been: while the manifest of one is made the next is written. A member that was slower than others may
    never have begun the newest.
    """
    of: dict[tuple[int, int], list[Account]] = {}
    for account in (one for statement in said for one in statement.accounts):
        of.setdefault((account.step, account.generation), []).append(account)
    return tuple(Account(*place, _any(same, "travelled"), _any(same, "found")) for place, same in sorted(of.items()))


def still_lost(said: Sequence[Statement], known_step: int, heard: tuple[int, int]) -> tuple[Account, ...]:
    """Checkpoints that have come to nothing and are not settled yet, in the order in which they were begun: the
    controller has not heard of them (it has heard of all up to `heard`: generation and step), or nothing newer is
    committed (`known_step` is). What one member knows all know from this seal on.

    What is older than one that was found is not lost for not being found: retention may have removed it.
    """
    under_way = settled(said)
    newest = max((one.step for one in under_way if one.found), default=0)
    found = {(one.generation, one.step): one for statement in said for one in statement.lost}
    found |= {(one.generation, one.step): one for one in under_way if one.step > newest}
    return tuple(one for place, one in sorted(found.items()) if place > heard or one.step > known_step)


def _any(accounts: Iterable[Account], name: str) -> bool:
    return any(getattr(one, name) for one in accounts)
