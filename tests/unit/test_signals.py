"""What signals do, tried on processes of their own: a handler in the test's process would be the test's."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elastictrain.signals import on_signals, sheltered

PROGRAM = """
import signal, subprocess, sys, threading
from pathlib import Path
from elastictrain.signals import on_signals, output_to, sheltered

log, gone = Path(sys.argv[1]), []

def hang_up():
    output_to(log, "gone")
    gone.append(True)

with sheltered():
    child = subprocess.Popen(["sleep", "60"])
    with on_signals(lambda: print("stop", flush=True) or gone.append(True), hang_up):
        print("ready", child.pid, flush=True)
        while not gone:
            threading.Event().wait(0.05)
signal.raise_signal(signal.SIGHUP) if log.exists() else None
print("and on", flush=True)
print("errors too", file=sys.stderr, flush=True)
try:
    print("child", child.wait(1), flush=True)
except subprocess.TimeoutExpired:
    print("child lives", flush=True)
child.kill()
child.wait()
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    return [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "driver.log")]


def test_a_terminal_that_is_closed_ends_neither_the_process_nor_its_children(program: list[str]) -> None:
    """A real terminal: with it goes a hang-up to all that belong to it."""
    driver, terminal = pty.fork()
    if driver == 0:
        os.execv(program[0], program)
    said = b""
    while b"ready" not in said or b"\n" not in said:
        said += os.read(terminal, 1000)
    os.killpg(driver, signal.SIGHUP)  # as a shell does with its jobs when its terminal goes
    os.close(terminal)
    _, status = os.waitpid(driver, 0)
    log = Path(program[2])
    assert os.waitstatus_to_exitcode(status) == 0, log.read_text() if log.exists() else "no log"
    assert log.read_text().splitlines() == ["gone", "and on", "errors too", "child lives"]


def test_output_that_goes_to_a_file_stays_there(program: list[str], tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        driver = subprocess.Popen(program, stdout=out, stderr=subprocess.PIPE, text=True)
        wait_for(tmp_path / "out", "ready")
        driver.send_signal(signal.SIGHUP)
        _, errors = driver.communicate(timeout=60)
    assert (driver.returncode, errors) == (0, "")
    assert (tmp_path / "out").read_text().splitlines()[1:] == ["and on", "child lives"]
    assert Path(program[2]).read_text().splitlines() == ["gone", "errors too"], "that went to a pipe"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_asks_for_a_stop(number: int, program: list[str], tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        driver = subprocess.Popen(program, stdout=out, stderr=subprocess.DEVNULL)
        wait_for(tmp_path / "out", "ready")
        driver.send_signal(number)
        assert driver.wait(60) == 0
    assert (tmp_path / "out").read_text().splitlines()[1:3] == ["stop", "and on"]
    assert not Path(program[2]).exists()


def wait_for(path: Path, word: str) -> None:
    pause = threading.Event()
    for _ in range(600):
        if word in path.read_text():
            return
        pause.wait(0.05)
    raise AssertionError(f"no {word!r} in {path}")


def test_a_second_ctrl_c_interrupts_and_handlers_are_given_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with sheltered(), on_signals(lambda: None, lambda: None):
        pass
    assert {number: signal.getsignal(number) for number in before} == before
    asked: list[str] = []
    with sheltered(), on_signals(lambda: asked.append("stop"), lambda: asked.append("hang up")):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGHUP)  # the shell's, after the kernel's
    signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert asked == ["hang up", "stop"]
    assert {number: signal.getsignal(number) for number in before} == before


def test_nohup_is_respected_and_threads_touch_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sheltered():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    seen: list[object] = []

    def inside() -> None:
        with sheltered(), on_signals(lambda: None, lambda: None):
            seen.append(signal.getsignal(signal.SIGHUP))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
