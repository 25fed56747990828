"""Seeded storms over the model cluster: fast, exactly repeatable, aimed at the living generation."""

from __future__ import annotations

import random

from elastictrain.controller import MachineSpec
from elastictrain.controller import events as ev
from elastictrain.protocol import Restore
from tests.property.controller.faults import FaultyCluster, random_harm


def random_spec(rng: random.Random) -> MachineSpec:
    most = rng.randint(2, 5)
    start = rng.randint(1, most)
    return MachineSpec(
        lane_count=rng.randint(most, 9),
        steps=rng.randint(5, 16),
        block_elements=tuple(rng.choice([1, 5, 10, 40]) for _ in range(rng.randint(1, 9))),
        min_workers=rng.randint(1, start),
        max_workers=most,
        initial_workers=start,
        spares=rng.choice([0, 0, 1, 2]),
        replace=rng.random() < 0.8,
        mirrors=rng.random() < 0.85,
        lane_order=rng.choice(["contiguous", "round_major"]),
        block_shares={0: 0.0} if rng.random() < 0.2 else {},
        checkpoint=True,
        rebalance_after_steps=3,
    )


FAULTS = (
    *("kill", "kill", "kill", "tear", "freeze", "freeze", "fail_start", "fail_restore"),
    *("name_frozen", "name_frozen", "hang", "cut", "lose_node", "lose_node", "heal", "preempt", "lose_controller"),
    *("dispute", "dispute", "convict", "miscompute"),
)
WISHES = ("add", "drain", "drain", "resize", "resize", "stop")


def storm(
    seed: int, length: int = 220, *, poison: tuple[int, int] | None = None, poison_apply: int | None = None
) -> FaultyCluster:
    """Random events, faults and wishes, then a calm in which the run must end. Raises when a property fails."""
    rng = random.Random(seed)
    restore = Restore(3, "checkpoint 3") if rng.random() < 0.2 else Restore(0, None)
    cluster = FaultyCluster(random_spec(rng), restore)
    cluster.poison, cluster.poison_apply = poison, poison_apply
    badness = rng.choice([0.0, 0.01, 0.03, 0.08])
    speeds = random.Random(f"{seed}/speeds")
    busy = rng.choice([0.45, 0.55, 0.8])  # with a slow network workers are far ahead of what the controller knows
    for _ in range(length):
        if cluster.ended is not None:
            break
        if speeds.random() < 0.04:
            straggle(cluster, speeds)
        dice = rng.random()
        if cluster.down and rng.random() < 0.1:
            cluster.bring_back(rng.choice([0.01, 1.0, 100.0]))
        elif dice < badness:
            fault(cluster, rng, rng.choice(FAULTS))
        elif dice < 1.5 * badness + 0.01:
            wish(cluster, rng, rng.choice(WISHES))
        elif dice < 0.14:
            cluster.send_stale(rng.randrange(1000))
            cluster.tick(rng.choice([0.01, 0.1, 1.0, 30.0]))
        elif dice < busy and cluster.workers:
            cluster.act(rng.choice(sorted(cluster.workers)), unlucky=rng.random() < 0.4)
        else:
            cluster.deliver(rng.randrange(1000))
    cluster.calm()
    cluster.check_end()
    return cluster


def fault(cluster: FaultyCluster, rng: random.Random, kind: str) -> None:
    members = cluster.machine.core.ledger.members()
    number = rng.choice(members if members and rng.random() < 0.8 else [*sorted(cluster.workers), 999])
    random_harm(cluster, rng, kind, number)


def straggle(cluster: FaultyCluster, rng: random.Random) -> None:
    """The straggler watch would move lanes, or do without a worker; sometimes of a generation that is over."""
    plan, now_s = cluster.machine.core.ledger.plan, cluster.now_s
    if plan is None:
        return
    members, generation = plan.layout.workers, plan.generation - (rng.random() < 0.2)
    if rng.random() < 0.2:
        speeds = tuple((worker, rng.uniform(0.1, 4.0)) for worker in members)
        cluster.send(ev.SpeedsLearned(now_s, generation, 1, speeds))
    elif rng.random() < 0.8:
        cuts = sorted(rng.sample(range(1, plan.layout.lane_count), len(members) - 1))
        lanes = tuple(b - a for a, b in zip([0, *cuts], [*cuts, plan.layout.lane_count], strict=True))
        speeds = tuple((worker, rng.uniform(0.1, 4.0)) for worker in members)
        action = "move_back" if rng.random() < 0.2 else "move_lanes"
        cluster.send(ev.LanesProposed(now_s, generation, 1, lanes, speeds, action, "slow"))
    else:
        action = rng.choice(["replace", "leave_out"])
        cluster.send(ev.StragglerLeaves(now_s, generation, 1, rng.choice(members), action, "too slow"))


def wish(cluster: FaultyCluster, rng: random.Random, kind: str) -> None:
    now_s = cluster.now_s
    if kind == "add":
        cluster.send(ev.AddRequested(now_s))
    elif kind == "drain":
        cluster.send(ev.DrainRequested(now_s, rng.choice([*sorted(cluster.workers), 99])))
    elif kind == "resize":
        cluster.send(ev.ResizeRequested(now_s, rng.randint(0, 6)))
    elif rng.random() < 0.1:
        cluster.send(ev.StopRequested(now_s, "asked to"))
