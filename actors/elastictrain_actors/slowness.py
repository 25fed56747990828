"""Between the driver and the straggler watch: signals in, announcements and events out. No Ray."""

from __future__ import annotations

from elastictrain.controller import events as ev
from elastictrain.controller.commands import Announce
from elastictrain.controller.facts import Role, StragglerSpec
from elastictrain.controller.machine import Machine
from elastictrain.controller.phases import Running
from elastictrain.protocol import StepSignals
from elastictrain.stragglers.decision import Decision, Policy
from elastictrain.stragglers.watch import Finding, StragglerWatch


class Slowness:
    """Feeds the watch of one run with what its workers say of their steps."""

    def __init__(self, machine: Machine, spec: StragglerSpec) -> None:
        self._machine, self._spec = machine, spec
        policy = Policy(min_gain=spec.min_gain, evict=spec.evicts)
        self.watch = StragglerWatch(machine.spec.steps, policy=policy)

    def members(self, signals: StepSignals) -> tuple[int, ...]:
        """The workers that said them, in rank order; none when their generation is over."""
        plan = self._machine.core.ledger.plan
        return plan.layout.workers if plan is not None and plan.generation == signals.generation else ()

    def hear(self, signals: StepSignals) -> tuple[list[Announce], ev.LanesProposed | ev.StragglerLeaves | None]:
        """What is to be told, and what is to be done. Signals of a generation that is over say nothing."""
        core = self._machine.core
        plan = core.ledger.plan
        if plan is None or signals.generation != plan.generation or not isinstance(core.state, Running):
            return [], None
        fewest = max(core.spec.min_workers, 2 if core.spec.mirrors else 1)
        verdict = self.watch.feed(
            plan.generation, plan.layout.workers, signals.step, signals.records,
            spares=len(core.ledger.workers.of(Role.READY)), least_workers=fewest, acts=self._spec.moves,
        )  # fmt: skip
        said = [_announce(finding) for finding in verdict.findings]
        return said, None if verdict.decision is None else self._event(verdict.decision)

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
