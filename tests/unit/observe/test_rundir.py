from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.job import Job, load_job, parse_job
from elastictrain.observe.lines import LineWriter, encode, read_lines
from elastictrain.observe.lock import holder_of
from elastictrain.observe.metrics import MetricsRow, history, tokens_per_s
from elastictrain.observe.rundir import RunDirectory, default_name, find_run, latest_of

HOST = socket.gethostname()


def make_job(**changes: Any) -> Job:
    return parse_job({"recipe": "a:B", "data": {"kind": "jsonl", "path": "x"}, "steps": 9, "name": "gpt"} | changes)


def steps(run: RunDirectory) -> list[tuple[int, int]]:
    return [(row.step, row.generation) for row in run.metrics()]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    job = make_job()
    with RunDirectory.create(tmp_path / "run", job) as run:
        run.event("run_started", {"steps": 9})
        run.event("running", {"generation": 2, "world": 3})
        assert run.row({"step": 1, "generation": 2, "loss": 3.5, "phases": {"vote_s": 0.1}, "extra": 7})
        run.status({"state": "running", "step": 1, "lanes": {0: 4}})
    read = RunDirectory.open(tmp_path / "run")
    assert [(e.kind, e.generation, e.data) for e in read.events()] == [
        ("run_started", None, {"steps": 9}),
        ("running", 2, {"generation": 2, "world": 3}),
    ]
    assert read.metrics() == [
        MetricsRow.model_validate({"step": 1, "generation": 2, "loss": 3.5, "phases": {"vote_s": 0.1}, "extra": 7})
    ]
    status = read.read_status()
    assert status is not None
    assert (status.state, status.step, status.lanes, status.run_dir) == ("running", 1, {0: 4}, str(tmp_path / "run"))
    assert load_job(tmp_path / "run" / "job.yaml") == job
    assert not list(tmp_path.glob("run/.*")), "a temporary file was left"


def test_a_step_is_written_again_only_after_going_back(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", make_job()) as run:
        for step in (1, 2, 3, 4):
            assert run.row({"step": step, "generation": 1})
        assert not run.row({"step": 4, "generation": 2})
        assert not run.row({"step": 2, "generation": 2})
        assert steps(run) == [(1, 1), (2, 1), (3, 1), (4, 1)]
        run.event("went_back", {"to_step": 2, "from_step": 4})
        assert not run.row({"step": 2, "generation": 2})
        assert run.row({"step": 3, "generation": 2})
        assert steps(run) == [(1, 1), (2, 1), (3, 2)], "step 4 of the old history has not happened"
        run.event("checkpoint_dropped", {"step": 2, "next_step": 0})
        assert run.row({"step": 1, "generation": 3})
        assert steps(run) == [(1, 3)]


def test_a_late_row_of_what_was_taken_back_is_not_written(tmp_path: Path) -> None:
    """Whoever published it lives on, and what it has said arrives after the run has gone back."""
    with RunDirectory.create(tmp_path / "run", make_job()) as run:
        for step in (1, 2, 3):
            assert run.row({"step": step, "generation": 1})
        run.event("went_back", {"to_step": 1, "up_to_generation": 1}, generation=2)
        assert not run.row({"step": 4, "generation": 1})
        assert not run.row({"step": 2, "generation": 1})
        assert run.row({"step": 2, "generation": 2})
        assert steps(run) == [(1, 1), (2, 2)]


@pytest.mark.parametrize("kind", ["went_back", "checkpoint_dropped", "run_resumed"])
def test_who_takes_the_directory_up_knows_what_was_taken_back(tmp_path: Path, kind: str) -> None:
    """A controller dies after it has gone back, or takes up what `--resume-step` has begun."""
    with RunDirectory.create(tmp_path / "run", make_job()) as run:
        for step in (1, 2, 3, 4):
            run.row({"step": step, "generation": 1 + step // 3})
        back = {"went_back": "to_step", "checkpoint_dropped": "next_step", "run_resumed": "step"}[kind]
        run.event(kind, {back: 1, "up_to_generation": 2})
    assert steps(RunDirectory.open(tmp_path / "run")) == [(1, 1)], "nothing else has happened"
    with RunDirectory.resume(tmp_path / "run", make_job()) as run:
        assert run.last_step == 1
        assert not run.row({"step": 3, "generation": 2}), "said again, or late"
        assert run.row({"step": 2, "generation": 3})
        assert steps(run) == [(1, 1), (2, 3)]


def test_resume_appends(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", make_job()) as run:
        for step in (1, 2, 3):
            run.row({"step": step, "generation": 1})
    with RunDirectory.resume(tmp_path / "run", make_job(steps=20)) as run:
        assert run.last_step == 3
        assert not run.row({"step": 3, "generation": 2})
        run.event("run_resumed", {"step": 2})
        assert run.row({"step": 3, "generation": 2})
        assert run.row({"step": 4, "generation": 2})
        assert steps(run) == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert load_job(tmp_path / "run" / "job.yaml").steps == 20
    assert load_job(tmp_path / "run" / "job-1.yaml").steps == 9
    with RunDirectory.resume(tmp_path / "run", make_job(steps=20)):
        assert not (tmp_path / "run" / "job-2.yaml").exists()


def test_a_directory_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", make_job()).close()
    with pytest.raises(ConfigError) as caught:
        RunDirectory.create(tmp_path / "run", make_job(steps=1))
    assert str(caught.value) == (
        f"run_dir='{tmp_path}/run' already holds a run; go on with it (--resume) or set run_dir (--run-dir) to another "
        "folder"
    )
    assert load_job(tmp_path / "run" / "job.yaml").steps == 9
    assert holder_of(tmp_path / "run") is None


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", make_job()) as run:
        for attempt in (RunDirectory.create, RunDirectory.resume):
            with pytest.raises(ConfigError) as caught:
                attempt(tmp_path / "run", make_job())
            assert str(caught.value).startswith(
                f"run_dir='{tmp_path}/run' is in use by process {os.getpid()} on {HOST}; stop that run, or set run_dir"
            )
        assert run.row({"step": 1}), "the holder goes on"
        assert holder_of(run.path) == f"process {os.getpid()} on {HOST}"
    RunDirectory.resume(tmp_path / "run", make_job()).close()


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def lock_of(kind: str) -> str:
    texts: dict[str, Callable[[], str]] = {
        "dead": lambda: json.dumps({"pid": dead_pid(), "host": HOST, "started": 1}),
        "another process with its number": lambda: json.dumps({"pid": os.getpid(), "host": HOST, "started": 1}),
        "torn": lambda: '{"pid": 12',
        "empty": lambda: "",
    }
    return texts[kind]()


@pytest.mark.parametrize("kind", ["dead", "another process with its number", "torn", "empty"])
def test_a_stale_lock_is_taken_over(kind: str, tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, make_job()).close()
    (tmp_path / "lock").write_text(lock_of(kind))
    with RunDirectory.resume(tmp_path, make_job()):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_counts(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, make_job()).close()
    (tmp_path / "lock").write_text(json.dumps({"pid": dead_pid(), "host": "elsewhere", "started": 1}))
    with pytest.raises(ConfigError, match=rf"on elsewhere; .*delete {tmp_path}/lock"):
        RunDirectory.resume(tmp_path, make_job())


def test_two_processes_cannot_both_take_it(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom elastictrain.observe.lock import RunLock\nfrom pathlib import Path\n"
        f"sys.stdin.readline()\nRunLock(Path({str(tmp_path)!r})).take()\nprint('taken', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    losers = 0
    while losers < 3:  # the winner waits on its input and holds on
        losers = sum(racer.poll() is not None for racer in racers)
    results = [racer.communicate("\n", timeout=30) for racer in racers]
    assert sorted(out for out, _ in results) == ["", "", "", "taken\n"]
    assert sum("is in use by process" in err for _, err in results) == 3


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_last_line_costs_only_itself(cut: int, tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", make_job()) as run:
        run.row({"step": 1, "generation": 1, "loss": 1.25})
        run.row({"step": 2, "generation": 1, "loss": 1.5})
    file = tmp_path / "run" / "metrics.jsonl"
    data = file.read_bytes()
    line = data.splitlines(keepends=True)[1]
    cut = min(cut, len(line) - 1)
    file.write_bytes(data[: len(data) - cut])
    whole = 2 if cut == 1 else 1  # only the end of line is missing: the row is there
    assert len(RunDirectory.open(tmp_path / "run").metrics()) == whole
    with RunDirectory.resume(tmp_path / "run", make_job()) as run:
        assert run.row({"step": 3 if whole == 2 else 2, "generation": 2})
        assert len(run.metrics()) == whole + 1


def test_not_finite_numbers_are_null(tmp_path: Path) -> None:
    assert json.loads(encode({"a": float("nan"), "b": [float("inf"), {"c": -float("inf")}], "d": 1.5})) == {
        "a": None,
        "b": [None, {"c": None}],
        "d": 1.5,
    }
    with RunDirectory.create(tmp_path / "run", make_job()) as run:
        run.row({"step": 1, "loss": float("nan"), "skipped": {"lanes": [3]}})
        assert run.metrics()[0].loss is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    writer = LineWriter(tmp_path / "events.jsonl")
    with pytest.raises(ClusterError, match=rf"^{tmp_path}/events.jsonl: cannot be written: No space left on device; "):
        writer.append({"kind": "x"})
    writer.close()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match=r"run_dir='.*/file/run' cannot be made: Not a directory; set run_dir"):
        RunDirectory.create(tmp_path / "file" / "run", make_job())


def test_reading_does_not_write(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, make_job()).close()
    with pytest.raises(ConfigError, match="open for reading only"):
        RunDirectory.open(tmp_path).row({"step": 1})


def test_default_places_and_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^RUN latest: no runs under "):
        find_run("latest")
    with pytest.raises(ConfigError, match=r"^RUN 'x': no such run; .*there are none under "):
        find_run("x")
    now = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)
    paths = []
    for number, name in enumerate(["gpt", "gpt", "digits"]):
        with RunDirectory.create(None, make_job(name=name), now=now) as run:
            paths.append(run.path)
        os.utime(run.path / "job.yaml", (number, number))
    assert [str(path) for path in paths] == [
        "runs/gpt-20261122T100000Z",
        "runs/gpt-20261122T100000Z-2",
        "runs/digits-20261122T100000Z",
    ]
    assert find_run("latest").path == paths[2]
    assert find_run("gpt-20261122T100000Z").path == paths[0]
    assert find_run(str(tmp_path / paths[1])).path == tmp_path / paths[1]
    with pytest.raises(ConfigError, match=r"RUN 'y': .*newest under runs/: digits-20261122T100000Z, gpt-"):
        find_run("y")
    assert latest_of("gpt") == paths[1]
    with pytest.raises(ConfigError, match=r"^--resume: no run of name='gp' under "):
        latest_of("gp")
    with RunDirectory.create(None, make_job(run_dir="here")) as run:
        assert run.path == Path("here")
    assert default_name("a/b c", now) == "a_b_c-20261122T100000Z"
    assert default_name("..", now).startswith("run-")


@given(
    lines=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), max_size=40),
)
def test_history_is_the_last_word_on_every_step(lines: list[tuple[int, int]]) -> None:
    rows = [MetricsRow(step=step, generation=generation) for step, generation in lines]
    kept = history(rows)
    numbers = [row.step for row in kept]
    assert numbers == sorted(set(numbers))
    # A row stands if and only if no later row is at its step or before it.
    stands = [row for i, row in enumerate(rows) if all(later.step > row.step for later in rows[i + 1 :])]
    assert kept == stands
    assert history(kept) == kept


@given(records=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9)), max_size=5))
def test_lines_round_trip(records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    writer = LineWriter(path)
    for record in records:
        writer.append(record)
    writer.close()
    assert list(read_lines(path)) == records


def test_tokens_per_second_counts_only_timed_steps() -> None:
    rows = [MetricsRow(step=1, tokens=100, step_s=0.5), MetricsRow(step=2, tokens=50), MetricsRow(step=3, step_s=1.0)]
    assert tokens_per_s(rows) == 200
    assert tokens_per_s(rows[1:]) is None
