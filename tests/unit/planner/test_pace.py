"""How many workers take part when the world has changed."""

from __future__ import annotations

from random import Random

import pytest

from elastictrain.planner.auto import choose_workers, pace_of
from elastictrain.planner.pace import WORTH, Pace, best_size
from elastictrain.planner.profiles import parse_cluster
from elastictrain.planner.workload import Workload

FREE = Pace(1.0, (0.0,))


def test_who_would_not_lower_the_largest_number_of_lanes_is_of_no_use() -> None:
    assert best_size(FREE, 16, (1.0,) * 11, 1) == 8
    assert best_size(FREE, 16, (1.0,) * 7, 1) == 6
    assert best_size(FREE, 16, (1.0,) * 5, 1) == 4
    assert best_size(FREE, 16, (1.0,) * 5, 5) == 5, "members stay"
    assert best_size(FREE, 4, (1.0,) * 9, 1) == 4, "everybody needs a lane"


def test_slow_newcomers_count_as_slow_and_exchange_costs() -> None:
    assert best_size(FREE, 8, (1.0, 1.0), 1) == 2
    assert best_size(FREE, 8, (1.0, 0.1), 1) == 1, "the one lane that it must have takes longer than eight elsewhere"
    dear = Pace(1.0, (0.0, 5.0, 6.0))
    assert best_size(dear, 8, (1.0, 1.0, 1.0), 1) == 1
    assert best_size(dear, 80, (1.0, 1.0, 1.0), 1) == 3
    assert dear.step_s(8, (1.0,) * 4) == 2 + 6, "beyond the list as at its end"


@pytest.mark.parametrize("seed", range(40))
def test_no_other_number_is_worth_more(seed: int) -> None:
    random = Random(seed)
    count, lanes = random.randint(1, 7), random.randint(1, 12)
    pace = Pace(random.uniform(0.1, 2), tuple(random.uniform(0, 2) for _ in range(count)))
    speeds = tuple(random.choice([1.0, random.uniform(0.2, 2)]) for _ in range(count))
    least = random.randint(1, count)
    sizes = range(min(least, lanes), min(count, lanes) + 1)
    seconds = {size: pace.step_s(lanes, speeds[:size]) for size in sizes}
    if least > lanes:
        return
    found = best_size(pace, lanes, speeds, least)
    assert seconds[found] <= (1 + WORTH) * min(seconds.values())
    assert all(seconds[fewer] > (1 + WORTH) * min(seconds.values()) for fewer in sizes if fewer < found)


def test_the_pace_of_a_job_is_that_of_its_plan() -> None:
    groups = [{"device": "a100-80", "nodes": 4, "per_node": 2}, {"device": "l4", "nodes": 2, "per_node": 2}]
    cluster = parse_cluster({"groups": groups})
    work = Workload(params=10**8, lane_flops=1e13, kept_bytes=1e8, lanes=24, dtype="bf16")
    choice = choose_workers(work, cluster, 1, 8)
    assert choice is not None
    pace = pace_of(work, cluster, choice)
    assert len(pace.rest_s) == choice.workers
    assert pace.rest_s[0] < pace.rest_s[-1]
    assert pace.step_s(24, (1.0,) * choice.workers) == pytest.approx(choice.split.step_s, rel=0.1)
