"""The Ray actor of the controller: the driver loop in a thread, the run directory, and a feed for whoever watches."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from elastictrain.controller import events as ev
from elastictrain.controller.adoption import bring_back
from elastictrain.controller.journal import load_event
from elastictrain.errors import ClusterError, ElasticTrainError, InternalError
from elastictrain.faults import Fault
from elastictrain.job import Job
from elastictrain.observe import RunDirectory
from elastictrain.observe.standing import complete
from elastictrain.planner.pace import Pace
from elastictrain.protocol import ModelFacts, Restore, Stage, StepSignals
from elastictrain_actors.driver import Driver, Outcome
from elastictrain_actors.journal_file import JournalFile, Replaced
from elastictrain_actors.ray_effects import Place, RayEffects
from elastictrain_actors.spec import machine_spec

CONTROLLER = "controller"
"""The actor's name in the run's namespace."""
LINGER_S = 60.0
ALONE_S = 5.0
RETURN_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class RunOrder:
    """All that the controller needs to run a job."""

    job: Job
    run_dir: str
    facts: ModelFacts
    restore: Restore
    checkpoints: tuple[tuple[int, str], ...]
    faults: tuple[Fault, ...]
    environment: dict[str, Any]
    namespace: str
    token: str
    stages: tuple[Stage, ...] = ()
    base_generation: int = 0
    pace: Pace | None = None


class _Record:
    """Writes the run directory and keeps what the watcher has not fetched yet."""

    def __init__(self, folder: RunDirectory, name: str) -> None:
        self._folder, self._name = folder, name
        self._feed: list[tuple[str, Any]] = []
        self._lock = threading.Lock()
        self._latest: dict[str, Any] = {}

    def event(self, kind: str, data: Mapping[str, Any], generation: int | None) -> None:
        self._add("event", self._folder.event(kind, data, generation=generation))

    def row(self, values: Mapping[str, Any]) -> None:
        if self._folder.row(values):
            seconds = values.get("step_s") or 0.0
            self._latest = {"loss": values.get("loss")}
            if seconds and values.get("tokens"):
                self._latest["tokens_per_s"] = values["tokens"] / seconds
            self._add("row", dict(values))

    def signals(self, said: StepSignals, workers: Sequence[int]) -> None:
        from elastictrain.stragglers.signals import LEFT_OUT, decode  # NumPy: only where there are signals

        self._folder.signals(said.generation, said.step, workers, decode(said.records), excused=LEFT_OUT)

    def status(self, values: Mapping[str, Any]) -> None:
        full = {"name": self._name, **values, **self._latest}
        self._folder.status(full)
        self._add("status", full)

    def _add(self, kind: str, item: Any) -> None:
        with self._lock:
            self._feed.append((kind, item))

    def take(self) -> list[tuple[str, Any]]:
        with self._lock:
            found, self._feed = self._feed, []
            return found


class ControllerActor:
    """Runs one job, from its first breath: Ray restarts it when it dies, and it goes on from its journal. `take` feeds
    the watcher; the outcome is there when the run is over.
    """

    def __init__(self, order: RunOrder) -> None:
        self._order = order
        self._outcome: Outcome | None = None
        self._over, self._fetched = threading.Event(), threading.Event()
        self._folder = RunDirectory.resume(order.run_dir, order.job)
        self._record = _Record(self._folder, order.job.name)
        self._journal = JournalFile(Path(order.run_dir))
        spec = machine_spec(order.job, order.facts, base_generation=order.base_generation, pace=order.pace)
        lines = self._journal.lines()
        self._gone_s = self._journal.silent_for_s() if lines else 0.0
        self._machine, self._unsaid = bring_back(spec, lines)
        last_s = load_event(lines[-1]).now_s if lines else time.monotonic()
        clock = _going_on_from(last_s + self._gone_s)
        place = Place(order.namespace, order.token, self._journal.epoch, clock)
        self._effects = RayEffects(order.job, order.faults, order.stages, order.environment, place)
        self._driver = Driver(
            self._machine, self._effects, self._record, self._journal, script=order.faults, clock=clock
        )
        threading.Thread(target=self._run, name="elastictrain-controller", daemon=True).start()

    def begun(self) -> int:
        """The number of this controller: 1, or more when it has been brought back."""
        return self._journal.epoch

    def _run(self) -> None:
        try:
            if self._machine.core.ledger.begun:
                self._outcome = self._driver.take_over(self._gone_s, self._unsaid)
            else:
                self._outcome = self._driver.run(ev.Begun(0.0, self._order.restore, self._order.checkpoints))
        except Replaced:
            os._exit(0)  # another one does all this now; not a word to anybody
        except BaseException as error:  # the watcher must hear of it; a silent thread death would look like a hang
            self._outcome = Outcome("failed", 0, None, f"InternalError: {type(error).__name__}: {error}")
        finally:
            for part in (self._effects, self._journal, self._folder):
                with suppress(Exception):  # a full disk must not keep the outcome from the watcher
                    part.close()
            self._over.set()
        self._end_alone()

    def _end_alone(self) -> None:
        """Whoever watches takes the outcome, writes the summary and ends this actor. With nobody there it does so
        itself.
        """
        if not self._fetched.wait(ALONE_S):
            with suppress(Exception):  # nobody is there to be told; whoever looks later completes it
                complete(RunDirectory.open(self._order.run_dir))
        threading.Event().wait(LINGER_S)
        with suppress(ValueError):
            ray.kill(ray.get_actor(CONTROLLER, self._order.namespace), no_restart=True)

    def take(self, timeout_s: float) -> tuple[list[tuple[str, Any]], Outcome | None]:
        """What has been recorded since the last call, and the outcome once there is one."""
        self._over.wait(timeout_s)
        outcome = self._outcome if self._over.is_set() else None
        if outcome is not None:
            self._fetched.set()
        return self._record.take(), outcome

    def status(self) -> dict[str, Any]:
        return self._driver.status()

    def request(self, kind: str, *arguments: Any) -> None:
        """A user's request: add, drain WORKER, resize N, stop REASON."""
        makers: dict[str, Any] = {
            "add": ev.AddRequested,
            "drain": ev.DrainRequested,
            "resize": ev.ResizeRequested,
            "stop": ev.StopRequested,
        }
        self._driver.request(makers[kind](0.0, *arguments))


def _going_on_from(time_s: float) -> Callable[[], float]:
    """A clock that shows `time_s` now. Machines have clocks of their own; the journal's time must never go back."""
    started_s = time.monotonic()
    return lambda: time_s + time.monotonic() - started_s


@contextmanager
def _in_our_words() -> Iterator[None]:
    """What goes wrong in or with the controller's actor, as one of our errors."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ElasticTrainError):
            raise error.cause from None
        raise InternalError(f"the controller failed: {error}") from error
    except ActorUnavailableError:
        raise
    except RayActorError as error:
        if isinstance(error.__cause__, ElasticTrainError):
            raise error.__cause__ from None
        raise ClusterError(
            f"the controller is gone for good: {error}; workers that are left step on without it (see `ray list "
            "actors`); end them, and go on from the newest checkpoint with --resume"
        ) from error


def start_controller(order: RunOrder) -> Any:
    """Start the controller on this node, so that the run directory lies where its user looks for it. It is detached: it
    outlives this process, and Ray brings it back when it dies.

    It asks for a byte of memory: an actor that asks for nothing is placed on any node by Ray, which then overlooks a
    wish that is not a must (and the head may be that node).
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(ControllerActor).options(
        num_cpus=0, memory=1, max_restarts=-1, max_concurrency=8, scheduling_strategy=here, lifetime="detached",
        name=CONTROLLER, namespace=order.namespace,
    )  # fmt: skip
    handle = actor.remote(order)
    with _in_our_words():
        ray.get(handle.begun.remote())
    return handle


def watch(handle: Any, on_item: Any, *, poll_s: float = 0.5) -> Outcome:
    """Hand everything the controller records to `on_item(kind, item)` until the run is over; then end the controller.

    A controller that is being brought back is waited for.
    """
    missed_since_s: float | None = None
    while True:
        items: list[tuple[str, Any]]
        outcome: Outcome | None
        try:
            with _in_our_words():
                items, outcome = ray.get(handle.take.remote(poll_s))
        except ActorUnavailableError:
            missed_since_s = missed_since_s or time.monotonic()
            if time.monotonic() - missed_since_s > RETURN_DEADLINE_S:
                raise ClusterError(
                    f"the controller has not come back within {RETURN_DEADLINE_S:.0f} s; the workers go on without "
                    "it, see `ray list actors`; or go on from the newest checkpoint with --resume"
                ) from None
            threading.Event().wait(0.1)
            continue
        missed_since_s = None
        for kind, item in items:
            on_item(kind, item)
        if outcome is not None:
            ray.kill(handle, no_restart=True)
            return outcome
