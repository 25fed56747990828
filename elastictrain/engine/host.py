"""A worker process from the inside, whoever started it: prepare, then serve a session and hand out its events.

The Ray actor and the local multi-process tests host the same object.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

import torch

from elastictrain.data import LaneReader, MixedSource, Segment, Source, open_data
from elastictrain.data.feeder import Feeder
from elastictrain.data.mixture import join_plans
from elastictrain.engine.collective import Rendezvous
from elastictrain.engine.numerics import apply_numerics
from elastictrain.engine.one_lane import lane_seed
from elastictrain.engine.outbox import Outbox
from elastictrain.engine.probes import Probes
from elastictrain.engine.session import Session
from elastictrain.engine.worker_model import build
from elastictrain.errors import ClusterError, ElasticTrainError
from elastictrain.faults import LoseNode, OwnFault
from elastictrain.job import Job
from elastictrain.protocol import FormPlan, ParkReport, Ready, Stage
from elastictrain.pulse import Pulse


class StageFeeder:
    """Batches of one stage, asked for by the run's steps."""

    def __init__(self, feeder: Feeder, from_step: int) -> None:
        self._feeder, self._from_step = feeder, from_step

    def batch(self, step: int, lane: int) -> Mapping[str, torch.Tensor]:
        return self._feeder.batch(self._position(step), lane)

    def expect(self, upcoming: Iterable[tuple[int, int]]) -> None:
        """Say which (step, lane) come next, so that they are read ahead."""
        self._feeder.expect([(self._position(step), lane) for step, lane in upcoming])

    def _position(self, step: int) -> int:
        """Step 1 of a run is position 0 of its first stage; one that continues counts from where its order began."""
        return max(0, step - 1 - self._from_step)


def first_stage(job: Job) -> Stage:
    """The stage that a new run starts with."""
    return Stage(0, 0, job.lanes, job.lane_batch_size)


def open_stage(job: Job, stage: Stage, before: Sequence[Stage] = ()) -> Source | MixedSource:
    """The job's data in the order of a stage, which follows on `before`.

    A stage has a seed of its own, unless it `continues` the order of the one before.
    """
    first = order_begins([*before, stage])
    seed = job.seed if first.index == 0 else lane_seed(job.seed, 0, first.index)
    segments = join_plans(
        [(one.from_step, [Segment.from_json(shown) for shown in one.mixture or ()])
         for one in [*before, stage] if one.index >= first.index and one.mixture]
    )  # fmt: skip
    return open_data(job.data, seed=seed, lanes=job.lanes, lane_batch_size=job.lane_batch_size, segments=segments)


def order_begins(stages: Sequence[Stage]) -> Stage:
    """The stage whose order the last one goes on with."""
    return next((stage for stage in reversed(stages) if not stage.continues), stages[0])


class WorkerHost:
    """Prepares a worker (model, data, a trial lane) and runs its training thread."""

    def __init__(
        self,
        job: Job,
        worker: int,
        *,
        host: str,
        faults: Iterable[OwnFault] = (),
        stages: Sequence[Stage] = (),
        outbox: Outbox | None = None,
        pulse: Pulse | None = None,
        lose_node: Callable[[LoseNode], None] | None = None,
    ) -> None:
        self.job, self.worker, self.host = job, worker, host
        self.stages = tuple(stages) or (first_stage(job),)
        self.outbox = outbox or Outbox()
        self.pulse = pulse or Pulse.create_or_mute(None, worker)[0]
        self._probes = Probes(worker, faults, lose_node)
        self._session: Session | None = None
        self._thread: threading.Thread | None = None
        self._rendezvous: Rendezvous | None = None

    def prepare(self) -> Ready:
        """Everything that can be done before a plan comes, so that joining costs the others as little as possible.

        Raises the error that keeps this worker from starting.
        """
        marks = [("start", time.perf_counter())]
        device = apply_numerics(self.job.numerics)
        model = build(self.job, device)
        marks.append(("model_s", time.perf_counter()))
        source = open_stage(self.job, self.stages[-1], self.stages[:-1])
        feeder = StageFeeder(Feeder(LaneReader(source), device), order_begins(self.stages).from_step)
        marks.append(("data_s", time.perf_counter()))
        session = Session(
            self.job,
            self.worker,
            model,
            feeder,
            device=device,
            host=self.host,
            emit=self.outbox.put,
            probes=self._probes,
            data_fingerprint=source.fingerprint,
            stages=[stage.as_json() for stage in self.stages],
            pulse=self.pulse,
        )
        session.rehearse()
        _give_back_freed_memory()
        marks.append(("trial_lane_s", time.perf_counter()))
        self._session, self._rendezvous = session, Rendezvous(self.host)
        self._thread = threading.Thread(target=session.run, name="elastictrain-training", daemon=True)
        self._thread.start()
        return Ready(
            worker=self.worker,
            pid=os.getpid(),
            numerics=session.numerics,
            fingerprint=dict(source.fingerprint),
            memory_bytes=_device_memory_bytes(device),
            store=self.store,
            prepared_s={name: at - before for (_, before), (name, at) in pairwise(marks)},
        )

    @property
    def store(self) -> str:
        """Address of the store where the generations that this worker leads meet; "" before it is prepared."""
        return "" if self._rendezvous is None else self._rendezvous.address

    @property
    def session(self) -> Session:
        if self._session is None:
            raise ClusterError(f"worker {self.worker} was asked to work before it was prepared")
        return self._session

    def form(self, plan: FormPlan) -> None:
        self.session.form(plan)

    def park(self, generation: int) -> ParkReport:
        return self.session.park(generation)

    def ask_pause(self, generation: int, store: bool) -> None:
        self.session.ask_pause(generation, store)

    def stop(self) -> None:
        """End the training thread; the process may then go."""
        if self._session is not None:
            self._session.stop()
        self.pulse.close()


def start_error(error: BaseException) -> tuple[str, bool]:
    """(message, whether another try would fail alike) for an exception out of `prepare`."""
    if isinstance(error, ElasticTrainError):
        return f"{type(error).__name__}: {error}", not isinstance(error, ClusterError)
    return "".join(traceback.format_exception(error)), not isinstance(error, OSError | MemoryError)


def _give_back_freed_memory() -> None:
    """Building a model leaves freed pages that glibc keeps; other systems give them back by themselves."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _device_memory_bytes(device: torch.device) -> int | None:
    """Memory the job may use: a CUDA device's; on a CPU several workers share the host, and nobody can promise it."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
