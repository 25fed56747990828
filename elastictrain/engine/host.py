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
from typing import Any

import torch

from elastictrain.data import AnySource
from elastictrain.data.block_client import BlockClient, Line
from elastictrain.data.feeder import Feeder
from elastictrain.data.live_feeder import LiveFeeder, open_feeder
from elastictrain.data.stages import first_stage, open_stage, stage_of
from elastictrain.engine.collective import Rendezvous
from elastictrain.engine.numerics import apply_numerics
from elastictrain.engine.outbox import Outbox
from elastictrain.engine.probes import Probes
from elastictrain.engine.session import Session
from elastictrain.engine.worker_model import build
from elastictrain.errors import ClusterError, ElasticTrainError
from elastictrain.faults import LoseNode, OwnFault
from elastictrain.job import Job
from elastictrain.protocol import Awaited, FormPlan, ParkReport, Ready, Stage
from elastictrain.pulse import Pulse


class StageFeeder:
    """Batches of a run's stages, asked for by its steps. Sources of stages before the last one are opened when a run
    that goes back to a checkpoint of theirs asks for them.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        open_feeder: Callable[[Stage], Feeder | LiveFeeder],
        feeder_of_last: Feeder | LiveFeeder,
    ) -> None:
        self._stages, self._open = tuple(stages), open_feeder
        self._feeders = {self._stages[-1].index: feeder_of_last}
        self._while_waiting: Callable[[], None] = lambda: None
        self._say: Callable[[str | None], None] = lambda _: None

    def call_while_waiting(self, what: Callable[[], None], say: Callable[[str | None], None] | None = None) -> None:
        """Call `what` again and again while `batch` waits for a segment of a live source; it may raise. `say` is told
        what a longer wait is for, and None when it is over.
        """
        self._while_waiting, self._say = what, say or self._say
        for feeder in self._feeders.values():
            if isinstance(feeder, LiveFeeder):
                feeder.while_waiting, feeder.say = what, self._say

    def mark_of(self, step: int) -> Mapping[str, Any] | None:
        """What names the order of a live source up to a step of the run, for its checkpoint; None for other data."""
        stage = self._stage(step)
        feeder = self._feeder(stage)
        return feeder.mark_of(stage.position(step)) if isinstance(feeder, LiveFeeder) else None

    def batch(self, step: int, lane: int) -> Mapping[str, torch.Tensor]:
        stage = self._stage(step)
        return self._feeder(stage).batch(stage.position(step), lane)

    def expect(self, upcoming: Iterable[tuple[int, int]]) -> None:
        """Say which (step, lane) come next, so that they are read ahead."""
        places: dict[int, list[tuple[int, int]]] = {index: [] for index in self._feeders}
        for step, lane in upcoming:
            stage = self._stage(step)
            self._feeder(stage)
            places.setdefault(stage.index, []).append((stage.position(step), lane))
        for index, mine in places.items():
            self._feeders[index].expect(mine)

    def forget(self, step: int, lanes: Iterable[int]) -> None:
        """These lanes of a step that was expected are not asked for: somebody else has computed them."""
        stage = self._stage(step)
        self._feeder(stage).forget([(stage.position(step), lane) for lane in lanes])

    def ready(self, step: int, lane: int) -> bool:
        """Whether that batch lies ready."""
        stage = self._stage(step)
        return self._feeder(stage).ready(stage.position(step), lane)

    def _stage(self, step: int) -> Stage:
        """That of the step; the last one where its number of lanes is not that of the job any more."""
        stage, last = stage_of(self._stages, step), self._stages[-1]
        return stage if (stage.lanes, stage.lane_batch_size) == (last.lanes, last.lane_batch_size) else last

    def _feeder(self, stage: Stage) -> Feeder | LiveFeeder:
        if stage.index not in self._feeders:
            self._feeders[stage.index] = self._open(stage)
            self.call_while_waiting(self._while_waiting)
        return self._feeders[stage.index]


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
        feeder_line: Line | None = None,
    ) -> None:
        """`feeder_line`: how this node's feeder is reached, where `data.feeder` asks for one."""
        self.job, self.worker, self.host = job, worker, host
        self.stages = tuple(stages) or (first_stage(job),)
        self.outbox = outbox or Outbox()
        self.pulse = pulse or Pulse.create_or_mute(None, worker)[0]
        self._probes = Probes(worker, faults, lose_node)
        self._blocks: BlockClient | None = None
        if feeder_line is not None and job.data.feeder == "node":
            self._blocks = BlockClient(feeder_line, worker, workers=job.workers.max + job.workers.spares)
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
        source = self._source(self.stages[-1])
        feeder = StageFeeder(
            self.stages,
            lambda stage: self._feeder(self._source(stage), device),
            self._feeder(source, device),
        )
        feeder.call_while_waiting(self.pulse.beat)
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
        session.rehearse(self._trial_step)
        feeder.call_while_waiting(session.check, lambda why: self.outbox.put(Awaited(self.worker, why)))
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
    def _trial_step(self) -> int:
        """A step whose samples are there. The first one's are where nothing has changed since; what a later one uses of
        a live source may still have to arrive.
        """
        first, last = self.stages[0], self.stages[-1]
        return 1 if self.job.data.is_live and first.mixture == last.mixture else last.from_step + 1

    def _source(self, stage: Stage) -> AnySource:
        return open_stage(self.job, stage, [one for one in self.stages if one.index < stage.index])

    def _feeder(self, source: AnySource, device: torch.device) -> Feeder | LiveFeeder:
        return open_feeder(source, device, self._blocks, widen=True)  # recipes get int64

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

    def offer_lanes(self, generation: int, plan: int, lanes: tuple[tuple[int, ...], ...], epoch: int = 0) -> None:
        self.session.offer_lanes(generation, plan, lanes, epoch)

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
