"""More devices never make the best plan slower, and no choice of devices is quicker than the one that is made."""

from __future__ import annotations

import math
from itertools import pairwise, product
from random import Random

import pytest

from elastictrain.planner.auto import choose_workers
from elastictrain.planner.compute import DEFAULTS
from elastictrain.planner.cuts import Cuts
from elastictrain.planner.lanes import plan_lanes
from elastictrain.planner.plan import Family, Task
from elastictrain.planner.profiles import Cluster, parse_cluster
from elastictrain.planner.search import search
from elastictrain.planner.shapes import MOST_DEALS, deals
from elastictrain.planner.workload import STATE_BYTES, Workload, plan_workload, teams_of
from tests.support.planner_instances import leaves
from tests.unit.planner.test_search import SMALL, random_task


def with_nodes(cluster: Cluster, number: int, more: int) -> Cluster:
    groups = [group.model_dump() for group in cluster.groups]
    groups[number]["nodes"] += more
    return parse_cluster({"groups": groups, "between": cluster.between})


def best_s(task: Task, cluster: Cluster, *families: Family) -> float:
    found = search(task, cluster, families=families or ("lanes", "grid", "mixed"))
    return found.plans[0].step_s if found.plans else math.inf


@pytest.mark.parametrize("seed", range(20))
def test_more_nodes_never_make_the_best_plan_slower(seed: int) -> None:
    task, cluster = random_task(seed)
    number = Random(seed).randrange(len(cluster.groups))
    families: tuple[Family, ...] = ("lanes", "grid", "mixed")
    for family in families:
        seconds = [best_s(task, with_nodes(cluster, number, more), family) for more in (0, 1, 2, 5)]
        for fewer, more in pairwise(seconds):
            assert more <= fewer * (1 + 1e-9), (family, seconds)


def test_a_slow_network_between_nodes_leaves_the_second_node_idle() -> None:
    one = {"device": "a100-80", "nodes": 1, "per_node": 8, "intra": "nvlink3", "inter": "eth-10"}
    task = Task(model=SMALL, lanes=16)
    families: tuple[Family, ...] = ("lanes", "grid")
    for family in families:
        alone = search(task, parse_cluster({"groups": [one]}), families=(family,))
        two = search(task, parse_cluster({"groups": [one | {"nodes": 2}]}), families=(family,))
        assert two.plans[0].devices == 8
        assert two.plans[0].step_s == pytest.approx(alone.plans[0].step_s)
        assert two.bound_s <= alone.plans[0].step_s * (1 + 1e-9)


def a_workload(random: Random) -> tuple[Workload, Cluster]:
    work = Workload(
        params=random.choice([10_000, 100_000_000, 700_000_000]), lane_flops=random.choice([1e10, 1e12, 1e14]),
        kept_bytes=random.choice([1e8, 3e9]), lanes=random.randint(1, 12), mirrors=random.random() < 0.5,
    )  # fmt: skip
    groups = [
        {
            "device": random.choice(["a100-80", "l4", "t4"]), "nodes": random.randint(1, 2),
            "per_node": random.randint(1, 3), "intra": "pcie4", "inter": random.choice(["eth-10", "ib-ndr"]),
            "island": random.choice(["a", "b"]), "slowdown": random.choice([1, 1, 4]),
        }
        for _ in range(random.randint(1, 3))
    ]  # fmt: skip
    return work, parse_cluster({"groups": groups, "between": random.choice(["eth-10", "eth-100"])})


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_of_devices_is_quicker(seed: int) -> None:
    """Against every choice of devices, which knows nothing of the searches."""
    work, cluster = a_workload(Random(seed))
    best: dict[int, float] = {}
    for counts in product(*(range(group.devices + 1) for group in cluster.groups)):
        used = {n: count for n, count in enumerate(counts) if count}
        if not 1 <= sum(counts) <= work.lanes:
            continue
        teams = teams_of(work, cluster, tuple(used), DEFAULTS, used)
        copies = 2 if work.mirrors and sum(counts) > 1 else 1
        split = plan_lanes(teams, work.lanes, STATE_BYTES * copies * work.params, least=1)
        if split is not None:
            best[sum(counts)] = min(split.step_s, best.get(sum(counts), math.inf))
    found, chosen = plan_workload(work, cluster), choose_workers(work, cluster, 1, 100)
    assert (found is None) == (chosen is None) == (not best)
    if found is not None and chosen is not None:
        assert found[1].step_s == pytest.approx(min(best.values()))
        assert chosen.split.step_s == pytest.approx(min(best.values()))
        assert best[chosen.workers] == pytest.approx(min(best.values()))
        assert 0 not in found[1].lanes


def test_devices_are_taken_in_every_way_or_group_by_group_where_there_are_too_many() -> None:
    assert sorted(deals((2, 3), 4)) == [(1, 3), (2, 2)]
    assert list(deals((4,), 3)) == [(3,)]
    assert list(deals((4, 4), 1)) == []
    assert list(deals((4, 4), 9)) == []
    few = sorted(deals((8, 8, 8), 10))
    assert few == sorted(t for t in product(range(1, 9), repeat=3) if sum(t) == 10)
    assert MOST_DEALS < 9 * 9
    assert sorted(deals((9, 9, 9), 12)) == [(1, 2, 9), (1, 9, 2), (2, 1, 9), (2, 9, 1), (9, 1, 2), (9, 2, 1)]


@pytest.mark.parametrize("intra", ["loopback", "nvlink3"])
def test_a_branch_of_worker_counts_promises_no_less_than_what_is_in_it(intra: str) -> None:
    """Also where an exchange across nodes is quicker than one inside, so that more workers take less time for it."""
    groups = [{"device": "h100", "nodes": 4, "per_node": 8, "intra": intra, "inter": "ib-ndr"}]
    task = Task(model=SMALL, lanes=32, lane_batch=2)
    for branch in Cuts(task, parse_cluster({"groups": groups}), DEFAULTS).grid():
        for promised, candidate in leaves(branch):
            assert promised <= candidate.bound_s * (1 + 1e-9)


def test_more_devices_only_add_numbers_of_workers_to_a_pipeline_over_several_groups() -> None:
    task, tried = Task(model=SMALL, lanes=24), []
    for nodes in (3, 4, 6, 9):
        groups = [{"device": device, "nodes": nodes, "per_node": 2} for device in ("a100-80", "l4")]
        mixed = Cuts(task, parse_cluster({"groups": groups}), DEFAULTS).mixed([(0, 1)])
        plans = (candidate.work_out(math.inf) for branch in mixed for _, candidate in leaves(branch))
        cuts = [plan.cut for plan in plans if plan is not None and plan.cut is not None]
        tried.append({(cut.tensor, cut.pipeline, cut.workers) for cut in cuts if cut.tensor * cut.pipeline <= 2})
    assert all(fewer < more for fewer, more in pairwise(tried))
    assert {workers for _, _, workers in tried[0]} == {1, 2, 3, 4, 5, 6}
