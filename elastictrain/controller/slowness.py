"""Between the driver and the straggler watch: signals in, announcements and events out. No Ray."""

from __future__ import annotations

from elastictrain.controller import events as ev
from elastictrain.controller.commands import Announce
from elastictrain.controller.facts import Role, StragglerSpec
from elastictrain.controller.machine import Machine
from elastictrain.controller.phases import Running
from elastictrain.controller.room import MemoryRoom
from elastictrain.controller.speeds import splits_in_force
from elastictrain.protocol import StepSignals
from elastictrain.stragglers.decision import Decision, Policy, Refused
from elastictrain.stragglers.room import PLENTY
from elastictrain.stragglers.watch import Finding, StragglerWatch

FRESH_STEPS, FRESH_S = 2, 5.0
"""What is both more steps and more seconds old is learned from, and not acted upon: a worker may be fast again. While a
controller listens, everything is heard within a second; how many steps that is, is no matter.
"""
SETTLE_STEPS = 10
"""After old steps, and where some are missing, so many are heard before anything is done."""


TOLD_SHARE = 0.05
"""A speed that has changed by less is not told again."""

Proposed = ev.LanesProposed | ev.StragglerLeaves | ev.SpeedsLearned


class Freshness:
    """Whether what workers say of a step may be acted upon. While no controller listens their words pile up, and when
    there are too many the later ones are not kept: what is known of a speed then is of long ago.
    """

    def __init__(self) -> None:
        self._generation = self._last = self._unsure = 0

    def may_act(self, signals: StepSignals, newest_step: int) -> bool:
        """To be asked of every step in turn. `newest_step`: the last one known to have been taken."""
        again = signals.generation == self._generation
        if again and signals.step <= self._last:
            return False
        stale = newest_step - signals.step > FRESH_STEPS and signals.age_s > FRESH_S
        missing = again and signals.step > self._last + 1
        self._generation, self._last = signals.generation, signals.step
        self._unsure = SETTLE_STEPS if stale or missing else max(0, self._unsure - 1)
        return self._unsure == 0


class Slowness:
    """Feeds the watch of one run with what its workers say of their steps."""

    def __init__(self, machine: Machine, spec: StragglerSpec) -> None:
        self._machine, self._spec = machine, spec
        policy = Policy(min_gain=spec.min_gain, evict=spec.evicts)
        self.watch = StragglerWatch(machine.spec.steps, policy=policy)
        self._freshness = Freshness()
        self._told: dict[int, float] = {}

    def members(self, signals: StepSignals) -> tuple[int, ...]:
        """The workers that said them, in rank order; none when their generation is over."""
        plan = self._machine.core.ledger.plan
        return plan.layout.workers if plan is not None and plan.generation == signals.generation else ()

    def hear(self, signals: StepSignals, newest_step: int = 0) -> tuple[list[Announce], Proposed | None]:
        """What is to be told, and what is to be done. Signals of a generation that is over say nothing.
        `newest_step`: the last one of which anything was heard.
        """
        core = self._machine.core
        plan = core.ledger.plan
        if plan is None or signals.generation != plan.generation or not isinstance(core.state, Running):
            return [], None
        fresh = self._freshness.may_act(signals, max(newest_step, core.ledger.published_step))
        fewest = max(core.spec.min_workers, 2 if core.spec.mirrors else 1)
        verdict = self.watch.feed(
            plan.generation, plan.layout.workers, signals.step, signals.records,
            spares=len(core.ledger.workers.of(Role.READY)), least_workers=fewest, acts=fresh and self._spec.moves,
            room=MemoryRoom(core) if core.ledger.memory() else PLENTY, splits=splits_in_force(core.ledger),
        )  # fmt: skip
        said = [_announce(finding) for finding in verdict.findings]
        if verdict.refused is not None:
            said.append(_announce_refused(verdict.refused, plan.layout.workers, signals.step))
        if verdict.decision is None:
            return said, self._learned(signals.step) if fresh else None
        return said, self._event(verdict.decision)

    def _learned(self, step: int) -> ev.SpeedsLearned | None:
        """Where the job plans and lanes do not move by themselves: what the next generation is to be dealt out by, when
        it has changed.
        """
        if not self._machine.spec.plans or self._spec.moves:
            return None
        speeds = self.watch.dealt_speeds()
        same = all(abs(share / self._told.get(worker, 1.0) - 1.0) < TOLD_SHARE for worker, share in speeds.items())
        if not speeds or same:
            return None
        self._told = {**self._told, **speeds}
        return ev.SpeedsLearned(0.0, self.watch.generation, step, tuple(sorted(speeds.items())))

    def _event(self, decision: Decision) -> ev.LanesProposed | ev.StragglerLeaves:
        watch = self.watch
        seconds = (decision.before_s, decision.after_s)
        if decision.worker is not None:
            leaves = watch.workers[decision.worker]
            return ev.StragglerLeaves(
                0.0, watch.generation, decision.step, leaves, decision.action, decision.why, *seconds
            )
        speeds = tuple(sorted(watch.speeds().items()))
        return ev.LanesProposed(
            0.0, watch.generation, decision.step, decision.lanes, speeds, decision.action, decision.why, *seconds
        )


def _announce(finding: Finding) -> Announce:
    data = {
        "what": finding.kind, "worker": finding.worker, "cause": finding.cause, "step": finding.step,
        "since": finding.since, "factor": round(finding.factor, 3), "reason": finding.words,
    }  # fmt: skip
    return Announce("straggler", data)


def _announce_refused(refused: Refused, workers: tuple[int, ...], step: int) -> Announce:
    lanes = dict(zip(workers, refused.lanes, strict=True))
    data = {"lanes": lanes, "reason": refused.reason, "instead": refused.instead, "step": step}
    return Announce("lanes_refused", data)
