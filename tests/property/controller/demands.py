"""What a new generation, and a stop, must be like, judged by what the model cluster knows and the machine does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.protocol import FormPlan
from tests.property.controller.worker import vote_bytes

if TYPE_CHECKING:
    from tests.property.controller.cluster import Cluster

UNDISTURBED = (
    ev.WorkerPlaced,
    ev.WorkerReady,
    ev.Sealed,
    ev.Progress,
    ev.CheckpointCommitted,
    ev.WorkerParked,
    ev.Tick,
)
"""Events of a cluster in which nothing goes wrong."""


def check_stop(cluster: Cluster, command: cm.EndRun) -> None:
    """With nothing in its way, a run that is stopped has stored what it ends with, unless all that is gone."""
    asked = max(n for n, event in enumerate(cluster.log) if isinstance(event, ev.StopRequested))
    if all(isinstance(event, UNDISTURBED) for event in cluster.log[asked + 1 :]) and not cluster.is_lost():
        stored = max(cluster.checkpoints, default=0)
        assert command.step == stored, f"stopped at step {command.step}, stored is step {stored}"


def check_form(cluster: Cluster, plan: FormPlan) -> None:
    for worker in cluster.workers.values():
        assert worker.plan is None or worker.state == "parked" or worker.number in cluster.fenced, (
            f"generation {plan.generation} forms while {worker} is not parked"
        )
    cluster.doubts.check(plan)
    truth = cluster.true_layout()
    if truth is None:
        assert plan.restore is not None, f"nothing is sealed, but nothing is restored: {plan}"
        newest = max(cluster.checkpoints, default=0)
        assert plan.step == plan.restore.step == newest, f"{plan.restore} instead of step {newest}"
        return
    assert not cluster.is_lost(), f"{plan} goes on without some blocks"
    assert plan.previous == truth, f"{plan} starts from another layout than the one sealed last, {truth}"
    assert plan.restore is None, f"{plan.restore} although every block has a live holder"
    holders = [w for w in cluster.believed().values() if w.number in truth.workers]
    reached = max(w.applied for w in holders)
    assert plan.step == reached, f"a survivor has applied {reached}, the plan goes on from {plan.step}"
    if any(w.applied < reached for w in holders if w.number in plan.layout.workers):
        assert plan.roll_forward == vote_bytes(reached)
