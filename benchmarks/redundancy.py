"""What lanes computed twice, dropped workers and coded gradients would win over lanes that move: a calculation.

None of the three is in the engine; docs/stragglers.md says why. Each is given the best of it here: nothing is lost by
telling each other who is done, nor by reading the batches of lanes that others have, nor in the exchange. Noise and
hiccups are those of the straggler watch's simulation (`elastictrain/sim/speeds.py`); who is slow is known, and has its
lanes by the planner's exact split. Seconds of a step's computation, and lanes computed, against lanes that move alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import common
from elastictrain.planner.split import split_affine

LANE_S = 0.2
EACH = 8
"""Lanes of a worker."""


@dataclass(frozen=True, slots=True)
class Step:
    """`lanes`, `lane_s`: of each worker, and seconds for one of them in this step. `stall_s`: a pause after
    `stall_at_s`, in which the worker does nothing at all.
    """

    lanes: tuple[int, ...]
    lane_s: tuple[float, ...]
    stall_at_s: tuple[float, ...]
    stall_s: tuple[float, ...]

    def after(self, worker: int, begin_s: float, busy_s: float) -> float:
        """When `worker` is done with `busy_s` of work that it begins at `begin_s`."""
        at, pause = self.stall_at_s[worker], self.stall_s[worker]
        end_s = begin_s + busy_s
        if begin_s < at < end_s:
            return end_s + pause
        return max(begin_s, at + pause) + busy_s if at <= begin_s < at + pause else end_s


Hiccups = str
"""`none`; `slow`: all lanes of the step take longer; `stall`: as long a pause, at any time in the step."""


def draw(rng: Random, lanes: tuple[int, ...], unit_s: tuple[float, ...], hiccups: Hiccups) -> Step:
    """Noise of 2 %; hiccups and collections as often and as long as in `elastictrain.sim.speeds`."""
    own, at, pause = [], [], []
    for count, unit in zip(lanes, unit_s, strict=True):
        more = 0.3 + rng.expovariate(1.0) if rng.random() * 400.0 < 1.0 else 0.0
        more += 0.4 if rng.random() * 300.0 < 1.0 else 0.0
        more = 0.0 if hiccups == "none" else more
        noise = rng.lognormvariate(0.0, 0.02)
        own.append(unit * noise * (1.0 + more if hiccups == "slow" else 1.0))
        at.append(rng.random() * count * unit)
        pause.append(more * count * unit if hiccups == "stall" else 0.0)
    return Step(lanes, tuple(own), tuple(at), tuple(pause))


def arrivals(step: Step) -> list[float]:
    return [
        step.after(worker, 0.0, n * own) for worker, (n, own) in enumerate(zip(step.lanes, step.lane_s, strict=True))
    ]


def moving(step: Step) -> tuple[float, float]:
    """(seconds until the last has come, lanes computed)."""
    return max(arrivals(step)), float(sum(step.lanes))


def backups(step: Step, *, copies: bool) -> tuple[float, float]:
    """Whoever is done takes over a lane of the one that would be last, if it has not been begun and that helps; the
    late one comes when it is done with the lane that it is in. With `copies` also a copy of that one, the first result
    counts, and the late one breaks off at once, unless it is stalled.
    """
    workers = range(len(step.lanes))
    left, made = list(step.lanes), 0
    done_s = arrivals(step)
    helped = [False] * len(left)
    while True:
        last = max(workers, key=done_s.__getitem__)
        helper = min((w for w in workers if w != last), key=done_s.__getitem__)
        begin_s = done_s[helper]
        taken_s = step.after(helper, begin_s, step.lane_s[helper])
        if taken_s >= done_s[last] or helped[last]:
            break
        fewer_s = step.after(last, 0.0, (left[last] - 1) * step.lane_s[last])
        if fewer_s > begin_s and left[last] > 1:  # not begun
            left[last] -= 1
            done_s[last] = fewer_s
        elif copies:
            made += 1
            back_s = step.stall_at_s[last] + step.stall_s[last]
            stalled = step.stall_s[last] > 0 and step.stall_at_s[last] < taken_s
            done_s[last], helped[last] = max(taken_s, back_s if stalled else 0.0), True
        else:
            break
        done_s[helper], helped[helper] = taken_s, True
    return max(done_s), float(sum(step.lanes) + made)


def dropping(step: Step, drop: int) -> tuple[float, float]:
    """The step ends without the slowest `drop` (dynamic backup workers): a step of fewer samples, and other bits. It is
    counted for as many samples as the others.
    """
    workers = len(step.lanes)
    kept = sorted(zip(arrivals(step), step.lanes, strict=True))[: workers - drop]
    lanes = sum(step.lanes)
    used = sum(own for _, own in kept)
    return kept[-1][0] * lanes / used, lanes * lanes / used


def coded(step: Step) -> tuple[float, float]:
    """Pairs of workers have the same lanes, and the first of the two is enough (fractional repetition: one of a pair
    may be missing). Bits are the same; everybody computes twice as many lanes.
    """
    both = [
        (step.after(w, 0.0, 2 * n * own), n) for w, (n, own) in enumerate(zip(step.lanes, step.lane_s, strict=True))
    ]
    pairs = [min(both[n][0], both[n + 1][0]) for n in range(0, len(both) - 1, 2)]
    return max(pairs), 2.0 * sum(step.lanes)


WAYS: dict[str, Callable[[Step], tuple[float, float]]] = {
    "lanes that move": moving,
    "lanes taken over in the step": lambda step: backups(step, copies=False),
    "backup lanes": lambda step: backups(step, copies=True),
    "the slowest one dropped": lambda step: dropping(step, 1),
    "gradients coded in pairs": coded,
}


def case(results: common.Results, workers: int, slow: float, hiccups: Hiccups, steps: int) -> dict[str, float]:
    """Mean seconds of a step by each way. `slow`: of one worker, how many times as long a lane takes."""
    unit_s = tuple(LANE_S * (slow if worker == 1 else 1.0) for worker in range(workers))
    lanes = split_affine(EACH * workers, [0.0] * workers, list(unit_s), least=[1] * workers).parts
    rng, taken = Random(f"{workers}/{slow}/{hiccups}"), {name: [0.0, 0.0] for name in WAYS}
    for _ in range(steps):
        step = draw(rng, lanes, unit_s, hiccups)
        for name, way in WAYS.items():
            seconds, computed = way(step)
            taken[name][0] += seconds / steps
            taken[name][1] += computed / steps
    base_s, base = taken["lanes that move"]
    for name, (seconds, computed) in taken.items():
        results.row(workers=workers, slow=slow, hiccups=hiccups, way=name, **{
            "s a step": seconds, "wins, percent": 100 * (1 - seconds / base_s),
            "lanes computed, percent": 100 * computed / base})  # fmt: skip
    return {name: 100 * (1 - seconds / base_s) for name, (seconds, _) in taken.items()}


def main() -> None:
    options = common.arguments(__doc__)
    results = common.Results("redundancy", "Redundant computation against lanes that move (a calculation)", options)
    steps = 300 if options.quick else 1500
    for workers in (4, 16, 64):
        for slow in (1.0, 2.0):
            for hiccups in ("none", "slow", "stall"):
                wins = case(results, workers, slow, hiccups, steps)
                if workers == 16 and slow > 1.0:
                    for name in list(WAYS)[1:]:
                        results.figure(f"16 workers, one at half speed, hiccups: {hiccups}: {name}, percent won",
                                       wins[name], "none", "a calculation")  # fmt: skip
    results.notes += [
        f"{EACH} lanes a worker, {LANE_S} s a lane, {steps:,} steps; computation alone, without exchange and vote.",
        "Below 0: slower than lanes that move.",
    ]
    results.write()


if __name__ == "__main__":
    main()
