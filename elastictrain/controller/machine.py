"""The controller as a pure machine: an event in, commands out. No Ray, torch, clock, randomness, threads or I/O.

Time arrives with the events (`now_s`), commands are performed by the shell, and what a command leads to comes back as
an event. So a journal of the events is the whole memory of a run: replaying it gives an equal machine.

Two kinds of moves are kept apart, as in h11: *event moves* (`moves`: what an event changes by itself) and *condition
moves* (`settle`: what follows from the facts, repeated to a fixed point in a stated priority). An event that is about
another generation, or from a worker that is not a live member of this one, changes nothing at all.

What each phase does is in `phases`; what is known across phases in `facts`; the recovery rule in `recovery`; who gets
what in `policies` and `planning`; the numbered invariants in `invariants`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastictrain.controller import alarms, moves, stored
from elastictrain.controller import events as ev
from elastictrain.controller.clockwork import next_deadline_s, on_tick
from elastictrain.controller.commands import Command, Kill
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Ledger, MachineSpec
from elastictrain.controller.phases import Gathering, Phase
from elastictrain.controller.settle import settle
from elastictrain.controller.speeds import on_lanes, on_let_go, on_speeds

HANDLERS: dict[type[Any], Callable[[Core, Any, list[Command]], bool]] = {
    ev.Begun: moves.on_begun,
    ev.WorkerPlaced: moves.on_placed,
    ev.WorkerReady: moves.on_ready,
    ev.WorkerStartFailed: moves.on_start_failed,
    ev.WorkerDied: moves.on_died,
    ev.WorkerTroubled: moves.on_troubled,
    ev.WorkerFailed: moves.on_failed,
    ev.WorkerParked: moves.on_parked,
    ev.Sealed: moves.on_sealed,
    ev.Progress: moves.on_progress,
    ev.CheckpointCommitted: stored.on_checkpoint,
    ev.CheckpointsRemoved: stored.on_removed,
    ev.CheckpointGivenUp: stored.on_given_up,
    ev.CopiesStand: stored.on_copies,
    ev.WorkerFinished: moves.on_finished,
    ev.AddRequested: moves.on_add,
    ev.DrainRequested: moves.on_drain,
    ev.ResizeRequested: moves.on_resize,
    ev.StopRequested: moves.on_stop,
    ev.WorkerFrozen: alarms.on_frozen,
    ev.NodeLost: alarms.on_node_lost,
    ev.GenerationHung: alarms.on_hung,
    ev.PreemptionNotice: alarms.on_preemption,
    ev.ClusterChanged: alarms.on_cluster,
    ev.LanesProposed: on_lanes,
    ev.StragglerLeaves: on_let_go,
    ev.SpeedsLearned: on_speeds,
    ev.ControllerBack: alarms.on_back,
    ev.Tick: on_tick,
}


def speaker(event: ev.Event) -> int | None:
    """The worker that an event comes from; None when it comes from elsewhere, or says only that a worker is gone."""
    if isinstance(event, ev.WorkerParked):
        return event.report.worker
    spoken = ev.WorkerPlaced | ev.WorkerReady | ev.WorkerTroubled | ev.WorkerFailed | ev.Sealed | ev.WorkerFinished
    return event.worker if isinstance(event, spoken | ev.CheckpointGivenUp | ev.CopiesStand) else None


class Machine:
    """The controller of one run. Equal machines answer equally to equal events."""

    def __init__(self, spec: MachineSpec) -> None:
        ledger = Ledger(target=spec.initial_workers, complement=spec.initial_workers + spec.spares)
        ledger.base_generation = spec.base_generation
        self.core = Core(spec, ledger, Gathering())

    @property
    def spec(self) -> MachineSpec:
        return self.core.spec

    @property
    def phase(self) -> Phase:
        return self.core.state.phase

    @property
    def generation(self) -> int:
        """The newest generation that was formed; 0 before the first."""
        return self.core.ledger.generation

    def handle(self, event: ev.Event) -> list[Command]:
        """Take in one event; what must be done now, in order. Nothing before `Begun` counts but a stop. A fenced worker
        that speaks is not heard: it is killed.
        """
        out: list[Command] = []
        if self.phase.is_terminal:
            return out
        if not self.core.ledger.begun and not isinstance(event, ev.Begun | ev.StopRequested):
            return out
        fenced = self.core.ledger.fenced
        if fenced and (worker := speaker(event)) in fenced:
            return [Kill(worker, fenced[worker])]
        if HANDLERS[type(event)](self.core, event, out):
            settle(self.core, event.now_s, out)
        return out

    def next_deadline_s(self) -> float | None:
        """When the shell should send a `Tick` if nothing else happens; None: no need."""
        return None if self.phase.is_terminal else next_deadline_s(self.core)

    def __eq__(self, other: object) -> bool:
        return self.core == other.core if isinstance(other, Machine) else NotImplemented

    __hash__ = None  # type: ignore[assignment]
