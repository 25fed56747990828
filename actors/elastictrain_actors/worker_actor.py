"""The Ray actor of one worker: a `WorkerHost`. It outlives its controller; a new one finds it by name."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from elastictrain.controller import events as ev
from elastictrain.controller.events import Message
from elastictrain.engine.outbox import Outbox
from elastictrain.errors import ClusterError
from elastictrain.faults import OwnFault
from elastictrain.job import Job
from elastictrain.protocol import FormPlan, Stage
from elastictrain.pulse import Pulse, pulse_folder, start_ticks
from elastictrain_actors.departure import on_sigterm
from elastictrain_actors.node_feeder import FeederLine
from elastictrain_actors.node_loss import lose_node

if TYPE_CHECKING:
    from elastictrain.engine.host import WorkerHost

LEFT_OVER = 19
"""The niceness of those who take what nobody else wants."""
UNWANTED_S = 300.0
"""A worker without any order for so long after it was made belongs to a run that ended while Ray's head was away."""


def worker_name(worker: int) -> str:
    """The actor's name in the run's namespace."""
    return f"worker-{worker}"


def worker_number(name: str) -> int | None:
    """The other way round; None for the name of something else."""
    prefix, _, number = name.rpartition("-")
    return int(number) if prefix == "worker" and number.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process a worker is, beyond doubt: pids are used again, start times with them are not. `store`: where the
    generations meet that it leads; "" before it is prepared.
    """

    node: str
    pid: int
    start_ticks: int
    store: str = ""


def import_engine() -> None:
    """All that takes long. The garbage collector would search what is being imported time and again, and the objects of
    torch (a quarter of a million) ever after, a tenth of a second amid a step: they stay, so it passes them over.
    """
    gc.disable()
    try:
        import pyarrow.parquet  # noqa: F401

        import elastictrain.engine.host  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()


def yielding(work: Callable[[], None]) -> None:
    """Do `work` with what the processor has left over: in a thread of its own, since one that has stepped back may not
    step forward again. Raises what it raises.
    """
    errors: list[BaseException] = []

    def run() -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEFT_OVER)
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="elastictrain-imports")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


class WorkerActor:
    """Hosts a worker. Calls are short except `prepare` and the long poll; they run in threads of their own.

    Every call carries the controller's epoch: one of an older epoch is a controller that has been replaced, and is
    refused (ClusterError).
    """

    def __init__(self, worker: int, token: str, unwanted_s: float = UNWANTED_S) -> None:
        """`token`: the run's secret, which also names the folder of its signs of life."""
        self._worker, self._token = worker, token
        self._epoch = 0
        self._outbox = Outbox()
        self._host: WorkerHost | None = None
        self._feeder_line = FeederLine()
        self._unwanted = threading.Timer(unwanted_s, os._exit, (0,))
        self._unwanted.daemon = True
        self._unwanted.start()
        with suppress(ValueError):  # Ray makes actors in the main thread; should it not, SIGTERM is death as before
            on_sigterm(self._told_to_go)

    def _told_to_go(self) -> None:
        notice = ev.PreemptionNotice(0.0, 0.0, self._worker, reason="SIGTERM")  # until when: the job knows
        self._outbox.put(notice)

    def who(self) -> Identity:
        """Can be said before torch is imported."""
        node, store = ray.get_runtime_context().get_node_id(), "" if self._host is None else self._host.store
        return Identity(node, os.getpid(), start_ticks(os.getpid()) or 0, store)

    def prepare(
        self, epoch: int, job: Job, faults: Sequence[OwnFault], stages: Sequence[Stage], gently: bool = False
    ) -> None:
        """Build model, data and session; says `Ready` or `WorkerStartFailed`. A second call changes nothing. `gently`:
        others train on this machine, and nobody waits for this worker.
        """
        self._check(epoch)
        if self._host is not None:
            return
        # To c10d a connection that breaks is worth a stack trace; to us it is how a generation ends. Read by torch.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if gently:
            yielding(import_engine)
        else:
            import_engine()
        # Here, and not above: the controller names this class and should not wait for torch's import.
        from elastictrain.engine.host import WorkerHost, start_error

        try:
            address = ray.util.get_node_ip_address()
            folder = pulse_folder(self._token)
            pulse, _ = Pulse.create_or_mute(folder, self._worker)
            self._host = WorkerHost(
                job, self._worker, host=address, faults=faults, stages=stages, outbox=self._outbox, pulse=pulse,
                lose_node=partial(lose_node, folder), feeder_line=self._feeder_line,
            )  # fmt: skip
            context = ray.get_runtime_context()
            ready = self._host.prepare()
            self._outbox.put(replace(ready, node=context.get_node_id(), labels=context.get_node_labels() or {}))
        except BaseException as error:
            self._outbox.put(ev.WorkerStartFailed(0.0, self._worker, *start_error(error)))

    @property
    def host(self) -> WorkerHost:
        assert self._host is not None, "prepare() comes first"
        return self._host

    def next_messages(self, epoch: int, after: int, timeout_s: float) -> tuple[int, list[Message]]:
        """See `Outbox.after`."""
        self._check(epoch)
        return self._outbox.after(after, timeout_s)

    def form(self, epoch: int, plan: FormPlan) -> None:
        self._check(epoch)
        self.host.form(plan)

    def park(self, epoch: int, generation: int) -> None:
        """Parks at once; the report is a message, so that it is not lost with the controller that asked."""
        self._check(epoch)
        self._outbox.put(ev.WorkerParked(0.0, generation, self.host.park(generation)))

    def ask_pause(self, epoch: int, generation: int, store: bool) -> None:
        self._check(epoch)
        self.host.ask_pause(generation, store)

    def offer_lanes(self, epoch: int, generation: int, plan: int, lanes: tuple[tuple[int, ...], ...]) -> None:
        self._check(epoch)
        self.host.offer_lanes(generation, plan, lanes, epoch)

    def use_feeder(self, epoch: int, number: int, handle: Any) -> None:
        """This node has a feeder. May come before `prepare`, and again when another one stands in."""
        self._check(epoch)
        self._feeder_line.use(number, handle)

    def retire(self, epoch: int) -> None:
        """End without a word: what this worker held is held by others."""
        self._check(epoch)
        if self._host is not None:
            self._host.stop()
        os._exit(0)

    def _check(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise ClusterError(
                f"controller {epoch} has been replaced by controller {self._epoch} and is not obeyed by worker "
                f"{self._worker}"
            )
        self._epoch = epoch
        self._unwanted.cancel()
