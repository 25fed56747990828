"""The Ray actor of the controller: the driver loop in a thread, the run directory, and a feed for whoever watches."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from elastictrain.controller import events as ev
from elastictrain.controller.machine import Machine
from elastictrain.errors import ClusterError, ElasticTrainError, InternalError
from elastictrain.faults import Add, Drain, Fail, Kill
from elastictrain.job import Job
from elastictrain.observe import RunDirectory
from elastictrain.protocol import ModelFacts, Restore, Stage
from elastictrain_actors.driver import Driver, Outcome
from elastictrain_actors.ray_effects import RayEffects
from elastictrain_actors.spec import machine_spec


@dataclass(frozen=True, slots=True)
class RunOrder:
    """All that the controller needs to run a job."""

    job: Job
    run_dir: str
    facts: ModelFacts
    restore: Restore
    checkpoints: tuple[tuple[int, str], ...]
    faults: tuple[Kill | Fail | Add | Drain, ...]
    environment: dict[str, Any]
    stages: tuple[Stage, ...] = ()
    base_generation: int = 0


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


class _JournalFile:
    """Events, appended and flushed before they are handled; generations, claimed by creating a file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal.jsonl"
        self._generations = folder / "generations"
        self._generations.mkdir(exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")

    def newest_generation(self) -> int:
        return max((int(file.name) for file in self._generations.iterdir()), default=0)

    def claim(self, generation: int) -> bool:
        try:
            (self._generations / f"{generation:08d}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def append(self, line: str) -> None:
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise ClusterError(
                f"journal {self._path} cannot be written: {error}; free the disk under run_dir"
            ) from error

    def close(self) -> None:
        self._file.close()


class ControllerActor:
    """Runs one job. `start` returns at once; `take` feeds the watcher; `outcome` is there when the run is over."""

    def __init__(self, order: RunOrder) -> None:
        self._order = order
        self._outcome: Outcome | None = None
        self._over = threading.Event()
        self._folder = RunDirectory.resume(order.run_dir, order.job)
        self._record = _Record(self._folder, order.job.name)
        self._effects = RayEffects(order.job, order.faults, order.stages, order.environment)
        self._journal = _JournalFile(Path(order.run_dir))
        base = max(order.base_generation, self._journal.newest_generation())
        self._machine = Machine(machine_spec(order.job, order.facts, base_generation=base))
        self._driver = Driver(self._machine, self._effects, self._record, self._journal, script=order.faults)

    def start(self) -> None:
        threading.Thread(target=self._run, name="elastictrain-controller", daemon=True).start()

    def _run(self) -> None:
        try:
            begun = ev.Begun(0.0, self._order.restore, self._order.checkpoints)
            self._outcome = self._driver.run(begun)
        except BaseException as error:  # the watcher must hear of it; a silent thread death would look like a hang
            self._outcome = Outcome("failed", 0, None, f"InternalError: {type(error).__name__}: {error}")
        finally:
            for part in (self._effects, self._journal, self._folder):
                with suppress(Exception):  # a full disk must not keep the outcome from the watcher
                    part.close()
            self._over.set()

    def take(self, timeout_s: float) -> tuple[list[tuple[str, Any]], Outcome | None]:
        """What has been recorded since the last call, and the outcome once there is one."""
        self._over.wait(timeout_s)
        outcome = self._outcome if self._over.is_set() else None
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


@contextmanager
def _in_our_words() -> Iterator[None]:
    """What goes wrong in or with the controller's actor, as one of our errors."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ElasticTrainError):
            raise error.cause from None
        raise InternalError(f"the controller failed: {error}") from error
    except RayActorError as error:
        if isinstance(error.__cause__, ElasticTrainError):
            raise error.__cause__ from None
        raise ClusterError(
            f"the controller's process is gone: {error}; its workers end with it; go on from the newest "
            "checkpoint with --resume"
        ) from error


def start_controller(order: RunOrder) -> Any:
    """Start the controller on this node, so that the run directory lies where its user looks for it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(ControllerActor).options(num_cpus=0, max_restarts=0, max_concurrency=8, scheduling_strategy=here)
    handle = actor.remote(order)
    with _in_our_words():
        ray.get(handle.start.remote())
    return handle


def watch(handle: Any, on_item: Any, *, poll_s: float = 0.2) -> Outcome:
    """Hand everything the controller records to `on_item(kind, item)` until the run is over."""
    while True:
        items: list[tuple[str, Any]]
        outcome: Outcome | None
        with _in_our_words():
            items, outcome = ray.get(handle.take.remote(poll_s))
        for kind, item in items:
            on_item(kind, item)
        if outcome is not None:
            return outcome
