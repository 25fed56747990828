"""Deadlines are data: when the next one is, and what `Tick` does when one has passed."""

from __future__ import annotations

from elastictrain.controller.commands import Command, Kill
from elastictrain.controller.core import RESTORE_PATIENCE, Core
from elastictrain.controller.events import Tick
from elastictrain.controller.limits import nodes_back
from elastictrain.controller.moves import condemn
from elastictrain.controller.nodes import resting_until
from elastictrain.controller.phases import Finishing, Forming, Parking, Running

ASKS_IN_VAIN = 10
"""So many members are asked to pause, one after the other, without a commit in between, before all are told to park."""


def next_deadline_s(core: Core) -> float | None:
    """When a `Tick` would change something, on the shell's clock; None: not before another event."""
    state = core.state
    ledger = core.ledger
    deadlines = [] if ledger.start_retry_at_s is None else [ledger.start_retry_at_s]
    deadlines += [notice.leave_by_s for notice in ledger.notices.values() if not notice.due]
    deadlines += resting_until(ledger.nodes)
    if isinstance(state, Parking):
        deadlines += [until_s for until_s in _suspected(core).values() if until_s is not None]
    if isinstance(state, Forming | Parking | Finishing):
        deadlines.append(state.deadline_s)
    elif isinstance(state, Running) and state.asked is not None:
        deadlines.append(state.ask_again_s)
    return min(deadlines, default=None)


def on_tick(core: Core, event: Tick, out: list[Command]) -> bool:
    now_s, state, ledger = event.now_s, core.state, core.ledger
    changed = nodes_back(core, now_s, out)
    changed |= any(now_s >= notice.leave_by_s and not notice.due for notice in ledger.notices.values())  # see `settle`
    if ledger.start_retry_at_s is not None and now_s >= ledger.start_retry_at_s:
        ledger.start_retry_at_s = None
        ledger.start_failures = core.spec.start_attempts - 1  # one more try; after a failure wait again
        changed = True
    if isinstance(state, Running):
        return _ask_another(core, state, now_s, out) or changed
    if isinstance(state, Parking):
        changed |= _end_grace(core, now_s, out)
    if not isinstance(state, Forming | Parking | Finishing) or now_s < state.deadline_s:
        return changed
    if isinstance(state, Forming):
        # Forming is collective: if one member is frozen, none of them answers. Who does not park either is frozen.
        # If all of them park, it was only slow: the next attempt gets twice the time.
        ledger.patience *= 2
        words = f"forming took longer than {now_s - state.started_s:.1f} s"
        if ledger.patience >= 2**core.spec.budget.formings:
            times = (
                f"generation {ledger.generation}, and {core.spec.budget.formings - 1} before it, could not be formed"
            )
            core.fail(
                f"ClusterError: {times}: {words}; look at the network and the storage; {core.resume_words()}", out
            )
            return True
        ledger.counted_in_vain = ledger.generation  # it has a limit of its own, just above
        core.begin_parking(now_s, words, None, out)
        core.saw(now_s, "deadline", words)
    elif isinstance(state, Parking) and not state.told:
        state.told, state.deadline_s = True, now_s + core.parking_limit_s()
        core.tell_to_park(out)
    elif isinstance(state, Parking):
        state.deadline_s = now_s + core.parking_limit_s()
        _kill(core, now_s, core.waiting(), "it did not park in time", out)
    else:
        state.deadline_s = now_s + core.spec.deadline_s * RESTORE_PATIENCE
        silent = [w for w in ledger.members() if w not in state.digests and w not in state.gone]
        _kill(core, now_s, silent, "it did not finish in time", out)
    return True


def _kill(core: Core, now_s: float, workers: list[int], reason: str, out: list[Command]) -> None:
    for worker in workers:
        if core.ledger.workers[worker].doomed:
            out.append(Kill(worker, reason))  # again: the first one has not been confirmed
        else:
            core.saw(now_s, "deadline", f"worker {worker}: {reason}")
            condemn(core, now_s, worker, "frozen", reason, (), out)


def _suspected(core: Core) -> dict[int, float | None]:
    """The members that are taken for frozen but may still answer (R7), by the end of their grace."""
    workers = core.ledger.workers
    return (
        {w: workers[w].suspected_until_s for w in core.waiting() if w in workers.suspected} if workers.suspected else {}
    )


def _end_grace(core: Core, now_s: float, out: list[Command]) -> bool:
    over = [worker for worker, until_s in _suspected(core).items() if until_s is not None and now_s >= until_s]
    for worker in over:
        why = core.ledger.workers[worker].why
        condemn(core, now_s, worker, "frozen", f"frozen: {why}; it did not answer within its grace", (), out)
    return bool(over)


def _ask_another(core: Core, state: Running, now_s: float, out: list[Command]) -> bool:
    members = core.ledger.members()
    if state.asked is None or now_s < state.ask_again_s:
        return False
    state.in_vain += 1
    if state.in_vain >= ASKS_IN_VAIN:  # nobody steps, and nobody has said why
        core.begin_parking(now_s, f"{state.in_vain} members were asked to pause, and no step was committed", None, out)
        return True
    state.asked = members[(members.index(state.asked) + 1) % len(members)]
    state.ask_again_s = now_s + core.parking_limit_s()
    core.ask_pause(state.asked, out)
    return True
