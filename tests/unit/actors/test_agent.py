"""The node agent's core against real processes of this machine, and against a controller that is a socket."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elastictrain.pulse import Pulse, pulse_folder, pulse_paths, start_ticks
from elastictrain.signs import Activity, NodeReport
from elastictrain_actors import agent as module
from elastictrain_actors import procfs
from elastictrain_actors.agent import Agent
from elastictrain_actors.beats import Codec
from elastictrain_actors.procfs import KillAnswer, ProcessReader, end_process, parse_stat

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pulse_folder("run", tmp_path)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(SLEEPER, stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def pretend(folder: Path, worker: int, process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """A pulse that names another process than the one that writes it."""
    pulse = Pulse.create(folder, worker)
    ticks = start_ticks(process.pid)
    assert ticks is not None
    pulse._memory[16:40] = struct.pack("<qqq", process.pid, ticks, process.pid)
    return process.pid, ticks


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Controller:
    """A socket that hears and answers when it is told to."""

    def __init__(self, token: str = "t") -> None:
        self.codec, self.socket = Codec(token), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(10)
        self.port = self.socket.getsockname()[1]

    def hear(self) -> NodeReport:
        raw, self.sender = self.socket.recvfrom(65536)
        report = self.codec.decode_report(raw)
        assert report is not None
        return report

    def answer(self, epoch: int, node: str, agent: int, number: int) -> None:
        self.socket.sendto(self.codec.encode_answer(epoch, node, agent, number), self.sender)


@pytest.fixture
def controller() -> Iterator[Controller]:
    one = Controller()
    yield one
    one.socket.close()


def test_the_kernels_line_of_a_process_with_a_strange_name() -> None:
    line = b"42 (a ) R (b) S 1 1 1 0 -1 4194304 99 0 0 0 150 50 0 0 20 0 3 0 1301300 0 0"
    found = parse_stat(line)
    assert (found.state, found.threads, found.start_ticks, found.is_dead) == ("S", 3, 1301300, False)
    assert found.cpu_s == pytest.approx(200 / os.sysconf("SC_CLK_TCK"))
    assert parse_stat(line.replace(b") S", b") Z").replace(b" 3 0 1301300", b" 1 0 1301300")).is_dead
    assert not parse_stat(line.replace(b") S", b") Z")).is_dead  # its other threads still run


def test_what_it_says_of_a_worker(folder: Path) -> None:
    pulse = Pulse.create(folder, 7)
    agent = Agent("node", folder, "t")
    pulse.begin_step(2, 9)
    pulse.enter(Activity.GATHER)
    (sign,) = agent.beat().workers
    assert (sign.worker, sign.pid, sign.start_ticks) == (7, os.getpid(), start_ticks(os.getpid()))
    assert (sign.state, sign.generation, sign.step, sign.activity) == ("R", 2, 9, Activity.GATHER)
    assert (sign.count, sign.steps_done) == (3, 0)
    assert 0 <= sign.age_s <= sign.in_activity_s + 0.001 < 5
    assert sign.cpu_s > 0
    assert sign.held_up_s is not None
    report = agent.beat()
    assert (report.node, report.number, report.agent, report.echo) == ("node", 2, 1, 0)
    agent.close()


def test_a_stopped_and_a_dead_worker(folder: Path, sleeper: subprocess.Popen[bytes]) -> None:
    pretend(folder, 1, sleeper)
    agent = Agent("node", folder, "t")
    (alive,) = agent.beat().workers
    assert (alive.is_stopped, alive.is_gone) == (False, False)
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
    assert agent.beat().workers[0].is_stopped
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert agent.beat().workers[0].is_gone  # a zombie is gone
    sleeper.wait()
    assert agent.beat().workers[0].is_gone
    agent.close()


def test_the_dead_are_reported_for_a_while_and_then_cleaned_up(folder: Path, sleeper: subprocess.Popen[bytes]) -> None:
    pretend(folder, 1, sleeper)
    clock = Clock()
    agent = Agent("node", folder, "t", clock=clock)
    agent.beat()
    sleeper.kill()
    sleeper.wait()
    assert agent.beat().workers[0].is_gone
    clock.now_s += module.KEEP_DEAD_S - 1
    assert agent.beat().workers[0].is_gone
    clock.now_s += 2
    agent.beat()
    assert agent.beat().workers == ()
    assert list(pulse_paths(folder)) == []


def test_a_pulse_taken_away_in_order_is_no_death_and_a_living_process_is_still_watched(
    folder: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    pretend(folder, 1, sleeper)
    agent = Agent("node", folder, "t")
    agent.beat()
    next(pulse_paths(folder)).unlink()
    assert [sign.is_gone for sign in agent.beat().workers] == [False]
    sleeper.kill()
    sleeper.wait()
    assert agent.beat().workers == ()


def test_files_that_are_no_pulse_are_passed_over(folder: Path) -> None:
    (folder / "x.pulse").write_bytes(b"junk")
    (folder / "readme").write_bytes(b"junk")
    Pulse.create(folder, 2)
    agent = Agent("node", folder, "t")
    assert [sign.worker for sign in agent.beat().workers] == [2]
    agent.close()


# --- killing ---


def test_it_kills_its_own_and_confirms(folder: Path, sleeper: subprocess.Popen[bytes]) -> None:
    pid, ticks = pretend(folder, 1, sleeper)
    sleeper.send_signal(signal.SIGSTOP)
    agent = Agent("node", folder, "t")
    assert agent.kill(1, pid, ticks) is KillAnswer.GONE
    assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    assert agent.kill(1, pid, ticks) is KillAnswer.GONE
    agent.close()


def test_it_touches_no_process_that_is_not_ours(folder: Path, sleeper: subprocess.Popen[bytes]) -> None:
    ticks = start_ticks(sleeper.pid)
    assert ticks is not None
    agent = Agent("node", folder, "t")
    assert agent.kill(1, sleeper.pid, ticks) is KillAnswer.NOT_OURS
    assert sleeper.poll() is None
    pretend(folder, 1, sleeper)
    assert agent.kill(1, sleeper.pid, ticks - 1) is KillAnswer.GONE  # that one is gone; this one is another
    assert end_process(sleeper.pid, ticks - 1, 1.0) is KillAnswer.GONE
    assert sleeper.poll() is None
    agent.close()


def test_an_older_controllers_orders_are_refused(
    folder: Path, sleeper: subprocess.Popen[bytes], controller: Controller
) -> None:
    pid, ticks = pretend(folder, 1, sleeper)
    agent = Agent("node", folder, "t")
    assert agent.follow(5, "127.0.0.1", controller.port, 1)
    assert agent.kill(4, pid, ticks) is KillAnswer.REFUSED
    assert agent.kill_all_but(4, []) == {}
    assert not agent.follow(4, "127.0.0.1", controller.port, 2)
    assert sleeper.poll() is None
    assert agent.kill(5, pid, ticks) is KillAnswer.GONE
    agent.close()


def test_it_ends_the_orphans_that_a_new_controller_does_not_know(folder: Path) -> None:
    with subprocess.Popen(SLEEPER, stdin=-1) as one, subprocess.Popen(SLEEPER, stdin=-1) as two:
        kept, orphan = pretend(folder, 1, one), pretend(folder, 2, two)
        (folder / f"1-{os.getpid()}.pulse").rename(folder / "first.pulse")
        agent = Agent("node", folder, "t")
        assert agent.kill_all_but(1, [kept]) == {orphan[0]: KillAnswer.GONE}
        assert (one.poll(), two.wait()) == (None, -signal.SIGKILL)
        one.kill()
    agent.close()


def test_a_process_that_waits_in_the_kernel_is_not_called_gone(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No real D state can be made at will: the signal is kept from it, and the kernel's letter is put there."""
    ticks = start_ticks(sleeper.pid)
    assert ticks is not None
    monkeypatch.setattr(procfs.signal, "pidfd_send_signal", lambda *_: None)
    assert end_process(sleeper.pid, ticks, 0.05) is KillAnswer.LIVES
    real = procfs.parse_stat
    monkeypatch.setattr(procfs, "parse_stat", lambda raw: replace(real(raw), state="D"))
    assert end_process(sleeper.pid, ticks, 0.05) is KillAnswer.IN_KERNEL


def test_kernels_without_process_handles(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_handles(_: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(procfs.os, "pidfd_open", no_handles)
    ticks = start_ticks(sleeper.pid)
    assert ticks is not None
    assert end_process(sleeper.pid, ticks - 1, 1.0) is KillAnswer.GONE
    assert sleeper.poll() is None
    assert end_process(sleeper.pid, ticks, 5.0) is KillAnswer.GONE
    assert sleeper.wait() == -signal.SIGKILL
    assert end_process(sleeper.pid, ticks, 1.0) is KillAnswer.GONE


def test_time_without_a_processor_is_what_the_kernel_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ProcessReader(os.getpid(), start_ticks(os.getpid()) or 0)
    samples = {1: (10, 0, 1), 2: (10, 0, 1)}
    monkeypatch.setattr(reader, "_schedule", samples.get)
    monkeypatch.setattr(procfs.Path, "iterdir", lambda _: map(Path, ("1", "2")))
    assert reader.held_up_s(1, "S", 0.0, whole=False) == 0.0
    samples[1] = (20, 300_000_000, 2)
    assert reader.held_up_s(1, "S", 1.0, whole=False) == pytest.approx(0.3)
    assert reader.held_up_s(1, "R", 1.5, whole=False) == pytest.approx(0.8)  # ready, and has not run: still waiting
    samples[1] = (30, 1_000_000_000, 3)  # it waited 0.7 s in all, of which 0.5 have been counted
    assert reader.held_up_s(1, "R", 2.0, whole=False) == pytest.approx(1.0)
    samples[2] = (10, 9_000_000_000, 9)  # before anybody looked at it
    assert reader.held_up_s(1, "S", 3.0, whole=True) == pytest.approx(1.0)
    samples[2] = (10, 9_400_000_000, 9)
    assert reader.held_up_s(1, "S", 4.0, whole=True) == pytest.approx(1.4)
    reader.close()
    nothing = ProcessReader(os.getpid(), 1)
    monkeypatch.setattr(nothing, "_schedule", lambda _: None)
    assert nothing.held_up_s(1, "R", 0.0, whole=True) is None
    assert nothing.stat() is None  # our pid, but another start
    nothing.close()


# --- the controller ---


def test_it_tells_and_hears(folder: Path, controller: Controller) -> None:
    agent = Agent("node", folder, "t", number=3)
    assert agent.follow(2, "127.0.0.1", controller.port, 3)
    agent.beat()
    agent.beat()
    assert [controller.hear().number, controller.hear().number] == [1, 2]
    controller.answer(2, "node", 3, 2)
    controller.answer(2, "node", 3, 1)
    agent.beat()
    assert (controller.hear().echo, agent._echo) == (2, 2)
    for epoch, node, number, beat in ((1, "node", 3, 3), (2, "other", 3, 3), (2, "node", 2, 3), (2, "node", 3, 99)):
        controller.answer(epoch, node, number, beat)  # of another controller, node, agent; of a beat that never was
    controller.socket.sendto(b"noise", controller.sender)
    agent.beat()
    assert controller.hear().echo == 2
    agent.close()


def test_it_follows_a_new_controller_from_the_first_beat_on(folder: Path, controller: Controller) -> None:
    agent = Agent("node", folder, "t")
    agent.follow(1, "127.0.0.1", controller.port, 1)
    agent.beat()
    controller.hear()
    controller.answer(1, "node", 1, 1)
    agent.beat()
    later = Controller()
    assert agent.follow(2, "127.0.0.1", later.port, 9)
    agent.beat()
    report = later.hear()
    assert (report.agent, report.number, report.echo) == (9, 1, 0)
    later.socket.close()
    agent.beat()  # nobody there: a lost beat
    agent.beat()
    agent.close()


def test_the_loop_counts_its_own_lateness_and_makes_up_for_no_missed_beat(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    agent = Agent("node", folder, "t", clock=clock)
    waits: list[float] = []
    late = iter([0.0, 0.005, 3.0, 0.0])

    def wait(seconds: float) -> bool:
        waits.append(round(seconds, 6))
        try:
            clock.now_s += seconds + next(late)
        except StopIteration:
            return True
        return False

    monkeypatch.setattr(agent._stop, "wait", wait)
    agent.run()
    assert agent._beats == 4
    assert agent._late_s == pytest.approx(3.0)
    assert waits == [0.0, 0.1, 0.095, 0.1, 0.1]


def test_it_ends_itself_only_without_workers_and_long_without_a_controller(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    agent = Agent("node", folder, "t", clock=clock)
    pulse = Pulse.create(folder, 0)

    def hours_pass(seconds: float) -> bool:
        clock.now_s += 7_200.0
        if agent._beats == 3:
            pulse.close()
        return agent._beats > 9

    monkeypatch.setattr(agent._stop, "wait", hours_pass)
    agent.run()
    assert agent._beats > 9  # our own process lives, and is the worker
    with agent._looking:
        for watched in agent._watched.values():
            monkeypatch.setattr(watched.process, "stat", lambda: None)
    agent._beats = 5
    agent.run()
    assert agent._beats < 9


def test_stop_ends_the_loop(folder: Path) -> None:
    agent = Agent("node", folder, "t")
    thread = threading.Thread(target=agent.run)
    thread.start()
    agent.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()
    agent.close()
