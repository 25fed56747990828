"""Sample ids and their hashes are what they always were, and see every difference that counts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from elastictrain.data.ids import lane_hash, running_hash, sample_ids, show_hash, split_ids, step_hash

IDS = sample_ids([3, 3, 0], [7, 6, 1])


def test_golden_values() -> None:
    assert IDS.tolist() == [3 << 32 | 7, 3 << 32 | 6, 1]
    assert [show_hash(lane_hash(lane, IDS)) for lane in (0, 1)] == GOLDEN_LANES
    assert show_hash(step_hash(lane_hash(lane, IDS) for lane in (0, 1))) == GOLDEN_STEP
    assert show_hash(running_hash(0, 1, 2**64 - 1)) == GOLDEN_RUNNING


GOLDEN_LANES = ["2bada7b0496a8787", "2587f34b68341ed0"]
GOLDEN_STEP = "51359afbb19ea657"
GOLDEN_RUNNING = "e6d21bf24434311a"


def test_ids_come_apart_again() -> None:
    blocks, rows = np.asarray([0, 2**32 - 1, 5]), np.asarray([2**32 - 1, 0, 9])
    back = split_ids(sample_ids(blocks, rows))
    assert back[0].tolist() == blocks.tolist()
    assert back[1].tolist() == rows.tolist()
    assert split_ids(sample_ids(4, np.arange(3)))[0].tolist() == [4, 4, 4]


@pytest.mark.parametrize(("block", "row"), [(0, 2**32), (2**32, 0), (-1, 0), (0, -1)])
def test_a_number_without_room_is_refused(block: int, row: int) -> None:
    with pytest.raises(OverflowError, match="32 bits"):
        sample_ids([block], [row])


def test_the_hash_of_a_step_does_not_depend_on_who_adds_what_first() -> None:
    chance = random.Random(1)
    hashes = [lane_hash(lane, sample_ids(lane, np.arange(4))) for lane in range(13)]
    expected = step_hash(hashes)
    for workers in (1, 2, 3, 5, 7, 8, 13):
        chance.shuffle(hashes)
        assert step_hash(step_hash(hashes[w::workers]) for w in range(workers)) == expected


def test_order_lane_and_step_count() -> None:
    assert lane_hash(0, IDS) != lane_hash(0, IDS[::-1])
    one, other = sample_ids(0, np.arange(3)), sample_ids(1, np.arange(3))
    swapped = step_hash([lane_hash(0, other), lane_hash(1, one)])
    assert step_hash([lane_hash(0, one), lane_hash(1, other)]) != swapped
    assert running_hash(running_hash(0, 1, 5), 2, 6) != running_hash(running_hash(0, 1, 6), 2, 5)
    assert running_hash(0, 1, 5) != running_hash(0, 2, 5)
