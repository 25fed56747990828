"""Notices of spot machines, against servers that answer as the clouds' metadata services are documented to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.client import HTTPException, IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError

import pytest

from elastictrain_actors.clouds import AWS_S, AZURE_S, CLOUDS, GOOGLE_S, Going, NoticeReader, aws, azure, google

Answer = Callable[[str, str, dict[str, str]], tuple[int, str]]


class Service:
    """A metadata service: `answer(method, path, headers)` says status and body."""

    def __init__(self) -> None:
        self.answer: Answer = lambda method, path, headers: (404, "")
        service = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                headers = {key.lower(): value for key, value in self.headers.items()}
                status, body = service.answer(self.command, self.path, headers)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.close()


def left_s(going: Going | None) -> float:
    assert going is not None
    return going.at_s - time.monotonic()


def ec2(action: dict[str, str] | None) -> Answer:
    def answer(method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if (method, path) == ("PUT", "/latest/api/token") and "x-aws-ec2-metadata-token-ttl-seconds" in headers:
            return 200, "secret"
        if headers.get("x-aws-ec2-metadata-token") != "secret":
            return 401, ""
        if path != "/latest/meta-data/spot/instance-action" or action is None:
            return 404, ""
        return 200, json.dumps(action)

    return answer


def test_aws(service: Service) -> None:
    service.answer = ec2(None)
    assert aws(service.base) is None
    at = (datetime.now(UTC) + timedelta(seconds=100)).strftime("%Y-%m-%dT%H:%M:%SZ")
    service.answer = ec2({"action": "terminate", "time": at})
    going = aws(service.base)
    assert 90 < left_s(going) <= 100
    assert going is not None
    assert going.reason == "EC2 spot: terminate"
    service.answer = ec2({"action": "stop"})
    assert left_s(aws(service.base)) == pytest.approx(AWS_S, abs=5)


def test_google(service: Service) -> None:
    said = "FALSE"

    def answer(_: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        right = path == "/computeMetadata/v1/instance/preempted" and headers.get("metadata-flavor") == "Google"
        return (200, said) if right else (403, "")

    service.answer = answer
    assert google(service.base) is None
    said = "TRUE"
    assert left_s(google(service.base)) == pytest.approx(GOOGLE_S, abs=5)


def test_azure(service: Service) -> None:
    events: list[dict[str, str]] = [{"EventType": "Reboot", "NotBefore": ""}]

    def answer(_: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        right = path.startswith("/metadata/scheduledevents?api-version=") and headers.get("metadata") == "true"
        return (200, json.dumps({"DocumentIncarnation": 1, "Events": events})) if right else (400, "")

    service.answer = answer
    assert azure(service.base) is None  # a reboot comes back with its memory lost: found as a lost node
    events.append({"EventType": "Preempt", "NotBefore": format_datetime(datetime.now(UTC) + timedelta(seconds=60))})
    assert 50 < left_s(azure(service.base)) <= 60
    events[:] = [{"EventType": "Terminate", "NotBefore": ""}]
    assert left_s(azure(service.base)) == pytest.approx(AZURE_S, abs=5)


def test_a_time_that_is_over_is_now(service: Service) -> None:
    service.answer = ec2({"action": "terminate", "time": "2020-01-01T00:00:00Z"})
    assert left_s(aws(service.base)) <= 0


@pytest.mark.parametrize("ask", [aws, azure, google])
def test_a_service_that_is_not_there_is_an_error(ask: Callable[[str], Going | None]) -> None:
    with pytest.raises(URLError):
        ask("http://127.0.0.1:9")


def test_a_reader_asks_until_there_is_an_answer_and_survives_nonsense() -> None:
    answers: list[object] = [OSError("away"), ValueError("not JSON"), None, Going(5.0, "why")]
    done = threading.Event()

    def ask() -> Going | None:
        answer = answers.pop(0)
        if not answers:
            done.set()
        if isinstance(answer, Exception):
            raise answer
        assert answer is None or isinstance(answer, Going)
        return answer

    reader = NoticeReader(ask, every_s=0.0)
    assert done.wait(30.0)
    reader.close()
    assert reader.going == Going(5.0, "why")
    assert answers == []  # asked no more


def test_an_answer_that_is_cut_off_does_not_end_the_asking() -> None:
    answers: list[Going | HTTPException] = [IncompleteRead(b"{"), Going(5.0, "why")]
    done = threading.Event()

    def ask() -> Going:
        said = answers.pop(0)
        if isinstance(said, HTTPException):
            raise said
        done.set()
        return said

    reader = NoticeReader(ask, every_s=0.0)
    assert done.wait(30.0)
    reader.close()


def test_every_cloud_that_a_job_can_name_is_there() -> None:
    assert set(CLOUDS) == {"aws", "gcp", "azure"}
