"""After the death of a controller: what its successor must do. Pure.

The journal brings back what was *decided*; whether it was *done* nobody knows. Commands are idempotent, so everything
that the state implies is done again: `outstanding`. What is left to ask is who is alive (`reconcile`), and which lines
of events.jsonl the last event's commands would have written (`bring_back`).
"""

from __future__ import annotations

from collections.abc import Iterable

from elastictrain.controller import events as ev
from elastictrain.controller.commands import Announce, Command, EndRun, Form, Kill, Park, Retire, StartWorker
from elastictrain.controller.facts import MachineSpec, Role
from elastictrain.controller.journal import read_events
from elastictrain.controller.machine import Machine
from elastictrain.controller.phases import Ended, Forming, Parking, Phase, Running
from elastictrain.controller.speeds import offered_again


def outstanding(machine: Machine) -> list[Command]:
    """The commands that the present state implies and that may not have been performed, each idempotent.

    Members that step, park by themselves or finish need none. What was let go (`Retire`, `Kill` of a worker that is
    forgotten) is not in the state any more: `reconcile` finds those.
    """
    core = machine.core
    ledger, state = core.ledger, core.state
    if isinstance(state, Ended):
        return _ending(machine, state)
    out: list[Command] = [Kill(worker, why) for worker, why in sorted(ledger.fenced.items())]
    out += [Kill(worker, ledger.workers[worker].why) for worker in sorted(ledger.workers.doomed)]
    out += [StartWorker(worker, ledger.workers[worker].avoid) for worker in ledger.with_role(Role.STARTING)]
    if isinstance(state, Forming) and ledger.plan is not None:
        out.append(Form(ledger.plan))
    elif isinstance(state, Parking) and state.told:
        core.tell_to_park(out)
    elif isinstance(state, Parking):
        out += [Park(ledger.generation, (worker,)) for worker in sorted(state.nudged) if worker in core.waiting()]
    elif isinstance(state, Running):
        out += offered_again(core)
        if state.asked is not None:
            core.ask_pause(state.asked, out)
    return out


def _ending(machine: Machine, state: Ended) -> list[Command]:
    ledger, out = machine.core.ledger, list[Command]()
    for worker in sorted(ledger.workers):
        facts = ledger.workers[worker]
        kind = state.phase is Phase.FAILED or facts.doomed or facts.role is Role.STARTING
        out.append(Kill(worker, f"the run has {state.phase.value}") if kind else Retire(worker))
    out += [Kill(worker, why) for worker, why in sorted(ledger.fenced.items())]
    return [*out, EndRun(state.phase.value, state.step, state.digest, state.error)]


def reconcile(machine: Machine, alive: Iterable[int], now_s: float) -> tuple[list[Command], list[ev.Event]]:
    """Compare with the worker processes that were found `alive`.

    Those that the machine does not know, or has let go, are killed; those that are gone have died meanwhile. A worker
    that is still to be started, and is not there, is not dead: `outstanding` starts it.
    """
    found, workers = set(alive), machine.core.ledger.workers
    if machine.phase.is_terminal:
        return [], []  # all are to end, says `outstanding`
    strangers: list[Command] = [Kill(worker, "nobody counts on it any more") for worker in sorted(found - set(workers))]
    gone = [worker for worker in sorted(set(workers) - found) if workers[worker].role is not Role.STARTING]
    gone += [worker for worker in workers.doomed if worker not in found and worker not in gone]
    return strangers, [ev.WorkerDied(now_s, worker, "gone when the controller came back") for worker in sorted(gone)]


def bring_back(spec: MachineSpec, lines: Iterable[str]) -> tuple[Machine, list[Announce]]:
    """The machine that has handled all events of a journal, and the announcements of the last one, which may not have
    been written down. Raises ClusterError for a journal that cannot be read.
    """
    machine, last = Machine(spec), list[Command]()
    for event in read_events(lines):
        last = machine.handle(event)
    return machine, [command for command in last if isinstance(command, Announce)]
