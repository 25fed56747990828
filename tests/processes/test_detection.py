"""Detection on real processes: stopped, deadlocked and spinning workers under load, and nodes behind a bad network."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from elastictrain.controller import events as ev
from elastictrain.controller.suspicion import Suspicion
from elastictrain.pulse import pulse_folder
from elastictrain_actors.agent import Agent
from elastictrain_actors.heartbeats import Heartbeats
from elastictrain_actors.procfs import KillAnswer
from elastictrain_actors.watchman import Watchman
from tests.support.lossy_link import LossyLink, lossy_link, why_not
from tests.support.watched_process import end, start, tell

pytestmark = [pytest.mark.processes, pytest.mark.alone]
TOKEN = "a token"


def processor_s(pid: int) -> float:
    """What a process has used of the processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Yard:
    """Three real workers, an agent in a thread, a watchman."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.ear = Heartbeats("127.0.0.1", TOKEN, 1)
        stack.callback(self.ear.close)
        self.watchman = Watchman(self.ear, Suspicion())
        self.workers = [start("worker", folder, number) for number in range(3)]
        stack.callback(end, *self.workers)
        self.agent = Agent("here", folder, TOKEN)
        assert self.agent.follow(1, "127.0.0.1", self.ear.port, 1)
        thread = threading.Thread(target=self.agent.run)
        thread.start()
        stack.callback(self.agent.close)
        stack.callback(thread.join)
        stack.callback(self.agent.stop)
        self.watchman.agent_started("here", 1)
        self.watchman.formed(1, range(3))

    def watch(self, seconds: float, *, until_found: bool = False) -> list[tuple[float, object]]:
        """What the watchman notices, with the seconds from now."""
        found, began_s, pause = [], time.monotonic(), threading.Event()
        while time.monotonic() < began_s + seconds and not (until_found and found):
            found += [(time.monotonic() - began_s, event) for event in self.watchman.look()]
            pause.wait(0.1)
        return found

    def settle(self) -> None:
        """Until steps are measured."""
        began_s = time.monotonic()
        while self.watchman.suspicion.step_s() is None:
            assert time.monotonic() < began_s + 30
            assert self.watch(0.2) == []


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    with ExitStack() as stack:
        one = Yard(pulse_folder("r", tmp_path), stack)
        one.settle()
        yield one


def frozen(found: list[tuple[float, object]]) -> tuple[float, ev.WorkerFrozen]:
    ((seconds, event),) = found
    assert isinstance(event, ev.WorkerFrozen), event
    return seconds, event


def test_stopped_locked_and_spinning_workers_are_named_killed_and_confirmed(yard: Yard) -> None:
    assert yard.watch(2.0) == []
    for number, (fault, words) in enumerate(
        [("stop", "stopped by a signal"), ("lock", "has slept for"), ("spin", "seconds of processor time")]
    ):
        words = words.replace("seconds", "s")
        if fault == "stop":
            yard.workers[number].send_signal(signal.SIGSTOP)
        else:
            tell(yard.workers[number], fault)
        promised_s = max(2.0, yard.watchman.suspicion.deadline_s()) if fault != "stop" else 1.0
        before_s = processor_s(yard.workers[number].pid)
        named_s, event = frozen(yard.watch(60.0, until_found=True))
        had_s = processor_s(yard.workers[number].pid) - before_s
        assert event.worker == number
        assert words in event.reason
        print(f"{fault}: named after {named_s:.2f} s, {had_s:.2f} on a processor: {event.reason}; {event.evidence}")
        # A spinning one is named by the time that it had; on a busy machine it has less of it.
        assert (had_s if fault == "spin" else named_s) < promised_s + (1.5 if fault == "spin" else 0.3)
        identity = yard.watchman.suspicion.identity(number)
        assert identity is not None
        node, pid, ticks = identity
        assert (node, pid) == ("here", yard.workers[number].pid)
        began_s = time.monotonic()
        assert yard.agent.kill(1, pid, ticks) is KillAnswer.GONE
        assert time.monotonic() - began_s < 2.0
        assert yard.workers[number].wait(timeout=5) == -signal.SIGKILL
        yard.watchman.worker_gone(number)
        yard.watchman.formed(number + 2, range(number + 1, 3))


def test_a_worker_that_dies_is_gone_at_once(yard: Yard) -> None:
    yard.workers[1].kill()
    ((seconds, event),) = yard.watch(10.0, until_found=True)
    assert isinstance(event, ev.WorkerDied)
    assert (event.worker, seconds < 1.0) == (1, True)


def test_eight_busy_processes_make_no_false_alarm(yard: Yard) -> None:
    busy = [start("burn") for _ in range(8)]
    try:
        assert yard.watch(8.0) == []
        os.kill(yard.workers[2].pid, signal.SIGSTOP)
        seconds, event = frozen(yard.watch(10.0, until_found=True))
        assert event.worker == 2
        assert seconds < 2.0
    finally:
        end(*busy)


def test_a_starved_worker_is_not_a_frozen_one(yard: Yard) -> None:
    """Idle priority beside busy processes: it hardly runs at all, and is not to blame for it."""
    busy = [start("burn") for _ in range(2 * (os.cpu_count() or 1))]
    try:
        for thread in Path(f"/proc/{yard.workers[0].pid}/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
        assert yard.watch(8.0) == []
    finally:
        end(*busy)


# --- nodes ---

needs_namespaces = pytest.mark.skipif(bool(why_not()), reason=why_not() or "namespaces work")


class Ear:
    """A controller's ear in one namespace, hearing an agent in the other."""

    def __init__(self, link: LossyLink, folder: Path, stack: ExitStack) -> None:
        self.link = link
        host = link.address("a")
        self.process = start("hear", host, TOKEN, "far", before=link.inside("a"))
        stack.callback(end, self.process)
        assert self.process.stdout is not None
        self.lines = self.process.stdout
        port = int(self.lines.readline())
        assert self.lines.readline().startswith("unheard")
        self.worker = start("worker", folder, 0)
        stack.callback(end, self.worker)
        self.agent = start("agent", "far", folder, TOKEN, host, port, 1, before=link.inside("b"))
        stack.callback(end, self.agent)
        self.next("heard", 20.0)

    def next(self, word: str, limit_s: float) -> float:
        """When (monotonic) the ear says the word next."""
        watchdog = threading.Timer(limit_s, self.process.kill)
        watchdog.start()
        line = self.lines.readline()
        watchdog.cancel()
        assert line.split()[:1] == [word], f"expected {word!r} within {limit_s} s, got {line!r}"
        return float(line.split()[1])

    def end(self) -> tuple[list[str], float]:
        """What it has said since, and the longest silence in seconds."""
        tell(self.process, "end")
        *said, worst = self.lines.read().splitlines()
        return said, float(worst.split()[1])


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[Ear]:
    with ExitStack() as stack:
        link = stack.enter_context(lossy_link(seed=5))
        yield Ear(link, pulse_folder("r", tmp_path), stack)


@needs_namespaces
@pytest.mark.parametrize("cut", [{"ab", "ba"}, {"ab"}, {"ba"}], ids=["both ways", "no answers", "no beats"])
@pytest.mark.parametrize("latency_s", [0.0, 0.2])
def test_a_node_behind_a_cut_is_lost_within_two_seconds_and_heard_again_after(
    ear: Ear, cut: set[str], latency_s: float
) -> None:
    ear.link.latency_s = latency_s
    threading.Event().wait(1.0)  # for the latency to be in force all along the way
    ear.link.cut, cut_s = cut, time.monotonic()
    lost_s = ear.next("lost", 10.0) - cut_s
    print(f"lost after {lost_s:.2f} s")
    assert 0.5 < lost_s < 2.0
    ear.link.cut, mended_s = set(), time.monotonic()
    assert ear.next("heard", 10.0) - mended_s < 2.0


@needs_namespaces
def test_a_slow_and_lossy_network_makes_no_false_alarm(ear: Ear) -> None:
    ear.link.latency_s, ear.link.loss = 0.2, 0.1
    threading.Event().wait(20.0)
    said, worst_s = ear.end()
    assert said == []
    assert ear.link.dropped > 20
    print(f"longest silence {worst_s:.2f} s, {ear.link.dropped} of {ear.link.carried} packets lost")
    assert 0.4 < worst_s < 1.6


@needs_namespaces
def test_a_controller_that_was_stopped_has_lost_no_node(ear: Ear) -> None:
    for _ in range(3):
        ear.process.send_signal(signal.SIGSTOP)
        threading.Event().wait(4.0)
        ear.process.send_signal(signal.SIGCONT)
        threading.Event().wait(0.5)
    said, _ = ear.end()
    assert said == []


@needs_namespaces
def test_a_dead_machine_is_lost_within_two_seconds(ear: Ear) -> None:
    """Agent and workers die at once, and nobody is left to say so."""
    ear.agent.send_signal(signal.SIGSTOP)
    ear.worker.kill()
    died_s = time.monotonic()
    assert ear.next("lost", 10.0) - died_s < 2.0
    assert isinstance(ear.agent, subprocess.Popen)
