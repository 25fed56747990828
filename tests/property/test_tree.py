"""The tree over any number of leaves: one fixed order of addition, whoever holds the leaves."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.tree import Node, finish, most_sums, path_up, roots, whole

COUNTS = st.integers(1, 70)


def pair(left: object, right: object) -> object:
    """An addition that is neither associative nor commutative: it shows the whole order."""
    return (left, right)


@functools.cache
def reference(lo: int, hi: int) -> object:
    """RFC 6962: split at the largest power of two below the size."""
    if hi - lo == 1:
        return lo
    half = 1
    while half * 2 < hi - lo:
        half *= 2
    return (reference(lo, lo + half), reference(lo + half, hi))


@given(COUNTS, st.data())
def test_the_sum_is_the_same_however_the_leaves_are_dealt_out(count: int, data: st.DataObject) -> None:
    holder = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    parts: dict[Node, object] = {}
    for who in set(holder):
        mine = [leaf for leaf in range(count) if holder[leaf] == who]
        leaves = {Node(leaf, leaf + 1): leaf for leaf in mine}
        parts |= {root: finish(leaves, pair, root) for root in roots(mine, count)}
    assert finish(parts, pair, whole(count)) == reference(0, count)


@given(COUNTS, st.data())
def test_roots_cover_their_leaves_once_and_cannot_be_joined(count: int, data: st.DataObject) -> None:
    members = data.draw(st.sets(st.integers(0, count - 1)))
    found = roots(members, count)
    assert [leaf for node in found for leaf in range(node.lo, node.hi)] == sorted(members)
    for left in found:
        for sibling, _ in path_up(left.lo, count):
            if sibling in found:
                below = [node for node in found if node.lo <= left.lo < node.hi]
                assert below == [left]
                parent = next(p for s, p in path_up(left.lo, count) if s == sibling)
                assert parent.children() != (left, sibling)


@given(COUNTS, st.data())
def test_path_up_leads_from_the_leaf_to_the_whole(count: int, data: st.DataObject) -> None:
    leaf = data.draw(st.integers(0, count - 1))
    node = Node(leaf, leaf + 1)
    for sibling, parent in path_up(leaf, count):
        assert {node, sibling} == set(parent.children())
        node = parent
    assert node == whole(count)


@given(st.integers(2, 300))
def test_the_left_child_holds_a_power_of_two(count: int) -> None:
    left, right = whole(count).children()
    assert (left.hi - left.lo).bit_count() == 1
    assert left.hi == right.lo
    assert right.hi - right.lo <= left.hi - left.lo


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a tree needs at least one leaf, got 0$"):
        whole(0)
    with pytest.raises(ValueError, match=r"^leaves -1\.\.2 are outside 0\.\.1$"):
        roots([-1, 2], 2)
    with pytest.raises(KeyError, match="no part covers leaf 1"):
        finish({Node(0, 1): 0}, pair, whole(2))


def test_a_worker_with_neighbouring_leaves_has_about_log2_of_them_as_sums() -> None:
    assert [most_sums(tuple(range(n)), n) for n in (1, 2, 3, 4, 8, 15, 16)] == [1, 1, 1, 2, 3, 3, 4]
    assert most_sums((1, 2, 3, 4), 8) == 3, "1, 2..3 and 4: no two are siblings"
    assert most_sums((0, 2, 4, 6), 8) == 4
    assert most_sums(tuple(range(8)), 8, apart=True) == 4
    assert most_sums((), 8) == 0


@given(COUNTS, st.data(), st.booleans())
def test_sums_are_never_fewer_than_the_roots_nor_more_than_the_leaves(
    count: int, data: st.DataObject, apart: bool
) -> None:
    members = tuple(sorted(data.draw(st.sets(st.integers(0, count - 1)))))
    found = most_sums(members, count, apart=apart)
    assert len(roots(members, count)) <= found <= len(members)
    assert most_sums(members, count) <= found <= most_sums(members, count) + 1
