"""The real controller and the real engine on plain processes: everything but Ray. Starts in about a second, because the
fork server has torch imported.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.controller.events import Message
from elastictrain.controller.journal import read_events
from elastictrain.controller.machine import Machine
from elastictrain.engine.host import WorkerHost, start_error
from elastictrain.engine.worker_model import inspect
from elastictrain.errors import InternalError
from elastictrain.faults import kills_for
from elastictrain.job import Job
from elastictrain.observe.metrics import Happened
from elastictrain.protocol import FormPlan, Ready, Restore, Stage
from elastictrain_actors.driver import Driver, Outcome
from elastictrain_actors.spec import machine_spec

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the Ray actor of a worker does
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preloaded"])
SHARED_DOMAIN = "here"
RECIPES = Path(__file__).parent / "recipes.py"
RAY_STEPS = 250
"""Of the runs on Ray that something happens to: as long as a new worker or controller takes to be there."""


def worker_main(
    pipe: connection.Connection,
    job: Job,
    worker: int,
    faults: Sequence[Any],
    patch: Any,
    cuda_devices: int,
    stages: Sequence[Stage] = (),
) -> None:
    """A worker process: commands come in, messages go out."""
    os.environ["OMP_NUM_THREADS"] = str(job.numerics.threads)
    if cuda_devices > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(worker % cuda_devices)
    if patch is not None:
        patch(worker)
    host = WorkerHost(job, worker, host="127.0.0.1", faults=faults, stages=stages)
    sending = threading.Lock()

    def send(message: object) -> None:
        with sending:
            pipe.send(message)

    try:
        ready = host.prepare()
    except BaseException as error:
        text, user = start_error(error)
        send(ev.WorkerStartFailed(0.0, worker, text, user))
        return
    send(ready)

    over = threading.Event()

    def pump() -> None:
        number, last = 0, False
        while not last:
            last = over.is_set()
            number, messages = host.outbox.after(number, 0.05)
            for message in messages:
                send(message)

    pumping = threading.Thread(target=pump, daemon=True)
    pumping.start()
    while True:
        command = pipe.recv()
        if isinstance(command, cmd.Form):
            host.form(command.plan)
        elif isinstance(command, cmd.Park):
            try:
                report = host.park(command.generation)
            except InternalError:  # on Ray the call fails, and what was said before arrives all the same
                over.set()
                pumping.join()
                raise
            send(ev.WorkerParked(0.0, command.generation, report))
        elif isinstance(command, cmd.AskPause):
            host.ask_pause(command.generation, command.store)
        elif isinstance(command, cmd.OfferLanes):
            host.offer_lanes(command.generation, command.plan, command.lanes)
        else:
            host.stop()
            os._exit(0)


class ProcessEffects:
    """`driver.Effects` on processes."""

    def __init__(self, job: Job, faults: Sequence[Any] = (), patch: Any = None, cuda_devices: int = 1) -> None:
        self.job, self.faults, self.patch, self.cuda_devices = job, faults, patch, cuda_devices
        self.stages: Sequence[Stage] = ()
        self.all_ready_first = False
        self.die_together: tuple[int, ...] = ()
        self._held_back: list[ev.WorkerReady] = []
        self.stores: dict[int, str] = {}
        self.pipes: dict[int, connection.Connection] = {}
        self.processes: dict[int, Any] = {}

    def perform(self, command: cmd.Command) -> None:
        if isinstance(command, cmd.StartWorker):
            self._start(command.worker)
        elif isinstance(command, cmd.Form):
            plan = replace(command.plan, store=self.stores[command.plan.layout.workers[0]])
            for worker in plan.layout.workers:
                self._send(worker, cmd.Form(plan))
        elif isinstance(command, cmd.Park | cmd.OfferLanes):
            for worker in command.workers:
                self._send(worker, command)
        elif isinstance(command, cmd.AskPause | cmd.Retire):
            self._send(command.worker, command)
        elif isinstance(command, cmd.Kill) and command.worker in self.processes:
            self.processes[command.worker].kill()  # it may be gone by now

    def adopt(self) -> list[int]:
        return []

    def _start(self, worker: int) -> None:
        ours, theirs = _context.Pipe()
        arguments = (
            theirs,
            self.job,
            worker,
            kills_for(self.faults, worker),
            self.patch,
            self.cuda_devices,
            self.stages,
        )
        process = _context.Process(target=worker_main, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self.pipes[worker], self.processes[worker] = ours, process

    def _send(self, worker: int, command: cmd.Command) -> None:
        with suppress(OSError, KeyError):  # it is dying; its sentinel says so
            self.pipes[worker].send(command)

    def poll(self, timeout_s: float) -> list[Message]:
        by_pipe = {pipe: worker for worker, pipe in self.pipes.items()}
        by_sentinel = {process.sentinel: worker for worker, process in self.processes.items()}
        found: list[Message] = []
        for ready in connection.wait([*by_pipe, *by_sentinel], timeout_s):
            if ready in by_pipe:
                found += self._drain(by_pipe[ready])
        dead = connection.wait([*by_sentinel], 0)
        if dead:  # what others had said by then is heard first
            for worker in by_pipe.values():
                found += self._drain(worker)
        for ready in dead:
            if by_sentinel[ready] in self.processes:
                found += self._bury(by_sentinel[ready])
        return self._hold_back(found) if self.all_ready_first else found

    def _hold_back(self, found: list[Message]) -> list[Message]:
        """Until all are ready, nobody is: so who is a spare, and that it is warm, does not depend on who was faster."""
        self._held_back += [message for message in found if isinstance(message, ev.WorkerReady)]
        found = [message for message in found if not isinstance(message, ev.WorkerReady)]
        if {message.worker for message in self._held_back} < set(self.processes):
            return found
        self.all_ready_first = False
        return [*found, *sorted(self._held_back, key=lambda ready: ready.worker)]

    def _bury(self, worker: int) -> list[Message]:
        """Its last messages and its death; with it go those that die together with it."""
        found = self._drain(worker)
        self.processes.pop(worker).join()
        self.pipes.pop(worker, None)
        found.append(ev.WorkerDied(0.0, worker, "process ended"))
        for other in self.die_together if worker in self.die_together else ():
            if other in self.processes:
                self.processes[other].kill()
                self.processes[other].join()
                found += self._bury(other)
        return found

    def _drain(self, worker: int) -> list[Message]:
        pipe, found = self.pipes.get(worker), []
        try:
            while pipe is not None and pipe.poll():
                message = pipe.recv()
                if isinstance(message, Ready):
                    self.stores[worker] = message.store
                    message = ev.WorkerReady(0.0, worker, f"{SHARED_DOMAIN}-{worker}", message.memory_bytes)
                found.append(message)
        except (EOFError, OSError):
            self.pipes.pop(worker, None)
        return found

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()


@dataclass
class MemoryRecord:
    """`driver.Record` in lists; like the run directory, it takes a step's row once unless the run went back."""

    events: list[tuple[str, dict[str, Any], int | None]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    signalled: list[tuple[Any, tuple[int, ...]]] = field(default_factory=list)
    happened: Happened = field(default_factory=Happened)
    on_row: Callable[[Mapping[str, Any]], None] | None = None
    on_event: Callable[[str], None] | None = None

    def event(self, kind: str, data: Any, generation: int | None) -> None:
        self.events.append((kind, dict(data), generation))
        if self.on_event is not None:
            self.on_event(kind)
        if kind == "went_back":
            self.happened.went_back(data["to_step"], data["up_to_generation"])

    def row(self, values: Any) -> None:
        if self.happened.add(values["step"], values["generation"]):
            self.rows.append(dict(values))
            if self.on_row is not None:
                self.on_row(values)

    def signals(self, said: Any, workers: Any) -> None:
        self.signalled.append((said, tuple(workers)))

    def status(self, values: Any) -> None:
        self.last_status = dict(values)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for k, data, _ in self.events if k == kind]


class MemoryJournal(list[str]):
    """`driver.Journal` in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.claimed: set[int] = set()

    def claim(self, generation: int) -> bool:
        free = generation not in self.claimed
        self.claimed.add(generation)
        return free


@dataclass
class Run:
    outcome: Outcome
    record: MemoryRecord
    journal: list[str]
    machine: Machine

    @property
    def digest(self) -> str:
        assert self.outcome.digest is not None, (self.outcome, self.record.events[-8:])
        return self.outcome.digest

    @property
    def losses(self) -> dict[int, float | None]:
        return {row["step"]: row["loss"] for row in self.record.rows}


def run_job(
    job: Job,
    faults: Sequence[Any] = (),
    *,
    restore: Restore | None = None,
    checkpoints: Sequence[tuple[int, str]] = (),
    patch: Any = None,
    cuda_devices: int = 1,
    all_ready_first: bool = False,
    die_together: tuple[int, ...] = (),
    stages: Sequence[Stage] = (),
    on_row: Callable[[Driver, Mapping[str, Any]], None] | None = None,
    on_event: Callable[[Driver, str], None] | None = None,
    **spec: Any,
) -> Run:
    """Run a job to its end on processes. `patch(worker)` is called in every worker first (to plant bugs or delays),
    `on_row(driver, values)` for every row that is recorded, `on_event(driver, kind)` for every event.
    """
    machine = Machine(replace(machine_spec(job, inspect(job)), **spec))
    effects = ProcessEffects(job, faults, patch, cuda_devices)
    effects.all_ready_first, effects.die_together, effects.stages = all_ready_first, die_together, stages
    record, journal = MemoryRecord(), MemoryJournal()
    try:
        driver = Driver(machine, effects, record, journal, script=faults)
        if on_row is not None:
            record.on_row = partial(on_row, driver)
        if on_event is not None:
            record.on_event = partial(on_event, driver)
        outcome = driver.run(ev.Begun(0.0, restore or Restore(0, None), tuple(checkpoints)))
    finally:
        effects.close()
    return Run(outcome, record, journal, machine)


def plans_of(run: Run) -> list[FormPlan]:
    """The plans of all generations, also of those that were never sealed: what the journal says, replayed."""
    plans: list[FormPlan] = []
    machine = Machine(run.machine.spec)
    for event in read_events(run.journal):
        plans += [command.plan for command in machine.handle(event) if isinstance(command, cmd.Form)]
    return plans


def write_text(folder: Path, *, rows: int = 400, group: int = 40) -> str:
    """A small Parquet file of text, deterministic; returns its path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"row {i}: " + " ".join(str((i * k) % 97) for k in range(1, 30)) for i in range(rows)]
    path = folder / "text.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=group)
    return str(path)


def byte_job(folder: Path, workers: int | dict[str, Any] = 3, **settings: Any) -> Job:
    """The standard small job of these tests."""
    base: dict[str, Any] = {
        "recipe": f"{Path(__file__).parent / 'recipes.py'}:Bytes",
        "data": {"kind": "parquet", "path": write_text(folder), "text_column": "text", "sequence_length": 32},
        "block_elements": 4096,  # several blocks each for up to seven workers
        "lanes": 11,
        "lane_batch_size": 2,
        "steps": 8,
        "clip_grad_norm": 0.5,
        "workers": {"max": workers, "replace": False} if isinstance(workers, int) else {"replace": False} | workers,
    }
    return Job(**(base | settings))
