"""The further places of a run's checkpoints, as the worker sees them that publishes: what is copied there, how they
are, and what the first place must not lose before.

Copying happens in threads of its own (`elastictrain_checkpoint.Follower`), one for each place, while the worker is in a
generation and publishes; it rests in between, since one that was fenced hears of no later seal. What there is to say is
said by the training thread: at a seal, and at the steps at which something has changed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial

from elastictrain.engine.retention import policy_of
from elastictrain.job import Checkpoint
from elastictrain_checkpoint import Follower, Standing, Store, catalogue, list_steps
from elastictrain_checkpoint.asking import Asked
from elastictrain_checkpoint.following import let_go

ROOM = 2
"""The first place has room for so many checkpoints like the newest, or lets go of what is not copied yet."""
DISTRUST_S = 60.0
"""So long a place is waited for that is to forget what nobody may go on from."""
LOOK_S = 0.2


class Copies:
    """Of one worker. Without the setting `checkpoint.copy_to` there are none, and every call returns at once.

    Args:
        settings: the job's.
        first: the store that checkpoints are committed to.

    """

    def __init__(self, settings: Checkpoint, first: Store) -> None:
        self._first = first
        stores = [Store(copy.path, storage_options=copy.storage_options) for copy in settings.copy_to]
        self._followers = {
            copy.path: Follower(
                first,
                store,
                policy_of(copy.keep),
                apart_steps=copy.every_steps,
                others=[other for other in stores if other is not store],
                removed=partial(self._note_removed, copy.path),
            )
            for copy, store in zip(settings.copy_to, stores, strict=True)
        }
        self._lock = threading.Lock()
        self._gone: set[int] = set()
        self._unsure: set[int] = set()
        self._said: dict[str, Standing] = {}
        self._is_ending, self._done = False, set[str]()

    def __bool__(self) -> bool:
        return bool(self._followers)

    def serve(self) -> None:
        """This worker publishes: copy what is missing, and what will be committed."""
        self._said, self._is_ending = {}, False
        for follower in self._followers.values():
            follower.serve()

    def rest(self) -> None:
        """Somebody else publishes now. Does not wait."""
        for follower in self._followers.values():
            follower.rest()

    def look(self, final: int | None = None) -> None:
        """Something was committed. `final`: the last step of the job, which is copied however `every_steps` is."""
        self._is_ending = False
        for follower in self._followers.values():
            follower.look(final)

    def mend(self, step: int) -> None:
        """Blocks of `step` were damaged in the first place, and came from another one: write them anew there."""
        for follower in list(self._followers.values())[:1]:
            follower.mend(step)

    def distrust(self, step: int, generation: int) -> None:
        """Nobody may go on from what was stored after `step` by generations before `generation`: every place forgets
        it now, if it answers in time, or else before anything else is copied there.
        """
        for follower in self._followers.values():
            follower.go_back(step, generation)
        asked, until_s = [Asked(one.forget) for one in self._followers.values()], time.monotonic() + DISTRUST_S
        for question in asked:
            with suppress(OSError):
                question.answer(max(0.0, until_s - time.monotonic()))

    def needed(self) -> set[int]:
        """Steps that the first place keeps until they are copied; without those that its disk has no room for.

        Raises:
            OSError: the first place cannot be read.

        """
        if not self:
            return set()
        near, now_s = catalogue(self._first), time.time()
        steps = {step for follower in self._followers.values() for step in follower.needed(near, now_s)}
        waiting = [entry for entry in near if entry.step in steps]
        room_bytes = ROOM * near[-1].size_bytes if near else 0
        return steps - let_go(waiting, self._first.free_bytes(), room_bytes)

    def lost(self, removed: Collection[int]) -> list[int]:
        """Those of the steps, which the first place does not have any more, that no other place has either; and of
        earlier ones of which that could not be known when they were removed.
        """
        gone, unsure = self._nowhere(removed, list(self._followers.values()))
        with self._lock:
            earlier, self._unsure = self._unsure, set()
        found = self._settled(earlier)
        with self._lock:
            self._unsure |= unsure
        return sorted(gone | found)

    def _note_removed(self, path: str, steps: list[int]) -> None:
        """In a thread: retention has removed steps from this place."""
        others = [follower for name, follower in self._followers.items() if name != path]
        gone = self._settled(set(steps), others)
        with self._lock:
            self._gone |= gone

    def _settled(self, steps: set[int], others: Sequence[Follower] | None = None) -> set[int]:
        """Those that no place has, the first one included; what is not known yet is asked again at the next commit."""
        if not steps:
            return set()
        gone, unsure = self._nowhere(steps, list(self._followers.values()) if others is None else others)
        try:
            here = set(list_steps(self._first)) if gone else set()
        except Exception:  # the first place's error, which is said by those that commit there; fsspec's are any
            gone, unsure, here = set(), unsure | gone, set()
        with self._lock:
            self._unsure |= unsure
        return gone - here

    def _nowhere(self, steps: Collection[int], others: Sequence[Follower]) -> tuple[set[int], set[int]]:
        """Steps that none of these places has; and those of which it is not known, since nobody has looked there."""
        known = [one for one in others if one.is_known]
        free = {step for step in steps if not any(one.holds(step) for one in known)}
        return (free, set()) if len(known) == len(others) else (set(), free)

    def gone(self) -> list[int]:
        """Steps that no place has any more, since this was asked last."""
        with self._lock:
            gone, self._gone = self._gone, set()
        return sorted(gone)

    def news(self) -> Iterator[tuple[str, Standing]]:
        """The places that are not as they were when this was asked last, or since `serve`."""
        for path, follower in self._followers.items():
            standing = follower.standing
            if standing != self._said.get(path, Standing()):
                self._said[path] = standing
                yield path, standing

    def wait(self, check: Callable[[], None], timeout_s: float) -> bool:
        """Wait until all is copied, or a place has failed and tried once more; whether that came to be in time. `check`
        is called now and then, and may raise. May be called again after that time: what has failed is tried once more
        only in the first of these calls, and who is done is not waited for again, so that several
        places that fail, each at its own time, come to an end.
        """
        until_s = time.monotonic() + timeout_s
        if not self._is_ending:
            self._is_ending, self._done = True, set()
            for follower in self._followers.values():
                follower.hurry()
        for path, follower in self._followers.items():
            while path not in self._done and not follower.wait(LOOK_S):
                check()
                if follower.is_silent:
                    break
                if time.monotonic() >= until_s:
                    return False
            self._done.add(path)
        self._is_ending = False
        return True
