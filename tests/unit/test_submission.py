"""Following a submitted job: a client that answers from a script stands for Ray's."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.errors import ClusterError, ConfigError, InternalError, UserError
from elastictrain_actors import submission
from elastictrain_actors.probe import MARK, read_probe
from elastictrain_actors.submission import connect, follow, last_json, submit_job


class Client:
    """`attempts`: what each try to follow the log gives, chunk by chunk; an exception is raised in its place."""

    def __init__(self, log: str, attempts: list[list[Any]], *, status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.log, self.attempts, self.status, self.code = log, attempts, status, code
        self.tries = 0
        self.submitted: list[dict[str, Any]] = []

    def submit_job(self, **request: Any) -> str:
        self.submitted.append(request)
        return str(request["submission_id"])

    def get_job_status(self, submission_id: str) -> Any:
        return SimpleNamespace(value="RUNNING" if self.tries < len(self.attempts) else self.status)

    def get_job_info(self, submission_id: str) -> Any:
        return SimpleNamespace(status=SimpleNamespace(value=self.status), driver_exit_code=self.code, message="gone\nx")

    def get_job_logs(self, submission_id: str) -> str:
        return self.log

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        self.tries += 1
        for chunk in self.attempts[self.tries - 1]:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "POLL_S", 0.0)


LINES = st.lists(st.text("ab {}é", max_size=5), max_size=12)


@settings(deadline=None)
@given(LINES, st.data())
def test_every_line_comes_once_however_the_log_is_cut_and_the_connection_breaks(lines: list[str], data: Any) -> None:
    log = "".join(line + "\n" for line in lines)
    attempts: list[list[Any]] = []
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.integers(0, len(log)))
        cuts = sorted(data.draw(st.lists(st.integers(0, end), max_size=4)))
        chunks: list[Any] = [log[a:b] for a, b in zip([0, *cuts], [*cuts, end], strict=True)]
        attempts.append([*chunks, RuntimeError("lost")] if data.draw(st.booleans()) else chunks)
    attempts.append([log[: data.draw(st.integers(0, len(log)))]])  # may end before the log's last words are in it
    seen: list[str] = []
    tail = follow(Client(log, attempts), "id", seen.append)
    assert seen == lines
    assert tail == lines[-submission.TAIL_LINES :]


def test_a_last_line_without_an_end_is_a_line() -> None:
    seen: list[str] = []
    assert follow(Client("a\nb", [["a\nb"]]), "id", seen.append) == ["a", "b"]
    assert seen == ["a", "b"]


def test_a_connection_that_never_holds_is_given_up() -> None:
    client = Client("", [[RuntimeError("no")]] * 20)
    with pytest.raises(ClusterError, match=r"^id: the log cannot be followed any more: no$"):
        follow(client, "id", print)
    assert client.tries == 6


def test_progress_renews_patience() -> None:
    log = "".join(f"{n}\n" for n in range(8))
    attempts: list[list[Any]] = [[log[: 2 * (n + 1)], OSError("lost")] for n in range(8)]
    assert len(follow(Client(log, [*attempts, [log]]), "id", lambda line: None)) == 8


def test_the_time_to_wait_is_limited_and_the_job_goes_on() -> None:
    class Silent(Client):
        async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
            await asyncio.Event().wait()
            yield ""

    with pytest.raises(TimeoutError, match=r"^id has not ended within timeout_s=0.05; it goes on$"):
        follow(Silent("", [[]]), "id", print, timeout_s=0.05)


def test_also_inside_a_notebook_whose_thread_has_a_loop() -> None:
    async def cell() -> list[str]:
        return follow(Client("x\n", [["x\n"]]), "id", lambda line: None)

    assert asyncio.run(cell()) == ["x"]


def test_the_last_line_that_is_a_json_object_is_the_result() -> None:
    assert last_json(['{"a": 1}', '{"b": 2}', "[3]", "{not json", "end"]) == {"b": 2}
    assert last_json(["end"]) is None


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.py").write_text("")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    job = {"recipe": "recipe.py:R", "data": {"kind": "jsonl", "path": "rows.jsonl"}, "steps": 1, "name": "my run"}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    return tmp_path / "job.yaml"


def submit(client: Client, job_file: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setattr(submission, "connect", lambda address: client)
    options = {"ship_dependencies": "none", "on_line": lambda line: None} | options
    return submit_job(job_file, "http://head:8265", **options)


def test_what_is_sent(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client('working\n{"outcome": "finished"}\n', [[]])
    found = submit(
        client, job_file, monkeypatch, runtime_env={"env_vars": {"MINE": "1"}, "py_modules": ["gcs://m.zip"]}
    )
    (sent,) = client.submitted
    assert found.status == "SUCCEEDED"
    assert found.result == {"outcome": "finished"}
    assert found.submission_id == sent["submission_id"]
    assert sent["submission_id"].startswith("elastictrain-my-run-")
    assert sent["entrypoint"] == "python -m elastictrain.cli run job.yaml --json"
    environment = sent["runtime_env"]
    names = [Path(module).name for module in environment["py_modules"]]
    assert names == ["elastictrain", "elastictrain_actors", "elastictrain_checkpoint", "m.zip"]
    assert environment["working_dir"].endswith(".zip")
    assert environment["env_vars"]["MINE"] == "1"
    assert environment["env_vars"]["OMP_NUM_THREADS"] == "1"
    assert "pip" not in environment


def test_auto_installs_what_the_cluster_says_that_it_lacks(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = MARK + json.dumps({"lacking": ["rich>=13"], "python": [3, 11]})
    client, said = Client(f"noise\n{answer}\n", []), list[str]()
    submit(client, job_file, monkeypatch, ship_dependencies="auto", on_line=said.append, wait=False)
    probe, job = client.submitted
    assert "runtime_env" not in probe
    assert job["runtime_env"]["pip"] == ["rich>=13"]
    assert "the nodes install with pip: rich>=13" in said


@pytest.mark.parametrize(
    ("code", "kind"), [(2, UserError), (3, ClusterError), (4, InternalError), (None, ClusterError)]
)
def test_a_failed_job_raises_what_the_exit_code_says_with_the_end_of_the_log(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, kind: type[Exception]
) -> None:
    client = Client("one\ntwo\n", [[]], status="FAILED", code=code)
    with pytest.raises(kind) as caught:
        submit(client, job_file, monkeypatch)
    ending = "gone" if code is None else f"exit code {code}"
    assert type(caught.value) is kind
    assert str(caught.value).endswith(f" on http://head:8265 failed ({ending}). The end of its log:\none\ntwo")


def test_a_wrong_job_is_said_before_anybody_is_asked(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("steps: 1\n")
    with pytest.raises(ConfigError, match="setting 'recipe' is missing"):
        submit_job(tmp_path / "job.yaml", "http://127.0.0.1:1")


# Addresses


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "local"])
def test_only_dashboards_are_addresses(address: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^address={address!r}: expected the dashboard of the cluster, as http://host"
    ):
        connect(address)


def test_nobody_there_says_what_was_tried_and_what_is_needed() -> None:
    with pytest.raises(ClusterError) as caught:
        connect("127.0.0.1:1")
    assert str(caught.value).startswith("address='127.0.0.1:1': no Ray dashboard at http://127.0.0.1:1/api/version (")
    assert "`ray[default]`" in str(caught.value)


@pytest.fixture
def server() -> Iterator[Any]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = self.server.answer  # type: ignore[attr-defined]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "said"),
    [((404, b""), "answered 404"), ((200, b"<html>"), "no Ray dashboard at"), ((200, b"[]"), "is not a Ray dashboard")],
)
def test_something_else_there(server: Any, answer: tuple[int, bytes], said: str) -> None:
    server.answer = answer
    with pytest.raises(ClusterError, match=said):
        connect(f"http://127.0.0.1:{server.server_port}/")


def test_the_address_wins_over_rays_variables(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = (200, b'{"ray_version": "2.60.0"}')
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    client = connect(f"127.0.0.1:{server.server_port}")
    assert client._address == f"http://127.0.0.1:{server.server_port}"
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


# What the probe says


def test_a_probe_without_an_answer_shows_its_log() -> None:
    with pytest.raises(
        ClusterError, match=r"^the cluster could not be asked .*set it to none or pip[^$]*python: not found"
    ):
        read_probe("sh: python: not found", assumed=("ray", "torch"))


def test_what_cannot_travel_must_be_there() -> None:
    def answer(lacking: list[str], python: list[int]) -> str:
        return MARK + json.dumps({"lacking": lacking, "python": python})

    with pytest.raises(ClusterError, match=r"^a node of the cluster lacks torch: install it on every node"):
        read_probe(answer(["torch", "numpy"], [3, 12]), assumed=("ray", "torch"))
    with pytest.raises(
        ClusterError, match=r"^the cluster has Python 3.10; elastictrain needs 3.11 or newer on every node$"
    ):
        read_probe(answer([], [3, 10]), assumed=("ray", "torch"))
