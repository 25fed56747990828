"""The two datagrams between a node agent and the controller: a report, and its answer.

JSON behind a 16-byte HMAC-SHA256 keyed by the run's token, so that stray, cut, foreign or forged datagrams are dropped
as a whole. Lists instead of objects: a report of 16 workers stays near one Ethernet frame.
"""

from __future__ import annotations

import hmac
import json
import math
from hashlib import sha256
from typing import Any

from elastictrain.signs import Activity, NodeReport, WorkerSign

MAC_BYTES = 16
MAX_DATAGRAM_BYTES = 60_000


class Codec:
    """Encodes and checks the datagrams of one run."""

    def __init__(self, token: str) -> None:
        """`token`: secret of the run; it never travels."""
        self._key = sha256(b"elastictrain-beats-1:" + token.encode()).digest()

    def encode_report(self, report: NodeReport) -> bytes:
        workers = [
            [
                w.worker, w.pid, w.start_ticks, w.state, _short(w.cpu_s), _short(w.held_up_s), w.count, w.generation,
                w.step, int(w.activity), w.steps_done, _short(w.step_s), _short(w.age_s), _short(w.in_activity_s),
            ]
            for w in report.workers
        ]  # fmt: skip
        head = [report.node, report.agent, report.number, report.echo, _short(report.at_s), _short(report.late_s)]
        return self._seal([*head, workers, _short(report.going_s), report.going_why])

    def decode_report(self, datagram: bytes) -> NodeReport | None:
        """None for whatever is not a report of this run."""
        found = self._open(datagram)
        try:
            node, agent, number, echo, at_s, late_s, workers, going_s, why = found
            return NodeReport(
                str(node), int(agent), int(number), int(echo), float(at_s), float(late_s),
                tuple(_sign(fields) for fields in workers), None if going_s is None else float(going_s), str(why),
            )  # fmt: skip
        except (TypeError, ValueError):
            return None

    def encode_answer(self, epoch: int, node: str, agent: int, number: int) -> bytes:
        """Beat `number` of that agent has been received by the controller of `epoch`."""
        return self._seal([epoch, node, agent, number])

    def decode_answer(self, datagram: bytes) -> tuple[int, str, int, int] | None:
        """(epoch, node, agent, number); None for whatever is not an answer of this run."""
        found = self._open(datagram)
        try:
            epoch, node, agent, number = found
            return int(epoch), str(node), int(agent), int(number)
        except (TypeError, ValueError):
            return None

    def _seal(self, content: Any) -> bytes:
        payload = json.dumps(content, separators=(",", ":")).encode()
        return hmac.digest(self._key, payload, "sha256")[:MAC_BYTES] + payload

    def _open(self, datagram: bytes) -> Any:
        mac, payload = datagram[:MAC_BYTES], datagram[MAC_BYTES:]
        if not hmac.compare_digest(mac, hmac.digest(self._key, payload, "sha256")[:MAC_BYTES]):
            return None
        try:
            return json.loads(payload)
        except ValueError:
            return None


def _short(value_s: float | None) -> float | None:
    """Milliseconds are enough; JSON has no infinities."""
    return None if value_s is None else round(value_s, 3) if math.isfinite(value_s) else 0.0


def _sign(fields: Any) -> WorkerSign:
    worker, pid, ticks, state, cpu_s, held_up_s, count, generation, step, activity, done, step_s, age_s, in_s = fields
    return WorkerSign(
        int(worker), int(pid), int(ticks), str(state), float(cpu_s), None if held_up_s is None else float(held_up_s),
        int(count), int(generation), int(step), Activity(activity), int(done), float(step_s), float(age_s), float(in_s),
    )  # fmt: skip
