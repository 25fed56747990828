"""`elastictrain data prepare` on a real Ray: the same bytes whatever the number of workers, and whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from elastictrain.data.preparing.driver import prepare_data
from elastictrain.errors import ClusterError, DataError
from elastictrain_actors.preparation import prepare
from tests.support.preparing import bytes_in, settings_for, write_input

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
HERE = "tests.support.preparing"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"deduplicate": "exact", "tokenizer": "bytes", "map": f"{HERE}:lower", "filter": f"{HERE}:even"}


def undisturbed(tmp_path: Path, **more: Any) -> dict[str, str]:
    """What it must come to: prepared by one process, without Ray."""
    prepare_data(settings_for(tmp_path / "in", tmp_path / "alone", **more))
    return files_of(tmp_path / "alone")


def files_of(out: Path) -> dict[str, str]:
    assert not (out / "_work").exists()
    return {name: digest for name, digest in bytes_in(out).items() if name != "_index.json"}


@pytest.mark.parametrize("near", [None, {"threshold": 0.5, "ngram": 1}])
def test_any_number_of_workers_writes_the_same_bytes(
    shared_ray: None, tmp_path: Path, settings: dict[str, Any], near: dict[str, Any] | None
) -> None:
    settings["near_duplicates"] = near
    write_input(tmp_path / "in")
    expected = undisturbed(tmp_path, **settings)
    assert sum(name.endswith(".parquet") for name in expected) > 1
    told: list[tuple[str, int, int]] = []
    for workers in (1, 4):
        out = tmp_path / str(workers)
        prepare(
            settings_for(tmp_path / "in", out, workers=workers, **settings),
            progress=lambda what, done, total: told.append((what, done, total)),
        )
        assert files_of(out) == expected
    for what in ("preparing parts", "writing files", *(["finding near-duplicates"] if near else [])):
        mine = [(done, total) for name, done, total in told if name == what]
        assert mine[0][0] == 0
        assert mine[-1][0] == mine[-1][1]


def test_a_task_that_is_killed_is_done_again(
    shared_ray: None, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_input(tmp_path / "in")
    mark = tmp_path / "mark"
    function = tmp_path / "mine.py"
    function.write_text(
        "import os, signal\n"
        "def dies_once(rows):\n"
        "    if 100 in rows.column('n').to_pylist():\n"
        "        try:\n"
        f"            os.close(os.open({str(mark)!r}, os.O_CREAT | os.O_EXCL))\n"
        "        except FileExistsError:\n"
        "            return rows\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rows\n"
    )
    more = settings | {"map": f"{function}:dies_once"}
    prepare(settings_for(tmp_path / "in", tmp_path / "out", workers=2, **more))
    assert mark.exists(), "it was killed"
    assert files_of(tmp_path / "out") == undisturbed(tmp_path, **more)


def test_a_task_that_dies_every_time_is_given_up(shared_ray: None, tmp_path: Path) -> None:
    write_input(tmp_path / "in")
    settings = settings_for(tmp_path / "in", tmp_path / "out", map=f"{HERE}:dies_always", workers=1)
    with pytest.raises(ClusterError, match=r"^part \d+ was begun 4 times, and each time its process died\."):
        prepare(settings)


def test_errors_of_tasks_are_those_of_the_user(shared_ray: None, tmp_path: Path) -> None:
    write_input(tmp_path / "in")
    settings = settings_for(tmp_path / "in", tmp_path / "out", map=f"{HERE}:fails_at_77", workers=2)
    with pytest.raises(DataError, match=r"0\.parquet, row group 3, row 17: map failed: ValueError: seventy-seven\."):
        prepare(settings)


def test_a_driver_that_is_killed_is_taken_up(shared_ray: None, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The command line is killed in the middle, with all its Ray; another one finishes its work."""
    write_input(tmp_path / "in")
    gate = tmp_path / "gate"
    function = tmp_path / "mine.py"
    function.write_text(
        "import os, time\n"
        "def waits(rows):\n"
        "    deadline = time.monotonic() + 240\n"
        f"    while 200 in rows.column('n').to_pylist() and not os.path.exists({str(gate)!r}):\n"
        "        if time.monotonic() > deadline:\n"
        "            raise TimeoutError('the gate was never opened')\n"
        "        time.sleep(0.05)\n"
        "    return rows\n"
    )
    more = settings | {"map": f"{function}:waits"}
    out = tmp_path / "out"
    job = settings_for(tmp_path / "in", out, workers=2, **more)
    (tmp_path / "prepare.yaml").write_text(json.dumps(job.model_dump(mode="json")))
    command = [sys.executable, "-m", "elastictrain.cli", "data", "prepare", str(tmp_path / "prepare.yaml")]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=_environment())
    try:
        deadline, pause = time.monotonic() + 240, threading.Event()
        while len(list(out.glob("_work/part-*.json"))) < 3:
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            pause.wait(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait(60)
    gate.touch()
    done = len(list(out.glob("_work/part-*.json")))
    begun: list[int] = []
    prepare(job, resume=True, progress=lambda what, done, total: begun.append(done) if "parts" in what else None)
    assert begun[0] >= done >= 3, "what was finished is not done again"
    gate_open = undisturbed(tmp_path, **more)
    assert files_of(out) == gate_open


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
