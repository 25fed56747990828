"""How many workers: against trying every number, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from elastictrain.planner.auto import choose_workers, told, worker_counts
from elastictrain.planner.compute import DEFAULTS
from elastictrain.planner.lanes import plan_lanes
from elastictrain.planner.profiles import Cluster, parse_cluster
from elastictrain.planner.workload import STATE_BYTES, Workload, teams_of

WORK = Workload(params=100_000_000, lane_flops=1e12, kept_bytes=1e8, lanes=16)


def cluster(inter: str = "ib-hdr", nodes: int = 16, **more: object) -> Cluster:
    return parse_cluster({"groups": [{"device": "a100-80", "nodes": nodes, "inter": inter, **more}]})


def every_number(work: Workload, there: Cluster, least: int, most: int) -> dict[int, float]:
    """Of one group: the seconds of every number of workers."""
    found = {}
    for count in range(least, min(most, there.size, work.lanes) + 1):
        teams = teams_of(work, there, (0,), DEFAULTS, {0: count})
        copies = 2 if work.mirrors and count > 1 else 1
        split = plan_lanes(teams, work.lanes, STATE_BYTES * copies * work.params, least=1)
        if split is not None:
            found[count] = split.step_s
    return found


@pytest.mark.parametrize("seed", range(40))
def test_no_number_of_workers_is_quicker(seed: int) -> None:
    random = Random(seed)
    work = Workload(
        params=random.choice([10_000, 10_000_000, 1_000_000_000]), lane_flops=random.choice([1e9, 1e12, 1e14]),
        kept_bytes=1e8, lanes=random.randint(4, 40),
    )  # fmt: skip
    there = cluster(random.choice(["eth-10", "ib-ndr"]), random.randint(1, 24), per_node=random.choice([1, 4]))
    least = random.randint(1, 3)
    most = random.randint(least, work.lanes)
    every = every_number(work, there, least, most)
    found = choose_workers(work, there, least, most)
    assert (found is None) == (not every)
    if found is not None:
        assert least <= found.workers <= most
        assert found.split.step_s == pytest.approx(every[found.workers])
        assert found.split.step_s == pytest.approx(min(every.values()))
        assert found.others[min(most, there.size)] == pytest.approx(every[min(most, there.size)])


def test_a_slow_network_makes_few_workers_quicker() -> None:
    work = replace(WORK, params=20_000_000)
    slow = choose_workers(work, cluster("eth-10"), 1, 16)
    quick = choose_workers(work, cluster("ib-ndr"), 1, 16)
    assert slow is not None
    assert quick is not None
    assert slow.workers < quick.workers == 16
    said = told(slow, cluster("eth-10"), 16)
    assert said[0].startswith(f"plan: auto: {slow.workers} worker")
    assert said[1].startswith("16, as workers.max allows, would take ")
    assert len(said) == 2
    assert len(told(quick, cluster("ib-ndr"), 16)) == 1


def test_of_two_that_are_as_quick_the_fewer_workers() -> None:
    alone = Workload(params=1, lane_flops=1e12, kept_bytes=0, lanes=10)
    free = {"name": "free", "alpha_s": 0, "beta_bytes_s": 1e18}
    there = parse_cluster({"groups": [{"device": "a100-80", "nodes": 9, "inter": "free"}], "links": [free]})
    found = choose_workers(alone, there, 1, 9)
    assert found is not None
    assert found.workers == 5  # nine would have two lanes somewhere too
    assert worker_counts(10, 1, 9) == [1, 2, 3, 4, 5, 9]
    assert worker_counts(10, 3, 8) == [3, 4, 5, 8]


def test_a_group_that_is_too_slow_is_left_out_and_that_is_said() -> None:
    mixed = parse_cluster(
        {"groups": [{"device": "a100-80", "per_node": 4}, {"device": "t4", "per_node": 4, "slowdown": 20}]}
    )
    found = choose_workers(WORK, mixed, 1, 8)
    assert found is not None
    assert dict(found.counts) == {0: 4}
    assert "nodes of other groups are not kept out" in told(found, mixed, 8)[-1]
    both = choose_workers(WORK, mixed, 5, 8)
    assert both is not None
    assert both.counts[0] == 4
    assert not both.alike
    assert min(both.split.lanes) >= 1


def test_few_workers_stay_on_one_node() -> None:
    many, one = cluster("eth-10", 8, per_node=4), cluster("eth-10", 1, per_node=4)
    here, there = (teams_of(WORK, found, (0,), DEFAULTS, {0: 4})[0] for found in (many, one))
    assert here.ways[0].fixed_s == there.ways[0].fixed_s
    five = teams_of(WORK, many, (0,), DEFAULTS, {0: 5})[0]
    assert five.ways[0].fixed_s > 3 * here.ways[0].fixed_s


def test_what_fits_nowhere_and_too_few_devices() -> None:
    huge = Workload(params=50_000_000_000, lane_flops=1e12, kept_bytes=1e8, lanes=16)
    assert choose_workers(huge, cluster(), 1, 16) is None
    assert choose_workers(WORK, cluster(nodes=2), 3, 16) is None
