"""Losing a node by address, with real processes: what the run has on that node goes together, and nothing else does."""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastictrain.pulse import Pulse, pulse_folder, start_ticks
from elastictrain_actors.node_loss import processes_of_run

ROOT = Path(__file__).parents[3]
ELSEWHERE = """
import sys
from pathlib import Path
from elastictrain.pulse import Pulse
pulse = Pulse.create(Path(sys.argv[1]), 9)
print("ready", flush=True)
for line in sys.stdin:
    print("alive", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pulse_folder("run", tmp_path)


@pytest.fixture
def elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A worker of the same run on this machine, but of another node: another process has started it."""
    command = [sys.executable, "-c", ELSEWHERE, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def family(folder: Path, how: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.node_family", str(folder), how],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


def lives(process: subprocess.Popen[str]) -> bool:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return bool(select.select([process.stdout], [], [], 20)[0]) and process.stdout.readline() == "alive\n"


def test_a_silent_node_stops_as_a_whole_and_is_continued_later(folder: Path, elsewhere: subprocess.Popen[str]) -> None:
    found = family(folder, "stop")
    assert {role: found[role] for role in ("loser", "worker", "agent")} == dict.fromkeys(
        ("loser", "worker", "agent"), "SIGSTOP"
    )
    assert found["stranger"] in "SR", "what is not of the run goes on"
    assert found["said"] == "back\n", "the loser too is continued"
    assert lives(elsewhere), "another node of the same machine goes on"


def test_a_node_that_dies_takes_all_of_the_run_with_it(folder: Path, elsewhere: subprocess.Popen[str]) -> None:
    found = family(folder, "kill")
    assert [found[role] for role in ("loser", "worker", "agent")] == ["SIGKILL"] * 3
    assert found["stranger"] in "SR"
    assert lives(elsewhere)


def test_processes_are_named_beyond_doubt_and_files_of_others_are_no_pulse(folder: Path) -> None:
    """The pulse of a process that is gone, whose number another one may have by now, names nobody."""
    (folder / "junk.pulse").write_bytes(b"no pulse")
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        ticks = start_ticks(child.pid)
        assert ticks is not None
        assert processes_of_run(folder, os.getpid()) == [], "it is of no run yet"
        pulse = Pulse.create(folder, 3)
        pulse._memory[16:32] = struct.pack("<qq", child.pid, ticks)
        assert processes_of_run(folder, os.getpid()) == [(child.pid, ticks)]
        assert processes_of_run(folder, os.getppid()) == [(os.getpid(), start_ticks(os.getpid()))], "it reads a pulse"
        pulse._memory[16:32] = struct.pack("<qq", child.pid, ticks - 1)
        assert processes_of_run(folder, os.getpid()) == []
        child.kill()
