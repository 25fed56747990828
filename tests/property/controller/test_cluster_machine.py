"""Hypothesis searches for a sequence of events, faults and wishes that breaks a property, and shrinks it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastictrain.controller import MachineSpec
from elastictrain.controller import events as ev
from tests.property.controller.faults import FaultyCluster

PICK = st.integers(0, 30)


@st.composite
def specs(draw: st.DrawFn) -> MachineSpec:
    most = draw(st.integers(1, 4))
    start = draw(st.integers(1, most))
    return MachineSpec(
        lane_count=draw(st.integers(most, 6)),
        steps=draw(st.integers(1, 6)),
        block_elements=tuple(draw(st.lists(st.sampled_from([1, 7, 30]), min_size=1, max_size=5))),
        min_workers=draw(st.integers(1, start)),
        max_workers=most,
        initial_workers=start,
        spares=draw(st.integers(0, 1)),
        replace=draw(st.booleans()),
        mirrors=draw(st.booleans()),
        checkpoint=True,
        rebalance_after_steps=2,
    )


class ClusterMachine(RuleBasedStateMachine):
    """`Cluster` checks every command against what really happened; `Watch` checks the numbered invariants."""

    cluster: FaultyCluster

    @initialize(spec=specs())
    def begin(self, spec: MachineSpec) -> None:
        self.cluster = FaultyCluster(spec)

    def _member(self, pick: int) -> int:
        """Aimed at the living generation, where there is one."""
        members = self.cluster.machine.core.ledger.members() or [*self.cluster.workers, 999]
        return members[pick % len(members)]

    def _anyone(self, pick: int) -> int:
        everyone = [*self.cluster.workers, 999]
        return everyone[pick % len(everyone)]

    @rule(rounds=st.integers(1, 6), unlucky=st.booleans())
    def go_on(self, rounds: int, unlucky: bool) -> None:
        for _ in range(rounds):
            for number in list(self.cluster.workers):
                self.cluster.act(number, unlucky=unlucky)
            while self.cluster.deliver(0):
                pass

    @rule(pick=PICK, unlucky=st.booleans())
    def act(self, pick: int, unlucky: bool) -> None:
        self.cluster.act(self._member(pick), unlucky=unlucky)

    @rule(pick=PICK)
    def start(self, pick: int) -> None:
        self.cluster.act(self._anyone(pick))

    @rule(pick=PICK)
    def deliver(self, pick: int) -> None:
        self.cluster.deliver(pick)

    @rule(pick=PICK)
    def stale(self, pick: int) -> None:
        self.cluster.send_stale(pick)

    @rule(pick=PICK, lose_messages=st.booleans())
    def kill(self, pick: int, lose_messages: bool) -> None:
        self.cluster.kill(self._member(pick), lose_messages=lose_messages)

    @rule(
        pick=PICK,
        what=st.sampled_from(
            [
                *("tear", "freeze", "fail_restore", "name_frozen", "hang", "cut", "lose_node", "heal", "preempt"),
                *("dispute", "convict", "miscompute"),
            ]
        ),
    )
    def harm(self, pick: int, what: str) -> None:
        getattr(self.cluster, what)(self._member(pick))

    @rule(after=st.integers(0, 4))
    def lose_controller(self, after: int) -> None:
        self.cluster.lose_controller(after)

    @precondition(lambda self: self.cluster.down)
    @rule(gone_s=st.sampled_from([0.01, 100.0]))
    def bring_back(self, gone_s: float) -> None:
        self.cluster.bring_back(gone_s)

    @rule(pick=PICK)
    def fail_start(self, pick: int) -> None:
        self.cluster.fail_start(self._anyone(pick))

    @rule(by_s=st.sampled_from([0.001, 1.0, 61.0]))
    def tick(self, by_s: float) -> None:
        self.cluster.tick(by_s)

    @rule()
    def add(self) -> None:
        self.cluster.send(ev.AddRequested(self.cluster.now_s))

    @rule(pick=PICK)
    def drain(self, pick: int) -> None:
        self.cluster.send(ev.DrainRequested(self.cluster.now_s, self._member(pick)))

    @rule(size=st.integers(0, 5))
    def resize(self, size: int) -> None:
        self.cluster.send(ev.ResizeRequested(self.cluster.now_s, size))

    @precondition(lambda self: self.cluster.machine.generation > 2)
    @rule()
    def stop(self) -> None:
        self.cluster.send(ev.StopRequested(self.cluster.now_s, "asked to"))

    @invariant()
    def the_deadline_is_data(self) -> None:
        """Asking when to wake up changes nothing, and after the end there is nothing to wake up for."""
        if hasattr(self, "cluster") and self.cluster.ended is not None:
            assert self.cluster.machine.next_deadline_s() is None

    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.calm()
            self.cluster.check_end()


TestClusterMachine = ClusterMachine.TestCase
TestClusterMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,  # a gate must not be a lottery; to search further, take this out and raise max_examples
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
