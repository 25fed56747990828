"""Leases on nodes, and the clock that they are told by."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.controller.leases import LIMIT_S, Leases, WatchedClock
from elastictrain.signs import NodeReport


def test_time_in_which_nobody_watched_does_not_pass() -> None:
    clock = WatchedClock()
    assert [round(clock.advance(at_s), 6) for at_s in (10.0, 10.05, 10.1, 15.1, 15.15, 15.1)] == [
        0.0, 0.05, 0.1, 0.2, 0.25, 0.25,
    ]  # fmt: skip
    assert round(clock.missed_s, 6) == 4.9


def heard(
    leases: Leases, number: int, echo: int, *, node: str = "a", agent: int = 1, late_s: float = 0.0, now_s: float = 0.0
) -> bool:
    return leases.heard(NodeReport(node, agent, number, echo, number / 10, late_s), now_s)


def test_a_node_is_not_judged_before_its_first_round_trip() -> None:
    leases = Leases()
    leases.expect("a", 1, 0.0)
    assert heard(leases, 1, 0)
    assert leases.answers("a", 1, 1, 0.1)
    assert leases.silent(100.0) == {}
    assert leases.unheard(100.0) == {"a": 100.0}
    assert heard(leases, 2, 1)
    assert leases.age_s("a", 1.0) == 0.9
    assert leases.unheard(1.0) == {}


def trip(leases: Leases, number: int, now_s: float, *, echo: int | None = None, agent: int = 1) -> None:
    heard(leases, number, number - 1 if echo is None else echo, agent=agent)
    leases.answers("a", agent, number, now_s)


def test_the_lease_counts_from_the_sending_of_the_answer_that_came_back() -> None:
    leases = Leases(limit_s=1.0)
    leases.expect("a", 1, 0.0)
    trip(leases, 1, 0.0)
    trip(leases, 2, 0.5)
    trip(leases, 3, 0.9)
    assert leases.silent(1.5) == {}
    assert leases.silent(1.6) == {"a": 1.1}  # the answer of 0.5 was the newest that was echoed
    trip(leases, 4, 1.6)
    assert leases.silent(1.7) == {}


def test_beats_without_echo_do_not_renew() -> None:
    """One-way loss: the node's beats arrive, our answers do not."""
    leases = Leases(limit_s=1.0)
    leases.expect("a", 1, 0.0)
    trip(leases, 1, 0.0)
    trip(leases, 2, 0.1)
    for number in range(3, 40):
        trip(leases, number, number / 10, echo=1)
    assert list(leases.silent(4.0)) == ["a"]


def test_late_doubled_and_foreign_beats_change_nothing() -> None:
    leases = Leases(limit_s=1.0)
    leases.expect("a", 2, 0.0)
    assert not heard(leases, 1, 0, node="b")
    assert not leases.answers("b", 1, 1, 0.0)
    assert not heard(leases, 99, 98)  # an older agent of the node
    assert not leases.answers("a", 1, 99, 0.0)
    trip(leases, 5, 0.0, agent=2, echo=0)
    assert not heard(leases, 5, 0, agent=2)
    assert not heard(leases, 4, 0, agent=2)
    assert not heard(leases, 5, 77, agent=2)  # echoes what was never answered
    assert leases.age_s("a", 1.0) is None
    assert heard(leases, 6, 5, agent=2)
    assert leases.age_s("a", 1.0) == 1.0


def test_a_late_beat_may_carry_the_newest_echo() -> None:
    leases = Leases()
    leases.expect("a", 1, 0.0)
    for number in (1, 2, 3):
        trip(leases, number, number / 10, echo=0)
    assert not heard(leases, 2, 1)
    assert leases.age_s("a", 1.1) == 1.0


def test_a_new_agent_starts_anew_and_an_old_number_does_not() -> None:
    leases = Leases()
    leases.expect("a", 3, 0.0)
    trip(leases, 1, 0.0, agent=3)
    trip(leases, 2, 0.1, agent=3)
    leases.expect("a", 3, 5.0)
    leases.expect("a", 2, 5.0)
    assert leases.age_s("a", 1.0) == 1.0
    leases.expect("a", 4, 5.0)
    assert leases.age_s("a", 9.0) is None


def test_another_channel_vouches_only_for_a_node_that_was_heard() -> None:
    leases = Leases(limit_s=1.0)
    leases.expect("a", 1, 0.0)
    leases.vouch("a", 3.0)
    assert leases.age_s("a", 3.0) is None
    trip(leases, 1, 0.0)
    trip(leases, 2, 0.1)
    leases.vouch("a", 3.0)
    leases.vouch("a", 2.0)
    assert (leases.age_s("a", 4.0), leases.silent(4.0)) == (1.0, {})
    assert leases.silent(4.1) != {}
    leases.forget("a")
    assert (leases.silent(9.0), leases.nodes) == ({}, [])


def test_answers_that_never_come_back_do_not_pile_up() -> None:
    leases = Leases()
    leases.expect("a", 1, 0.0)
    for number in range(1, 5_000):
        trip(leases, number, number / 10, echo=0)
    assert len(leases._leases["a"].answers) <= 257


def test_a_node_that_is_late_by_its_own_count_has_longer() -> None:
    leases = Leases(limit_s=1.0)
    leases.expect("a", 1, 0.0)
    heard(leases, 1, 0, late_s=50.0)  # before we listened
    leases.answers("a", 1, 1, 0.0)
    heard(leases, 2, 1, late_s=50.0)
    assert leases.allowed_s("a", 0.0) == 1.0
    heard(leases, 3, 1, late_s=50.8)
    assert leases.allowed_s("a", 0.0) == pytest.approx(2.6)
    heard(leases, 4, 1, late_s=50.9)  # the worst counts
    assert (leases.silent(2.4), list(leases.silent(2.6))) == ({}, ["a"])
    assert leases.allowed_s("a", 30.0) == pytest.approx(1.8)
    heard(leases, 5, 1, late_s=90.0, now_s=30.0)
    assert leases.allowed_s("a", 30.0) == 10.0


class Wire:
    """One agent and one controller over a network with latency, loss and cuts, in steps of 10 ms."""

    def __init__(self, seed: int, latency_s: float, jitter_s: float, loss: float) -> None:
        self.random = Random(seed)
        self.latency_s, self.jitter_s, self.loss = latency_s, jitter_s, loss
        self.clock, self.leases = WatchedClock(), Leases()
        self.leases.expect("a", 1, 0.0)
        self.now_s, self.beat_due_s, self.number, self.echo = 0.0, 0.0, 0, 0
        self.up: list[tuple[float, int, int]] = []
        self.down: list[tuple[float, int]] = []
        self.cut: set[str] = set()
        self.asleep_until_s = self.next_turn_s = 0.0

    def _arrives(self, way: str) -> float | None:
        if way in self.cut or self.random.random() < self.loss:
            return None
        return self.now_s + self.latency_s + self.random.uniform(0, self.jitter_s)

    def tick(self) -> bool:
        """Ten milliseconds; whether the node is called lost."""
        self.now_s += 0.01
        for at_s, number in [item for item in self.down if item[0] <= self.now_s]:
            self.down.remove((at_s, number))
            self.echo = max(self.echo, number)
        if self.now_s >= self.beat_due_s:
            self.beat_due_s = self.now_s + 0.1
            self.number += 1
            at = self._arrives("up")
            if at is not None:
                self.up.append((at, self.number, self.echo))
        if self.now_s < max(self.asleep_until_s, self.next_turn_s):
            return False
        self.next_turn_s = self.now_s + self.random.uniform(0.01, 0.05)
        watched_s = self.clock.advance(self.now_s)
        for item in sorted(item for item in self.up if item[0] <= self.now_s):
            self.up.remove(item)
            heard(self.leases, item[1], item[2], now_s=watched_s)
            self.leases.answers("a", 1, item[1], watched_s)
            back = self._arrives("down")
            if back is not None:
                self.down.append((back, item[1]))
        return bool(self.leases.silent(watched_s))

    def run(self, seconds: float) -> float | None:
        """When the node was called lost, in seconds from now; None if it never was."""
        began_s = self.now_s
        while self.now_s < began_s + seconds:
            if self.tick():
                return self.now_s - began_s
        return None


WIRES = st.builds(
    Wire,
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.02, 0.2]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0.0, 0.1]),
)


@settings(max_examples=60, deadline=None)
@given(WIRES, st.lists(st.tuples(st.floats(0, 20), st.floats(0, 10)), max_size=3))
def test_latency_loss_and_a_sleeping_watcher_lose_no_node(wire: Wire, naps: list[tuple[float, float]]) -> None:
    wire.run(3.0)
    for after_s, nap_s in naps:
        assert wire.run(after_s) is None
        wire.asleep_until_s = wire.now_s + nap_s
    assert wire.run(20.0) is None


@settings(max_examples=80, deadline=None)
@given(WIRES, st.sampled_from([{"up"}, {"down"}, {"up", "down"}]), st.floats(2, 6))
def test_a_cut_in_any_direction_is_found_in_time(wire: Wire, cut: set[str], after_s: float) -> None:
    assert wire.run(after_s) is None
    wire.cut = cut
    found_s = wire.run(3.0)
    assert found_s is not None
    assert found_s <= LIMIT_S + 0.1
