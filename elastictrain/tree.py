"""The fixed binary tree over `count` numbered leaves: the order in which everything is summed.

Floating-point addition is not associative, so a sum is reproducible only if its order is. The order here is one fixed
recursive split that depends on nothing but the number of leaves: `[lo, hi)` is cut at `lo + p`, where `p` is the
largest power of two below `hi - lo` (the shape of the Merkle tree of RFC 6962, which is defined for any number of
leaves). A partial sum combines only with its sibling. A worker that holds some of the leaves can therefore sum up to
its *roots*, the largest nodes that it covers completely, and whoever finishes the tree gets the same bits as anybody
else, however the leaves were dealt out. Leaves are lanes (gradients, buffers) or blocks (norms).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    """The leaves `lo .. hi-1`. A node of one leaf is a leaf."""

    lo: int
    hi: int

    @property
    def is_leaf(self) -> bool:
        return self.hi - self.lo == 1

    def children(self) -> tuple[Node, Node]:
        """The two halves; the left one holds a power of two of leaves."""
        size = self.hi - self.lo
        half = 1 << (size - 1).bit_length() - 1
        return Node(self.lo, self.lo + half), Node(self.lo + half, self.hi)


def whole(count: int) -> Node:
    """The root of the tree over `count` leaves."""
    if count < 1:
        raise ValueError(f"a tree needs at least one leaf, got {count}")
    return Node(0, count)


def roots(members: Iterable[int], count: int) -> tuple[Node, ...]:
    """The largest nodes of the tree over `count` leaves whose leaves are all in `members`, in leaf order."""
    ordered = sorted(set(members))
    if not ordered:
        return ()
    if ordered[0] < 0 or ordered[-1] >= count:
        raise ValueError(f"leaves {ordered[0]}..{ordered[-1]} are outside 0..{count - 1}")
    found: list[Node] = []
    _collect(whole(count), ordered, found)
    return tuple(found)


def _collect(node: Node, ordered: list[int], found: list[Node]) -> None:
    if not ordered:
        return
    if len(ordered) == node.hi - node.lo:
        found.append(node)
        return
    left, right = node.children()
    _collect(left, [leaf for leaf in ordered if leaf < left.hi], found)
    _collect(right, [leaf for leaf in ordered if leaf >= right.lo], found)


def path_up(leaf: int, count: int) -> tuple[tuple[Node, Node], ...]:
    """From a leaf to the root: pairs of (sibling, parent), the nearest first."""
    steps: list[tuple[Node, Node]] = []
    node = whole(count)
    while not node.is_leaf:
        left, right = node.children()
        inside, other = (left, right) if leaf < left.hi else (right, left)
        steps.append((other, node))
        node = inside
    return tuple(reversed(steps))


def finish(parts: Mapping[Node, T], add: Callable[[T, T], T], node: Node, absent: Collection[int] = ()) -> T:
    """The value of `node` from the values of nodes below it that cover it exactly once, but for the leaves `absent`: of
    a node with one half only that half is the value.

    `add(left, right)` may reuse its arguments' storage. Raises KeyError when another leaf is not covered, or all are
    absent.
    """
    found = _finish(parts, add, node, absent)
    if found is None:
        raise KeyError(f"all leaves of {node.lo} .. {node.hi - 1} are absent")
    return found


def _finish(parts: Mapping[Node, T], add: Callable[[T, T], T], node: Node, absent: Collection[int]) -> T | None:
    if node in parts:
        return parts[node]
    if node.is_leaf:
        if node.lo in absent:
            return None
        raise KeyError(f"no part covers leaf {node.lo}")
    left, right = (_finish(parts, add, half, absent) for half in node.children())
    return add(left, right) if left is not None and right is not None else left if right is None else right


@lru_cache(maxsize=4096)
def most_sums(members: tuple[int, ...], count: int, *, apart: bool = False) -> int:
    """How many sums there are at once, at most, while the leaves `members` (ascending) are summed one after the other
    as far as siblings meet. A leaf whose sibling is there is added to it and needs no room; `apart`: each first needs
    room of its own.
    """
    there: set[Node] = set()
    most = 0
    for leaf in members:
        sum_of, met = Node(leaf, leaf + 1), 0
        for sibling, parent in path_up(leaf, count):
            if sibling not in there:
                break
            sum_of, met = parent, met + 1
            there.discard(sibling)
        most = max(most, len(there) + met + (apart or not met))
        there.add(sum_of)
    return most
