"""Event moves about checkpoints: what each message of whoever stores them changes (see `moves`)."""

from __future__ import annotations

from typing import Any

from elastictrain.controller import events as ev
from elastictrain.controller.commands import Announce, Command
from elastictrain.controller.core import Core

# ruff: noqa: ARG001  (all functions of the table have one shape, whether they need every argument or not)


def on_checkpoint(core: Core, event: ev.CheckpointCommitted, out: list[Command]) -> bool:
    ledger = core.ledger
    if event.generation != ledger.generation or ledger.sealed != ledger.generation:
        return False
    if ledger.checkpoints.get(event.step) == event.path:
        return False
    ledger.checkpoints[event.step] = event.path
    for step in sorted(ledger.checkpoints)[: -(core.spec.checkpoints_kept or len(ledger.checkpoints))]:
        del ledger.checkpoints[step]  # retention has removed it: nobody can go back to it
    ledger.given_up = None
    ledger.published_step = max(ledger.published_step, event.step)  # R5: a manifest is published, so its step is
    out.append(Announce("checkpoint", {"step": event.step, "path": event.path}))
    return True


def on_removed(core: Core, event: ev.CheckpointsRemoved, out: list[Command]) -> bool:
    """What is gone is no place to go back to. The newest that is known stays, whatever a late message says."""
    ledger = core.ledger
    if event.generation != ledger.generation or ledger.sealed != ledger.generation:
        return False
    newest = max(ledger.checkpoints, default=0)
    gone = [step for step in event.steps if step in ledger.checkpoints and step != newest]
    for step in gone:
        del ledger.checkpoints[step]
    return bool(gone)


def on_given_up(core: Core, event: ev.CheckpointGivenUp, out: list[Command]) -> bool:
    """A checkpoint was under way when its generation ended, and does not exist. Said once; it belongs to the record of
    whatever has ended that generation.
    """
    ledger = core.ledger
    if event.generation != ledger.generation or ledger.sealed != ledger.generation:
        return False
    incident = None if event.why else ledger.incident or ledger.settling
    how = "its shares were durable, its manifest was not there" if event.travelled else "not all of it was written"
    ended = f"generation {event.begun_in} ended" if incident is None else incident.cause
    data = {
        "step": event.step,
        "begun_in": event.begun_in,
        "why": event.why or f"{ended}; {how}",
        "stored_instead": event.instead,
    }
    if (event.begun_in, event.step) <= ledger.heard_given_up:
        return False  # what may not have been heard is said again
    ledger.given_up, ledger.heard_given_up = data, (event.begun_in, event.step)
    if incident is not None:
        instead = "none" if event.instead is None else f"step {event.instead}"
        what = f"the checkpoint of step {event.step} was given up ({how}); stored instead: {instead}"
        incident.saw(event.now_s, f"worker {event.worker}", what)
    out.append(Announce("checkpoint_given_up", dict(data)))
    return True


def on_copies(core: Core, event: ev.CopiesStand, out: list[Command]) -> bool:
    """How a further place of checkpoints is. That it has a newer one is said, and the first time that it fails."""
    ledger = core.ledger
    if event.generation != ledger.generation or ledger.sealed != ledger.generation:
        return False
    before = ledger.copies.get(event.path, {"step": 0, "waiting": [], "error": ""})
    now: dict[str, Any] = {"step": event.step, "waiting": list(event.waiting), "error": event.error}
    if now == before:
        return False
    ledger.copies[event.path] = now
    if event.step > before["step"]:
        out.append(Announce("checkpoint_copied", {"step": event.step, "path": event.path, "waiting": now["waiting"]}))
    if event.error and not before["error"]:
        facts = {"path": event.path, "error": event.error, "waiting": now["waiting"]}
        out.append(Announce("copy_failed", facts))
    elif before["error"] and not event.error:
        out.append(Announce("copy_works", {"path": event.path, "waiting": now["waiting"]}))
    return True
