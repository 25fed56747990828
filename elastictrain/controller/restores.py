"""Checkpoints that a generation goes on from: what was read of them, and what follows when one is damaged."""

from __future__ import annotations

from dataclasses import replace

from elastictrain.controller import events as ev
from elastictrain.controller.commands import Announce, Command
from elastictrain.controller.core import Core
from elastictrain.protocol import ReadBytes, Restore


def is_refused(core: Core, event: ev.WorkerFailed, out: list[Command]) -> bool:
    """End the run if the user has asked for this very checkpoint: which other one to take is not ours to say."""
    ledger = core.ledger
    restore = None if ledger.plan is None else ledger.plan.restore
    if restore is None or not restore.insist or ledger.sealed == ledger.generation:
        return False
    kind, _, words = event.error.rpartition("CorruptCheckpoint: ")
    where = f"checkpoint step {restore.step} ({restore.checkpoint})"
    core.fail(f"CorruptCheckpoint: {where} is damaged and refused: {kind}{words}", out)
    return True


def drop_checkpoint(core: Core, event: ev.WorkerFailed, out: list[Command]) -> bool:
    """Take the checkpoint of the live plan off the list. False: that plan does not restore one."""
    ledger = core.ledger
    restore = None if ledger.plan is None else ledger.plan.restore
    if restore is None or restore.checkpoint is None or ledger.sealed == ledger.generation:
        return False
    if ledger.checkpoints.get(restore.step) == restore.checkpoint:  # the first of its members to say so
        del ledger.checkpoints[restore.step]
        ledger.restore = replace(ledger.newest_restore(), discard_newer=restore.discard_newer)
        ledger.published_step = ledger.shown_step = ledger.restore.step
        data = {"step": restore.step, "path": restore.checkpoint, "error": event.error}
        next_one = {"next_step": ledger.restore.step, "next_path": ledger.restore.checkpoint}
        out.append(Announce("checkpoint_dropped", data | next_one | {"up_to_generation": ledger.generation}))
    return True


def announce_restored(restore: Restore, read: ReadBytes, out: list[Command]) -> None:
    """Say what a generation has read of the checkpoint that it goes on from."""
    data = {"step": restore.step, "path": restore.checkpoint, "stored_bytes": read.stored}
    by_worker = {str(worker): size for worker, size in read.by_worker}
    if read.healed:
        data["healed_blocks"] = read.healed
    out.append(Announce("restored", data | {"read_bytes": sum(by_worker.values()), "read_by_worker": by_worker}))
