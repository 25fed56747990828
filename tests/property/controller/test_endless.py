"""A job that cannot go on ends soon and says why; bad luck does not end it."""

from __future__ import annotations

import random

import pytest

from elastictrain.controller import MachineSpec
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from tests.property.controller.faults import FaultyCluster
from tests.property.controller.storm import storm


def spec(workers: int, **changes: object) -> MachineSpec:
    facts = {"lane_count": 8, "steps": 12, "block_elements": (10,) * 6, "checkpoint": True}
    return MachineSpec(**facts, max_workers=workers, initial_workers=workers, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("spares", [0, 2])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_a_lane_that_kills_whoever_computes_it_ends_the_run(workers: int, spares: int, step: int) -> None:
    cluster = FaultyCluster(spec(workers, spares=spares))
    cluster.poison = (step, 5)
    cluster.calm()
    cluster.check_end()
    assert cluster.ended is not None
    error = cluster.ended.error or ""
    assert cluster.ended.outcome == "failed"
    assert 3 <= len(cluster.poisoned) <= 4  # one more when the controller does not know how far it had come
    known = f"step {step}" if workers > 1 else f"step {step - 1} or {step}" if step > 1 else "step 1 or 2"
    assert error.startswith(f"RecipeError: {known} cannot be committed: it has failed 3 times in a row")
    assert "Whoever computes" in error
    assert all(f"worker {worker} (killed)" in error for worker in cluster.poisoned[-3:])


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_an_update_that_always_fails_ends_the_run_with_its_traceback(workers: int, step: int) -> None:
    """It tears all workers, so each round goes back to the checkpoint."""
    cluster = FaultyCluster(spec(workers))
    cluster.poison_apply = step
    cluster.calm()
    cluster.check_end()
    assert cluster.ended is not None
    assert cluster.ended.outcome == "failed"
    assert len(cluster.poisoned) <= 3 * workers
    error = cluster.ended.error or ""
    assert error.startswith(f"RecipeError: step {step} or {step + 1} could be computed but not applied")
    assert "Traceback ...\nRuntimeError: no memory for" in error


@pytest.mark.parametrize("spares", [0, 1])
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("flaky", [0, 1])
def test_one_that_is_troubled_again_and_again_is_replaced(workers: int, spares: int, flaky: int) -> None:
    """Nobody dies of it, so no other budget is touched."""
    cluster = FaultyCluster(spec(workers, spares=spares))
    cluster.flaky = {flaky}
    cluster.calm()
    cluster.check_end()
    assert cluster.ended is not None
    assert cluster.ended.outcome == "finished"
    assert flaky not in cluster.workers
    assert cluster.machine.generation <= cluster.spec.budget.vain + 2


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_when_all_are_troubled_it_ends(workers: int, replace: bool) -> None:
    cluster = FaultyCluster(spec(workers, replace=replace))
    cluster.flaky = range(10**6)
    cluster.calm()
    cluster.check_end()
    assert cluster.ended is not None
    assert cluster.ended.outcome == "failed"
    error = cluster.ended.error or ""
    assert error.startswith("ClusterError: no step after 0 could be committed: the last 5 generations, of workers")
    budget = cluster.spec.budget
    assert cluster.machine.generation <= (budget.vain_replaced + 1) * budget.vain + budget.vain_replaced


def test_deaths_with_commits_in_between_never_end_a_run() -> None:
    """A hundred deaths, each with a step behind it: the hourly budget is far away, and no step is to blame."""
    cluster = FaultyCluster(spec(3))
    killed = 0
    for _ in range(4000):
        if cluster.ended is not None:
            break
        for number in list(cluster.workers):
            cluster.act(number)
        while cluster.deliver(0):
            pass
        members = cluster.machine.core.ledger.members()
        applied = {cluster.workers[w].applied for w in members if w in cluster.workers}
        if cluster.machine.phase.value == "running" and len(members) == 3 and min(applied, default=0) > killed:
            killed += 1
            cluster.kill(members[killed % 3], lose_messages=False)
    assert cluster.ended is not None
    assert cluster.ended.outcome == "finished"
    assert killed >= 10


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_among_other_faults_it_ends_as_well(first: int) -> None:
    for seed in range(first, first + 50):
        rng = random.Random(seed)
        storm(seed, length=60, poison=(rng.randint(1, 4), 0) if seed % 2 else None, poison_apply=rng.randint(1, 4))


def test_so_many_failures_in_an_hour_are_the_clusters_fault() -> None:
    cluster = FaultyCluster(spec(1, start_attempts=10**6))
    budget = cluster.spec.budget.hourly(1)
    for failures in range(budget + 1):
        assert cluster.ended is None, f"after {failures} of {budget}"
        (worker,) = cluster.workers
        cluster.fail_start(worker)
        cluster.tick(30.0)
        cluster.deliver(0)
    assert cluster.ended is not None
    assert (cluster.ended.error or "").startswith(
        f"ClusterError: {budget + 1} failures within an hour (workers could not start), more than {budget}"
    )


def test_failures_of_more_than_an_hour_ago_are_forgotten() -> None:
    cluster = FaultyCluster(spec(1, start_attempts=10**6))
    for _ in range(2 * cluster.spec.budget.hourly(1)):
        (worker,) = cluster.workers
        cluster.fail_start(worker)
        cluster.tick(40.0)
        cluster.deliver(0)
    assert cluster.ended is None


def test_a_node_that_keeps_failing_is_set_aside_within_the_share() -> None:
    """Three nodes: the worst is set aside; a second one is not, whatever it does."""
    cluster = FaultyCluster(spec(1, spares=4))
    aside: list[str] = []
    for turn in range(40):
        for worker in list(cluster.workers.values()):
            if worker.state == "starting":
                cluster.act(worker.number)
            elif worker.state == "waiting" and worker.node in ("node1", "node2"):
                cluster.kill(worker.number, lose_messages=False)
        while cluster.deliver(turn):
            pass
        aside = sorted(n for n, f in cluster.machine.core.ledger.nodes.items() if f.aside_until_s is not None)
        assert len(aside) <= 1
    assert len(aside) == 1
    assert cluster.ended is None
    again = [c for c in cluster.send(ev.Tick(cluster.now_s + 5 * 3600.0)) if isinstance(c, cm.Announce)]
    assert [c.data["node"] for c in again if c.kind == "node_taken_back"] == aside
