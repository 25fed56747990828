"""Which checkpoints a further store is to be given, and which a nearer one must not lose before. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import inf

from elastictrain_checkpoint.catalogue import Entry, happened
from elastictrain_checkpoint.policies import Policy

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
LONGEST_REST_S = 1.0


def present(near: Sequence[Entry], far: Sequence[Entry]) -> set[int]:
    """Steps of ``far`` that need not be copied: what is there is what ``near`` has, or newer."""
    here = {entry.step: entry for entry in near}
    return {entry.step for entry in far if entry.step not in here or entry.generation >= here[entry.step].generation}


def wanted(
    near: Sequence[Entry],
    far: Sequence[Entry],
    keep: Policy,
    now_s: float,
    *,
    apart_steps: int = 1,
    final: int | None = None,
) -> list[int]:
    """Steps that are to be copied from ``near`` to ``far``, the most urgent, that is the newest, first.

    Not copied is what the retention of ``far`` would remove at once: so a store that is slower than the checkpoints
    come gets the newest ones, and nothing piles up.

    Args:
        near: what there is to copy.
        far: what is there already.
        keep: which checkpoints ``far`` keeps.
        now_s: time in seconds since 1970.
        apart_steps: a step is copied only if it is at least so many steps after the last one that was.
        final: a step that is copied however near it is to the one before: the last of a run.

    """
    history = happened([*near, *far])
    there = present(near, far)
    taken: list[Entry] = []
    for entry in history:
        apart = not taken or entry.step - taken[-1].step >= apart_steps
        if entry.step in there or apart or entry.step == final:
            taken.append(entry)
    kept = keep.keep([entry.point for entry in taken], now_s)
    return sorted((entry.step for entry in taken if entry.step in kept and entry.step not in there), reverse=True)


def let_go(waiting: Sequence[Entry], free_bytes: int | None, room_bytes: int) -> set[int]:
    """Steps that wait to be copied and may be removed even so, since the disk has no room for them: the oldest ones.

    Args:
        waiting: what is to be copied.
        free_bytes: what the disk has left; None if it does not say.
        room_bytes: what it is to have.

    """
    gone: set[int] = set()
    for entry in sorted(waiting, key=lambda entry: entry.step):
        if free_bytes is None or free_bytes >= room_bytes:
            break
        free_bytes += entry.size_bytes
        gone.add(entry.step)
    return gone


def pause_s(failures: int) -> float:
    """How long to wait after so many failures in a row: twice as long each time, a minute at most."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 30)) if failures > 0 else 0.0


def rest_s(worked_s: float, share: float) -> float:
    """How long to rest after so much work, so that it takes this share of the time; a second at most."""
    return min(LONGEST_REST_S, max(0.0, worked_s) * (1 / share - 1))


def work_s(rested_s: float, share: float) -> float:
    """The work that such a rest makes up for."""
    return rested_s * share / (1 - share) if share < 1 else inf


def in_words(steps: Collection[int]) -> str:
    """A few of the steps."""
    shown = ", ".join(map(str, sorted(steps)[-5:]))
    return f"{len(steps)} steps, the newest {shown}" if len(steps) > 5 else shown
