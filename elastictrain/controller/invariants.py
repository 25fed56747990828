"""The invariants of the controller as code. Property tests and the simulator check them after every event.

Of the state (`check_invariants`):

- **I1** At most one generation is live: every member belongs to the newest plan, and only the sealed and the forming
  layout are remembered.
- **I2** A generation has between `min_workers` and `max_workers` members, and so has the target.
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
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from elastictrain.controller.commands import Announce, Command, Form, Retire, StartWorker
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Role
from elastictrain.controller.machine import Machine
from elastictrain.controller.phases import TRANSITIONS, Phase
from elastictrain.errors import InternalError
from elastictrain.layout import Layout, lost_blocks
from elastictrain.protocol import FormPlan


def _require(holds: bool, invariant: str, facts: object) -> None:
    if not holds:
        raise InternalError(f"invariant {invariant} does not hold: {facts}")


def check_invariants(machine: Machine) -> None:
    """I1 to I7. Raises InternalError that names the invariant."""
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


def _check_layout(core: Core, layout: Layout) -> None:
    spec = core.spec
    _require(spec.min_workers <= layout.world_size <= spec.max_workers, "I2", layout.workers)
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
    """Checks I8 to I13: call `before` ahead of an event is handled and `after` with the commands it gave."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.started: set[int] = set()
        self.before()

    def before(self) -> None:
        ledger = self.machine.core.ledger
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
            elif isinstance(command, Retire) and not self.machine.phase.is_terminal:
                truth = ledger.truth
                _require(truth is None or command.worker not in truth.workers, "I13", command)
        check_invariants(self.machine)

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
