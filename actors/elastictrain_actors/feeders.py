"""The feeders of a run, seen from the controller: one on every node that has a worker, where `data.feeder` is `node`.

The controller starts them, tells workers which one is theirs, and starts another when one dies. Nobody waits for any of
this: workers without a feeder read for themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from elastictrain.controller import commands as cmd
from elastictrain.job import Job
from elastictrain.protocol import Stage
from elastictrain_actors.calls import Calls
from elastictrain_actors.creations import Creations, end_actor
from elastictrain_actors.driver import Heard
from elastictrain_actors.node_feeder import start_feeder

if TYPE_CHECKING:
    from elastictrain_actors.ray_effects import Place

NUMBERS_PER_EPOCH = 1000
PREFIX = "feeder-"
LONGEST_PAUSE_S = 60.0
SETTLED_S = 60.0
"""A feeder that has lived so long died of something new."""


def pause_before(deaths: int) -> float:
    """Seconds before another feeder is started, after so many deaths in a row: none after the first, then 1, 2, 4 …"""
    return 0.0 if deaths < 2 else min(LONGEST_PAUSE_S, 2.0 ** (deaths - 2))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@dataclass(slots=True)
class _Feeder:
    handle: Any
    number: int
    since_s: float
    open: bool = False


@dataclass(slots=True)
class _Node:
    workers: dict[int, Any] = field(default_factory=dict)
    feeder: _Feeder | None = None
    deaths: int = 0
    due_s: float | None = None  # when the next one is started


class Feeders:
    """Used from one thread, the driver's. Does nothing where every worker has a feeder of its own."""

    def __init__(
        self, place: Place, calls: Calls, environment: dict[str, Any], job: Job, stages: Sequence[Stage]
    ) -> None:
        self._place, self._calls, self._environment = place, calls, environment
        last = stages[-1] if stages else None
        self._data = job.data.renamed((last.renamed if last else None) or {})
        self._lanes = (last.lanes if last else 0) or job.lanes
        self._lane_batch_size = (last.lane_batch_size if last else 0) or job.lane_batch_size
        self._wanted = job.data.feeder == "node"
        self._creations = Creations() if self._wanted else None
        self._nodes: dict[str, _Node] = {}
        self._numbers: dict[str, int] = {}

    def replace(self, names: Iterable[str]) -> None:
        """End the feeders of a controller before this one (by the names of the run's actors)."""
        for name in names:
            if name.startswith(PREFIX):
                with suppress(ValueError):
                    end_actor(ray.get_actor(name, self._place.namespace))

    def need(self, node: str, worker: int, handle: Any) -> None:
        """A worker lives on `node`, and shall be told of its feeder."""
        if not self._wanted:
            return
        facts = self._nodes.setdefault(node, _Node())
        facts.workers[worker] = handle
        if facts.feeder is None:
            if facts.due_s is None and (node, self._numbers.get(node)) not in self._not_there_yet:
                facts.due_s = time.monotonic()
        elif facts.feeder.open:
            self._tell(worker, handle, facts.feeder)

    def worker_gone(self, worker: int) -> None:
        """What it held is let go; a node without workers needs no feeder."""
        for node, facts in list(self._nodes.items()):
            if facts.workers.pop(worker, None) is None:
                continue
            if not facts.workers:
                self.lost(node)
            elif facts.feeder is not None:
                self._quietly(facts.feeder.handle.forget.remote(worker), node, facts.feeder.number)

    def start_due(self) -> list[Heard]:
        """To be called every turn."""
        if self._creations is None:
            return []
        now_s = time.monotonic()
        for node, facts in self._nodes.items():
            if facts.due_s is not None and now_s >= facts.due_s:
                facts.due_s = None
                self._start(node)
        found: list[Heard] = []
        for made in self._creations.take():
            node, number = made.key
            if made.error is not None:
                found += self._not_made(node, number, made.error)
            else:
                self._started(node, number, made.handle)
        return found

    def lost(self, node: str) -> None:
        """The node has no workers any more, or is out of reach."""
        facts = self._nodes.pop(node, None)
        if facts is None:
            return
        self._not_there_yet.drop((node, self._numbers.get(node)))
        if facts.feeder is not None:
            self._calls.forget((PREFIX, node, facts.feeder.number))
            end_actor(facts.feeder.handle)

    def close(self) -> None:
        """The run is over: the feeders end."""
        if self._creations is not None:
            self._creations.close()
        for node in list(self._nodes):
            self.lost(node)

    @property
    def _not_there_yet(self) -> Creations:
        assert self._creations is not None
        return self._creations

    def _start(self, node: str) -> None:
        number = self._numbers[node] = self._numbers.get(node, self._place.epoch * NUMBERS_PER_EPOCH) + 1
        create = partial(
            start_feeder, node, self._data, self._lanes, self._lane_batch_size, name=f"{PREFIX}{node[:12]}-{number}",
            namespace=self._place.namespace, environment=self._environment,
        )  # fmt: skip
        self._not_there_yet.ask((node, number), create)

    def _started(self, node: str, number: int, handle: Any) -> None:
        """Of a node that is lost none comes here: what was asked for has been dropped."""
        feeder = self._nodes[node].feeder = _Feeder(handle, number, time.monotonic())
        self._ask_whether_open(node, feeder)
        failed = partial(self._died, node, feeder)
        self._calls.add(handle.run.remote(), (PREFIX, node, number), lambda _: None, failed)

    def _ask_whether_open(self, node: str, feeder: _Feeder) -> None:
        self._calls.add(
            feeder.handle.opened.remote(), (PREFIX, node, feeder.number),
            lambda found: self._opened(node, feeder, *found), lambda error: self._died(node, feeder, error),
        )  # fmt: skip

    def _opened(self, node: str, feeder: _Feeder, pid: int, error: str | None, is_opening: bool = False) -> list[Heard]:
        facts = self._nodes.get(node)
        if facts is None or facts.feeder is not feeder:
            return []
        said = {"node": node, "number": feeder.number, "pid": pid}
        if is_opening:
            self._ask_whether_open(node, feeder)
            return []
        if error is not None:  # a store that was away is back some time; how long it has tried is no merit
            self._end(facts, feeder)
            return [cmd.Announce("feeder_failed", {**said, "error": error})]
        feeder.open = True
        for worker, handle in facts.workers.items():
            self._tell(worker, handle, feeder)
        return [cmd.Announce("feeder_started", {**said, "workers": sorted(facts.workers)})]

    def _died(self, node: str, feeder: _Feeder, error: Exception) -> list[Heard]:
        facts = self._nodes.get(node)
        if facts is None or facts.feeder is not feeder:
            return []
        if time.monotonic() - feeder.since_s >= SETTLED_S:
            facts.deaths = 0
        self._end(facts, feeder)
        return [cmd.Announce("feeder_lost", {"node": node, "number": feeder.number, "reason": _first_line(error)})]

    def _not_made(self, node: str, number: int, error: Exception) -> list[Heard]:
        self._plan_next(self._nodes[node])
        return [cmd.Announce("feeder_failed", {"node": node, "number": number, "error": _first_line(error)})]

    def _end(self, facts: _Node, feeder: _Feeder) -> None:
        """It is done with, and another one takes its place. It may be alive, only out of reach, and would hold what it
        has put into the store for ever: nobody else ends it.
        """
        facts.feeder = None
        self._plan_next(facts)
        end_actor(feeder.handle)

    def _plan_next(self, facts: _Node) -> None:
        facts.deaths += 1
        facts.due_s = time.monotonic() + pause_before(facts.deaths)

    def _tell(self, worker: int, handle: Any, feeder: _Feeder) -> None:
        """Should the worker not hear it, it reads for itself; that it has died others notice."""
        reference = handle.use_feeder.remote(self._place.epoch, feeder.number, feeder.handle)
        self._calls.add(reference, worker, lambda _: None, lambda _: None)

    def _quietly(self, reference: Any, node: str, number: int) -> None:
        self._calls.add(reference, (PREFIX, node, number), lambda _: None, lambda _: None)
