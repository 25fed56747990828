"""Delays and bugs to plant in a worker process (`run_job(patch=...)`). Functions at module level: they are pickled."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from elastictrain.engine import collective, commit, forming, session, step, stepping
from elastictrain.engine.probes import Probes


def both(first: Callable[[int], None], second: Callable[[int], None]) -> Callable[[int], None]:
    """Plant two things."""
    return partial(_both, first, second)


def _both(first: Any, second: Any, worker: int) -> None:
    first(worker)
    second(worker)


def hold_vote(workers: tuple[int, ...], at: int) -> Callable[[int], None]:
    """`workers` hold the whole vote of step `at`, but do not apply it before they are parked: survivors differ."""
    return partial(_hold_vote, workers, at)


def _hold_vote(workers: tuple[int, ...], at: int, worker: int) -> None:
    if worker not in workers:
        return
    sessions: list[session.Session] = []
    make, original = session.Session.__init__, Probes.at

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        sessions.append(self)

    def wait(self: Probes, number: int, phase: str) -> None:
        if number == at and phase == "voted" and sessions[0].generation == 1:
            until = time.monotonic() + 30
            while sessions[0]._latched < 1 and time.monotonic() < until:
                time.sleep(0.001)
        original(self, number, phase)

    session.Session.__init__ = remember  # type: ignore[method-assign]
    Probes.at = wait  # type: ignore[method-assign]


def wait_for_company(size: int, generations: int = 1 << 30) -> Callable[[int], None]:
    """While the world is smaller than `size`, go no further than two steps into a generation: until the pause for a
    newcomer is asked for. (Steps of these tests take milliseconds, a new process takes seconds.) Only in the first
    `generations`.
    """
    return partial(_wait_for_company, size, generations)


def _wait_for_company(size: int, generations: int, worker: int) -> None:
    del worker
    seal = stepping.Stepping.__init__
    run = stepping.StepRunner.run

    def note(self: Any, owner: Any, plan: Any, groups: Any) -> None:
        seal(self, owner, plan, groups)
        self.runner.company = owner, plan

    def wait(self: Any, number: int) -> Any:
        owner, plan = getattr(self, "company", (None, None))
        small = plan is not None and plan.generation <= generations and self.layout.world_size < size
        if small and self.rank == 0 and number - plan.step > 2:
            until = time.monotonic() + 60
            while owner._pause_in != plan.generation and not owner.is_parked() and time.monotonic() < until:
                time.sleep(0.001)
        return run(self, number)

    stepping.Stepping.__init__ = note  # type: ignore[method-assign]
    stepping.StepRunner.run = wait  # type: ignore[method-assign]


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
    apply = stepping.apply_step

    def hasty(owner: Any, pending: Any, vote: Any, votes: Any, generation: int) -> Any:
        tally = apply(owner, pending, vote, votes, generation)
        if owner.worker == 0:
            owner.emit(session.ev.Progress(0.0, generation, pending.step))
            owner.emit(session.ev.Sealed(0.0, generation, owner.worker, 0))  # urgent, so that it leaves at once
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                time.sleep(0.01)
        return tally

    stepping.apply_step = hasty


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
