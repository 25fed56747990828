"""The invariants of the controller as code. Property tests and the simulator check them after every event.

Of the state (`check_invariants`):

- **I1** At most one generation is live: every member belongs to the newest plan, and only the sealed and the forming
  layout are remembered.
- **I2** A generation has between `min_workers` and `max_workers` members, and so has the target. One that is formed
  only to store the state of a run that is stopped may have fewer.
- **I3** A layout covers every lane and every block of the job, in any generation; with mirrors on and two workers or
  more, no block of it is held once.
- **I4** While forming or running, every block of the sealed layout has a live holder (a leaving one counts), or the
  generation restores a checkpoint.
- **I5** Nothing is published that could be redone: a generation forms at or after the published step, and no known
  checkpoint is newer than what is published.
- **I6** A worker that leaves is kept, parked, until all members have seen the seal: never in phase running.
- **I7** A worker marked as draining is a live member or is leaving.

Of a change (`Watch`):

- **I8** Phases follow the table; a terminal phase stays and emits nothing.
- **I9** Generations strictly increase, one by one, and a generation forms only after parking or gathering: every worker
  of the one before is parked, dead or gone.
- **I10** Worker numbers are never used twice.
- **I11** The published step never falls, except when the job goes back to a checkpoint, and that is announced.
- **I12** A move's source is a live holder in the sealed layout, and every new holder gets each of its blocks once.
- **I13** A worker is retired only when no sealed layout counts on it.
- **I14** A worker of a lost node is fenced: it has no role, gets none again, and is in no new plan.
- **I15** A doomed worker has no say: no report of it counts, and it is in no new plan.
- **I16** Whoever is doomed as the last holder of a block is announced as the loss of both holders.
- **I17** Nodes are set aside only up to their share of the known ones, and starts avoid all of them only when every one
  is lost or about to go.
- **I18** A run that goes on has lost workers, or hung, in fewer rounds at one step than its budget allows.
- **I19** What an event commands follows from the state after it, so that a new controller can command it again.
- **I20** That a controller was away kills nobody, and every deadline moves by the gap.
- **I21** A notice belongs to a member (or to one that leaves); when it is due, its worker is draining.
- **I22** A run that goes on has formed fewer generations in vain, one after the other, than its budget allows, and has
  replaced no more workers for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from elastictrain.controller import events as ev
from elastictrain.controller.adoption import outstanding
from elastictrain.controller.commands import (
    Announce,
    AskPause,
    Command,
    EndRun,
    Form,
    Kill,
    OfferLanes,
    Park,
    Retire,
    StartWorker,
)
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Role
from elastictrain.controller.machine import Machine
from elastictrain.controller.phases import TRANSITIONS, Finishing, Forming, Gathering, Parking, Phase
from elastictrain.errors import InternalError
from elastictrain.layout import Layout, lost_blocks
from elastictrain.protocol import FormPlan


def _require(holds: bool, invariant: str, facts: object) -> None:
    if not holds:
        raise InternalError(f"invariant {invariant} does not hold: {facts}")


def check_invariants(machine: Machine) -> None:
    """I1 to I7, and what of I14 to I22 is about a state. Raises InternalError that names the invariant."""
    core = machine.core
    spec, ledger, phase = core.spec, core.ledger, machine.phase
    members, leaving = ledger.with_role(Role.MEMBER), ledger.with_role(Role.LEAVING)
    in_plan = set() if ledger.plan is None else set(ledger.plan.layout.workers)
    _require(set(members) <= in_plan, "I1", (members, in_plan))
    _require(set(ledger.layouts) <= {ledger.sealed, ledger.generation}, "I1", sorted(ledger.layouts))
    _require(spec.min_workers <= ledger.target <= spec.max_workers, "I2", ledger.target)
    for layout in ledger.layouts.values():
        _check_layout(core, layout)
    if phase in (Phase.FORMING, Phase.RUNNING):
        _check_live(core, members, leaving)
    _require(max(ledger.checkpoints, default=0) <= ledger.published_step, "I5", ledger.checkpoints)
    _require(set(leaving) == set(ledger.leaving), "I6", (leaving, sorted(ledger.leaving)))
    _require(phase is not Phase.RUNNING or not leaving, "I6", leaving)
    _require(set(ledger.draining) <= {*members, *leaving}, "I7", ledger.draining)
    _require(len(set(ledger.draining)) == len(ledger.draining), "I7", ledger.draining)
    _require(not set(ledger.fenced) & set(ledger.workers), "I14", ledger.fenced)
    heard = core.state.reports if isinstance(core.state, Parking) else {}
    heard = core.state.parked if isinstance(core.state, Gathering) else heard
    _require(not ledger.workers.doomed & set(heard), "I15", (ledger.workers.doomed, sorted(heard)))
    _require(phase.is_terminal or len(ledger.rounds) < spec.budget.same_step, "I18", ledger.rounds)
    _require(phase.is_terminal or len(ledger.vain) < spec.budget.vain, "I22", ledger.vain)
    _require(len(ledger.vain_replaced) <= spec.budget.vain_replaced, "I22", ledger.vain_replaced)
    _require(set(ledger.notices) <= {*members, *leaving}, "I21", ledger.notices)
    due = {worker for worker, notice in ledger.notices.items() if notice.due}
    _require(due <= set(ledger.draining), "I21", (ledger.notices, ledger.draining))


def _check_layout(core: Core, layout: Layout) -> None:
    spec = core.spec
    least = spec.min_workers if core.ledger.closing == 0 else 1
    _require(least <= layout.world_size <= spec.max_workers, "I2", layout.workers)
    _require(layout.blocks == len(spec.block_elements), "I3", layout)
    _require(layout.lane_count == spec.lane_count, "I3", layout)
    mirrored = layout.held_once == 0 or not spec.mirrors or layout.world_size == 1
    _require(mirrored, "I3", layout)


def _check_live(core: Core, members: Sequence[int], leaving: Sequence[int]) -> None:
    ledger = core.ledger
    assert ledger.plan is not None
    _require(set(members) == set(ledger.plan.layout.workers), "I1", members)
    if ledger.truth is None:
        _require(ledger.plan.restore is not None, "I4", ledger.plan)
    else:
        gone = set(ledger.truth.workers) - {*members, *leaving}
        _require(not lost_blocks(ledger.truth, gone), "I4", (ledger.truth, sorted(gone)))
    if ledger.sealed != ledger.generation:
        _require(ledger.published_step <= ledger.plan.step, "I5", (ledger.published_step, ledger.plan.step))


class Watch:
    """Checks I8 to I22: call `before` ahead of an event is handled and `after` with the commands it gave."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.started: set[int] = set()
        self.before()

    def before(self, event: ev.Event | None = None) -> None:
        """`event`: what comes next; without it I20 is not checked."""
        self.event = event
        ledger, state = self.machine.core.ledger, self.machine.core.state
        self.truth, self.doomed = ledger.truth, set(ledger.workers.doomed)
        self.deadline_s = state.deadline_s if isinstance(state, Forming | Parking | Finishing) else None
        self.phase = self.machine.phase
        self.generation = ledger.generation
        self.published_step = ledger.published_step

    def after(self, commands: Sequence[Command]) -> None:
        """Check the change since `before`, then everything that `check_invariants` checks."""
        self._check_phase(commands)
        ledger = self.machine.core.ledger
        back = any(isinstance(c, Announce) and c.kind in ("went_back", "checkpoint_dropped") for c in commands)
        _require(back or ledger.published_step >= self.published_step, "I11", ledger.published_step)
        for command in commands:
            if isinstance(command, StartWorker):
                _require(command.worker not in self.started, "I10", command)
                self.started.add(command.worker)
            elif isinstance(command, Form):
                _require(command.plan.generation == self.generation + 1, "I9", command.plan.generation)
                self._check_moves(command.plan)
                there = set(command.plan.layout.workers)
                _require(not there & set(ledger.fenced), "I14", (command.plan.layout.workers, ledger.fenced))
                _require(not there & ledger.workers.doomed, "I15", (command.plan.layout.workers, ledger.workers.doomed))
            elif isinstance(command, Retire) and not self.machine.phase.is_terminal:
                truth = ledger.truth
                _require(truth is None or command.worker not in truth.workers, "I13", command)
        if not self.phase.is_terminal:
            self._check_dooms(commands)
            self._check_nodes(commands)
            self._check_can_be_repeated(commands)
            self._check_gap(commands)
        check_invariants(self.machine)

    def _check_dooms(self, commands: Sequence[Command]) -> None:
        ledger = self.machine.core.ledger
        new = ledger.workers.doomed - self.doomed
        if not new or self.truth is None:
            return
        speaking = set(ledger.workers) - ledger.workers.doomed
        alone = [s for s in self.truth.shards if new & set(s.holders()) and not speaking & set(s.holders())]
        said = any(isinstance(c, Announce) and c.kind == "doomed" and c.data["blocks_held_alone"] > 0 for c in commands)
        _require(said or not alone, "I16", (sorted(new), alone))

    def _check_nodes(self, commands: Sequence[Command]) -> None:
        nodes = self.machine.core.ledger.nodes
        for command in commands:
            if isinstance(command, Announce) and command.kind == "node_set_aside":
                aside = sum(facts.aside_until_s is not None for facts in nodes.values())
                _require(aside <= len(nodes) * self.machine.spec.budget.node_share, "I17", nodes)
            elif isinstance(command, StartWorker) and nodes and set(command.avoid) >= set(nodes):
                _require(all(facts.avoid_until_s is not None for facts in nodes.values()), "I17", nodes)

    def _check_can_be_repeated(self, commands: Sequence[Command]) -> None:
        ledger, state = self.machine.core.ledger, self.machine.core.state
        again = outstanding(self.machine)
        known = {*ledger.workers, *ledger.fenced}
        asked = [command for command in commands if isinstance(command, AskPause)]
        for command in commands:
            if command in asked[:-1]:
                continue  # another was asked, or for something else, in the same event
            if isinstance(command, StartWorker | Form | AskPause) and self.machine.phase.is_terminal:
                continue  # the end came in the same event
            if isinstance(command, StartWorker | Form | AskPause | OfferLanes | EndRun):
                _require(command in again, "I19", (command, again))
            elif isinstance(command, Kill) and command.worker in known:
                _require(any(isinstance(c, Kill) and c.worker == command.worker for c in again), "I19", command)
            elif isinstance(command, Park) and isinstance(state, Parking):
                told = {w for c in again if isinstance(c, Park) for w in c.workers}
                need = set(command.workers) - set(state.reports) - ledger.workers.doomed
                _require(need & set(ledger.workers) <= told, "I19", (command, again))

    def _check_gap(self, commands: Sequence[Command]) -> None:
        state = self.machine.core.state
        if not isinstance(self.event, ev.ControllerBack):
            return
        _require(not any(isinstance(command, Kill) for command in commands), "I20", commands)
        if self.deadline_s is not None and isinstance(state, Forming | Parking | Finishing) and not commands[1:]:
            _require(state.deadline_s == self.deadline_s + self.event.gone_s, "I20", state)

    def _check_phase(self, commands: Sequence[Command]) -> None:
        now = self.machine.phase
        if self.phase.is_terminal:
            _require(now is self.phase and not commands, "I8", (self.phase, now, commands))
        reachable = {self.phase}
        for _ in range(3):  # one event may lead through several phases
            reachable |= {after for phase in reachable for after in TRANSITIONS[phase]}
        _require(now in reachable, "I8", (self.phase, now))
        formed = self.machine.generation != self.generation
        _require(not formed or self.phase is not Phase.FINISHING, "I9", self.phase)

    def _check_moves(self, plan: FormPlan) -> None:
        if plan.restore is not None:
            _require(not plan.moves, "I12", plan.moves)
            return
        truth = self.machine.core.ledger.truth
        assert truth is not None
        got = Counter((move.target, block) for move in plan.moves for block in range(move.lo, move.hi))
        need = Counter((w, b) for w in plan.layout.workers for b in plan.layout.held(w) - _held(truth, w))
        _require(got == need, "I12", (got, need))
        for move in plan.moves:
            holds = set(range(move.lo, move.hi)) <= _held(truth, move.source)
            _require(holds and move.source in plan.layout.workers, "I12", move)


def _held(layout: Layout, worker: int) -> frozenset[int]:
    return layout.held(worker) if worker in layout.workers else frozenset()
