"""Deadlines are data: when the next one is, and what `Tick` does when one has passed."""

from __future__ import annotations

from elastictrain.controller.commands import Announce, Command, Kill, Park
from elastictrain.controller.core import RESTORE_PATIENCE, Core
from elastictrain.controller.events import Tick
from elastictrain.controller.phases import Finishing, Forming, Parking, Running


def next_deadline_s(core: Core) -> float | None:
    """When a `Tick` would change something, on the shell's clock; None: not before another event."""
    state = core.state
    deadlines = [] if core.ledger.start_retry_at_s is None else [core.ledger.start_retry_at_s]
    if isinstance(state, Forming | Parking | Finishing):
        deadlines.append(state.deadline_s)
    elif isinstance(state, Running) and state.asked is not None:
        deadlines.append(state.ask_again_s)
    return min(deadlines, default=None)


def on_tick(core: Core, event: Tick, out: list[Command]) -> bool:
    now_s, state, ledger = event.now_s, core.state, core.ledger
    changed = False
    if ledger.start_retry_at_s is not None and now_s >= ledger.start_retry_at_s:
        ledger.start_retry_at_s = None
        ledger.start_failures = core.spec.start_attempts - 1  # one more try; after a failure wait again
        changed = True
    if isinstance(state, Running):
        return _ask_another(core, state, now_s, out) or changed
    if not isinstance(state, Forming | Parking | Finishing) or now_s < state.deadline_s:
        return changed
    if isinstance(state, Forming):
        # Forming is collective: if one member is frozen, none of them answers. Who does not park either is frozen.
        # If all of them park, it was only slow: the next attempt gets twice the time.
        ledger.patience *= 2
        core.begin_parking(now_s, f"forming took longer than {now_s - state.started_s:.1f} s", None, out)
    elif isinstance(state, Parking) and not state.told:
        state.told, state.deadline_s = True, now_s + core.parking_limit_s()
        out.append(Park(ledger.generation, tuple(core.waiting())))
    elif isinstance(state, Parking):
        state.deadline_s = now_s + core.parking_limit_s()
        _kill(core, core.waiting(), "it did not park in time", out)
    else:
        state.deadline_s = now_s + core.spec.deadline_s * RESTORE_PATIENCE
        silent = [w for w in ledger.members() if w not in state.digests and w not in state.gone]
        _kill(core, silent, "it did not finish in time", out)
    return True


def _kill(core: Core, workers: list[int], reason: str, out: list[Command]) -> None:
    for worker in workers:
        if core.ledger.workers[worker].doomed:
            out.append(Kill(worker, reason))  # again: the first one has not been confirmed
        else:
            out.append(Announce("unresponsive", {"worker": worker, "reason": reason}))
            core.doom(worker, reason, out)


def _ask_another(core: Core, state: Running, now_s: float, out: list[Command]) -> bool:
    members = core.ledger.members()
    if state.asked is None or now_s < state.ask_again_s:
        return False
    state.asked = members[(members.index(state.asked) + 1) % len(members)]
    state.ask_again_s = now_s + core.parking_limit_s()
    core.ask_pause(state.asked, out)
    return True
