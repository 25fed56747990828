"""A further store that is kept in step with a nearer one, in the background.

What is to be copied is read off the two stores, anew in every pass: so a process that ends in the middle of a copy
leaves nothing to remember, and whoever follows next takes up what is missing. Copies are those of `transfer`: packs
first, every block checked, the manifest last and once. The further store has a retention of its own, which runs after
every copy.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from elastictrain_checkpoint.catalogue import Entry, catalogue, happened
from elastictrain_checkpoint.commit import list_steps, load
from elastictrain_checkpoint.copying import Stopped
from elastictrain_checkpoint.errors import CorruptData, NoCheckpoint
from elastictrain_checkpoint.following import in_words, pause_s, rest_s, wanted, work_s
from elastictrain_checkpoint.policies import Policy
from elastictrain_checkpoint.retain import discard, prune
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.tiers import heal
from elastictrain_checkpoint.transfer import copy_checkpoint

MOST_TRIES = 2
"""A step is begun no more often in one pass: once as it is, and once more when it has been healed."""
SHARE = 0.25
"""Of a processor, at most, that copying takes while others train."""
SILENT_S = 60.0
"""A store that has done nothing for so long, in the middle of a call, is said not to answer."""


@dataclass(frozen=True)
class Standing:
    """How a further store is.

    Attributes:
        copied: its newest step; None while that is not known, or there is none.
        waiting: steps that are still to be copied there, ascending.
        error: why it does not get on; empty while it does.

    """

    copied: int | None = None
    waiting: tuple[int, ...] = ()
    error: str = ""


class Follower:
    """Copies to ``target`` what it is to have of ``source``, in a thread of its own, while it is told to `serve`.

    A store that fails is tried again, later and later (`following.pause_s`), without end. At most one of several
    processes should serve; that two do for a moment does no harm.

    Args:
        source, target: where from and where to.
        keep: which checkpoints ``target`` keeps.
        apart_steps: copy no step that is less than so many after the last one that was.
        others: further stores, which may have whole what is damaged in ``source``.
        removed: called in the thread with the steps that the retention of ``target`` has removed.
        share: of a processor, at most, until somebody is in a hurry (`hurry`); from above 0 to 1, which never rests.
        clock: seconds that never go back.
        worked: seconds that a processor has worked for the thread that asks.

    """

    def __init__(
        self,
        source: Store,
        target: Store,
        keep: Policy,
        *,
        apart_steps: int = 1,
        others: Sequence[Store] = (),
        removed: Callable[[list[int]], None] = lambda _: None,
        share: float = SHARE,
        clock: Callable[[], float] = time.monotonic,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share={share} is not a part of a processor, from above 0 to 1")
        self._source, self._target, self._keep, self._apart_steps = source, target, keep, apart_steps
        self._others, self._removed, self._clock = tuple(others), removed, clock
        self._share, self._worked, self._worked_s = share, worked, 0.0
        self._changed = threading.Condition()
        self._over: threading.Event | None = None
        self._asked = self._at_once = self._is_idle = self._has_failed = self._hurried = False
        self._final: int | None = None
        self._back_to: tuple[int, int] | None = None
        self._there: list[Entry] | None = None
        self._busy: int | None = None
        self._bad: set[tuple[int, str]] = set()
        self._heal: set[int] = set()
        self._moved_s = 0.0
        self._standing = Standing()

    # --- orders ---

    def serve(self) -> None:
        """Copy what is missing, and what comes (see `look`); returns at once. Fine if it serves already."""
        with self._changed:
            if self._over is not None:
                return
            self._over, self._asked, self._is_idle, self._there = threading.Event(), True, False, None
            self._hurried = False
            self._moved_s = self._clock()
            threading.Thread(target=self._work, args=(self._over,), name="elastictrain-copies", daemon=True).start()

    def rest(self) -> None:
        """Begin no further call to the stores, and end the copy that is under way at its next block; returns at once.
        What is copied by then is used by whoever serves next.
        """
        with self._changed:
            if self._over is not None:
                self._over.set()
            self._over, self._busy, self._is_idle, self._has_failed = None, None, False, False
            self._changed.notify_all()

    def look(self, final: int | None = None) -> None:
        """The source has something new. ``final``: a step that is copied however near it is to the one before."""
        with self._changed:
            self._asked, self._is_idle = True, False
            self._final = self._final if final is None else final
            self._changed.notify_all()

    def mend(self, step: int) -> None:
        """Write what is damaged of a step in the source anew, from the target and the others, before anything else."""
        with self._changed:
            self._heal.add(step)
        self.look()

    def go_back(self, step: int, generation: int) -> None:
        """What the target has after ``step``, of generations before ``generation``, is not to be trusted: it goes
        before anything else is done there.
        """
        with self._changed:
            self._back_to = (step, generation)
        self.look()

    # --- questions ---

    @property
    def standing(self) -> Standing:
        """How the target is now."""
        standing = self._standing
        if self.is_silent:
            standing = replace(standing, error=f"{self._target.url} has not answered for {SILENT_S:g} s")
        return standing

    @property
    def is_silent(self) -> bool:
        """Whether a call to one of the stores takes so long that nobody should wait for it."""
        with self._changed:
            works = self._over is not None and not self._is_idle and not self._has_failed
            return works and self._clock() - self._moved_s > SILENT_S

    def holds(self, step: int) -> bool:
        """Whether the target may have this step: it was seen to, or nobody has looked yet (see `is_known`)."""
        with self._changed:
            return self._there is None or any(entry.step == step for entry in self._there)

    @property
    def is_known(self) -> bool:
        """Whether it was seen what the target has."""
        with self._changed:
            return self._there is not None

    def needed(self, near: Sequence[Entry], now_s: float) -> set[int]:
        """Steps of the source, whose entries these are, that must stay until they are copied."""
        with self._changed:
            there, busy, final, bad = self._there or [], self._busy, self._final, set(self._bad)
        attempts = {entry.step: entry.attempt for entry in near}
        steps = wanted(near, there, self._keep, now_s, apart_steps=self._apart_steps, final=final)
        return {step for step in steps if (step, attempts[step]) not in bad} | ({busy} if busy is not None else set())

    def hurry(self) -> None:
        """Try again at once what has failed, and rest no more between two blocks: nobody trains any longer."""
        with self._changed:
            self._hurried = True
            if self._has_failed:
                self._at_once, self._has_failed = True, False
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is nothing to copy any more, or the target has failed; whether that came to be in time. True
        at once if it does not serve.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: self._over is None or self._has_failed or (self._is_idle and not self._asked),
                timeout_s,
            )

    # --- the thread ---

    def _work(self, over: threading.Event) -> None:
        failures = 0
        while True:
            if self._is_over(over, failures):
                return
            try:
                self._pass(over)
                failures = 0
            except Stopped:
                return
            except Exception as error:  # whatever it is: nobody's training ends by a further store
                failures += 1
                self._fail(over, f"{type(error).__name__}: {error}")

    def _fail(self, over: threading.Event, why: str) -> None:
        self._set(over, _busy=None)
        waiting = self._standing.waiting
        with suppress(Exception):  # what waits can be said although the target cannot be asked
            waiting = tuple(sorted(self.needed(catalogue(self._source), time.time())))
        self._set(over, _has_failed=True, _standing=replace(self._standing, waiting=waiting, error=why))

    def _is_over(self, over: threading.Event, failures: int) -> bool:
        """Wait until there is something to do: what was asked for, or, after failures, the time to try again."""
        with self._changed:
            self._changed.wait_for(
                lambda: over.is_set() or self._at_once or (self._asked and not failures),
                pause_s(failures) if failures else None,
            )
            if over.is_set():
                return True
            self._asked = self._at_once = self._has_failed = False
            self._moved_s = self._clock()
            return False

    def _pass(self, over: threading.Event) -> None:
        """Copy until nothing is missing."""

        def check(*_: object) -> None:
            self._rest(over)

        self._worked_s = self._worked()
        source, target = self._source.guarded(check), self._target.guarded(check)
        self._go_back(target)
        self._mend(source, target, over, check)
        near, far = catalogue(source), catalogue(target)
        with self._changed:
            is_first = self._there is None
        if is_first:  # whoever served before may have ended between a copy and this
            self._prune(target, near)
            far = catalogue(target)
        tries: Counter[int] = Counter()
        while True:
            self._set(over, _there=far)
            with self._changed:
                final = self._final
            steps = wanted(near, far, self._keep, time.time(), apart_steps=self._apart_steps, final=final)
            attempts = {entry.step: entry.attempt for entry in near}
            left = [step for step in steps if (step, attempts[step]) not in self._bad and tries[step] < MOST_TRIES]
            copied = max((entry.step for entry in happened(far)), default=None)
            standing = Standing(copied, tuple(sorted(steps)), self._about_bad(steps, attempts))
            self._set(over, _standing=standing)
            if not left:
                with self._changed:
                    self._is_idle = not self._asked and not over.is_set()
                    self._changed.notify_all()
                return
            tries[left[0]] += 1
            self._set(over, _busy=left[0])
            if self._copy(source, target, left[0], attempts[left[0]], check):
                self._prune(target, near, left[0])
            near, far = catalogue(source), catalogue(target)
            self._set(over, _busy=None)

    def _rest(self, over: threading.Event) -> None:
        """Between two blocks, and two calls: rest so long that the share is kept."""
        worked_s = self._worked()
        pause_s = rest_s(worked_s - self._worked_s, self._share)
        self._worked_s = min(worked_s, self._worked_s + work_s(pause_s, self._share))
        with self._changed:
            self._changed.wait_for(lambda: over.is_set() or self._hurried, pause_s)
            if over.is_set():
                raise Stopped("somebody else copies now")
            self._moved_s = self._clock()

    def _copy(self, source: Store, target: Store, step: int, attempt: str, check: Callable[..., None]) -> bool:
        """Copy one step; whether it is there now."""
        try:
            copy_checkpoint(source, load(source, step), target, progress=check, replace_older=True)
        except NoCheckpoint:
            return False  # retention took it
        except CorruptData:
            others = [target, *(store.guarded(check) for store in self._others)]
            if step in list_steps(source) and heal(source, step, others).left:
                with self._changed:
                    self._bad.add((step, attempt))
            return False
        return True

    def _prune(self, target: Store, near: Sequence[Entry], copied: int | None = None) -> None:
        """Let the target's retention work. ``copied``: what was just written there, every block of it checked. Garbage
        waits for its lease, since a process that served before may still write it.
        """
        history = happened([*near, *catalogue(target)])
        verified = () if copied is None else (copied,)
        gone = prune(target, self._keep, verified=verified, current=_last_of(history, target)).removed
        if gone:
            with self._changed:  # first: whoever asks two targets that have removed a step at once must be told by one
                self._there = None if self._there is None else [one for one in self._there if one.step not in gone]
            self._removed(gone)

    def forget(self) -> None:
        """Do at once what `go_back` has ordered, in the calling thread. It is done once more before the next copy: the
        thread may be copying just such a step, and publish it after this.

        Raises:
            OSError: storage failed.

        """
        with self._changed:
            back_to = self._back_to
        if back_to is not None:
            self._discard_after(self._target, *back_to)

    def _discard_after(self, target: Store, step: int, generation: int) -> None:
        for entry in catalogue(target):
            if entry.step > step and entry.generation < generation:
                discard(target, entry.step)

    def _go_back(self, target: Store) -> None:
        """In the thread, which copies nothing meanwhile: what is gone now does not come again."""
        with self._changed:
            back_to = self._back_to
        if back_to is None:
            return
        self._discard_after(target, *back_to)
        with self._changed:
            if self._back_to == back_to:
                self._back_to = None

    def _mend(self, source: Store, target: Store, over: threading.Event, check: Callable[..., None]) -> None:
        """A step stays in the source while it is mended. What fails is tried again in the next pass, and holds up no
        copy: it may be the source that fails.
        """
        with self._changed:
            steps = sorted(self._heal)
        there = list_steps(source) if steps else []
        others = [target, *(store.guarded(check) for store in self._others)]
        for step in steps:
            if step in there:
                self._set(over, _busy=step)
                try:
                    heal(source, step, others)
                except NoCheckpoint:
                    pass  # retention took it, or it is sound nowhere
                except Stopped:
                    raise
                except Exception:  # fsspec's do not keep to OSError
                    continue
                finally:
                    self._set(over, _busy=None)
            with self._changed:
                self._heal.discard(step)

    def _about_bad(self, steps: Sequence[int], attempts: dict[int, str]) -> str:
        bad = [step for step in steps if (step, attempts[step]) in self._bad]
        if not bad:
            return ""
        return f"step {in_words(bad)}: damaged in {self._source.url}, and whole in no other store; it is not copied"

    def _set(self, over: threading.Event, **facts: object) -> None:
        """What this service has found, unless it is over and another one finds."""
        with self._changed:
            if not over.is_set():
                for name, value in facts.items():
                    setattr(self, name, value)
                self._changed.notify_all()


def _last_of(history: Sequence[Entry], target: Store) -> int | None:
    """The newest step of the history that the target has: later ones there, of lower generations, have not happened."""
    there = set(list_steps(target))
    return max((entry.step for entry in history if entry.step in there), default=None)
