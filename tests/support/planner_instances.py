"""Small random problems of the planner, and what trying everything says about them.

The brute force knows nothing of the searches: it lists every division and takes the best. Used by the property tests (a
slice) and by `benchmarks/planner.py` (ten thousand).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from random import Random

from elastictrain.planner.lanes import Team, Way, plan_lanes
from elastictrain.planner.places import Kind
from elastictrain.planner.reach import Problem, Reach, beyond, least_s
from elastictrain.planner.shapes import Branch, Candidate
from elastictrain.planner.split import fill_whole, split_affine, split_tables
from elastictrain.planner.stages import place_stages


def leaves(node: Branch | Candidate, bound_s: float = 0.0) -> Iterator[tuple[float, Candidate]]:
    """Every candidate under a branch, with the largest bound on the way to it."""
    bound_s = max(bound_s, node.bound_s)
    if isinstance(node, Candidate):
        yield bound_s, node
        return
    for child in node.open(math.inf):
        yield from leaves(child, bound_s)


def divisions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to deal `total` out to `parts`, zeros allowed."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in divisions(total - first, parts - 1):
            yield (first, *rest)


def brute_split(total: int, tables: list[list[float]], low: list[int]) -> float:
    """The smallest makespan over every division; a table's length is its worker's limit. Infinite: there is none."""
    return min(
        (
            max(table[n] for table, n in zip(tables, parts, strict=True))
            for parts in divisions(total, len(tables))
            if all(lo <= n < len(table) for table, n, lo in zip(tables, parts, low, strict=True))
        ),
        default=math.inf,
    )


def stage_least_s(kind: Kind, lo: int, hi: int, flight: float) -> float:
    """The least seconds of a stage, whatever number of its first layers is computed again. Infinite: none fits."""
    best = math.inf
    for again in range(hi - lo + 1) if kind.again_s else (0,):
        at = lo + again
        need = sum(kind.keep_bytes[lo:hi]) + flight * (sum(kind.again_bytes[lo:at]) + sum(kind.live_bytes[at:hi]))
        if need + (kind.working_bytes if again else 0.0) <= kind.memory_bytes:
            best = min(best, sum(kind.layer_s[lo:hi]) + sum(kind.again_s[lo:at]) + kind.fixed_s)
    return best


def brute_stages(
    kinds: list[Kind], stages: int, micro_batches: int, borders: dict[tuple[int, int], float], bubble: float,
    flights: list[float], settled: tuple[int, ...] | None = None,
) -> float:  # fmt: skip
    """The least `b sum + (m - b) max` over every order of kinds (or the one that is `settled`) and every cut of the
    layers. Infinite: none fits.
    """
    layers, best = len(kinds[0].layer_s), math.inf
    for order in product(range(len(kinds)), repeat=stages) if settled is None else (settled,):
        if any(order.count(k) > kind.count for k, kind in enumerate(kinds)):
            continue
        for sizes in divisions(layers - stages, stages):
            times, at = [], 0
            for place, (k, extra) in enumerate(zip(order, sizes, strict=True)):
                kind, hi = kinds[k], at + extra + 1
                taken = stage_least_s(kind, at, hi, flights[place])
                if math.isinf(taken):
                    break
                times.append(taken + (borders.get((order[place - 1], k), 0.0) if place else 0.0))
                at = hi
            else:
                best = min(best, bubble * sum(times) + (micro_batches - bubble) * max(times))
    return best


def _close(found: float, truth: float) -> bool:
    return found == truth or abs(found - truth) <= 1e-9 * max(abs(found), abs(truth))


def check_lanes(random: Random) -> bool:
    """Lanes by speed: at most six devices, at most twelve lanes."""
    workers, total = random.randint(1, 6), random.randint(1, 12)
    speeds = [random.choice([0.25, 0.5, 1.0, 2.0, random.uniform(0.1, 4)]) for _ in range(workers)]
    fixed = [random.choice([0.0, random.uniform(0, 3)]) for _ in range(workers)]
    low = [random.choice([0, 0, 1]) for _ in range(workers)]
    most = [random.choice([total, random.randint(1, total)]) for _ in range(workers)]
    tables = [[0.0, *(a + c * n for n in range(1, cap + 1))] for a, c, cap in zip(fixed, speeds, most, strict=True)]
    truth = brute_split(total, tables, low)
    if math.isinf(truth):
        return not sum(low) <= total <= sum(most)
    before = next(p for p in divisions(total, workers))
    found = split_affine(total, fixed, speeds, least=low, most=most)
    moved = split_affine(total, fixed, speeds, least=low, most=most, before=before)
    least_moves = min(
        sum(abs(n - old) for n, old in zip(parts, before, strict=True))
        for parts in divisions(total, workers)
        if all(lo <= n <= cap and _under(table[n], truth)
               for table, n, lo, cap in zip(tables, parts, low, [len(t) - 1 for t in tables], strict=True) if n <= cap)
        and all(n <= len(t) - 1 for n, t in zip(parts, tables, strict=True))
    )  # fmt: skip
    moves = sum(abs(n - old) for n, old in zip(moved.parts, before, strict=True))
    again = max(table[n] for table, n in zip(tables, found.parts, strict=True))
    return (
        _close(found.makespan, truth) and _close(again, truth) and sum(found.parts) == total
        and found.bound <= truth * (1 + 1e-9) and moves == least_moves
        and _close(max(table[n] for table, n in zip(tables, moved.parts, strict=True)), truth)
    )  # fmt: skip


def _under(value: float, limit: float) -> bool:
    return value <= limit * (1 + 1e-12)


def check_tables(random: Random) -> bool:
    """Lanes by measured tables of any shape that never falls."""
    workers, total = random.randint(1, 5), random.randint(1, 12)
    tables = []
    for _ in range(workers):
        table = [0.0]
        for _ in range(random.randint(1, total)):
            table.append(table[-1] + random.choice([0.0, 1.0, random.uniform(0, 2)]))
        tables.append(table)
    low = [random.choice([0, 0, 1]) for _ in range(workers)]
    truth = brute_split(total, tables, low)
    if math.isinf(truth):
        return not sum(low) <= total <= sum(len(t) - 1 for t in tables)
    found = split_tables(total, tables, least=low)
    again = max(table[n] for table, n in zip(tables, found.parts, strict=True))
    inside = all(lo <= n < len(t) for lo, n, t in zip(low, found.parts, tables, strict=True))
    return inside and sum(found.parts) == total and _close(found.makespan, truth) and _close(again, truth)


def check_blocks(random: Random) -> bool:
    """Blocks by memory: the fullest worker least full."""
    workers, things = random.randint(1, 5), random.randint(1, 12)
    memory = [random.choice([8.0, 16.0, 24.0, random.uniform(4, 32)]) for _ in range(workers)]
    used = [random.uniform(0, m) for m in memory]
    size = random.choice([0.5, 1.0, 2.5])
    tables = [[(u + size * n) / m for n in range(things + 1) if u + size * n <= m * (1 + 1e-12)]
              for u, m in zip(used, memory, strict=True)]  # fmt: skip
    truth = brute_split(things, tables, [0] * workers)
    if math.isinf(truth):
        return sum(len(t) - 1 for t in tables) < things
    return _close(fill_whole(things, size, used, memory).makespan, truth)


def check_stages(random: Random) -> bool:
    """Layers and kinds onto stages: at most three kinds, six places, eight layers, twelve micro-batches."""
    layers, kinds_count = random.randint(1, 8), random.randint(1, 3)
    micro_batches = random.randint(1, 12)
    shape = [random.choice([1.0, 1.0, random.uniform(0.2, 3)]) for _ in range(layers)]
    size = [random.choice([1.0, random.uniform(0.5, 4)]) for _ in range(layers)]
    kinds = []
    for _ in range(kinds_count):
        speed = random.choice([1.0, 2.0, random.uniform(0.3, 3)])
        live = [random.choice([0.0, 0.3, 1.0]) for _ in range(layers)]
        checkpoints = random.random() < 0.6
        twist = [random.choice([1.0, random.uniform(0.8, 1.2)]) for _ in range(layers)]
        kinds.append(
            Kind(
                count=random.randint(1, 6 // kinds_count),
                layer_s=tuple(s * t / speed for s, t in zip(shape, twist, strict=True)),
                keep_bytes=tuple(size),
                live_bytes=tuple(live),
                again_s=tuple(random.choice([0.0, 0.3 * s]) for s in shape) if checkpoints else (),
                again_bytes=tuple(random.choice([0.0, 0.2, 1.0]) * b for b in live) if checkpoints else (),
                working_bytes=random.choice([0.0, 0.5]),
                memory_bytes=random.choice([1e9, random.uniform(2, 14)]),
                fixed_s=random.choice([0.0, 0.1]),
            )
        )
    stages = random.randint(1, max(1, min(layers, sum(kind.count for kind in kinds))))
    return _as_good_as_brute_force(random, kinds, stages, micro_batches)


def check_again(random: Random) -> bool:
    """The same with so little memory that most stages must compute some layers again, often on one kind alone."""
    layers, micro_batches = random.randint(2, 8), random.randint(1, 12)
    stages = random.randint(1, min(layers, 4))
    shape = [random.choice([1.0, random.uniform(0.5, 2)]) for _ in range(layers)]
    live = [random.choice([1.0, random.uniform(0.5, 2)]) for _ in range(layers)]
    kinds = []
    for _ in range(random.choice([1, 1, 2])):
        speed = random.choice([1.0, 2.0, random.uniform(0.5, 2)])
        need = (0.5 * layers + min(stages, micro_batches) * sum(live)) / stages
        kinds.append(
            Kind(
                count=stages,
                layer_s=tuple(s / speed for s in shape),
                keep_bytes=(0.5,) * layers,
                live_bytes=tuple(live),
                memory_bytes=need * random.uniform(0.5, 1.3),
                again_s=tuple(random.uniform(0.1, 0.6) * s / speed for s in shape),
                again_bytes=tuple(0.1 * b for b in live),
                working_bytes=random.choice([0.0, max(live)]),
            )
        )
    return _as_good_as_brute_force(random, kinds, stages, micro_batches)


def _as_good_as_brute_force(random: Random, kinds: list[Kind], stages: int, micro_batches: int) -> bool:
    """With any borders between kinds, and the bubble and activations in flight of any schedule."""
    layers, many = len(kinds[0].layer_s), range(len(kinds))
    borders = {(a, b): random.choice([0.0, 0.5]) for a in many for b in many}
    bubble = random.choice([1.0, 1.0, 1 / 3, 0.5, 0.25])
    flights = random.choice([
        [float(min(stages - place, micro_batches)) for place in range(stages)],
        [float(min(stages, micro_batches))] * stages,
        [min(stages - place + 0.5, micro_batches) for place in range(stages)],
    ])  # fmt: skip
    places = [kind for kind in many for _ in range(kinds[kind].count)]
    settled = tuple(random.sample(places, stages)) if random.random() < 0.3 else None
    truth = brute_stages(kinds, stages, micro_batches, borders, bubble, flights, settled)
    even = sum(min(kind.layer_s[n] for kind in kinds) for n in range(layers)) / stages
    received = [min(borders[a, b] for a in many) for b in many]
    problem = Problem(kinds, flights, received, even, 0.0, bubble, micro_batches)
    if least_s([problem])[0] > truth * (1 + 1e-9) or (truth < math.inf and beyond([problem], [truth * (1 + 1e-6)])[0]):
        return False
    if truth < math.inf:  # also where nearly as good a pipeline is known
        near = place_stages(kinds, stages, micro_batches, borders=borders, bubble=bubble, in_flight=flights,
                            order=settled, better_than_s=truth * (1 + 1e-6))  # fmt: skip
        if near is None or not _close(near.time_s, truth):
            return False
    found = place_stages(kinds, stages, micro_batches, borders=borders, bubble=bubble, in_flight=flights, order=settled)
    if found is None:
        return math.isinf(truth)
    again = [stage.time_s for stage in found.stages]
    enough = Reach(kinds, borders, flights).most([max(again)])[0] >= layers
    covered = [stage.lo for stage in found.stages] == [0, *(stage.hi for stage in found.stages[:-1])]
    kept = settled is None or tuple(stage.kind for stage in found.stages) == settled
    return (
        enough and covered and kept and found.stages[-1].hi == layers and found.exact and _close(found.time_s, truth)
        and _close(bubble * sum(again) + (micro_batches - bubble) * max(again), truth)
    )  # fmt: skip


def check_room(random: Random) -> bool:
    """Lanes by speed where the devices that have some must also hold the state: at most five devices, eight lanes."""
    teams = []
    for number in range(random.randint(1, 3)):
        ways = [
            Way(str(n), random.choice([0.0, random.uniform(0, 3)]), random.choice([0.1, 1.0, random.uniform(0.1, 6)]),
                random.choice([2.0, 8.0, random.uniform(0, 12)]))
            for n in range(random.choice([1, 1, 2]))
        ]  # fmt: skip
        teams.append(
            Team(str(number), random.randint(1, 2), random.choice([10.0, 24.0, random.uniform(8, 40)]), tuple(ways))
        )
    lanes, least = random.randint(1, 8), random.choice([0, 0, 1])
    state = random.uniform(0.1, 1.0) * sum(team.count * team.memory_bytes for team in teams)
    truth = math.inf
    for ways_of in product(*(team.ways for team in teams)):
        each = [(team, way) for team, way in zip(teams, ways_of, strict=True) for _ in range(team.count)]
        if any(way.kept_bytes > team.memory_bytes for team, way in each):
            continue
        for parts in divisions(lanes, len(each)):
            room = sum(team.memory_bytes - way.kept_bytes for n, (team, way) in zip(parts, each, strict=True) if n)
            if min(parts) >= least and room >= state:
                taken = max(way.fixed_s + n * way.lane_s for n, (_, way) in zip(parts, each, strict=True) if n)
                truth = min(truth, taken)
    found = plan_lanes(teams, lanes, state, least=least)
    return math.isinf(truth) if found is None else _close(found.step_s, truth)


CHECKS = {
    "lanes": check_lanes, "tables": check_tables, "blocks": check_blocks, "stages": check_stages, "again": check_again,
    "room": check_room,
}  # fmt: skip


def check(kind: str, seed: int) -> bool:
    """Whether the search finds what brute force finds, on the instance of this seed."""
    return CHECKS[kind](Random(seed))
