"""The fault `lose_node`, performed by one worker of that node: what the run has there stops or dies together. Linux.

A node is what one raylet has started: on a machine with several raylets (tests) the others are left alone, and so is
everything on the node that is not of this run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from elastictrain.faults import LoseNode
from elastictrain.pulse import PulseFile, is_same_process, pulse_paths, start_ticks

PROC = Path("/proc")
LOOK_S = 0.3
"""Longer than an agent's beat."""
AGENT_S = 40.0
"""Longer than a controller waits with starting agents when no step comes through."""
SIGNALS = {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}

# Argument 1: seconds; then pid:start for each process. A process of its own, because whoever is stopped cannot continue
# itself. Standard library only: it must not take a second to start.
_BRING_BACK = """
import os, signal, sys, time
time.sleep(float(sys.argv[1]))
for one in sys.argv[2:]:
    pid, ticks = one.split(":")
    try:
        raw = open(f"/proc/{pid}/stat", "rb").read()
        if raw[raw.rindex(b")") + 2 :].split()[19].decode() == ticks:
            os.kill(int(pid), signal.SIGCONT)
    except OSError:
        pass
"""


def lose_node(folder: Path, fault: LoseNode) -> None:
    """Stop or kill the workers and the agent that the run with these pulses has on the calling worker's node, the
    caller last. With "stop" it returns when somebody has continued the caller.

    A node falls silent only for those that have heard it: so the node's agent, which starts with the first step, is
    waited for, at most `AGENT_S`.
    """
    own = os.getpid()
    others = _with_an_agent(folder, own)
    if fault.how == "stop":
        _bring_back([*others, (own, start_ticks(own) or 0)], fault.silent_s)
    number = SIGNALS[fault.how]
    for pid, ticks in others:
        if is_same_process(pid, ticks):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
    os.kill(own, number)


def _with_an_agent(folder: Path, own: int) -> list[tuple[int, int]]:
    """The run's other processes on this node, when its agent is among them and has had the time for a beat."""
    until_s, seen = time.monotonic() + AGENT_S, False
    while True:
        others = [identity for identity in processes_of_run(folder, os.getppid()) if identity[0] != own]
        workers = {pid for pid, _ in _workers(folder)}
        here = any(pid not in workers for pid, _ in others)
        if (seen and here) or time.monotonic() > until_s:
            return others
        seen = here
        time.sleep(LOOK_S)


def processes_of_run(folder: Path, parent: int) -> list[tuple[int, int]]:
    """(pid, start) of the children of `parent` (a raylet) that are of the run whose pulses lie in `folder`: workers,
    which have a pulse there, and agents, which read them.
    """
    workers, found = _workers(folder), []
    for pid in _children(parent):
        ticks = start_ticks(pid)
        if ticks is not None and ((pid, ticks) in workers or _has_open(pid, folder)):
            found.append((pid, ticks))
    return sorted(found)


def _workers(folder: Path) -> set[tuple[int, int]]:
    found = set()
    for path in pulse_paths(folder):
        with suppress(OSError, ValueError):  # being made, or just gone
            file = PulseFile(path)
            file.close()
            found.add((file.pid, file.start_ticks))
    return found


def _children(parent: int) -> list[int]:
    found = []
    for path in PROC.iterdir():
        if path.name.isdecimal():
            with suppress(OSError, ValueError):
                raw = (path / "stat").read_bytes()
                if int(raw[raw.rindex(b")") + 2 :].split()[1]) == parent:
                    found.append(int(path.name))
    return found


def _has_open(pid: int, folder: Path) -> bool:
    """Whether a process has a file in `folder` open. One of another user says nothing, and is none of ours."""
    with suppress(OSError):
        for entry in (PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if entry.readlink().parent == folder:
                    return True
    return False


def _bring_back(processes: Iterable[tuple[int, int]], after_s: float) -> None:
    """Have somebody who is not stopped continue them."""
    who = [f"{pid}:{ticks}" for pid, ticks in processes]
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BRING_BACK, str(after_s), *who],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
