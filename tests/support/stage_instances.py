"""Small random pipelines with slow places, and what trying everything says about them.

The brute force knows nothing of the searches: it lists every cut and every number of layers computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, product
from random import Random

from elastictrain.planner.model import Cut
from elastictrain.planner.pipelines import Pipelines, Placement
from elastictrain.planner.places import Kind
from tests.support.planner_instances import divisions, stage_least_s


def pipelines(random: Random, *, stages: int, workers: int, tight: bool | None = None) -> Pipelines:
    """Up to 12 layers on one or two kinds of devices; often with hardly room for more layers than there are."""
    layers, micro_batches = random.randint(max(stages, 3), 12), random.randint(1, 12)
    shape = [random.choice([1.0, 1.0, random.uniform(0.5, 2)]) for _ in range(layers)]
    kinds = []
    for _ in range(random.choice([1, 1, 2])):
        speed = random.choice([1.0, 2.0])
        fair = (1.0 + 0.5 * min(stages, micro_batches)) * layers / stages
        scarce = random.random() < 0.6 if tight is None else tight
        checkpoints = random.random() < 0.5
        kinds.append(
            Kind(
                workers, tuple(s / speed for s in shape), (1.0,) * layers, (0.5,) * layers,
                fair * random.uniform(0.9, 1.8) if scarce else 1e9,
                again_s=tuple(0.3 * s / speed for s in shape) if checkpoints else (),
                again_bytes=(0.1,) * layers if checkpoints else (), working_bytes=random.choice([0.0, 0.5]),
            )
        )  # fmt: skip
    each = range(len(kinds))
    borders = {(a, b): random.choice([0.0, 0.2]) for a, b in product(each, each)}
    kind_of = tuple(random.randrange(len(kinds)) for _ in range(workers))
    schedule = random.choice(["1f1b", "1f1b", "zb-h1"])
    return Pipelines(tuple(kinds), kind_of, micro_batches, Cut(schedule=schedule), 1 / 3, borders, random.random())


def factors(random: Random, workers: int, slow: Sequence[int]) -> tuple[float, ...]:
    return tuple(random.uniform(1.2, 4.0) if worker in slow else 1.0 for worker in range(workers))


def flights(work: Pipelines, stages: int) -> list[float]:
    """Micro-batches in flight, written down once more."""
    if work.cut.schedule == "zb-h1":
        return [float(min(stages, work.micro_batches))] * stages
    return [float(min(stages - stage, work.micro_batches)) for stage in range(stages)]


def closed_s(work: Pipelines, seats: Sequence[int], stage_s: Sequence[float]) -> float:
    """`b sum t + (m - b) max t`, with what each stage waits for the one before it."""
    kinds = [work.kind_of[worker] for worker in seats]
    waits = [0.0, *(work.border_s[pair] for pair in pairwise(kinds))]
    times = [s + w for s, w in zip(stage_s, waits, strict=True)]
    bubble = 1 / 3 if work.cut.schedule == "zb-h1" else 1.0
    return bubble * sum(times) + (work.micro_batches - bubble) * max(times)


def of_placement(work: Pipelines, placement: Placement, slowness: Sequence[float]) -> float:
    """Closed form of a placement."""
    at, times = 0, []
    for worker, count, again in zip(placement.seats, placement.layers, placement.again, strict=True):
        kind = work.kinds[work.kind_of[worker]]
        own = sum(kind.layer_s[at : at + count]) + sum(kind.again_s[at : at + again]) + kind.fixed_s
        times.append(slowness[worker] * own)
        at += count
    return closed_s(work, placement.seats, times)


def fits(work: Pipelines, placement: Placement) -> bool:
    at = 0
    for stage, (worker, count, again) in enumerate(
        zip(placement.seats, placement.layers, placement.again, strict=True)
    ):
        kind, flight = work.kinds[work.kind_of[worker]], flights(work, len(placement.seats))[stage]
        live = sum(kind.again_bytes[at : at + again]) + sum(kind.live_bytes[at + again : at + count])
        need = sum(kind.keep_bytes[at : at + count]) + flight * live + (kind.working_bytes if again else 0.0)
        if need > kind.memory_bytes * (1 + 1e-9):
            return False
        at += count
    return at == work.layers


def brute(work: Pipelines, seats: Sequence[int], slowness: Sequence[float]) -> float:
    """The least closed form for these workers in this order, over every cut. Infinite: none fits."""
    stages, best = len(seats), math.inf
    if stages > work.layers:
        return best
    for sizes in divisions(work.layers - stages, stages):
        times, at = [], 0
        for stage, (worker, extra) in enumerate(zip(seats, sizes, strict=True)):
            kind, hi = work.kinds[work.kind_of[worker]], at + extra + 1
            times.append(slowness[worker] * stage_least_s(kind, at, hi, flights(work, stages)[stage]))
            at = hi
        if all(map(math.isfinite, times)):
            best = min(best, closed_s(work, seats, times))
    return best


def orders(action: str, seats: Sequence[int], slow: Sequence[int], spares: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every order of workers that an action may lead to."""
    seats = list(seats)
    if action == "move_layers":
        yield tuple(seats)
    if action == "swap_roles":
        for a, b in combinations(range(len(seats)), 2):
            other = [*seats]
            other[a], other[b] = seats[b], seats[a]
            if not slow or seats[a] in slow or seats[b] in slow:
                yield tuple(other)
    for worker in (one for one in slow if one in seats):
        if action == "replace":
            yield from (tuple(spare if one == worker else one for one in seats) for spare in spares)
        if action == "leave_out" and len(seats) > 1:
            yield tuple(one for one in seats if one != worker)
