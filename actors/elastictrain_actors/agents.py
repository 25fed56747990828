"""The node agents of a run, seen from the controller: one on every node that has a worker, started when its first
worker has said where it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from elastictrain_actors.calls import Calls
from elastictrain_actors.creations import GRACE_S, Creations, end_actor
from elastictrain_actors.driver import Heard
from elastictrain_actors.node_agent import start_agent
from elastictrain_actors.procfs import KillAnswer
from elastictrain_actors.watchman import Watchman

if TYPE_CHECKING:
    from elastictrain_actors.ray_effects import Place

KILL_S = 2.0
NUMBERS_PER_EPOCH = 1000
PATIENCE_S = 20.0
RETRY_S = 10.0
"""After an agent that did not come up."""
PREFIX = "agent-"


@dataclass(slots=True)
class _Agent:
    handle: Any
    number: int
    follows: bool = False


class Agents:
    """Used from one thread, the driver's."""

    def __init__(
        self,
        place: Place,
        watchman: Watchman,
        calls: Calls,
        environment: Mapping[str, Any],
        cloud: str | None = None,
    ) -> None:
        self._place, self._watchman, self._calls = place, watchman, calls
        self._environment, self._cloud = dict(environment), cloud
        self._creations = Creations()
        self._agents: dict[str, _Agent] = {}
        self._numbers: dict[str, int] = {}
        self._due_s: dict[str, float] = {}
        self._patience_s = PATIENCE_S

    def replace(self, names: Iterable[str]) -> None:
        """End the agents of a controller before this one (by the names of the run's actors): ours follow us."""
        for name in names:
            if name.startswith(PREFIX):
                with suppress(ValueError):
                    end_actor(ray.get_actor(name, self._place.namespace))

    def need(self, node: str) -> None:
        """A worker lives on `node`: have an agent there, soon."""
        if node not in self._agents and (node, self._numbers.get(node)) not in self._creations:
            self._due_s.setdefault(node, time.monotonic() + self._patience_s)

    def hurry(self) -> None:
        """The first workers and their first step are through. Until then (or until they have taken long) no agent
        starts: that takes a second of a processor, which they need more.
        """
        if self._patience_s:
            self._patience_s = 0.0
            self._due_s = dict.fromkeys(self._due_s, 0.0)

    def start_due(self) -> None:
        """To be called every turn."""
        due = [node for node, due_s in self._due_s.items() if time.monotonic() >= due_s]
        for node in due:
            del self._due_s[node]
            self._start(node)
        for made in self._creations.take(GRACE_S if due else 0.0):
            if made.error is not None:
                raise made.error
            node, number = made.key
            self._started(node, number, made.handle)

    def _start(self, node: str) -> None:
        # Numbers tell a node's agents apart; those of a later controller are above those of an earlier one.
        number = self._numbers[node] = self._numbers.get(node, self._place.epoch * NUMBERS_PER_EPOCH) + 1
        create = partial(
            start_agent, node, self._place.token, number, environment=self._environment,
            namespace=self._place.namespace, cloud=self._cloud, detached_as=f"{PREFIX}{node[:12]}-{number}",
        )  # fmt: skip
        self._creations.ask((node, number), create)

    def _started(self, node: str, number: int, handle: Any) -> None:
        agent = self._agents[node] = _Agent(handle, number)
        ears = self._watchman.heartbeats

        def died(_: object) -> None:
            if self._agents.get(node) is agent:
                del self._agents[node]
                self._watchman.agent_died(node)
                self._due_s[node] = time.monotonic() + (0.0 if agent.follows else RETRY_S)

        def follows(yes: bool) -> None:
            if yes and self._agents.get(node) is agent:
                agent.follows = True
                self._watchman.agent_started(node, number)

        key = (PREFIX, node, number)
        self._calls.add(handle.follow.remote(self._place.epoch, ears.host, ears.port, number), key, follows, died)
        self._calls.add(handle.run.remote(), key, died, died)

    def lost(self, node: str) -> None:
        """The node is out of reach: so is its agent. One is started again when a worker shows up there again."""
        self._due_s.pop(node, None)
        self._creations.drop((node, self._numbers.get(node)))
        agent = self._agents.pop(node, None)
        if agent is not None:
            self._calls.forget((PREFIX, node, agent.number))
            end_actor(agent.handle)

    def kill(
        self, node: str, pid: int, start_ticks: int, answered: Callable[[KillAnswer | None], Sequence[Heard]]
    ) -> None:
        """SIGKILL a worker and confirm. `answered` gets None when there is no agent that could say."""
        agent = self._agents.get(node)
        if agent is None or not agent.follows:
            return
        order = agent.handle.kill.remote(self._place.epoch, pid, start_ticks, KILL_S)
        self._calls.add(order, (PREFIX, node, agent.number), answered, lambda _: answered(None))

    def close(self) -> None:
        """The run is over: the agents end."""
        self._creations.close()
        for agent in self._agents.values():
            end_actor(agent.handle)
        self._agents.clear()
