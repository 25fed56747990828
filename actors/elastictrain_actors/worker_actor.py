"""The Ray actor of one worker: a `WorkerHost` and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray

from elastictrain.controller.events import Message
from elastictrain.faults import Fail, Kill
from elastictrain.job import Job
from elastictrain.protocol import FormPlan, ParkReport, Ready, Stage

if TYPE_CHECKING:
    from elastictrain.engine.host import WorkerHost


class WorkerActor:
    """Hosts a worker. Calls are short except `prepare` and the long poll; they run in threads of their own."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._host: WorkerHost | None = None

    def prepare(
        self, job: Job, faults: Sequence[Kill | Fail], stages: Sequence[Stage]
    ) -> tuple[Ready, str, str] | tuple[str, bool]:
        """(what it is, failure domain, address), or (error, whether the user must act)."""
        # Here, and not above: the controller names this class and should not wait for torch's import.
        from elastictrain.engine.host import WorkerHost, start_error

        try:
            address = ray.util.get_node_ip_address()
            self._host = WorkerHost(job, self._worker, host=address, faults=faults, stages=stages)
            ready = self._host.prepare()
        except BaseException as error:
            return start_error(error)
        return ready, ray.get_runtime_context().get_node_id(), address

    @property
    def host(self) -> WorkerHost:
        assert self._host is not None, "prepare() comes first"
        return self._host

    def next_messages(self, timeout_s: float) -> list[Message]:
        return self.host.outbox.take(timeout_s)

    def form(self, plan: FormPlan) -> None:
        self.host.form(plan)

    def park(self, generation: int) -> ParkReport:
        return self.host.park(generation)

    def ask_pause(self, generation: int, store: bool) -> None:
        self.host.ask_pause(generation, store)

    def retire(self) -> None:
        """End without a word: what this worker held is held by others."""
        self.host.stop()
        os._exit(0)
