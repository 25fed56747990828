"""`driver.Effects` on Ray actors: one function per command, each idempotent; failures come back as events.

A worker's death is noticed through its long poll, which fails within some 50 ms of the process's end. A restart of an
actor is not a restart of its state, so actors are never restarted by Ray: the controller starts another number.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.controller.events import Message
from elastictrain.errors import ClusterError
from elastictrain.faults import Add, Drain, Fail, Kill, kills_for
from elastictrain.job import Job
from elastictrain.protocol import Ready, Stage
from elastictrain_actors.driver import Heard
from elastictrain_actors.worker_actor import WorkerActor, worker_name, worker_number

if TYPE_CHECKING:
    from elastictrain.engine.collective import Rendezvous

LONG_POLL_S = 0.5
SLOW_START_S = 20.0
STORE_START_S = 120.0


@dataclass(slots=True)
class _Worker:
    handle: Any
    since_s: float
    pid: int | None = None
    node: str = ""
    heard: int = 0
    said_slow: bool = False
    broken: str = ""


def death_in_words(said: str) -> str:
    """Ray's paragraph about the end of an actor as one short phrase, with Ray's exit type where it names one."""
    exit_type = re.search(r"exit type: ([A-Z_]+)", said)
    text = said.lower()
    if "node" in text and ("node has died" in text or "node died" in text or "node was terminated" in text):
        words = "its node died"
    elif "memory usage threshold" in text or (exit_type and exit_type[1] == "NODE_OUT_OF_MEMORY"):
        words = "killed by Ray: its node ran out of memory"
    elif exit_type is not None and exit_type[1] == "SYSTEM_ERROR":
        words = "its process died (killed or crashed)"
    elif exit_type is not None:
        words = "its process ended"
    else:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        words = next((line for line in lines if "died" in line or "killed" in line), lines[0] if lines else "it died")
        words = words if len(words) <= 160 else words[:157] + "..."
    return f"{words} [{exit_type[1]}]" if exit_type else words


class RayEffects:
    """Workers as Ray actors. Used from one thread, the driver's."""

    def __init__(
        self,
        job: Job,
        faults: Sequence[Kill | Fail | Add | Drain],
        stages: Sequence[Stage],
        environment: Mapping[str, Any],
        *,
        namespace: str,
        epoch: int,
    ) -> None:
        """`namespace`: of the run's actors. `epoch`: number of this controller; workers refuse orders of older ones."""
        self.job, self.faults, self.stages = job, faults, tuple(stages)
        self._environment = dict(environment)
        self._namespace, self._epoch = namespace, epoch
        self._to_poll: set[int] = set()
        self._address = ray.util.get_node_ip_address()
        self._node = ray.get_runtime_context().get_node_id()
        self._rendezvous: Future[Rendezvous] | None = None
        self._workers: dict[int, _Worker] = {}
        # What each reference is waited for: called with its result, or with the error instead.
        self._pending: dict[Any, tuple[int, Callable[[int, Any], list[Heard]]]] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="elastictrain-store")
        self._numerics: dict[str, str] | None = None
        self._out: list[Heard] = []

    # --- commands ---

    def perform(self, command: cmd.Command) -> None:
        match command:
            case cmd.StartWorker(worker, avoid):
                self._start(worker, avoid)
            case cmd.Form(plan):
                plan = replace(plan, store=self._store())
                for worker in plan.layout.workers:
                    self._call(worker, "form", plan)
            case cmd.Park(generation, workers):
                for worker in workers:
                    self._call(worker, "park", generation)
            case cmd.AskPause(generation, worker, store):
                self._call(worker, "ask_pause", generation, store)
            case cmd.Retire(worker):
                self._call(worker, "retire")
                self._forget(worker)
            case cmd.Kill(worker, _):
                self._kill(worker)

    def _store(self) -> str:
        try:
            return self._meeting_place().result(timeout=STORE_START_S).address
        except (RuntimeError, OSError, TimeoutError) as error:
            raise ClusterError(
                f"no store for the groups to meet can be opened on {self._address}: {type(error).__name__}: {error}"
            ) from error

    def _meeting_place(self) -> Future[Rendezvous]:
        """The store where groups meet needs torch, which takes seconds to import: it does so while workers start."""
        if self._rendezvous is None:

            def start() -> Rendezvous:
                from elastictrain.engine.collective import Rendezvous

                return Rendezvous(self._address)

            self._rendezvous = self._background.submit(start)
        return self._rendezvous

    def _start(self, worker: int, avoid: Sequence[str]) -> None:
        if worker in self._workers:
            return
        options: dict[str, Any] = {
            "num_cpus": self.job.workers.cpus,
            "num_gpus": self.job.workers.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 8,
            # It outlives its controller (and a driver that goes away); a second start of the same number finds it.
            "name": worker_name(worker),
            "namespace": self._namespace,
            "lifetime": "detached",
            "get_if_exists": True,
        }
        if avoid:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(avoid)})"}
        if self._environment:
            options["runtime_env"] = self._environment
        handle = ray.remote(WorkerActor).options(**options).remote(worker)
        self._meeting_place()
        self._meet(worker, handle)
        self._call(worker, "prepare", self.job, kills_for(self.faults, worker), self.stages)

    def adopt(self) -> Sequence[int]:
        """Take over the workers that a controller before this one has left; says which are there."""
        self._meeting_place()
        found = []
        for actor in ray.util.list_named_actors(all_namespaces=True):
            number = worker_number(actor["name"])
            if actor["namespace"] == self._namespace and number is not None:
                with suppress(ValueError):  # it has died since
                    self._meet(number, ray.get_actor(actor["name"], self._namespace))
                    found.append(number)
        return found

    def _meet(self, worker: int, handle: Any) -> None:
        self._workers[worker] = _Worker(handle, time.monotonic())
        reference = handle.who.remote()
        self._pending[reference] = (worker, self._introduced)
        self._to_poll.add(worker)

    def _introduced(self, worker: int, who: tuple[int, str]) -> list[Heard]:
        facts = self._workers[worker]
        facts.pid, facts.node = who
        return []

    def _kill(self, worker: int) -> None:
        facts = self._workers.get(worker)
        if facts is None:
            return
        if facts.pid is not None and facts.node == self._node:
            # ray.kill leaves a stopped process alive; SIGKILL does not.
            with suppress(ProcessLookupError):
                os.kill(facts.pid, signal.SIGKILL)
        ray.kill(facts.handle, no_restart=True)

    def _call(self, worker: int, method: str, *arguments: Any, then: Any = None) -> None:
        facts = self._workers.get(worker)
        if facts is None:
            return
        reference = getattr(facts.handle, method).remote(self._epoch, *arguments)
        self._pending[reference] = (worker, then or (lambda *_: []))

    # --- what comes back ---

    def poll(self, timeout_s: float) -> Sequence[Heard]:
        # What the last call returned has been written down by now, so workers may forget it.
        for worker in self._to_poll:
            self._poll_again(worker)
        self._to_poll.clear()
        if self._pending and not self._out:
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
            if ready:  # take whatever else is there, in one turn
                ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
            for reference in ready:
                if reference in self._pending:
                    worker, then = self._pending.pop(reference)
                    self._out += self._result(reference, worker, then)
        elif not self._out:
            time.sleep(timeout_s)  # nobody is there whom we could wait for
        found, self._out = [*self._out, *self._slow_starts()], []
        return found

    def _slow_starts(self) -> list[cmd.Announce]:
        """Workers for which the cluster has had no room for a while: say what is asked and what is free."""
        found = []
        for worker, facts in self._workers.items():
            if facts.pid is None and not facts.said_slow and time.monotonic() - facts.since_s > SLOW_START_S:
                facts.said_slow = True
                asked = {"cpus": self.job.workers.cpus, "gpus": self.job.workers.gpus}
                free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
                found.append(cmd.Announce("slow_start", {"worker": worker, "asked": asked, "free": free}))
        return found

    def _result(self, reference: Any, worker: int, then: Any) -> list[Heard]:
        try:
            result = ray.get(reference)
        except ActorUnavailableError as error:
            return self._broken(worker, error)
        except RayActorError as error:
            return self._died(worker, error)
        except RayError as error:
            return self._broken(worker, error)
        return list(then(worker, result))

    def _broken(self, worker: int, error: Exception) -> list[Heard]:
        """A call failed in a worker that may still live: end it. It is dead when its next poll says so, not before."""
        facts = self._workers.get(worker)
        if facts is not None and not facts.broken:
            facts.broken = death_in_words(str(error))
            self._kill(worker)
            self._to_poll.add(worker)
        return []

    def _died(self, worker: int, error: Exception) -> list[Heard]:
        facts = self._workers.get(worker)
        if facts is None:
            return []
        self._forget(worker)
        return [ev.WorkerDied(0.0, worker, facts.broken or death_in_words(str(error)))]

    def _forget(self, worker: int) -> None:
        self._workers.pop(worker, None)
        self._pending = {ref: item for ref, item in self._pending.items() if item[0] != worker}

    def _prepared(self, worker: int, ready: Ready) -> list[Heard]:
        node = self._workers[worker].node
        refusal = self._compare(worker, ready)
        if refusal:
            self._kill(worker)
            self._forget(worker)
            return [ev.WorkerStartFailed(0.0, worker, refusal, True)]
        seconds = {name: round(value, 3) for name, value in ready.prepared_s.items()}
        return [
            cmd.Announce(
                "worker_prepared", {"worker": worker, "pid": ready.pid, "domain": node, "prepared_s": seconds}
            ),
            ev.WorkerReady(0.0, worker, node, ready.memory_bytes),
        ]

    def _compare(self, worker: int, ready: Ready) -> str | None:
        """The first worker's numerics are the run's; a difference is said, and refused only if the job asks for it."""
        from elastictrain.engine.numerics import differences  # torch has been imported by now, for the store

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
            self._call(worker, "next_messages", facts.heard, LONG_POLL_S, then=self._messages)

    def _messages(self, worker: int, result: tuple[int, list[Message]]) -> list[Heard]:
        found: list[Heard] = []
        self._workers[worker].heard, messages = result
        self._to_poll.add(worker)
        for message in messages:
            if isinstance(message, Ready):
                found += self._prepared(worker, message)
                continue
            found.append(message)
            if isinstance(message, ev.WorkerStartFailed):
                self._kill(worker)
                self._forget(worker)
        return found

    def close(self) -> None:
        """End whatever is left."""
        self._background.shutdown(wait=False)
        for worker in list(self._workers):
            self._kill(worker)
            self._forget(worker)
