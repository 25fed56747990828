"""One step in which lanes that a late worker has not begun are taken over, on a virtual clock.

Who takes over what is decided by `redundancy.to_take`, as in a run; claims take no time, and batches lie ready.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import inf

from elastictrain.redundancy import Lanes, Sharing, next_take_s, to_take


def shared_step(sharing: Sharing, lane_s: Sequence[float], usual_s: Sequence[float]) -> tuple[Lanes, tuple[float, ...]]:
    """Who has computed which lane, and when each worker was done with all of its, by rank. `lane_s`: seconds of a lane
    in this step; `usual_s`: as everybody knows them.
    """
    world = len(sharing.lanes)
    free = {lane for own in sharing.lanes for lane in own}
    ahead = [list(own) for own in sharing.lanes]
    tried: list[set[int]] = [set() for _ in range(world)]
    done: list[list[int]] = [[] for _ in range(world)]
    ends_s = [0.0] * world
    idle = [(0.0, rank) for rank in range(world)]
    while idle and free:
        now_s, rank = heapq.heappop(idle)
        lane = _next(sharing, rank, ahead[rank], tried[rank], free, now_s, usual_s)
        if lane is not None:
            free.remove(lane)
            done[rank].append(lane)
            ends_s[rank] = now_s + lane_s[rank]
            heapq.heappush(idle, (ends_s[rank], rank))
            continue
        tried[rank].update(set(sharing.second[rank]) - free)
        again_s = next_take_s(sharing, rank, tried[rank], now_s, usual_s)
        if again_s < inf:  # it waits; that ends at once when nothing is left to wait for
            heapq.heappush(idle, (again_s, rank))
    return tuple(tuple(sorted(own)) for own in done), tuple(ends_s)


def _next(
    sharing: Sharing, rank: int, ahead: list[int], tried: set[int], free: set[int], now_s: float,
    usual_s: Sequence[float],
) -> int | None:  # fmt: skip
    """What a worker begins now: its next own lane that nobody has begun, or one of another; None: it is done."""
    while ahead:
        lane = ahead.pop(0)
        if lane in free:
            return lane
    while wanted := to_take(sharing, rank, tried, now_s, usual_s):
        tried.add(wanted[0])
        if wanted[0] in free:
            return wanted[0]
    return None
