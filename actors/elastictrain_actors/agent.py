"""The agent of one node: reads the pulses of its workers, tells the controller, and kills on order. No Ray, no torch.

It decides nothing. Workers outlive a controller, so an agent that hears nothing lets them be; it only ends itself when
it has had neither a controller nor a worker for a long time. Orders carry the epoch of the controller that gives them:
one of an older controller is refused.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from elastictrain.pulse import PulseFile, is_same_process, pulse_paths
from elastictrain.signs import Beat, NodeReport, WorkerSign
from elastictrain_actors.beats import Codec
from elastictrain_actors.clouds import Going
from elastictrain_actors.procfs import KillAnswer, ProcessReader, end_process, lift_thread

BEAT_S = 0.1
PUNCTUAL_S = 0.02
"""A beat that comes so late is in time: only what could have kept others from running too is counted."""
STALE_S = 0.3
"""A worker without progress for so long is looked at more closely: all its threads, not only the training thread."""
KEEP_DEAD_S = 30.0
"""For so long a dead worker is reported as gone: one datagram may be lost, many are not."""
LONELY_S = 600.0


class _Watched:
    """One worker's process: its pulse and what the kernel says."""

    def __init__(self, file: PulseFile) -> None:
        self.file, self.process = file, ProcessReader(file.pid, file.start_ticks)
        self.beat: Beat | None = None
        self.gone_s: float | None = None
        self.cpu_s = 0.0

    @property
    def identity(self) -> tuple[int, int]:
        return self.file.pid, self.file.start_ticks

    def sign(self, now_s: float) -> WorkerSign:
        file, stat = self.file, self.process.stat()
        found = self.file.read()
        if found is not None and (self.beat is None or found.count > self.beat.count):
            self.beat = found
        beat, held_up_s, state = self.beat, None, "X"
        if stat is None:
            self.gone_s = now_s if self.gone_s is None else self.gone_s
        else:
            self.cpu_s = stat.cpu_s
            thread = file.pid if beat is None else beat.thread
            own = self.process.thread_state(thread)
            state = stat.state if own is None or stat.state in "Tt" else own
            is_stale = beat is not None and now_s - beat.beat_s > STALE_S
            held_up_s = self.process.held_up_s(thread, own, now_s, whole=is_stale)
        if beat is None:
            return WorkerSign(file.worker, file.pid, file.start_ticks, state, self.cpu_s, held_up_s)
        return WorkerSign(
            file.worker, file.pid, file.start_ticks, state, self.cpu_s, held_up_s, beat.count, beat.generation,
            beat.step, beat.activity, beat.steps_done, beat.step_s, max(0.0, now_s - beat.beat_s),
            max(0.0, now_s - beat.entered_s),
        )  # fmt: skip

    def close(self) -> None:
        self.file.close()
        self.process.close()


class Agent:
    """`look` and `kill` may be called from any thread; `run` is the loop. `folder`: where this run's pulses lie.
    `going`: whether somebody has announced that this machine goes.
    """

    def __init__(
        self,
        node: str,
        folder: Path,
        token: str,
        *,
        number: int = 1,
        clock: Callable[[], float] = time.monotonic,
        going: Callable[[], Going | None] = lambda: None,
    ) -> None:
        self.node, self.folder, self.number = node, folder, number
        self._codec, self._clock, self._going = Codec(token), clock, going
        self._watched: dict[Path, _Watched] = {}
        self._looking = threading.Lock()
        self._stop = threading.Event()
        self._socket: socket.socket | None = None
        self._epoch = 0
        self._beats, self._echo, self._late_s = 0, 0, 0.0
        self._heard_s = clock()
        self._seen: set[tuple[int, int]] = set()

    # --- orders ---

    def follow(self, epoch: int, host: str, port: int, number: int) -> bool:
        """Report to the controller of `epoch` at this address from now on, as agent `number`. False: it is an old one.

        Raises OSError when there is no way to that address.
        """
        if epoch < self._epoch:
            return False
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        new = socket.socket(family, kind, protocol)
        new.setblocking(False)
        try:
            new.connect(address)
        except OSError:
            new.close()
            raise
        with self._looking:
            old, self._socket = self._socket, new
            self._epoch, self.number, self._beats, self._echo = epoch, number, 0, 0
            self._heard_s = self._clock()
        if old is not None:
            old.close()
        return True

    def kill(self, epoch: int, pid: int, start_ticks: int, deadline_s: float = 2.0) -> KillAnswer:
        """SIGKILL one worker of this run and wait until it is gone, for at most `deadline_s`."""
        if epoch < self._epoch:
            return KillAnswer.REFUSED
        if not is_same_process(pid, start_ticks):
            return KillAnswer.GONE
        with self._looking:
            self._find()
        if (pid, start_ticks) not in self._seen:
            return KillAnswer.NOT_OURS
        return end_process(pid, start_ticks, deadline_s)

    def kill_all_but(
        self, epoch: int, keep: Iterable[tuple[int, int]], deadline_s: float = 2.0
    ) -> dict[int, KillAnswer]:
        """End the orphans: workers of this run that the controller of `epoch` does not know. Answers by pid."""
        if epoch < self._epoch:
            return {}
        kept = {tuple(identity) for identity in keep}
        with self._looking:
            self._find()
            living = [w.identity for w in self._watched.values() if w.process.stat() is not None]
        orphans = [identity for identity in living if identity not in kept]
        return {pid: self.kill(epoch, pid, ticks, deadline_s) for pid, ticks in orphans}

    # --- the loop ---

    def run(self) -> None:
        """Report every 0.1 s until `stop`, or until there has long been neither a controller nor a worker."""
        lift_thread()
        due_s = self._clock()
        while not self._stop.wait(max(0.0, due_s - self._clock())):
            now_s = self._clock()
            self._late_s += now_s - due_s if now_s - due_s > PUNCTUAL_S else 0.0
            self.beat()
            if self._is_lonely():
                return
            due_s = due_s + BEAT_S if due_s + BEAT_S > now_s else now_s + BEAT_S  # missed beats are not made up for

    def stop(self) -> None:
        """End the loop and let go of everything; workers are left alone."""
        self._stop.set()

    def close(self) -> None:
        """After the loop has ended."""
        with self._looking:
            for watched in self._watched.values():
                watched.close()
            self._watched.clear()
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def beat(self) -> NodeReport:
        """Hear, look and tell, once."""
        with self._looking:
            self._hear()
            report = self._look()
            channel = self._socket
            if channel is not None:
                # Full buffers, no route, nobody there: a lost beat like any other.
                with suppress(OSError):
                    channel.send(self._codec.encode_report(report))
        return report

    def _look(self) -> NodeReport:
        now_s = self._clock()
        self._find()
        self._beats += 1
        signs = tuple(watched.sign(now_s) for watched in self._watched.values())
        self._bury(now_s)
        going = self._going()
        left = (None, "") if going is None else (max(0.0, going.at_s - now_s), going.reason)
        return NodeReport(self.node, self.number, self._beats, self._echo, now_s, self._late_s, signs, *left)

    def _find(self) -> None:
        """Pulses that are new, and those that were taken away in order."""
        paths = set(pulse_paths(self.folder))
        for path in paths - self._watched.keys():
            with suppress(OSError, ValueError):  # being made, or just gone: the next beat will see
                self._watched[path] = watched = _Watched(PulseFile(path))
                self._seen.add(watched.identity)
        for path in self._watched.keys() - paths:
            # Its process may go on for a moment, or somebody has emptied the folder: only a dead one is let go.
            if self._watched[path].process.stat() is None:
                self._watched.pop(path).close()

    def _bury(self, now_s: float) -> None:
        for path, watched in list(self._watched.items()):
            if watched.gone_s is not None and now_s - watched.gone_s > KEEP_DEAD_S:
                self._watched.pop(path).close()
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _hear(self) -> None:
        channel = self._socket
        while channel is not None:
            try:
                answer = self._codec.decode_answer(channel.recv(2048))
            except OSError:  # nothing (more) there; or nobody listens at the other end
                return
            if answer is not None:
                epoch, node, agent, number = answer
                if (epoch, node, agent) == (self._epoch, self.node, self.number) and number <= self._beats:
                    self._echo = max(self._echo, number)
                    self._heard_s = self._clock()

    def _is_lonely(self) -> bool:
        alive = any(watched.gone_s is None for watched in self._watched.values())
        return not alive and self._clock() - self._heard_s > LONELY_S
