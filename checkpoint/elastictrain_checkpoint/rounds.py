"""How much of a `ReadPlan` is read before it is handed on. Pure."""

from __future__ import annotations

import itertools

import numpy as np

from elastictrain_checkpoint.reshard import ReadPlan

ROUND_BYTES = 16 << 20
MESSAGE_BYTES = 2 << 20
"""About what a worker sends to each other in a round that overlaps with the next: it is copied while it is in cache."""
SHARED_ROUND_BYTES = 2 << 20
"""What all workers of a host read in a round stays in the processor's cache until the others have taken it."""
_GAP_BYTES = 1 << 20
"""Who skips more than that reads on in another hash block: it counts as less than that."""
STATE_BYTES = 1024
"""What each worker says to each at the end."""


def most_shared_bytes(plan: ReadPlan, round_bytes: int = SHARED_ROUND_BYTES) -> int:
    """No worker needs more memory than this in one turn of an exchange that `Shares` memory."""
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(plan.size_bytes)])
    read = [int(ends[spans.stop] - ends[spans.start]) for mine in rounds_of(plan, round_bytes) for spans in mine]
    return max([plan.workers * STATE_BYTES, *read])


def most_sent_bytes(plan: ReadPlan, round_bytes: int = ROUND_BYTES) -> int:
    """No worker sends more than this in one call of the exchange."""
    size = plan.size_bytes[plan.span] * (plan.worker != plan.owner[plan.span])
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(size)])
    sent = [
        int(ends[plan.bounds[spans.stop]] - ends[plan.bounds[spans.start]])
        for mine in rounds_of(plan, round_bytes)
        for spans in mine
        if spans
    ]
    return max([plan.workers * STATE_BYTES, *sent])


def rounds_of(plan: ReadPlan, round_bytes: int) -> list[list[range]]:
    """Spans of each worker in each round: those that end in the next ``round_bytes`` of what it reads. Where it reads a
    file without gaps, rounds end with multiples of that in the file, and so with hash blocks.
    """
    bounds = np.searchsorted(plan.owner, np.arange(plan.workers + 1))
    ends = plan.start + plan.size_bytes
    # Files and gaps count as what leaves a span's place among multiples as it is.
    gap = np.zeros(len(ends), dtype=np.int64)
    gap[1:] = (plan.start[1:] - ends[:-1]) % np.where(plan.file[1:] != plan.file[:-1], round_bytes, _GAP_BYTES)
    firsts = bounds[:-1][bounds[:-1] < bounds[1:]]
    gap[firsts] = plan.start[firsts] % round_bytes
    cuts = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        number = (np.cumsum(plan.size_bytes[begin:end] + gap[begin:end]) - 1) // round_bytes
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), end - begin]
        cuts.append([range(begin + a, begin + b) for a, b in itertools.pairwise(edges)])
    most = max((len(mine) for mine in cuts), default=0)
    return [[mine[i] if i < len(mine) else range(0) for mine in cuts] for i in range(most)]
