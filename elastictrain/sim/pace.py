"""How long the steps of virtual workers take: devices of unequal speed, slow-downs, noise, and what the workers would
say of it. And what a step computes, so that it can be seen that nothing but the time depends on all this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from random import Random

from elastictrain.offers import Lanes
from elastictrain.sim import draws
from elastictrain.sim.books import require
from elastictrain.sim.process import Process
from elastictrain.sim.scenario import Scenario
from elastictrain.stragglers.signals import FLAG_COMPILE, Signal
from elastictrain.tree import Node, finish, roots, whole

TRANSFER = 0.03
"""Of a step of the undisturbed world."""


class Devices:
    """What each process needs for a lane. Speeds belong to processes and not to the time at which they are asked for,
    so that a fault more or less does not change them.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.rng = scenario, Random(f"{scenario.seed}/pace")
        self.lane_s = scenario.costs.step_s / scenario.lanes_per_worker / (1.0 + TRANSFER)
        self.transfer_s = TRANSFER * self.lane_s * scenario.lanes_per_worker
        self.changed_s = 0.0
        """When a speed has changed last."""

    def speed(self, process: Process) -> float:
        rng = Random(f"{self.scenario.seed}/device {process.number}")
        return self.scenario.speeds[rng.randrange(len(self.scenario.speeds))]

    def slow_down(self, process: Process, now_s: float, rng: Random) -> float:
        """Returns how long it lasts."""
        long_s = 60.0 + draws.lasts_s(rng, self.scenario.workers)
        process.slow_factor = draws.factor(rng)
        process.slow_until_s, self.changed_s = now_s + long_s, now_s
        return long_s

    def unit_s(self, process: Process, now_s: float) -> float:
        """Seconds for a lane, without noise."""
        if process.speed is None:
            process.speed = self.speed(process)
        slow = process.slow_factor if now_s < process.slow_until_s else 1.0
        return self.lane_s / process.speed * slow

    def computing_s(self, process: Process, lanes: int, now_s: float) -> float:
        seconds = lanes * self.unit_s(process, now_s) * self.rng.lognormvariate(0.0, self.scenario.noise)
        if self.scenario.hiccups and self.rng.random() < self.scenario.hiccups:
            seconds *= 1.3 + self.rng.expovariate(1.0)
        return seconds


def records(
    lanes: Sequence[int], computed_s: Sequence[float], transfer_s: float, *, first: bool, dealt: Sequence[int]
) -> bytes:
    """What the workers say of a step: `lanes` that each has computed, of those `dealt` out. `first`: of a generation,
    or under another split.
    """
    last_s, flags = max(computed_s), FLAG_COMPILE if first else 0
    return b"".join(
        Signal(
            own, took_s, arrive_s=took_s, exchange_s=last_s - took_s + transfer_s, flags=flags, more=own - should
        ).encode()
        for own, took_s, should in zip(lanes, computed_s, dealt, strict=True)
    )


def _hash(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def _leaf(step: int, lane: int) -> bytes:
    """What lane `lane` gives in step `step`: its samples, its seed."""
    return _hash(step.to_bytes(8, "big"), lane.to_bytes(8, "big"))


def digest_of(step: int, lanes: Iterable[Sequence[int]], lane_count: int) -> bytes:
    """What a step gives when these workers have computed it: each up to its roots, and then the tree over all of them,
    as the engine does. The sum is a hash, neither associative nor commutative. Raises Violation when a lane was left
    out or was computed twice.
    """
    parts: dict[Node, bytes] = {}
    dealt = [tuple(own) for own in lanes]
    require(
        sorted(lane for own in dealt for lane in own) == list(range(lane_count)),
        f"step {step} computes {dealt}, which is not each of {lane_count} lanes once",
    )
    for own in dealt:
        leaves = {Node(lane, lane + 1): _leaf(step, lane) for lane in own}
        parts |= {root: finish(leaves, _hash, root) for root in roots(own, lane_count)}
    return finish(parts, _hash, whole(lane_count))


class Samples:
    """What every committed step has given. A step that is committed again, since nobody was left who had it, must give
    the same.
    """

    def __init__(self, lane_count: int) -> None:
        self.lane_count = lane_count
        self._steps: dict[int, bytes] = {}

    def commit(self, step: int, lanes: Iterable[Sequence[int]]) -> None:
        found = digest_of(step, lanes, self.lane_count)
        require(self._steps.setdefault(step, found) == found, f"step {step} gave something else the second time")

    def digest(self, steps: int) -> str:
        """Of the first `steps` of them, each on the state that the one before has left."""
        require(all(step in self._steps for step in range(1, steps + 1)), f"not all of {steps} steps were computed")
        return chain(self._steps, steps)


def chain(found: Mapping[int, bytes], steps: int) -> str:
    state = b""
    for step in range(1, steps + 1):
        state = _hash(state, found[step])
    return state.hex()


def undisturbed(lane_count: int, steps: int) -> str:
    """The digest of a run in which one worker computes all lanes of all steps."""
    return chain({step: digest_of(step, [range(lane_count)], lane_count) for step in range(1, steps + 1)}, steps)


MOST_TURNS = 3
"""A change of speed may come in the middle of a trial, which is taken back; one that is made for it may be too."""


class Swings:
    """Counts moves of lanes, and of these the ones after which some worker's lanes have gone the other way more than
    `MOST_TURNS` times although no speed has changed. And lanes that were taken over within a step.
    """

    def __init__(self) -> None:
        self.moves = self.swings = self.taken_over = 0
        self._changed_s = 0.0
        self._last: dict[int, tuple[int, int]] = {}

    def forget(self) -> None:
        """Another generation: lanes are dealt out anew."""
        self._last = {}

    def moved(self, workers: Sequence[int], before: Lanes, after: Lanes, changed_s: float) -> None:
        """`changed_s`: when a speed has changed last."""
        self.moves += 1
        if changed_s > self._changed_s:
            self._changed_s = changed_s
            self._last = {worker: (way, 0) for worker, (way, _) in self._last.items()}
        swings = False
        for worker, old, new in zip(workers, map(len, before), map(len, after), strict=True):
            if old != new:
                now = 1 if new > old else -1
                way, turns = self._last.get(worker, (now, 0))
                turns += way != now
                swings |= turns > MOST_TURNS
                self._last[worker] = (now, turns)
        self.swings += swings
