"""A run that is under way is reached from elsewhere, and outlives whoever started it; the bits stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import elastictrain as et
from elastictrain.job import dump_job
from elastictrain.observe import Blind, RunDirectory, Summary
from elastictrain.observe.answers import Request
from elastictrain.observe.follow import follow
from elastictrain.observe.standing import complete
from elastictrain_actors.reach import ask
from tests.support.process_cluster import RAY_STEPS as STEPS
from tests.support.process_cluster import byte_job
from tests.unit.observe.test_follow import Seen

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]

ROOT = Path(__file__).parents[2]


def job(folder: Path, name: str, **settings: Any) -> et.Job:
    folder.mkdir(exist_ok=True)
    workers = {"min": 1, "max": 3, "start": 2, "replace": False}
    return byte_job(folder, **{"workers": workers, "steps": STEPS, "run_dir": str(folder / name), **settings})


class Begun(Blind):
    """Says when the n-th row has arrived."""

    def __init__(self, rows: int) -> None:
        self._rows, self.event_ = rows, threading.Event()

    def row(self, metrics: Any) -> None:
        if metrics["step"] >= self._rows:
            self.event_.set()


def in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Start `call`; the returned function waits for its result or raises its error."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> Any:
        thread.join(240)
        assert result, "still running"
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    return wait


def test_watched_resized_drained_and_stopped_from_elsewhere(tmp_path: Path, undisturbed: str) -> None:
    begun = Begun(10)
    settings = {"checkpoint": {"path": str(tmp_path / "checkpoints"), "every_steps": 1000}, "steps": STEPS}
    running = in_background(lambda: et.run(job(tmp_path, "run", **settings), observer=begun))
    assert begun.event_.wait(120)
    run = RunDirectory.open(tmp_path / "run")
    watchers = [Seen(), Seen()]
    watched = [in_background(lambda seen=seen: follow(run, seen)) for seen in watchers]

    def answered(request: Request) -> tuple[str, str]:
        found = ask(run, request, timeout_s=120)
        assert found is not None
        return found.outcome, found.words

    assert answered(Request("drain", 9)) == ("refused", "worker 9 is not one of [0, 1]")
    assert answered(Request("resize", 9))[0] == "refused"
    outcome, words = answered(Request("resize", 3))
    assert (outcome, words.partition(",")[0]) == ("done", "worker 2 joined; world 2 → 3")
    outcome, words = answered(Request("drain", 0))
    assert (outcome, words.partition(",")[0]) == ("done", "worker 0 has handed over and left; world 3 → 2")
    assert "no step redone" in words
    assert answered(Request("resize", 2)) == ("done", "the run has 2 workers")
    outcome, words = answered(Request("stop", "enough seen"))
    assert outcome == "done"
    assert "its state is in the checkpoint" in words
    stopped: Summary = running()
    assert stopped.outcome == "stopped"
    for wait, seen in zip(watched, watchers, strict=True):
        assert wait().kind == "stopped"
        assert seen.rows == list(range(seen.before[0] + 1, stopped.steps + 1)), "each watcher sees every step"
        assert seen.kinds.count("resized") == 2
    summary = et.run(job(tmp_path, "run", **settings), resume=True)
    assert (summary.outcome, summary.digest) == ("finished", undisturbed)
    assert summary.world_sizes[:3] == [2, 3, 2]
    with pytest.raises(et.ConfigError, match=r"it is over \(finished\)"):
        ask(run, Request("add"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP], ids=["killed", "hung-up"])
def test_the_driver_goes_and_the_run_goes_on(number: int, tmp_path: Path, undisturbed: str) -> None:
    settings = job(tmp_path, "run")
    (tmp_path / "job.yaml").write_text(dump_job(settings))
    paths = [str(ROOT), str(ROOT / "actors"), str(ROOT / "checkpoint"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, "-m", "elastictrain.cli", "run", "job.yaml"]
    with (tmp_path / "out").open("w") as out:
        driver = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        run = wait_for_row(tmp_path / "run", 5, driver)
        driver.send_signal(number)
        if number == signal.SIGKILL:
            driver.wait(60)
        end = follow(run, Seen())
        code = driver.wait(60)
    finally:
        driver.kill()
    assert end is not None
    assert (end.kind, end.data["digest"]) == ("finished", undisturbed)
    assert [row.step for row in run.metrics()] == list(range(1, STEPS + 1)), "every step once"
    summary = complete(run)
    assert (run.read_summary() or {})["digest"] == undisturbed
    assert run.loss_png.exists()
    assert summary.world_sizes == [2]
    if number == signal.SIGHUP:
        assert code == 0, (tmp_path / "out").read_text()
        assert "the terminal has gone, the run goes on" in (tmp_path / "run" / "driver.log").read_text()
    else:
        assert code == -signal.SIGKILL


def wait_for_row(folder: Path, step: int, driver: subprocess.Popen[bytes]) -> RunDirectory:
    pause = threading.Event()
    for _ in range(1200):
        if (folder / "events.jsonl").exists():
            run = RunDirectory.open(folder)
            rows = run.metrics()
            if rows and rows[-1].step >= step:
                assert rows[-1].step < STEPS, "it was over before anything could happen to it"
                return run
        assert driver.poll() is None, (folder.parent / "out").read_text()
        pause.wait(0.1)
    raise AssertionError("it has not started")
