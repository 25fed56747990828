"""The controller's ear: one UDP socket for all node agents, and a thread that hears and answers.

Who is out of reach is decided by `controller.leases`, in time during which this thread was running: when the controller
itself is starved or stopped, no node is lost by it.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Any

from elastictrain.controller.leases import LIMIT_S, Leases, WatchedClock
from elastictrain.errors import ClusterError
from elastictrain.signs import NodeReport
from elastictrain_actors.beats import Codec
from elastictrain_actors.procfs import lift_thread

TURN_S = 0.05
_BUFFER_BYTES = 4 * 2**20
_BATCH = 512


class Heartbeats:
    """Hears the agents of one run. `host`: this node's address, as the others reach it; `token`: the run's secret;
    `epoch`: of this controller. All methods may be called from any thread; none blocks.

    Raises ClusterError when the address cannot be bound.
    """

    def __init__(self, host: str, token: str, epoch: int, *, limit_s: float = LIMIT_S) -> None:
        self.host, self.epoch = host, epoch
        self._codec = Codec(token)
        self._clock, self._leases = WatchedClock(), Leases(limit_s)
        self._reports: dict[str, NodeReport] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._socket = self._bind(host)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="elastictrain-heartbeats", daemon=True)
        self._thread.start()

    def _bind(self, host: str) -> socket.socket:
        bound = None
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
            bound = socket.socket(family, kind, protocol)
            bound.bind(address)
        except OSError as error:
            if bound is not None:
                bound.close()
            raise ClusterError(f"no UDP port can be opened on this node's address {host}: {error}") from error
        with suppress(OSError):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        bound.settimeout(TURN_S)
        return bound

    # --- what the controller says ---

    def expect(self, node: str, agent: int) -> None:
        """Agent number `agent` has been started on `node` and told to follow this controller."""
        with self._lock:
            self._leases.expect(node, agent, self._clock.now_s)

    def forget(self, node: str) -> None:
        """Watch the node no more: it is lost, left, or its agent has died and a new one is not up yet."""
        with self._lock:
            self._leases.forget(node)
            self._reports.pop(node, None)

    def now_s(self) -> float:
        """Watched time, for `vouch`."""
        with self._lock:
            return self._clock.now_s

    def vouch(self, node: str, asked_s: float) -> None:
        """A worker of the node has answered a call that was made at watched time `asked_s`: it is within reach."""
        with self._lock:
            self._leases.vouch(node, asked_s)

    # --- what it learns ---

    def poll(self) -> list[NodeReport]:
        """The newest report of every node that has sent one since the last call."""
        with self._lock:
            reports, self._reports = self._reports, {}
        return [reports[node] for node in sorted(reports)]

    def silent(self) -> dict[str, float]:
        """Nodes out of reach, with the seconds of silence. A node stays in it until `forget` or until it is back."""
        with self._lock:
            return self._leases.silent(self._clock.now_s)

    def unheard(self) -> dict[str, float]:
        """Nodes whose agent has never been heard, with the seconds since it was expected."""
        with self._lock:
            return self._leases.unheard(self._clock.now_s)

    def missed_s(self) -> float:
        """Time in all during which this process was kept from watching."""
        with self._lock:
            return self._clock.missed_s

    def close(self) -> None:
        """Returns when the thread has ended."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        self._socket.close()

    # --- the thread ---

    def _run(self) -> None:
        lift_thread()
        while not self._stop.is_set():
            with self._lock:
                self._clock.advance(time.monotonic())
            with suppress(TimeoutError):
                self._take(*self._receive())
                self._rest()

    def _receive(self) -> tuple[bytes, Any]:
        try:
            return self._socket.recvfrom(65536)
        except (TimeoutError, BlockingIOError):
            raise
        except ConnectionError:  # an answer of ours met a closed port: that agent is gone, others are not
            return b"", None
        except OSError:  # the network is down for a moment; without this thread no node would ever be lost
            self._stop.wait(TURN_S)
            return b"", None

    def _rest(self) -> None:
        """Whatever else is there already; then the clock gets its turn again."""
        self._socket.setblocking(False)
        try:
            for _ in range(_BATCH):
                self._take(*self._receive())
        except BlockingIOError:
            pass
        finally:
            self._socket.settimeout(TURN_S)

    def _take(self, datagram: bytes, sender: Any) -> None:
        report = self._codec.decode_report(datagram)
        if report is None:
            return
        with self._lock:
            if self._leases.heard(report, self._clock.now_s):
                self._reports[report.node] = report
            if not self._leases.answers(report.node, report.agent, report.number, self._clock.now_s):
                return
        answer = self._codec.encode_answer(self.epoch, report.node, report.agent, report.number)
        with suppress(OSError):
            self._socket.sendto(answer, sender)
