"""Requests to a run from outside, with a controller of paper: what is sent, what is waited for, what is said."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.observe import RunDirectory
from elastictrain.observe.address import Address
from elastictrain.observe.answers import Request
from elastictrain_actors import reach
from tests.unit.observe.story import change, job, tell

VIEW = {"phase": "running", "world": 2, "target": 2, "draining": [], "spares": [], "starting": [],
        "workers": [{"worker": 0}, {"worker": 1}]}  # fmt: skip


class Paper:
    """Stands for the controller's handle: `acts` are what its requests and views do, one after another."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, ...]] = []
        self.on_request: list[Callable[[], Any]] = []
        self.on_status: list[Callable[[], Any]] = []
        self.request = SimpleNamespace(remote=self._request)
        self.status = SimpleNamespace(remote=lambda: self.on_status.pop(0) if self.on_status else lambda: VIEW)

    def _request(self, *arguments: Any) -> Callable[[], Any]:
        self.requests.append(arguments)
        return self.on_request.pop(0) if self.on_request else lambda: None


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Paper:
    handle = Paper()

    @contextmanager
    def controller_of(folder: Path) -> Iterator[Paper]:
        yield handle

    monkeypatch.setattr(reach, "controller_of", controller_of)
    monkeypatch.setattr(ray, "get", lambda reference, timeout: reference())
    monkeypatch.setattr(reach, "POLL_S", 0.0)
    return handle


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    tell(tmp_path / "run", end=None)
    with RunDirectory.resume(tmp_path / "run", job()) as held:
        yield held


def raising(error: BaseException) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


def test_done(paper: Paper, run: RunDirectory) -> None:
    paper.on_request = [lambda: change(run, "resized", 5, 40, (2, 3), joined=[7])]
    found = reach.ask(run, Request("resize", 3))
    assert found is not None
    assert (found.outcome, found.words) == ("done", "worker 7 joined; world 2 → 3, a pause of 0.25 s, no step redone")
    assert paper.requests == [("resize", 3)]


def test_an_event_that_comes_just_before_the_view_is_told_rather_than_the_view(paper: Paper, run: RunDirectory) -> None:
    """The controller writes what has happened, and then shows how things stand."""
    three = VIEW | {"world": 3, "target": 3}
    paper.on_status = [lambda: VIEW, lambda: change(run, "resized", 5, 40, (2, 3), joined=[7]) or three]
    found = reach.ask(run, Request("resize", 3))
    assert found is not None
    assert found.words == "worker 7 joined; world 2 → 3, a pause of 0.25 s, no step redone"


def test_only_what_comes_after_the_request_answers_it(paper: Paper, run: RunDirectory) -> None:
    """The story has seen a worker 3 join and a worker 0 leave already."""
    run.event("refused", {"request": "drain", "reason": "an old one"})
    paper.on_request = [lambda: run.event("refused", {"request": "drain", "reason": "a new one"})]
    found = reach.ask(run, Request("drain", 0))
    assert found is not None
    assert (found.outcome, found.words) == ("refused", "a new one")


def test_it_waits_and_says_why(paper: Paper, run: RunDirectory) -> None:
    said: list[str] = []
    paper.on_status = [
        lambda: VIEW,
        lambda: VIEW,
        lambda: run.event("slow_start", {"worker": 7, "asked": {"cpus": 1}, "free": {}}) and VIEW,
        raising(GetTimeoutError()),
        lambda: change(run, "resized", 5, 40, (2, 3), joined=[7]) or VIEW,
    ]
    found = reach.ask(run, Request("add"), say=said.append)
    assert found is not None
    assert found.outcome == "done"
    assert said[0] == ""
    assert said[-1] == "worker 7 has not started yet: it needs 1 CPU, free are none"


def test_without_waiting(paper: Paper, run: RunDirectory) -> None:
    assert reach.ask(run, Request("stop", "asked"), wait=False) is None
    assert paper.requests == [("stop", "asked")]


def test_the_deadline_says_that_the_request_stands(paper: Paper, run: RunDirectory) -> None:
    message = r"^asked to resize to 3 workers; it stands, but has not been done yet; see `elastictrain attach`$"
    with pytest.raises(ClusterError, match=message):
        reach.ask(run, Request("resize", 3), timeout_s=0.0)


def test_a_controller_that_comes_back_is_asked_again_but_never_for_a_second_worker(
    paper: Paper, run: RunDirectory
) -> None:
    def died() -> Any:
        run.event("controller_back", {"gone_s": 1.0, "phase": "running"})
        return VIEW

    paper.on_request = [raising(ActorUnavailableError("restarting", None)), lambda: None, lambda: None]
    paper.on_status = [lambda: VIEW, died, lambda: run.event("stopped", {"step": 40}) and VIEW]
    found = reach.ask(run, Request("stop", "asked"))
    assert found is not None
    assert found.outcome == "done"
    assert len(paper.requests) == 3, "once in vain, once heard by the one that died, once by its successor"
    run.event("run_resumed", {"step": 40})
    paper.requests.clear()
    paper.on_status = [lambda: VIEW, died, lambda: change(run, "resized", 5, 40, (2, 3), joined=[7]) or VIEW]
    assert reach.ask(run, Request("add")) is not None
    assert paper.requests == [("add",)]
    paper.on_request = [raising(ActorUnavailableError("restarting", None))]
    with pytest.raises(ClusterError, match="not known whether it has heard; ask again if no worker comes"):
        reach.ask(run, Request("add"))


def test_a_controller_that_does_not_come_back(paper: Paper, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    paper.on_status = [raising(GetTimeoutError())]
    with pytest.raises(ClusterError, match="the controller does not answer; see `elastictrain status`"):
        reach.ask(run, Request("resize", 3), timeout_s=0.0)
    paper.on_request = [raising(GetTimeoutError("no answer"))]
    with pytest.raises(ClusterError, match="the controller does not answer: no answer"):
        reach.ask(run, Request("resize", 3), timeout_s=0.0)
    paper.on_request = [raising(ActorDiedError())]
    with pytest.raises(ConfigError, match="the run has just ended"):
        reach.ask(run, Request("resize", 3))
    monkeypatch.setattr(reach, "is_gone", lambda run: True)
    with pytest.raises(ClusterError, match="its controller has gone, and its cluster with it; go on from the newest"):
        reach.ask(run, Request("resize", 3))


def test_a_run_that_is_over_is_not_asked(paper: Paper, run: RunDirectory) -> None:
    run.event("finished", {"step": 40})
    with pytest.raises(ConfigError, match=r"it is over \(finished\), nothing runs any more"):
        reach.ask(run, Request("add"))
    assert paper.requests == []


# --- where it runs ---


def test_the_address(tmp_path: Path) -> None:
    address = Address(address="10.0.0.1:6379", namespace="n", auth_mode="token")
    address.write(tmp_path)
    assert Address.read(tmp_path) == address
    for text in ("", "[]", '{"address": "x"}'):
        (tmp_path / "address.json").write_text(text)
        with pytest.raises(ConfigError, match=r"it has no address\.json, so it is not known where it runs"):
            Address.read(tmp_path)


def test_a_cluster_that_is_gone_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Address(address=f"127.0.0.1:{port}", namespace="n").write(tmp_path)
    with pytest.raises(
        ClusterError, match=f"no Ray at 127.0.0.1:{port}.*Connection refused.*on the head instead.*--resume"
    ):
        reach.controller_of(tmp_path).__enter__()
