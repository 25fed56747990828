"""Thousands of events against the model cluster, by seed. A failing seed is the report: `storm(seed)` repeats it."""

from __future__ import annotations

import copy
from collections import Counter

import pytest

from elastictrain.controller import Machine, view
from elastictrain.controller import events as ev
from elastictrain.protocol import ParkReport
from tests.property.controller.storm import storm


@pytest.mark.parametrize("first", range(0, 800, 100))
def test_every_storm_ends_without_a_lost_step(first: int) -> None:
    for seed in range(first, first + 100):
        storm(seed)


def test_the_storms_reach_what_they_are_for() -> None:
    """A property test that never sees a recovery, a restore or a drain proves nothing about them."""
    seen: Counter[str] = Counter()
    for seed in range(150):
        cluster = storm(seed)
        assert cluster.ended is not None
        seen[cluster.ended.outcome] += 1
        seen["recoveries"] += len(cluster.machine.core.ledger.recoveries)
        seen["went_back"] += len(cluster.went_back_to)
        plans = list(cluster.plans.values())
        seen["roll_forward"] += sum(plan.roll_forward is not None for plan in plans)
        seen["joined"] += sum(bool(plan.joiners) and plan.generation > 1 for plan in plans)
        seen["moved"] += sum(bool(plan.moves) for plan in plans)
        seen.update({type(event).__name__ for event in cluster.log})
        seen["fenced"] += len(cluster.fenced)
        seen["spoke while fenced"] += len(cluster.spoke)
        seen["not performed"] += len(cluster.not_performed)
        parked = [event.report for event in cluster.log if isinstance(event, ev.WorkerParked)]
        seen["doubted"] += sum(report.doubt is not None for report in parked)
        failed = [event for event in cluster.log if isinstance(event, ev.WorkerFailed)]
        seen["corrupt"] += sum(event.kind == "corrupt" for event in failed)
        seen["back in doubt"] += sum(plan.restore is not None and plan.restore.discard_newer for plan in plans)
    wanted = ["finished", "stopped", "failed", "recoveries", "went_back", "roll_forward", "joined", "moved"]
    wanted += ["WorkerFrozen", "NodeLost", "GenerationHung", "PreemptionNotice", "ControllerBack"]
    wanted += ["doubted", "corrupt", "back in doubt"]
    wanted += ["fenced", "spoke while fenced", "not performed"]
    short = {what: seen[what] for what in wanted if seen[what] < 5}
    assert not short, f"seen too seldom: {short} of {seen}"


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_a_picture_of_the_machine_does_not_change_with_it(seed: int) -> None:
    """It is handed to other threads while the machine goes on."""
    spec, log = storm(seed).spec, storm(seed).log
    machine, pictures = Machine(spec), []
    for number, event in enumerate(log):
        machine.handle(event)
        if number % 7 == 0:
            pictures.append((seen := view(machine), copy.deepcopy(seen)))
    assert all(seen == as_it_was for seen, as_it_was in pictures)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_messages_of_another_generation_change_nothing(seed: int, shift: int) -> None:
    """Forged messages aimed at live members of the living generation, only with another number."""
    cluster = storm(seed, length=40 + seed) if seed % 2 else None
    machine = cluster.machine if cluster is not None else _mid_run(seed)
    generation = machine.generation + shift
    for worker in [*machine.core.ledger.workers, 998]:
        report = ParkReport(worker, generation, 3, generation, True)
        for event in (
            ev.WorkerTroubled(1.0, generation, worker, "x"),
            ev.WorkerFailed(1.0, generation, worker, "user", "x"),
            ev.WorkerFailed(1.0, generation, worker, "torn", "x"),
            ev.WorkerParked(1.0, generation, report),
            ev.Sealed(1.0, generation, worker, 3),
            ev.Progress(1.0, generation, 4),
            ev.CheckpointCommitted(1.0, generation, 4, "p"),
            ev.CheckpointsRemoved(1.0, generation, tuple(machine.core.ledger.checkpoints)),
            ev.CheckpointGivenUp(1.0, generation, worker, 4, 1, True, 5),
            ev.CopiesStand(1.0, generation, worker, "far", 4, (), ""),
            ev.WorkerFinished(1.0, generation, worker, 5, "d"),
        ):
            before = copy.deepcopy(machine)
            assert machine.handle(event) == []
            assert machine == before, event


def _mid_run(seed: int):  # type: ignore[no-untyped-def]
    import random

    from tests.property.controller.cluster import Cluster
    from tests.property.controller.storm import random_spec

    rng = random.Random(seed)
    cluster = Cluster(random_spec(rng))
    for _ in range(20 + seed):
        if cluster.workers:
            cluster.act(rng.choice(sorted(cluster.workers)))
        cluster.deliver(rng.randrange(100))
    return cluster.machine
