"""Running a job: check it, find where it starts, bring up Ray where there is none, and watch the controller.

`et.run(job)` and `elastictrain run job.yaml` are this one function.
"""

from __future__ import annotations

import secrets
import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elastictrain import errors
from elastictrain.errors import ConfigError, CorruptCheckpoint, ElasticTrainError, RecipeError
from elastictrain.faults import SHARING, Add, Fault, KillController, LoseNode, OwnFault
from elastictrain.job import Job
from elastictrain.observe import Blind, Observer, RunDirectory, Summary
from elastictrain.observe.dropped import recorded_drops
from elastictrain.observe.events import iso
from elastictrain.observe.rundir import latest_of
from elastictrain.observe.standing import complete
from elastictrain.protocol import ModelFacts
from elastictrain.signals import on_signals, output_to, sheltered
from elastictrain_actors.cluster import check_gpus, connected
from elastictrain_actors.controller_actor import RunOrder, start_controller, watch
from elastictrain_actors.driver import Outcome
from elastictrain_actors.journal_file import begin_anew
from elastictrain_actors.reach import write_address

if TYPE_CHECKING:
    from elastictrain.data.stages import Skip
    from elastictrain.engine.resume import Start
    from elastictrain.planner.pace import Pace

Faults = Sequence[Fault]
Note = tuple[str, dict[str, Any]]


def run(
    job: Job,
    *,
    faults: Faults = (),
    resume: bool = False,
    resume_step: int | None = None,
    data_changed: Literal["fail", "new_stage"] = "fail",
    observer: Observer | None = None,
    address: str | None = None,
) -> Summary:
    """Train `job` to its last step and return what became of it.

    `faults`: a script of faults to commit on the way. `resume`: go on from the newest checkpoint, in the job's run
    directory; `resume_step` from that one. `data_changed`: what to do when the data are not those of the checkpoint:
    end with an error that says what has changed and what follows from either choice, or take them as a new stage of
    the data order. `address`: a Ray cluster; default RAY_ADDRESS, a Ray that this process is
    already connected to, or an embedded one on this machine.

    Raises UserError (the job, recipe or data), ClusterError (machines, storage), InternalError (us). A run that is
    stopped (Ctrl-C, SIGTERM) returns normally with outcome "stopped". A terminal that goes away (SIGHUP) ends nothing:
    the observer is told no more, and output goes to driver.log in the run directory.
    """
    _check_faults(job, faults)
    resuming = resume or resume_step is not None
    if data_changed != "fail" and not resuming:
        raise ConfigError(
            f"data_changed={data_changed!r} (--data-changed) is about a run that is taken up; add --resume, or leave "
            "it out"
        )
    watcher = observer or Blind()
    job, planned, pace = _planned(_replayed(job))
    with sheltered(), connected(job, address, lambda: inspect(job)) as (job, environment, facts):
        check_gpus(job)
        from elastictrain.engine.resume import find_start, older_offer  # imports torch, like `inspect`

        before = _run_before(job) if resuming else None
        start = find_start(
            job,
            resume=resuming,
            step=resume_step,
            skips=_skips(before),
            changed=data_changed,
            kept=None if before is None else before.data_folder,
        )
        job = job.model_copy(update={"start_from": start.start_from})
        folder, base_generation = _open_run_directory(job, facts.parameters, start, planned)
        order = RunOrder(
            job=job,
            run_dir=str(folder),
            facts=facts,
            restore=start.restore,
            checkpoints=start.checkpoints,
            faults=tuple(faults),
            environment=environment,
            namespace=f"elastictrain-{uuid.uuid4().hex[:12]}",
            token=secrets.token_hex(16),
            stages=start.stages,
            base_generation=base_generation,
            pace=pace,
        )
        write_address(folder, order.namespace)
        outcome = _follow(order, watcher)
    summary = complete(RunDirectory.open(folder))
    if outcome.outcome == "failed":
        error = error_of(outcome.error or "unknown")
        if start.restore.insist and isinstance(error, CorruptCheckpoint):
            error = CorruptCheckpoint(f"{error}; {older_offer(job, start.restore.step)}")
        raise error
    return summary


def submit(job_file: str | Path, address: str, *, wait: bool = True) -> str:
    """Hand a job file to a Ray cluster by its dashboard address; returns the submission id."""
    from elastictrain_actors.submission import submit_job

    return submit_job(job_file, address, wait=wait).submission_id


def _check_faults(job: Job, faults: Faults) -> None:
    adds = sum(isinstance(fault, Add) for fault in faults)
    at_once = job.workers.initial + job.workers.spares
    each = [at_once + adds if isinstance(fault, LoseNode) else 1 for fault in faults if isinstance(fault, OwnFault)]
    lost = sum(each) if job.workers.replace else 0  # a node may have all workers
    numbers = at_once + adds + lost
    for fault in faults:
        if not isinstance(fault, Add | KillController) and fault.worker >= numbers:
            raise ConfigError(
                f"faults: {fault.do} worker {fault.worker} at step {fault.step}: the run has workers 0..{numbers - 1}; "
                "name one of them"
            )
        if fault.step > job.steps:
            raise ConfigError(f"faults: {fault.do} at step {fault.step}: the job ends at step {job.steps}")
        phase = getattr(fault, "phase", None)
        if phase == "drop" and job.redundancy.lanes != "drop_slowest":
            raise ConfigError(
                f"faults: {fault.do} in phase drop: a step has that phase only with redundancy.lanes: drop_slowest"
            )
        if phase in SHARING and job.redundancy.lanes == "none":
            raise ConfigError(
                f"faults: {fault.do} in phase {phase}: a step has that phase only where lanes "
                "are shared; set redundancy.lanes, or name another phase"
            )


def inspect(job: Job) -> ModelFacts:
    """Check recipe and optimizer, and measure the model. Imports torch, which takes seconds: Ray starts meanwhile."""
    from elastictrain.engine import worker_model

    return worker_model.inspect(job)


def _replayed(job: Job) -> Job:
    """The job with what `redundancy.replay` names: it needs that run no more."""
    named = job.redundancy.replay
    if not isinstance(named, str):
        return job
    settings = job.redundancy.model_copy(update={"replay": recorded_drops(named)})
    try:
        settings.check(job.gradients, job.workers.max, job.stragglers.action, job.lanes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return job.model_copy(update={"redundancy": settings})


def _planned(job: Job) -> tuple[Job, tuple[Note, ...], Pace | None]:
    """The job with what `plan: auto` chooses, the line of events.jsonl that says so, what the controller goes by."""
    if job.plan is None:
        return job, (), None
    from elastictrain.engine.planned import plan_job  # imports torch

    settled, note, pace = plan_job(job)
    return settled, (("plan_chosen", note),), pace


def _open_run_directory(job: Job, parameters: int, start: Start, planned: Sequence[Note] = ()) -> tuple[Path, int]:
    """Make (or take up) the run directory and write its first line; the controller goes on with it. The newest
    generation before this run comes with it.
    """
    if start.resumed:
        path = Path(job.run_dir) if job.run_dir is not None else latest_of(job.name)
        folder = RunDirectory.resume(path, job)
    else:
        folder = RunDirectory.create(None, job)
    with folder:
        base_generation = max(start.generation, begin_anew(folder.path))
        facts = {"name": job.name, "steps": job.steps, "workers": job.workers.initial, "parameters": parameters}
        if start.resumed:
            where = {"step": start.restore.step, "checkpoint": start.restore.checkpoint}
            folder.event("run_resumed", facts | where | {"up_to_generation": base_generation})
        else:
            folder.event("run_started", facts)
        for kind, data in (*planned, *start.notes):
            folder.event(kind, data)
        for one in start.kept.values():
            one.write(folder.data_folder)
        named = {name: one.identity for name, one in start.kept.items() if name}
        folder.write_data([stage.as_json() for stage in start.stages], start.data, named)
    return folder.path.absolute(), base_generation


def _run_before(job: Job) -> RunDirectory | None:
    """The run that is to go on, to read."""
    try:
        return RunDirectory.open(job.run_dir if job.run_dir is not None else latest_of(job.name))
    except ConfigError:  # said where the directory is opened to be written to
        return None


def _skips(folder: RunDirectory | None) -> list[Skip]:
    """What `elastictrain data skip` was asked for."""
    from elastictrain.data.stages import Skip

    return [] if folder is None else [Skip.of(record) for record in folder.read_skips()]


def _follow(order: RunOrder, watcher: Observer) -> Outcome:
    watcher.update({"name": order.job.name, "run_dir": order.run_dir, "steps": order.job.steps,
                    "waiting": "workers are starting"})  # fmt: skip
    handle = start_controller(order)
    shows: dict[str, Callable[[Any], None]] = {"event": watcher.event, "row": watcher.row, "status": watcher.update}
    alone = threading.Event()

    def stop() -> None:
        handle.request.remote("stop", "stopped by the user (Ctrl-C)")

    def hang_up() -> None:
        alone.set()
        words = "the terminal has gone, the run goes on; to see it: elastictrain attach"
        output_to(Path(order.run_dir) / "driver.log", f"{iso(datetime.now(UTC))} {words} {order.run_dir}")

    with on_signals(stop, hang_up):
        return watch(handle, lambda kind, item: None if alone.is_set() else shows[kind](item))


def error_of(text: str) -> ElasticTrainError:
    """The typed error behind a message "TypeName: text"; anything else came out of the recipe's own code."""
    name, _, message = text.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, ElasticTrainError):
        return kind(message)
    return RecipeError(f"the recipe failed in a worker:\n{text}")


__all__ = ["error_of", "run", "submit"]
