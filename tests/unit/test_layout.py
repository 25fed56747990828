"""Layouts by example: numbers that a reader can check, and what is refused."""

from __future__ import annotations

import re

import pytest

from elastictrain.errors import CapacityError, InternalError
from elastictrain.layout import (
    Candidates,
    Layout,
    Move,
    Shard,
    balanced,
    choose_mirror,
    cut,
    deal_lanes,
    lost_blocks,
    moves_between,
    promoted,
)

EVEN = [10] * 6
THREE = balanced(1, [0, 1, 2], 6, EVEN)


def test_balanced() -> None:
    assert THREE.lanes == ((0, 1), (2, 3), (4, 5))
    assert THREE.shards == (Shard(0, 2, 0, 1), Shard(2, 4, 1, 2), Shard(4, 6, 2, 0))
    assert THREE.owned(1) == (Shard(2, 4, 1, 2),)
    assert THREE.mirrored(1) == (Shard(0, 2, 0, 1),)
    assert THREE.held(1) == {0, 1, 2, 3}


def test_shares_by_worker_number() -> None:
    layout = balanced(1, [4, 7], 8, EVEN, lane_shares={4: 3.0}, block_shares={4: 0.0})
    assert layout.lanes_of(4) == (0, 1, 2, 3, 4, 5)
    assert layout.owned(4) == ()
    assert layout.shards == (Shard(0, 6, 7, 4),)


def test_lanes_are_in_proportion_to_speed_but_nobody_is_idle() -> None:
    assert [len(lanes) for lanes in deal_lanes(16, [7, 1], "contiguous")] == [14, 2]
    assert [len(lanes) for lanes in deal_lanes(16, [100, 1, 1], "contiguous")] == [14, 1, 1]


def test_round_major_lanes_are_neighbours_in_time() -> None:
    assert deal_lanes(7, [1, 1, 1], "round_major") == ((0, 3, 6), (1, 4), (2, 5))


def test_a_single_worker_has_no_mirror() -> None:
    assert balanced(1, [5], 4, EVEN).held_once == 6


def test_fewer_blocks_than_workers() -> None:
    layout = balanced(1, [0, 1, 2, 3], 4, [10, 10])
    assert layout.blocks == 2
    assert layout.held_once == 0


def test_the_mirror_is_on_another_failure_domain() -> None:
    domains = {0: "a", 1: "a", 2: "b", 3: "b"}
    assert choose_mirror(0, Candidates([0, 1, 2, 3], domains, {})) == 2
    assert choose_mirror(0, Candidates([0, 1, 2, 3], domains, {2: 10})) == 3
    assert choose_mirror(0, Candidates([0, 1], domains, {})) == 1  # the same domain only when there is no other
    assert choose_mirror(0, Candidates([0], domains, {})) is None


def test_the_mirror_is_promoted_in_place() -> None:
    after = promoted(THREE, 2, [0, 2], EVEN)
    assert after.shards == (Shard(0, 2, 0, 2), Shard(2, 4, 2, 0), Shard(4, 6, 2, 0))
    assert moves_between(THREE, after, [0, 2]) == (Move(0, 2, 0, 2), Move(2, 0, 2, 4))


def test_lost_blocks() -> None:
    assert lost_blocks(THREE, [1]) == ()
    assert lost_blocks(THREE, [0, 1]) == (Shard(0, 2, 0, 1),)
    message = "Shard(lo=0, hi=2, owner=0, mirror=1) has lost both holders; only a checkpoint can bring it back"
    with pytest.raises(InternalError, match=f"^{re.escape(message)}$"):
        promoted(THREE, 2, [2], EVEN)
    with pytest.raises(InternalError, match=r"^blocks 0\.\.1 have no live holder among \(0, 1\)$"):
        moves_between(THREE, balanced(2, [2], 6, EVEN), [2])


def test_cut() -> None:
    assert cut(10, [1, 1, 1]) == [4, 3, 3]
    assert cut(3, [0, 5]) == [0, 3]
    for shares in ([], [0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match=r"^shares must be non-negative with a positive sum, got "):
            cut(4, shares)


def test_fewer_lanes_than_workers_names_the_settings() -> None:
    message = (
        "3 workers for 2 lanes: every worker needs a lane; set `lanes` to 3 or more, or `workers.max` to 2 or less"
    )
    with pytest.raises(CapacityError, match=f"^{re.escape(message)}$"):
        deal_lanes(2, [1, 1, 1], "contiguous")


@pytest.mark.parametrize(
    ("workers", "lanes", "shards", "message"),
    [
        ((0, 0), ((0,), (1,)), (Shard(0, 1, 0, None),), "layout needs distinct workers, got (0, 0)"),
        ((), (), (), "layout needs distinct workers, got ()"),
        ((0, 1), ((0, 1),), (Shard(0, 1, 0, 1),), "2 workers but 1 lane sets"),
        ((0,), ((0, 0),), (Shard(0, 1, 0, None),), "lanes ((0, 0),) do not cover 0..1 exactly once"),
        ((0,), ((0, 1),), (Shard(1, 2, 0, None),), "shards do not tile the blocks: "),
        ((0,), ((0, 1),), (Shard(0, 0, 0, None),), "shards do not tile the blocks: "),
        ((0, 1), ((0,), (1,)), (Shard(0, 1, 0, 0),), "Shard(lo=0, hi=1, owner=0, mirror=0) is held by workers"),
        ((0,), ((0, 1),), (Shard(0, 1, 3, None),), "Shard(lo=0, hi=1, owner=3, mirror=None) is held by workers"),
    ],
)
def test_a_layout_that_is_none(
    workers: tuple[int, ...], lanes: tuple[tuple[int, ...], ...], shards: tuple[Shard, ...], message: str
) -> None:
    with pytest.raises(InternalError, match=f"^{re.escape(message)}"):
        Layout(1, workers, lanes, shards, 2)
