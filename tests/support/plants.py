"""Delays and bugs to plant in a worker process (`run_job(patch=...)`). Functions at module level: they are pickled."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from elastictrain.controller import events as ev
from elastictrain.engine import (
    collective,
    commit,
    forming,
    held,
    inquest,
    outbox,
    session,
    step,
    stepping,
)
from elastictrain.engine.probes import Probes
from elastictrain.engine.verdict import Verdict
from elastictrain.errors import PeerLost
from elastictrain.protocol import Row


class Calls:
    """Wakes whoever waits for what a call of `methods` of `owner` may have changed: no polling."""

    def __init__(self, owner: Any, *methods: str) -> None:
        self._called = threading.Condition()
        for name in methods:
            setattr(owner, name, self._noted(getattr(owner, name)))

    def _noted(self, method: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                with self._called:
                    self._called.notify_all()

        return noted

    def wait(self, until: Callable[[], bool], timeout_s: float = 60.0) -> None:
        with self._called:
            self._called.wait_for(until, timeout_s)


def orders() -> Calls:
    """What the controller tells this worker's session."""
    return Calls(session.Session, "park", "ask_pause")


def both(first: Callable[[int], None], second: Callable[[int], None]) -> Callable[[int], None]:
    """Plant two things."""
    return partial(_both, first, second)


def _both(first: Any, second: Any, worker: int) -> None:
    first(worker)
    second(worker)


def hold_vote(workers: tuple[int, ...], at: int) -> Callable[[int], None]:
    """`workers` hold the whole vote of step `at`, but do not apply it before they are parked: survivors differ, for the
    others heed no order to park before they have applied it.
    """
    return partial(_hold_vote, workers, at)


def _hold_vote(workers: tuple[int, ...], at: int, worker: int) -> None:
    if worker not in workers:
        _park_after(at)
        return
    sessions: list[session.Session] = []
    make, original, told = session.Session.__init__, Probes.at, orders()

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        sessions.append(self)

    def wait(self: Probes, number: int, phase: str) -> None:
        if number == at and phase == "voted" and sessions[0].generation == 1:
            told.wait(lambda: sessions[0]._latched >= 1, 30)
        original(self, number, phase)

    session.Session.__init__ = remember  # type: ignore[method-assign]
    Probes.at = wait  # type: ignore[method-assign]


def _park_after(step: int) -> None:
    """In the first generation this worker heeds the order to park when it has applied `step`, or is over with."""
    applies, leave, park, over = stepping.apply_step, session.Session._leave, session.Session.park, threading.Event()

    def apply(owner: Any, pending: Any, *rest: Any) -> Any:
        tally = applies(owner, pending, *rest)
        if pending.step == step:
            over.set()
        return tally

    def left(self: session.Session, generation: int) -> None:
        over.set()
        leave(self, generation)

    def late(self: session.Session, generation: int) -> Any:
        assert over.wait(60)
        return park(self, generation)

    stepping.apply_step = apply
    session.Session._leave, session.Session.park = left, late  # type: ignore[method-assign]


def wait_for_waiting(at: int) -> Callable[[int], None]:
    """Nobody heeds the order to park after the fault in the mirror phase of step `at` before it waits for others in the
    vote, or has seen the fault itself: an order that is quicker would find nobody waiting.
    """
    return partial(_wait_for_waiting, at)


def _wait_for_waiting(at: int, worker: int) -> None:
    del worker
    mirrored, waits = threading.Event(), threading.Event()
    live, guard = collective.GroupSet._live_gloo, collective.GroupSet._guard
    park, original = session.Session.park, Probes.at

    def mark(self: Probes, number: int, phase: str) -> None:
        if (number, phase) == (at, "mirror"):
            mirrored.set()
        original(self, number, phase)

    def look(self: Any) -> Any:
        group = live(self)
        if mirrored.is_set():
            waits.set()
        return group

    def watched(self: Any, operation: Callable[[], None]) -> None:
        try:
            guard(self, operation)
        except PeerLost:
            waits.set()
            raise

    def late(self: session.Session, generation: int) -> Any:
        waits.wait(30)
        return park(self, generation)

    Probes.at = mark  # type: ignore[method-assign]
    collective.GroupSet._live_gloo = look  # type: ignore[method-assign]
    collective.GroupSet._guard = watched  # type: ignore[method-assign]
    session.Session.park = late  # type: ignore[method-assign]


def wait_for_company(size: int, generations: int = 1 << 30) -> Callable[[int], None]:
    """While the world is smaller than `size`, go no further than two steps into a generation: until the pause for a
    newcomer is asked for. (Steps of these tests take milliseconds, a new process takes seconds.) Only in the first
    `generations`.
    """
    return partial(_wait_for_company, size, generations)


def _wait_for_company(size: int, generations: int, worker: int) -> None:
    del worker

    def small(runner: Any, plan: Any, number: int) -> bool:
        return plan.generation <= generations and runner.layout.world_size < size and number - plan.step > 2

    _wait_for_pause(small)


def wait_for_pause(at: int) -> Callable[[int], None]:
    """Take no step from `at` on before a pause is asked for."""
    return partial(_wait_for_pause_at, at)


def _wait_for_pause_at(at: int, worker: int) -> None:
    del worker
    _wait_for_pause(lambda runner, plan, number: number >= at)


def _wait_for_pause(due: Callable[[Any, Any, int], bool]) -> None:
    """The first rank waits before a step for which `due(runner, plan, step)` until it is told to pause or to park."""
    seal, run, told = stepping.Stepping.__init__, stepping.StepRunner.run, orders()

    def note(self: Any, owner: Any, plan: Any, groups: Any) -> None:
        seal(self, owner, plan, groups)
        self.runner.company = owner, plan

    def wait(self: Any, number: int) -> Any:
        owner, plan = getattr(self, "company", (None, None))
        if plan is not None and self.rank == 0 and due(self, plan, number):
            told.wait(lambda: owner._pause_in == plan.generation or owner.is_parked())
        return run(self, number)

    stepping.Stepping.__init__ = note  # type: ignore[method-assign]
    stepping.StepRunner.run = wait  # type: ignore[method-assign]


def last_rows_are_lost(worker: int, generation: int) -> Callable[[int], None]:
    """`worker` dies in `generation`, and the rows that it had to publish in it die with it: they wait in its outbox."""
    return partial(_last_rows_are_lost, worker, generation)


def _last_rows_are_lost(which: int, generation: int, worker: int) -> None:
    put = outbox.Outbox.put

    def forgetful(self: outbox.Outbox, message: Any) -> None:
        published_in = message.values["generation"] if isinstance(message, Row) else None
        if isinstance(message, ev.Progress):
            published_in = message.generation
        if worker != which or published_in != generation:
            put(self, message)

    outbox.Outbox.put = forgetful  # type: ignore[method-assign]


def die_while_blocks_move(generation: int, victim: int, source: int) -> Callable[[int], None]:
    """While `generation` forms, `victim` dies before blocks move, and `source` sends nothing before it is told to park:
    who waits for its blocks has taken them up and has no values for them. Memory that is not filled reads NaN.
    """
    return partial(_die_while_blocks_move, generation, victim, source)


def _die_while_blocks_move(generation: int, victim: int, source: int, worker: int) -> None:
    move, take, told = forming._move, held.HeldState._master_for, orders()

    def interrupted(owner: Any, plan: Any, groups: Any) -> Any:
        if plan.generation == generation and worker == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.generation == generation and worker == source:
            told.wait(owner.is_parked)
        return move(owner, plan, groups)

    def unfilled(self: held.HeldState, block: Any) -> torch.Tensor:
        master = take(self, block)
        return master if self.flat.master_view(block) is not None else master.fill_(float("nan"))

    forming._move = interrupted
    held.HeldState._master_for = unfilled  # type: ignore[method-assign]


# --- bugs: each takes one rule out ---


def forget_pending(worker: int) -> None:
    """Against R1: the reduced gradients do not outlive the step's phase."""
    del worker
    report = session.Session.report

    def forgetful(self: session.Session) -> Any:
        self.pending = None
        return report(self)

    session.Session.report = forgetful  # type: ignore[method-assign]


def vote_early(worker: int) -> None:
    """Against R2: the vote is sent before the data has come; what has not come is taken as it lies in memory."""
    del worker

    def hasty(self: Any, sends: Any, recvs: Any, between: Any) -> None:
        group = self._live_gloo()
        self.late = getattr(self, "late", [])
        self.late += [group.recv([tensor], peer, 0) for peer, tensor in recvs]
        self.late += [group.send([tensor], peer, 0) for peer, tensor in sends]
        between()

    collective.GroupSet._exchange_gloo = hasty  # type: ignore[method-assign]


def park_without_latch(worker: int) -> None:
    """Against R3: the report is given, but apply is not latched off."""
    del worker
    park, check = session.Session.park, session.Session.check

    def loose(self: session.Session, generation: int) -> Any:
        self.unlatched = True  # type: ignore[attr-defined]
        return park(self, generation)

    def unchecked(self: session.Session) -> None:
        if not getattr(self, "unlatched", False):
            check(self)

    session.Session.park = loose  # type: ignore[method-assign]
    session.Session.check = unchecked  # type: ignore[method-assign]


def free_before_seal(worker: int) -> None:
    """Against R4: what moves away is let go before the new generation is sealed."""
    del worker
    enter = forming._move

    def greedy(owner: Any, plan: Any, groups: Any) -> Any:
        digests = enter(owner, plan, groups)
        owner.model.held.keep_only(plan.layout.held(owner.worker))
        return digests

    forming._move = greedy


def publish_at_once(worker: int) -> None:
    """Against R5: a step is published when this worker has applied it."""
    del worker
    apply, sent = stepping.apply_step, Deliveries()

    def hasty(owner: Any, pending: Any, vote: Any, votes: Any, generation: int) -> Any:
        tally = apply(owner, pending, vote, votes, generation)
        if owner.worker == 0:
            owner.emit(session.ev.Progress(0.0, generation, pending.step))
            owner.emit(session.ev.Sealed(0.0, generation, owner.worker, 0))  # urgent, so that it leaves at once
            sent.wait_for_all()
        return tally

    stepping.apply_step = hasty


class Deliveries:
    """Counts how often this process has come for what its outbox holds; before it comes again, it has sent that."""

    def __init__(self) -> None:
        self._come = threading.Condition()
        self._times = 0
        fetch = outbox.Outbox.after

        def counted(box: outbox.Outbox, number: int, timeout_s: float) -> Any:
            with self._come:
                self._times += 1
                self._come.notify_all()
            return fetch(box, number, timeout_s)

        outbox.Outbox.after = counted  # type: ignore[method-assign]

    def wait_for_all(self) -> None:
        """Until everything that was put before has been sent: it may be on its way with an older batch in hand."""
        with self._come:
            last = self._times + 2
            self._come.wait_for(lambda: self._times >= last, 60.0)


def never_drop(worker: int) -> None:
    """Against R6: groups are kept after an error, so that live peers wait for a timeout (8 s here)."""
    del worker
    kept: list[Any] = []

    def keep(self: Any) -> None:
        kept.append((self._gloo, self))
        self._dropped.set()

    collective.GroupSet.drop = keep  # type: ignore[method-assign]
    collective.GroupSet.deadline_s = property(lambda self: 8.0, lambda self, value: None)  # type: ignore[assignment]


def torn_is_harmless(worker: int) -> None:
    """Against R7: an exception within apply is taken for one that left the state whole."""
    del worker

    class Blind(commit.Committed):  # no slots, so that the property wins
        tearing = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]

    session.Committed = Blind  # type: ignore[misc]


def combine_as_they_come(worker: int) -> None:
    """Against the tree: an owner adds what it has in its own order."""
    del worker

    def flat(parts: Any, add: Any, node: Any) -> Any:
        tensors = [parts[key] for key in sorted(parts, key=lambda n: -n.lo)]
        total = tensors[0]
        for tensor in tensors[1:]:
            total = total.add_(tensor)
        return total

    step.finish = flat


def accuses_another(worker: int, culprit: int) -> Callable[[int], None]:
    """`worker` comes to a verdict of its own, whatever the sums say: `culprit` is wrong."""
    return partial(_accuses_another, worker, culprit)


def _accuses_another(liar: int, culprit: int, worker: int) -> None:
    if worker == liar:
        inquest.judge = lambda *_, **__: Verdict({culprit: "so I say"})
