"""Commands for a run that is under way, with a controller of paper behind them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.errors import ClusterError
from elastictrain.observe import RunDirectory
from elastictrain.observe.answers import Answer, Request
from tests.unit.observe.story import job, tell
from tests.unit.observe.test_incidents import record


class FakeReach(ModuleType):
    """Stands for `elastictrain_actors.reach`: notes what is asked, and answers what it is told to."""

    def __init__(self) -> None:
        super().__init__("elastictrain_actors.reach")
        self.asked: list[tuple[Path, Request, bool, float]] = []
        self.answer: Answer | None = Answer("done", "worker 3 joined")
        self.error: Exception | None = None
        self.says: list[str] = []

    def ask(
        self, run: RunDirectory, request: Request, *, wait: bool, timeout_s: float, say: Callable[[str], object]
    ) -> Answer | None:
        self.asked.append((run.path, request, wait, timeout_s))
        for words in self.says:
            say(words)
        if self.error is not None:
            raise self.error
        return self.answer if wait else None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeReach:
    module = FakeReach()
    monkeypatch.setitem(sys.modules, "elastictrain_actors.reach", module)
    return module


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run under way in runs/a."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tell(tmp_path / "runs" / "a", end=None)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (["add", "a"], Request("add")),
        (["drain", "a", "0"], Request("drain", 0)),
        (["resize", "a", "4"], Request("resize", 4)),
        (["stop", "a"], Request("stop", "stopped by the user (elastictrain stop)")),
    ],
    ids=["add", "drain", "resize", "stop"],
)
def test_a_request_and_its_answer(arguments: list[str], request_: Request, fake: FakeReach) -> None:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("worker 3 joined (")
    assert result.stdout.endswith(" s after it was asked for)\n")
    assert fake.asked == [(Path("runs/a"), request_, True, 300.0)]
    result = call(*arguments, "--no-wait", "--timeout", "7")
    assert (result.exit_code, result.stdout) == (0, f"asked to {request_}\n")
    assert fake.asked[1] == (Path("runs/a"), request_, False, 7.0)
    found = json.loads(call(*arguments, "--json").stdout)
    assert (found["request"], found["argument"], found["outcome"]) == (request_.kind, request_.argument, "done")
    assert found["words"] == "worker 3 joined"
    assert found["seconds"] >= 0


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (Answer("refused", "worker 0 is the [last] one"), 2, "refused: worker 0 is the [last] one\n"),
        (Answer("over", "the run came to its end first"), 2, "the run came to its end first\n"),
        (Answer("failed", "the run failed first"), 3, "the run failed first\n"),
    ],
)
def test_what_is_not_done_has_an_exit_code(answer: Answer, code: int, said: str, fake: FakeReach) -> None:
    fake.answer = answer
    result = call("drain", "a", "0")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", said)
    result = call("drain", "a", "0", "--json")
    assert (result.exit_code, json.loads(result.stdout)["outcome"]) == (code, answer.outcome)


def test_a_run_that_cannot_be_reached(fake: FakeReach) -> None:
    fake.error = ClusterError("no Ray at h:1")
    result = call("stop", "a")
    assert (result.exit_code, result.stderr) == (3, "no Ray at h:1\n")


def test_why_it_takes_so_long_is_said_once(fake: FakeReach) -> None:
    fake.says = ["", "no room", "no room", "worker 3 is ready"]
    assert call("add", "a").stderr == "waiting: no room\nwaiting: worker 3 is ready\n"
    assert call("add", "a", "--json").stderr == ""


@pytest.mark.parametrize(
    "arguments", [["drain", "a", "-1"], ["resize", "a", "0"], ["drain", "a"], ["resize", "a", "x"]]
)
def test_what_can_never_be_is_refused_at_once(arguments: list[str], fake: FakeReach) -> None:
    assert call(*arguments).exit_code == 2
    assert fake.asked == []


@pytest.mark.parametrize("command", ["attach", "add", "stop", "incidents"])
def test_no_such_run(command: str, fake: FakeReach) -> None:
    result = call(command, "b")
    assert result.exit_code == 2
    assert result.stderr.startswith("RUN 'b': no such run; expected a path")


def test_a_run_that_never_started_says_so() -> None:
    """Through the real `reach`: nothing is there to connect to."""
    result = call("stop", "a")
    assert result.exit_code == 2
    assert "has no address.json, so it is not known where it runs" in result.stderr


# --- attach ---


@pytest.mark.parametrize(("end", "code"), [("finished", 0), ("stopped", 130), ("failed", 3)])
def test_attach_to_a_run_that_is_over_shows_its_end(end: str, code: int, run: RunDirectory) -> None:
    with RunDirectory.resume(run.path, job()) as more:
        more.event(end, {"step": 40, "digest": "ab12", "error": "it broke"})
    result = call("attach", "a")
    assert result.exit_code == code
    assert "the run is over" in result.stderr
    assert f"outcome   {end}, 40 steps" in result.stdout
    assert "step 40/40" in result.stdout, "the view caught up"
    assert (run.read_summary() or {})["outcome"] == end, "the driver may have been killed"
    result = call("attach", "a", "--json")
    assert json.loads(result.stdout)["outcome"] == end


def test_ctrl_c_leaves_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("elastictrain.observe.follow.follow", interrupted)
    result = call("attach", "a")
    assert (result.exit_code, result.stdout) == (
        0,
        "left it alone, it goes on; `elastictrain stop a` would end it\n",
    )


def test_a_run_that_nobody_writes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastictrain.observe.follow.is_gone", lambda run: True)
    result = call("attach", "a")
    assert result.exit_code == 3
    assert "nobody has written to it for 60 s, although it has not ended" in result.stderr
    assert "--resume" in result.stderr


# --- incidents ---


def test_incidents(run: RunDirectory) -> None:
    result = call("incidents", "a")
    assert (result.exit_code, result.stdout) == (0, "no incident: nothing was lost, frozen or preempted\n")
    assert call("incidents", "a", "--json").stdout == "[]\n"
    result = call("incidents", "a", "1")
    assert (result.exit_code, result.stderr) == (2, "RUN 'runs/a': no incident 1; it has none\n")
    with RunDirectory.resume(run.path, job()) as more:
        more.event("incident", record())
        more.event("incident", record(detected_s=150.0, cause="[/x] closed"))
    lines = call("incidents", "a").stdout.splitlines()
    assert "worker 1 is frozen: silent" in lines[1]
    assert "worker 1: [/x] closed" in lines[2]
    assert lines[3] == "one in full: elastictrain incidents a 2"
    assert "incident 1  recovered" in call("incidents", "a", "1").stdout
    assert [found["number"] for found in json.loads(call("incidents", "a", "--json").stdout)] == [1, 2]
    assert json.loads(call("incidents", "a", "2", "--json").stdout)["cause"] == "[/x] closed"
    assert call("incidents", "a", "3").stderr == "RUN 'runs/a': no incident 3; it has 2\n"
