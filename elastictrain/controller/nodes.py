"""What is known of the machines: which of them keep failing, are lost, or are about to go. Pure.

A node that fails again and again is *set aside*: no new worker starts there for some hours, and then it is tried again.
Never more than a third of the known nodes, so that a fault of the job, which fails everywhere, cannot use up a cluster.
A node that is lost or about to be preempted is avoided too, for as long as somebody may still place a worker there:
Ray takes 15 to 65 seconds to notice that a node is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from elastictrain.controller.budgets import WINDOW_S, FailureBudget

LOST_REST_S = 120.0
"""How long a lost node, or one whose time is over, is avoided: twice what Ray takes to notice."""


@dataclass(slots=True)
class NodeFacts:
    """`failures`: (time, what) of the last hour. `aside_until_s`: set aside. `avoid_until_s`: lost or about to go, with
    the reason in `avoided`.
    """

    failures: list[tuple[float, str]] = field(default_factory=list)
    aside_until_s: float | None = None
    avoid_until_s: float | None = None
    avoided: str = ""

    @property
    def wakes_s(self) -> float | None:
        """When this node is taken back, at the earliest."""
        return min((s for s in (self.aside_until_s, self.avoid_until_s) if s is not None), default=None)


Nodes = dict[str, NodeFacts]


def resting_until(nodes: Mapping[str, NodeFacts]) -> list[float]:
    """When each node that rests is taken back. Asked after every event, and of a thousand nodes few rest."""
    resting = [n for n in nodes.values() if n.aside_until_s is not None or n.avoid_until_s is not None]
    return [facts.wakes_s for facts in resting if facts.wakes_s is not None]


def to_avoid(nodes: Mapping[str, NodeFacts]) -> tuple[str, ...]:
    """The nodes on which no worker should start now. Those set aside for their failures are let off when no known node
    would be left: better a bad machine than none.
    """
    going = [node for node, facts in nodes.items() if facts.avoid_until_s is not None]
    aside = [node for node, facts in nodes.items() if facts.aside_until_s is not None and facts.avoid_until_s is None]
    return tuple(sorted([*going, *aside] if len(going) + len(aside) < len(nodes) else going))


def count_failure(nodes: Nodes, node: str, now_s: float, what: str) -> None:
    facts = nodes.setdefault(node, NodeFacts())
    facts.failures = [(at_s, old) for at_s, old in facts.failures if at_s > now_s - WINDOW_S]
    facts.failures.append((now_s, what))


def should_set_aside(budget: FailureBudget, nodes: Nodes, node: str) -> bool:
    """Whether `node` has failed too often, and there is room to set it aside."""
    facts = nodes[node]
    if facts.aside_until_s is not None or len(facts.failures) < budget.node_failures:
        return False
    aside = sum(other.aside_until_s is not None for other in nodes.values())
    return aside + 1 <= int(len(nodes) * budget.node_share)


def take_back(nodes: Nodes, now_s: float) -> list[str]:
    """End the rest of the nodes whose time has come; which ones."""
    back = []
    for node, facts in nodes.items():
        wakes_s = facts.wakes_s
        if wakes_s is None or now_s < wakes_s:
            continue
        if facts.aside_until_s is not None and now_s >= facts.aside_until_s:
            facts.aside_until_s, facts.failures = None, []
        if facts.avoid_until_s is not None and now_s >= facts.avoid_until_s:
            facts.avoid_until_s, facts.avoided = None, ""
        if facts.wakes_s is None:
            back.append(node)
    return sorted(back)


def is_going(nodes: Nodes, node: str) -> bool:
    """Whether its end has been announced."""
    return node in nodes and nodes[node].avoided == "going"


def keep_only(nodes: Nodes, alive: Iterable[str], now_s: float) -> None:
    """The cluster consists of these: forget the others, but not what the last hour holds against them."""
    there = set(alive)
    for node in there - set(nodes):
        nodes[node] = NodeFacts()
    for node in set(nodes) - there:
        recent = any(at_s > now_s - WINDOW_S for at_s, _ in nodes[node].failures)
        if nodes[node].wakes_s is None and not recent:
            del nodes[node]
