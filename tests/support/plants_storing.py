"""Delays and accidents of storing, to plant in a worker process (see `plants`)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from elastictrain.engine import (
    committing,
    keeping,
    saver,
    session,
    stepping,
)
from elastictrain_checkpoint import discard, list_steps, pin, posix
from tests.support.plants import Calls, Deliveries, orders


def storage_is_fast(worker: int) -> None:
    """What is to be stored is written before the next vote: a fault then finds the checkpoint that a test counts on."""
    saver.Writing.done = property(lambda writing: writing.handle._ended.wait(60))  # type: ignore[method-assign, assignment]


def commits_are_fast(worker: int) -> None:
    """What is to be stored is written before the next vote, and committed and known before the one after it: the next
    save finds its base, and a fault the checkpoint to go back to.
    """
    storage_is_fast(worker)
    commits_are_known(worker)


def commits_are_known(worker: int) -> None:
    """No step is taken beside a commit: the controller knows of it first."""
    del worker
    heed, sent = keeping.Keeper.heed, Deliveries()
    seen: list[Any] = [None]

    def after_the_commit(self: keeping.Keeper) -> None:
        if self._session.saver is not None:
            work = self._session.saver._committer._work
            assert work is None or work.ended.wait(60)
            if work is not seen[0]:
                seen[0] = work
                sent.wait_for_all()
        heed(self)

    keeping.Keeper.heed = after_the_commit  # type: ignore[method-assign]


def commits_are_seen(worker: int) -> None:
    """Nobody goes on from a step in which a commit was handed over before the manifest is there: whoever dies in the
    next step leaves it. (Others than the publisher may else be a step ahead of it.)
    """
    del worker
    heed = keeping.Keeper.heed

    def after_the_manifest(self: keeping.Keeper) -> None:
        saver = self._session.saver
        handed = [] if saver is None else [one for one in saver.begun if one.step == self._handed]
        while saver is not None and handed and not saver.is_committed(handed[0]):
            self._session.check()
            threading.Event().wait(0.01)
        heed(self)

    keeping.Keeper.heed = after_the_manifest  # type: ignore[method-assign]


def all_is_known_before(step: int) -> Callable[[int], None]:
    """Nobody begins `step` before all that it had to say has been sent, rows of metrics too."""
    return partial(_all_is_known_before, step)


def _all_is_known_before(step: int, worker: int) -> None:
    del worker
    heed, sent = keeping.Keeper.heed, Deliveries()

    def after_all(self: keeping.Keeper) -> None:
        if self._session.computing == step:
            sent.wait_for_all()
        heed(self)

    keeping.Keeper.heed = after_all  # type: ignore[method-assign]


def storage_waits(step: int, until: int) -> Callable[[int], None]:
    """The packs of checkpoint `step` are not taken by the storage before the worker has applied step `until`."""
    return partial(_storage_waits, step, until)


def _storage_waits(step: int, until: int, worker: int) -> None:
    inner, apply, seen = posix.PosixBackend.create, stepping.apply_step, [0]

    def counted(owner: Any, pending: Any, *rest: Any) -> Any:
        tally = apply(owner, pending, *rest)
        seen[0] = pending.step
        return tally

    def create(self: Any, path: str, blocks: Any) -> int:
        if path.startswith(f"step-{step:08d}/"):
            applied.wait(lambda: seen[0] >= until)
        return inner(self, path, blocks)

    stepping.apply_step = counted  # type: ignore[assignment]
    applied = Calls(stepping, "apply_step")
    posix.PosixBackend.create = create  # type: ignore[method-assign]


def peers_wait_for(victim: int, step: int) -> Callable[[int], None]:
    """Nobody but `victim` goes on from storing `step` before it is told to park: the fault of `victim` comes first."""
    return partial(_peers_wait_for, victim, step)


def _peers_wait_for(victim: int, at: int, worker: int) -> None:
    told, begin = orders(), keeping.Keeper.begin

    def wait(self: keeping.Keeper, step: int, *rest: Any) -> None:
        begin(self, step, *rest)
        owner = self._session
        if step == at and owner.generation == 1:
            told.wait(owner.is_parked)

    if worker != victim:
        keeping.Keeper.begin = wait  # type: ignore[method-assign]


def manifest_waits_for_the_end(step: int) -> Callable[[int], None]:
    """The commit of checkpoint `step` goes on when its generation is over: it was given up by then."""
    return partial(_manifest_waits_for_the_end, step)


def _manifest_waits_for_the_end(step: int, worker: int) -> None:
    del worker
    over, create = threading.Event(), saver.Saver._create
    given_up = committing.Committer.give_up

    def leave(self: committing.Committer) -> None:
        given_up(self)
        over.set()

    def wait(self: saver.Saver, store: Any, shares: Any, **facts: Any) -> str:
        if facts["step"] == step:
            assert over.wait(60)
        return create(self, store, shares, **facts)

    committing.Committer.give_up = leave  # type: ignore[method-assign]
    saver.Saver._create = wait  # type: ignore[method-assign]


def manifest_waits_for_the_next_save(step: int) -> Callable[[int], None]:
    """The manifest of checkpoint `step` is made when the save after it has begun."""
    return partial(_manifest_waits_for_the_next_save, step)


def _manifest_waits_for_the_next_save(at: int, worker: int) -> None:
    del worker
    begun, begin, create = threading.Event(), keeping.Keeper.begin, saver.Saver._create

    def and_say(self: keeping.Keeper, step: int, *rest: Any) -> None:
        begin(self, step, *rest)
        if step > at:
            begun.set()

    def wait(self: saver.Saver, store: Any, shares: Any, **facts: Any) -> str:
        assert facts["step"] != at or begun.wait(60)
        return create(self, store, shares, **facts)

    keeping.Keeper.begin = and_say  # type: ignore[method-assign]
    saver.Saver._create = wait  # type: ignore[method-assign]


def pins(step: int) -> Callable[[int], None]:
    """Somebody pins the checkpoint of `step` as soon as it is there."""
    return partial(_pins, step)


def _pins(step: int, worker: int) -> None:
    del worker
    create = saver.Saver._create

    def and_pin(self: saver.Saver, store: Any, shares: Any, **facts: Any) -> str:
        path = create(self, store, shares, **facts)
        if facts["step"] == step:
            pin(store, step)
        return path

    saver.Saver._create = and_pin  # type: ignore[method-assign]


def base_vanishes(step: int) -> Callable[[int], None]:
    """Somebody removes all earlier checkpoints just before the one of `step` is committed."""
    return partial(_base_vanishes, step)


def _base_vanishes(step: int, worker: int) -> None:
    del worker
    create = saver.Saver._create

    def without_base(self: saver.Saver, store: Any, shares: Any, **facts: Any) -> str:
        if facts["step"] == step:
            for earlier in list_steps(store):
                discard(store, earlier)
        return create(self, store, shares, **facts)

    saver.Saver._create = without_base  # type: ignore[method-assign]


def manifest_has_no_room(worker: int) -> None:
    """The disk is full when a manifest is created. Peers hear of what that comes to when it has been said."""
    del worker
    leave, sent = session.Session._leave, Deliveries()

    def last(self: session.Session, generation: int) -> None:
        sent.wait_for_all()
        leave(self, generation)

    def full(self: Any, path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device", path)

    posix.PosixBackend.publish = full  # type: ignore[method-assign]
    session.Session._leave = last  # type: ignore[method-assign]


def manifest_hangs(step: int, until: int) -> Callable[[int], None]:
    """The call that creates the manifest of `step` in the first generation is not answered before this worker has
    applied step `until`; nobody goes on in that generation before the call is made.
    """
    return partial(_manifest_hangs, step, until)


def _manifest_hangs(step: int, until: int, worker: int) -> None:
    if worker:
        return
    inner, apply, seen, made = posix.PosixBackend.publish, stepping.apply_step, [0], threading.Event()
    heed, first = keeping.Keeper.heed, [True]

    def counted(owner: Any, pending: Any, *rest: Any) -> Any:
        tally = apply(owner, pending, *rest)
        seen[0] = pending.step
        return tally

    def publish(self: Any, path: str, data: bytes) -> None:
        if path.startswith(f"step-{step:08d}/") and first.pop():
            first.append(False)
            made.set()
            applied.wait(lambda: seen[0] >= until)
        inner(self, path, data)

    def after_the_call(self: keeping.Keeper) -> None:
        if self._handed == step and self._session.generation == 1:
            assert made.wait(60)
        heed(self)

    stepping.apply_step = counted  # type: ignore[assignment]
    applied = Calls(stepping, "apply_step")
    posix.PosixBackend.publish = publish  # type: ignore[method-assign]
    keeping.Keeper.heed = after_the_call  # type: ignore[method-assign]


def manifest_hangs_until_the_next_seal(step: int) -> Callable[[int], None]:
    """The call that creates the manifest of `step` in the first generation is answered when the next one is sealed, and
    nobody trains in that one before what comes of it was seen to.
    """
    return partial(_manifest_hangs_until_the_next_seal, step)


def _manifest_hangs_until_the_next_seal(step: int, worker: int) -> None:
    if worker:
        return
    inner, heed, settle = posix.PosixBackend.publish, keeping.Keeper.heed, keeping.Keeper.settle
    made, sealed = threading.Event(), threading.Event()

    def publish(self: Any, path: str, data: bytes) -> None:
        if path == f"step-{step:08d}/MANIFEST.json" and not made.is_set():
            made.set()
            assert sealed.wait(60)
        inner(self, path, data)

    def after_the_call(self: keeping.Keeper) -> None:
        if self._handed == step and self._session.generation == 1:
            assert made.wait(60)
        heed(self)

    def and_answer(self: keeping.Keeper) -> None:
        settle(self)
        if self._plan.generation > 1:
            sealed.set()
            for work in self._saver._committer._left:
                assert work.ended.wait(60)

    posix.PosixBackend.publish = publish  # type: ignore[method-assign]
    keeping.Keeper.heed = after_the_call  # type: ignore[method-assign]
    keeping.Keeper.settle = and_answer  # type: ignore[method-assign]


def dies_before_it_says_what_was_lost(victim: int) -> Callable[[int], None]:
    """`victim`, which publishes, is killed when all members know what has come to nothing, and the controller not."""
    return partial(_dies_before_it_says_what_was_lost, victim)


def _dies_before_it_says_what_was_lost(victim: int, worker: int) -> None:
    tell = keeping.Keeper._tell

    def die(self: keeping.Keeper, what: Any) -> None:
        if self._lost:
            os.kill(os.getpid(), signal.SIGKILL)
        tell(self, what)

    if worker == victim:
        keeping.Keeper._tell = die  # type: ignore[method-assign]


def dies_waiting_for_shares(victim: int) -> Callable[[int], None]:
    """`victim` is killed where all wait for a checkpoint that is still being written, before the next one begins."""
    return partial(_dies_waiting_for_shares, victim)


def _dies_waiting_for_shares(victim: int, worker: int) -> None:
    finish = keeping.Keeper.finish_writing

    def die(self: keeping.Keeper) -> Any:
        if self._storing is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self)

    if worker == victim:
        keeping.Keeper.finish_writing = die  # type: ignore[method-assign]
