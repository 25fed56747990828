"""Which nodes are within reach: leases renewed by round trips, and a clock that runs only while we watch.

A node is within reach as of the moment at which an answer of ours was *sent* that the node has since echoed: both
directions worked, at least once, after that moment. One number so covers a dead node, a cut in either direction and a
cut in both, and the verdict never comes later than the limit after the cut, whatever the latency: no answer sent after
the cut can be echoed. (The lease of Gray and Cheriton 1989, seen from its grantor.)

Ages are told in *watched time*: a watcher that was kept from running for three seconds has not seen three seconds of
silence. And a node whose beats have lately been late, by its own count, is given twice its worst lateness on top of the
limit (up to 10 s in all; what is remembered of it halves every 30 s): one that starves is not dead.

Pure: time arrives as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp2

from elastictrain.signs import NodeReport

LIMIT_S = 1.6
"""Silence until a node counts as lost. With one turn of the watcher and one of the controller on top, the whole stays
below 2 s; below it lie 11 beats of 0.1 s that would all have to fail at 200 ms of latency each way."""
LONGEST_S = 10.0
HALF_LIFE_S = 30.0


@dataclass(slots=True)
class WatchedClock:
    """Seconds during which this process was watching. A turn that took longer than `longest_turn_s` counts as that."""

    longest_turn_s: float = 0.1
    now_s: float = 0.0
    missed_s: float = 0.0
    _last_s: float | None = None

    def advance(self, monotonic_s: float) -> float:
        """One turn of the watcher; returns the watched time. A clock that goes back counts as no time."""
        if self._last_s is not None:
            passed_s = max(0.0, monotonic_s - self._last_s)
            counted_s = min(passed_s, self.longest_turn_s)
            self.now_s += counted_s
            self.missed_s += passed_s - counted_s
        self._last_s = monotonic_s
        return self.now_s


@dataclass(slots=True)
class _Lease:
    agent: int
    since_s: float
    newest: int = 0
    echo: int = 0
    answers: dict[int, float] = field(default_factory=dict)
    renewed_s: float | None = None
    late_s: float | None = None
    worst_s: float = 0.0
    worst_at_s: float = 0.0

    def note_lateness(self, late_s: float, now_s: float) -> None:
        """`late_s`: the agent's own sum, as of its newest beat."""
        delta_s = 0.0 if self.late_s is None else late_s - self.late_s
        self.late_s = late_s
        self.worst_s, self.worst_at_s = max(delta_s, self.lately_s(now_s)), now_s

    def lately_s(self, now_s: float) -> float:
        return self.worst_s * exp2((self.worst_at_s - now_s) / HALF_LIFE_S)


class Leases:
    """One lease per node that was told to `expect`. All times are watched time, in seconds."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._leases: dict[str, _Lease] = {}

    @property
    def nodes(self) -> list[str]:
        return sorted(self._leases)

    def expect(self, node: str, agent: int, now_s: float) -> None:
        """Agent number `agent` has been started on `node`; nothing that an earlier one says counts any more. The node
        is not judged before the first round trip: starting a process takes what it takes.
        """
        known = self._leases.get(node)
        if known is None or agent > known.agent:
            self._leases[node] = _Lease(agent, now_s)

    def forget(self, node: str) -> None:
        """Not watched any more: it is known to be lost, or its agent has died (which is not the death of a node)."""
        self._leases.pop(node, None)

    def heard(self, report: NodeReport, now_s: float) -> bool:
        """A beat has come. True when it is the newest of the node's own agent; late, doubled and foreign ones change
        nothing but the echo, which counts whenever it comes.
        """
        lease, echo = self._leases.get(report.node), report.echo
        if lease is None or report.agent != lease.agent:
            return False
        if echo > lease.echo and echo in lease.answers:
            lease.echo = echo
            lease.renewed_s = max(lease.renewed_s or 0.0, lease.answers[echo])
            lease.answers = {n: at_s for n, at_s in lease.answers.items() if n > echo}
        if report.number <= lease.newest:
            return False
        lease.newest = report.number
        lease.note_lateness(report.late_s, now_s)
        return True

    def answers(self, node: str, agent: int, number: int, now_s: float) -> bool:
        """Whether beat `number` is to be answered, now. Answers never echoed are kept while they could matter."""
        lease = self._leases.get(node)
        if lease is None or agent != lease.agent:
            return False
        lease.answers.setdefault(number, now_s)
        if len(lease.answers) > 256:
            lease.answers = {n: at_s for n, at_s in lease.answers.items() if now_s - at_s <= 4 * self.limit_s}
        return True

    def vouch(self, node: str, asked_s: float) -> None:
        """Another channel has shown that the node is within reach: it answered a question that was put at `asked_s`."""
        lease = self._leases.get(node)
        if lease is not None and lease.renewed_s is not None:
            lease.renewed_s = max(lease.renewed_s, asked_s)

    def age_s(self, node: str, now_s: float) -> float | None:
        """Since when the node may have been out of reach; None before the first round trip."""
        lease = self._leases.get(node)
        return None if lease is None or lease.renewed_s is None else now_s - lease.renewed_s

    def allowed_s(self, node: str, now_s: float) -> float:
        """How long a node may be silent."""
        lease = self._leases[node]
        return max(self.limit_s, min(LONGEST_S, self.limit_s + 2 * lease.lately_s(now_s)))

    def silent(self, now_s: float) -> dict[str, float]:
        """The lost nodes, with seconds of silence."""
        ages = {node: self.age_s(node, now_s) for node in sorted(self._leases)}
        return {n: age_s for n, age_s in ages.items() if age_s is not None and age_s > self.allowed_s(n, now_s)}

    def unheard(self, now_s: float) -> dict[str, float]:
        """Nodes whose agent has not made a single round trip, with seconds since it was started: perhaps datagrams do
        not pass between the nodes at all.
        """
        return {node: now_s - lease.since_s for node, lease in sorted(self._leases.items()) if lease.renewed_s is None}
