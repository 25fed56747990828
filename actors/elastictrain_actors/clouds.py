"""Notices of spot machines, as the clouds' metadata services give them to the machine that is about to go.

Formats: AWS EC2 "spot instance interruption notices" (instance metadata v2), Google Compute Engine "preempted" metadata
value, Azure "Scheduled Events".
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

EVERY_S = 2.0
TIMEOUT_S = 2.0
TOKEN_S = 300
AWS_S = 120.0
GOOGLE_S = 30.0
AZURE_S = 30.0
"""What each promises when it names no time."""

_open = build_opener(ProxyHandler({})).open  # a metadata service is never behind a proxy


@dataclass(frozen=True, slots=True)
class Going:
    """This machine goes. `at_s`: on the machine's monotonic clock."""

    at_s: float
    reason: str


def aws(base: str = "http://169.254.169.254") -> Going | None:
    """EC2; None while nothing is announced. Raises OSError or ValueError when nobody answers there as EC2 does."""
    token = _get(f"{base}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)})
    headers = {"X-aws-ec2-metadata-token": token}
    try:
        notice = json.loads(_get(f"{base}/latest/meta-data/spot/instance-action", "GET", headers))
    except HTTPError as error:
        if error.code == 404:  # nothing is announced
            return None
        raise
    if notice["action"] not in ("terminate", "stop", "hibernate"):
        return None
    return Going(_monotonic(_utc(notice.get("time")), AWS_S), f"EC2 spot: {notice['action']}")


def google(base: str = "http://metadata.google.internal") -> Going | None:
    """Compute Engine."""
    headers = {"Metadata-Flavor": "Google"}
    said = _get(f"{base}/computeMetadata/v1/instance/preempted", "GET", headers)
    return Going(time.monotonic() + GOOGLE_S, "Compute Engine: preempted") if said.strip() == "TRUE" else None


def azure(base: str = "http://169.254.169.254") -> Going | None:
    """Azure; only events that take the machine away."""
    said = json.loads(_get(f"{base}/metadata/scheduledevents?api-version=2020-07-01", "GET", {"Metadata": "true"}))
    for event in said.get("Events", ()):
        if event.get("EventType") in ("Preempt", "Terminate"):
            at = parsedate_to_datetime(event["NotBefore"]) if event.get("NotBefore") else None
            return Going(_monotonic(at, AZURE_S), f"Azure: {event['EventType']}")
    return None


CLOUDS: dict[str, Callable[[], Going | None]] = {"aws": aws, "gcp": google, "azure": azure}


def _get(url: str, method: str, headers: dict[str, str]) -> str:
    with _open(Request(url, method=method, headers=headers), timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


def _utc(said: Any) -> datetime | None:
    return datetime.fromisoformat(str(said)).astimezone(UTC) if said else None


def _monotonic(at: datetime | None, otherwise_s: float) -> float:
    left_s = otherwise_s if at is None else (at - datetime.now(UTC)).total_seconds()
    return time.monotonic() + max(0.0, left_s)


class NoticeReader:
    """Asks one cloud every two seconds, in a thread of its own."""

    def __init__(self, ask: Callable[[], Going | None], every_s: float = EVERY_S) -> None:
        self._ask, self._every_s = ask, every_s
        self.going: Going | None = None
        """Once announced, a machine goes: later answers are not asked for."""
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="elastictrain-notices", daemon=True).start()

    def _run(self) -> None:
        while self.going is None and not self._stop.wait(self._every_s):
            try:
                self.going = self._ask()
            except Exception:  # no such service, or not now; or nonsense, in the middle of which the line was cut
                continue

    def close(self) -> None:
        self._stop.set()
