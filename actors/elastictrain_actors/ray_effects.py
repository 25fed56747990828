"""`driver.Effects` on Ray actors: one function per command, each idempotent; failures come back as events.

A worker's death is noticed through its long poll, which fails within some 50 ms of the process's end; that it is
frozen, or its node lost, by the node agents (`agents`, `watchman`). A restart of an actor is not a restart of its
state, so actors are never restarted by Ray: the controller starts another number.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from elastictrain.agreement import differences
from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.controller.events import Message
from elastictrain.controller.suspicion import Suspicion
from elastictrain.faults import Fault, kills_for
from elastictrain.job import Job
from elastictrain.protocol import Ready, Stage
from elastictrain.pulse import is_same_process
from elastictrain_actors.agents import Agents
from elastictrain_actors.calls import Calls
from elastictrain_actors.creations import GRACE_S, Creations, end_actor
from elastictrain_actors.deaths import death_in_words
from elastictrain_actors.driver import Heard
from elastictrain_actors.feeders import Feeders
from elastictrain_actors.heartbeats import Heartbeats
from elastictrain_actors.procfs import KillAnswer
from elastictrain_actors.starts import Starts
from elastictrain_actors.surroundings import Surroundings
from elastictrain_actors.watchman import Watchman
from elastictrain_actors.worker_actor import Identity, WorkerActor, worker_name, worker_number

LONG_POLL_S = 0.5
SLOW_START_S = 20.0
STORE_S = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a controller stands. `namespace`: of the run's actors; `token`: the run's secret; `epoch`: number of the
    controller: workers and agents refuse orders of older ones; `clock`: the driver's.
    """

    namespace: str
    token: str
    epoch: int
    clock: Callable[[], float]


@dataclass(slots=True)
class _Worker:
    handle: Any
    since_s: float
    who: Identity | None = None
    store: str = ""
    heard: int = 0
    said_slow: bool = False
    end: str = field(default="")
    """Why it has been told to die; nothing that it says counts any more."""


def suspicion_for(job: Job) -> Suspicion:
    """Batches come late without anybody's fault from a remote store, from a segment that is still to arrive, and from
    the feeder of the node.
    """
    late = job.data.is_remote or job.data.is_live or job.data.feeder == "node"
    return Suspicion(debug=job.debug, remote_data=late)


class RayEffects:
    """Workers as Ray actors. Used from one thread, the driver's."""

    def __init__(
        self, job: Job, faults: Sequence[Fault], stages: Sequence[Stage], environment: Mapping[str, Any], place: Place
    ) -> None:
        self.job, self.faults, self.stages, self._place = job, faults, tuple(stages), place
        self._environment = dict(environment)
        self._address = ray.util.get_node_ip_address()
        self._node = ray.get_runtime_context().get_node_id()
        self._calls = Calls()
        self._workers: dict[int, _Worker] = {}
        self._to_poll: set[int] = set()
        self._numerics: dict[str, str] | None = None
        self._out: list[Heard] = []
        ears = Heartbeats(self._address, place.token, place.epoch)
        self._watchman = Watchman(ears, suspicion_for(job), place.clock)
        self._creations = Creations()
        self._agents = Agents(place, self._watchman, self._calls, self._environment, job.workers.spot_notices)
        self._feeders = Feeders(place, self._calls, self._environment, job, self.stages)
        self._surroundings = Surroundings(place.clock)
        self._starts = Starts()

    # --- commands ---

    def perform(self, command: cmd.Command) -> None:
        match command:
            case cmd.StartWorker(worker, avoid):
                self._starts.want(worker, avoid)
                self._start_due()
            case cmd.Form(plan):
                self._watchman.formed(plan.generation, plan.layout.workers)
                plan = replace(plan, store=self._store(plan.layout.workers[0]))
                for worker in plan.layout.workers:
                    self._order(worker, "form", plan)
            case cmd.Park(generation, workers):
                self._starts.parking()
                self._watchman.parking(generation)
                for worker in workers:
                    self._order(worker, "park", generation)
            case cmd.AskPause(generation, worker, store):
                self._order(worker, "ask_pause", generation, store)
            case cmd.OfferLanes(generation, plan, lanes, workers):
                for worker in workers:
                    self._order(worker, "offer_lanes", generation, plan, lanes)
            case cmd.Retire(worker):
                self._order(worker, "retire")
                self._forget(worker)
            case cmd.Kill(worker, reason):
                self._kill(worker, reason)

    def _store(self, leader: int) -> str:
        """That of the first member: a function of the plan, so that a controller that comes back and says it again says
        the same. "" when it cannot be reached: then nobody meets, and all say so.
        """
        facts = self._workers.get(leader)
        if facts is None:
            return ""
        if not facts.store:  # adopted a moment ago
            with suppress(RayError, TimeoutError):
                facts.store = ray.get(facts.handle.who.remote(), timeout=STORE_S).store
        return facts.store

    def _start_due(self) -> None:
        due = self._starts.due()
        for worker, avoid in due.items():
            self._start(worker, avoid)
        self._meet_created(GRACE_S if due else 0.0)

    def _meet_created(self, wait_s: float) -> None:
        """Workers whose actor there is now. `wait_s`: for those that have been asked for just now."""
        for made in self._creations.take(wait_s):
            if made.error is not None:
                raise made.error
            self._meet(made.key, made.handle)
            kills, gently = kills_for(self.faults, made.key), self._starts.others_step
            self._order(made.key, "prepare", self.job, kills, self.stages, gently)

    def _start(self, worker: int, avoid: Sequence[str]) -> None:
        if worker in self._workers or worker in self._creations:
            return
        options: dict[str, Any] = {
            "num_cpus": self.job.workers.cpus,
            "num_gpus": self.job.workers.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 8,
            # It outlives its controller (and a driver that goes away); a second start of the same number finds it.
            "name": worker_name(worker),
            "namespace": self._place.namespace,
            "lifetime": "detached",
            "get_if_exists": True,
        }
        if avoid:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(avoid)})"}
        if self._environment:
            options["runtime_env"] = self._environment
        actor = ray.remote(WorkerActor).options(**options)
        self._creations.ask(worker, lambda: actor.remote(worker, self._place.token))

    def adopt(self) -> Sequence[int]:
        """Take over the workers that a controller before this one has left; says which are there."""
        self._agents.hurry()  # its workers are up
        found = []
        names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)
                 if a["namespace"] == self._place.namespace]  # fmt: skip
        self._agents.replace(names)
        self._feeders.replace(names)
        for name in names:
            number = worker_number(name)
            if number is not None:
                with suppress(ValueError):  # it has died since
                    self._meet(number, ray.get_actor(name, self._place.namespace))
                    found.append(number)
        return found

    def _meet(self, worker: int, handle: Any) -> None:
        self._workers[worker] = _Worker(handle, time.monotonic())
        self._to_poll.add(worker)
        self._expect(worker, handle.who.remote(), lambda who: self._introduced(worker, who))

    def _introduced(self, worker: int, who: Identity) -> list[Heard]:
        facts = self._workers[worker]
        facts.who, facts.store = who, facts.store or who.store
        self._agents.need(who.node)
        self._feeders.need(who.node, worker, facts.handle)
        if facts.end:
            self._kill(worker, facts.end)  # told to die before anybody knew where it was
        return [ev.WorkerPlaced(0.0, worker, who.node)]

    def _kill(self, worker: int, reason: str) -> None:
        """SIGKILL by the agent of its node, which also ends a stopped process and confirms; without one (or without an
        answer) as well as it can be done from here. It is dead when `WorkerDied` says so.
        """
        facts = self._workers.get(worker)
        if facts is None:
            self._forget(worker)
            self._out.append(ev.WorkerDied(0.0, worker, "it is gone"))
            return
        facts.end = facts.end or reason
        end_actor(facts.handle)
        who = facts.who
        if who is None:
            return
        if who.node == self._node and is_same_process(who.pid, who.start_ticks):
            with suppress(ProcessLookupError):
                os.kill(who.pid, signal.SIGKILL)
        self._agents.kill(who.node, who.pid, who.start_ticks, lambda answer: self._killed(worker, answer))

    def _killed(self, worker: int, answer: KillAnswer | None) -> list[Heard]:
        facts = self._workers.get(worker)
        # In the kernel: SIGKILL is pending, so it runs no more code of ours.
        if answer not in (KillAnswer.GONE, KillAnswer.IN_KERNEL) or facts is None:
            return []  # Ray, or the loss of its node, will tell
        self._forget(worker)
        return [ev.WorkerDied(0.0, worker, facts.end)]

    def _order(self, worker: int, method: str, *arguments: Any) -> None:
        facts = self._workers.get(worker)
        if facts is not None:
            order = getattr(facts.handle, method).remote(self._place.epoch, *arguments)
            self._expect(worker, order, lambda _: None)

    def _expect(self, worker: int, reference: Any, then: Callable[[Any], Sequence[Heard] | None]) -> None:
        self._calls.add(reference, worker, then, lambda error: self._failed(worker, error))

    # --- what comes back ---

    def poll(self, timeout_s: float) -> Sequence[Heard]:
        # What the last call returned has been written down by now, so workers may forget it.
        for worker in self._to_poll:
            self._poll_again(worker)
        self._to_poll.clear()
        self._start_due()
        self._agents.start_due()
        self._out += self._feeders.start_due()
        if not self._out:
            self._out += self._calls.take(timeout_s)
        found, self._out = [*self._out, *self._look(), *self._slow_starts(), *self._surroundings.take()], []
        return found

    def _look(self) -> list[Heard]:
        """What the watchman has noticed. What he says of workers that are forgotten is old."""
        found: list[Heard] = []
        for noticed in self._watchman.look():
            if isinstance(noticed, ev.NodeLost):
                self._agents.lost(noticed.node)
                self._feeders.lost(noticed.node)
            if isinstance(noticed, ev.WorkerDied):
                if noticed.worker not in self._workers:
                    continue
                self._forget(noticed.worker)
            found.append(noticed)
        return found

    def _slow_starts(self) -> list[cmd.Announce]:
        """Workers for which the cluster has had no room for a while: say what is asked and what is free. Or for which
        Ray's head has not even answered.
        """
        late_s = time.monotonic() - SLOW_START_S
        late = {
            worker: facts for worker, facts in self._workers.items() if facts.who is None and facts.since_s < late_s
        }
        self._surroundings.is_short = bool(late)
        asked = {"cpus": self.job.workers.cpus, "gpus": self.job.workers.gpus}
        found = [
            cmd.Announce("slow_start", {"worker": worker, "asked": asked, "free": None})
            for worker in self._creations.late(SLOW_START_S)
        ]
        for worker, facts in late.items():
            if not facts.said_slow:
                facts.said_slow = True
                there = self._surroundings.now
                free = {kind: there.free.get(kind, 0.0) for kind in there.total}
                found.append(cmd.Announce("slow_start", {"worker": worker, "asked": asked, "free": free}))
        return found

    def _failed(self, worker: int, error: Exception) -> list[Heard]:
        """A call has failed: the worker is dead, or (its own exception, out of reach) is made so."""
        facts = self._workers.get(worker)
        if facts is None:
            return []
        if isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError):
            self._forget(worker)
            return [ev.WorkerDied(0.0, worker, facts.end or death_in_words(str(error)))]
        if not facts.end:
            self._kill(worker, death_in_words(str(error)))
            self._to_poll.add(worker)  # its next poll fails when it is dead, not before
        return []

    def _forget(self, worker: int) -> None:
        """Nobody counts on it any more, whether it is there, is being made, or is still to be started."""
        self._starts.drop(worker)
        self._creations.drop(worker)
        if self._workers.pop(worker, None) is not None:
            self._calls.forget(worker)
            self._watchman.worker_gone(worker)
            self._feeders.worker_gone(worker)

    def _prepared(self, worker: int, ready: Ready) -> list[Heard]:
        refusal = self._compare(worker, ready)
        if refusal:
            self._kill(worker, refusal)
            return [ev.WorkerStartFailed(0.0, worker, refusal, True)]
        node = ready.node
        self._workers[worker].store = ready.store
        facts = {"worker": worker, "pid": ready.pid, "domain": node,
                 "prepared_s": {name: round(value, 3) for name, value in ready.prepared_s.items()}}  # fmt: skip
        return [
            cmd.Announce("worker_prepared", facts),
            ev.WorkerReady(0.0, worker, node, ready.memory_bytes, node, ready.labels),
        ]

    def _compare(self, worker: int, ready: Ready) -> str | None:
        """The first worker's numerics are the run's; a difference is said, and refused only if the job asks for it."""
        if self._numerics is None:
            self._numerics = ready.numerics
        found = differences(self._numerics, ready.numerics, f"worker {worker}")
        if found:
            self._out.append(cmd.Announce("numerics_differ", {"worker": worker, "differences": found}))
        return (
            f"ConfigError: {'; '.join(found)} (numerics.strict is set)" if found and self.job.numerics.strict else None
        )

    def _poll_again(self, worker: int) -> None:
        facts = self._workers.get(worker)
        if facts is not None:
            reference = facts.handle.next_messages.remote(self._place.epoch, facts.heard, LONG_POLL_S)
            self._expect(worker, reference, lambda result: self._messages(worker, result))

    def _messages(self, worker: int, result: tuple[int, list[Message]]) -> list[Heard]:
        facts = self._workers[worker]
        facts.heard, messages = result
        self._to_poll.add(worker)
        found: list[Heard] = []
        for message in messages if not facts.end else ():
            if isinstance(message, Ready):
                found += self._prepared(worker, message)
                continue
            if isinstance(message, ev.PreemptionNotice):  # the worker knows no clock but its own
                message = replace(message, deadline_s=self._place.clock() + self.job.workers.notice_s)
            found.append(message)
            if isinstance(message, ev.Sealed):
                self._starts.sealed()
            if isinstance(message, ev.Progress):
                self._agents.hurry()
            if isinstance(message, ev.WorkerStartFailed):
                self._kill(worker, "it could not start")
        return found

    def close(self) -> None:
        """End whatever is left."""
        self._creations.close()
        for worker in list(self._workers):
            self._kill(worker, "the run is over")
            self._forget(worker)
        self._agents.close()
        self._feeders.close()
        self._surroundings.close()
        self._watchman.heartbeats.close()
