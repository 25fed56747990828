"""Time of collectives over a class of links: latency plus bytes (the alpha-beta model; Thakur et al. 2005)."""

from __future__ import annotations

from elastictrain.planner.profiles import Link


def all_reduce_s(size_bytes: float, members: int, link: Link, efficiency: float = 1.0) -> float:
    """Ring all-reduce: every byte goes around twice."""
    return 2 * all_gather_s(size_bytes, members, link, efficiency)


def all_gather_s(size_bytes: float, members: int, link: Link, efficiency: float = 1.0) -> float:
    """Ring all-gather (or reduce-scatter, which is its mirror image) of `size_bytes` in all."""
    if members <= 1:
        return 0.0
    around = (members - 1) / members * size_bytes
    return (members - 1) * link.alpha_s + around / (link.beta_bytes_s * efficiency)


def send_s(size_bytes: float, link: Link) -> float:
    """One transfer between neighbours."""
    return link.alpha_s + size_bytes / link.beta_bytes_s


def share_across(link: Link, members_per_node: int, per_node: int, nodes: int) -> float:
    """The part of the link's bandwidth that a group sees: `members_per_node` of a node's `per_node` devices, on `nodes`
    nodes.

    All groups of a node send at once. A contiguous group has all of the node's ports; a strided one only those of its
    own members. And the more switches a ring passes, the more it meets other traffic (`Link.crowd`).
    """
    ports = members_per_node if link.per == "device" else members_per_node / per_node
    return float(ports * max(nodes, 1) ** -link.crowd)
