"""Who has begun which lane, and who was done with it first: small words in the generation's store, one for each lane.

Every word is the claim of the last step in which the lane was shared (`redundancy.Claim`), and all members know it when
that step is over. So a claim is one compare-and-set: it replaces that word, or somebody else was quicker.

The store lives in the first member. When that one dies its connections end, and with them every question; when it is
frozen nothing ends by itself, so a thread of ours hangs up when an answer takes too long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from elastictrain.errors import PeerLost
from elastictrain.redundancy import Claim, read_claim

ANSWER_S = 20.0
"""Longest wait for the store's answer."""
_LOOK_S = 1.0
_NOTHING = "?"
"""Is never there: to set it in place of itself only asks what is there."""


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class ClaimBoard:
    """Of one worker in one generation. `store`: the generation's own part of its store. `hang_up`: ends the connection
    to it. Every question raises PeerLost when there is no answer.
    """

    def __init__(self, store: Store, hang_up: Callable[[], None], *, answer_s: float = ANSWER_S) -> None:
        self._store, self._hang_up, self._answer_s = store, hang_up, answer_s
        self._last: dict[str, str] = {}  # what all know to be there
        self._asked_at: float | None = None
        self._asking = threading.Lock()  # of `_asked_at`: a question does not end while its connection is cut
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self, key: str, claim: Claim) -> Claim:
        """Claim `key` if nobody else has in this step. Returns whose it is."""
        return self._replace(key, self._last.get(key, ""), claim)

    def finish(self, key: str, begun: Claim, done: Claim) -> Claim:
        """Say that `done` has computed what `begun` had claimed. Returns who was first."""
        return self._replace(key, begun.encode(), done)

    def read(self, key: str, step: int) -> Claim | None:
        """The claim of `key` in `step`; None when there is none yet."""
        found = read_claim(self._ask(key, _NOTHING, _NOTHING))
        return found if found is not None and found.step == step else None

    def settle(self, keys: Iterable[str], claims: Iterable[Claim]) -> None:
        """What all know to be there now: the step is over."""
        self._last.update({key: claim.encode() for key, claim in zip(keys, claims, strict=True)})

    def close(self) -> None:
        """No more questions, and nothing is cut any more; may be called twice."""
        with self._asking:
            self._ended.set()
        if self._thread is not None:
            self._thread.join(self._answer_s)

    def _replace(self, key: str, expected: str, claim: Claim) -> Claim:
        wanted = claim.encode()
        for _ in range(3):
            there = self._ask(key, expected, wanted)
            if there == wanted:
                return claim
            found = read_claim(there)
            if found is not None and found.step >= claim.step:
                return found
            expected = there  # of an older step, in which we knew nothing of it
        raise PeerLost(f"the claim of {key} in step {claim.step} is {expected!r}, again and again")

    def _ask(self, key: str, expected: str, desired: str) -> str:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="elastictrain-claims", daemon=True)
            self._thread.start()
        problem, answer = "", b""
        began = time.monotonic()
        with self._asking:
            self._asked_at = began
        try:
            answer = self._store.compare_set(key, expected, desired)
        except RuntimeError as error:
            problem = str(error).partition("\n")[0]
        finally:
            with self._asking:
                self._asked_at = None
        if problem:
            took_s = time.monotonic() - began
            raise PeerLost(f"the first member's store gave no answer about {key} for {took_s:.1f} s: {problem}")
        return answer.decode()

    def _watch(self) -> None:
        while not self._ended.wait(min(_LOOK_S, self._answer_s)):
            with self._asking:
                asked_at = self._asked_at
                is_late = asked_at is not None and time.monotonic() - asked_at > self._answer_s
                # Whoever asks waits for this to end: the next connection to that store is none that is cut here.
                if is_late and not self._ended.is_set():
                    self._hang_up()
