"""What Ray says of its cluster: which nodes there are, what is free, and which of them are about to go.

Asked in a thread of its own: while Ray's head is away an answer may take a minute, and the controller does not wait.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import ray

from elastictrain.controller import events as ev

EVERY_S = 1.0
SHARE = 0.05
"""Of its time that the thread may spend asking: an answer about thousands of nodes takes longer."""
CAPACITY_EVERY_S = 5.0
NO_DEADLINE_S = 120.0
"""Ray may drain a node without saying until when."""
SHOWN = ("CPU", "GPU")

News = ev.ClusterChanged | ev.PreemptionNotice


@dataclass(frozen=True, slots=True)
class Cluster:
    """One answer of Ray. `going`: seconds that are left to nodes that are being drained."""

    nodes: tuple[str, ...] = ()
    total: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)
    going: Mapping[str, float] = field(default_factory=dict)

    def in_words(self) -> str:
        """Such as "Ray has 2 nodes with CPU 3 of 8 free, GPU 0 of 2 free"."""
        amounts = [f"{kind} {self.free.get(kind, 0.0):g} of {total:g} free" for kind, total in self.total.items()]
        many = "1 node" if len(self.nodes) == 1 else f"{len(self.nodes)} nodes"
        return f"Ray has {many}" + (f" with {', '.join(amounts)}" if amounts else "")


def read_cluster() -> Cluster:
    """Ask Ray. Raises what Ray raises when it does not answer."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = {kind: sum(node["Resources"].get(kind, 0.0) for node in nodes) for kind in SHOWN}
    return Cluster(
        tuple(sorted(node["NodeID"] for node in nodes)),
        {kind: amount for kind, amount in total.items() if amount},
        ray.available_resources(),
        _draining(),
    )


def _draining() -> dict[str, float]:
    """Ray has no public call for this; its own Train and Serve use this one."""
    try:
        found = ray._private.state.state.get_draining_nodes()
    except AttributeError:  # another Ray; its drained nodes are then lost like any other
        return {}
    return {node: until_ms / 1000 - time.time() if until_ms else NO_DEADLINE_S for node, until_ms in found.items()}


class Surroundings:
    """`take` from one thread. `clock`: the driver's. `is_short`: workers wait for room, so what is free is news."""

    def __init__(self, clock: Callable[[], float], read: Callable[[], Cluster] = read_cluster) -> None:
        self._clock, self._read = clock, read
        self.now = Cluster()
        self.is_short = False
        self._said: tuple[tuple[str, ...], str] = ((), "")
        self._said_at_s = 0.0
        self._going: set[str] = set()
        self._answers: queue.SimpleQueue[Cluster] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="elastictrain-surroundings", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        took_s = 0.0
        while not self._stop.wait(max(EVERY_S, took_s / SHARE)):
            begun_s = time.monotonic()
            with suppress(Exception):  # whatever Ray raises while its head is away: nothing is known, nothing changes
                self._answers.put(self._read())
            took_s = time.monotonic() - begun_s

    def take(self) -> list[News]:
        """What is new since the last call."""
        found: list[News] = []
        while not self._answers.empty():
            self.now = self._answers.get()
            found += self._departures()
        if not self.now.nodes:
            return found
        words = self.now.in_words() if self.is_short else ""
        said = (self.now.nodes, words)
        is_due = self.now.nodes != self._said[0] or self._clock() - self._said_at_s >= CAPACITY_EVERY_S
        if said != self._said and is_due:
            self._said, self._said_at_s = said, self._clock()
            found.append(ev.ClusterChanged(0.0, *said))
        return found

    def _departures(self) -> list[News]:
        """Each is said once."""
        new = [node for node in sorted(self.now.going) if node not in self._going]
        self._going = set(self.now.going)
        until_s = {node: self._clock() + self.now.going[node] for node in new}
        return [ev.PreemptionNotice(0.0, until_s[node], None, node, "Ray drains its node") for node in new]

    def close(self) -> None:
        """Does not wait for an answer that is under way."""
        self._stop.set()
