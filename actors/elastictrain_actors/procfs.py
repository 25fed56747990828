"""What the kernel says of a process, and how to end one for certain. Linux; no psutil: a few reads of /proc."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from elastictrain.pulse import is_same_process

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_READ_BYTES = 1024


class KillAnswer(StrEnum):
    """What became of an order to kill. GONE: no such process exists (any more), confirmed."""

    GONE = "gone"
    NOT_OURS = "not ours"
    """The process lives, but no pulse of this run names it: it was not touched."""
    REFUSED = "refused: a newer controller is in charge"
    IN_KERNEL = "cannot be killed (state D)"
    """SIGKILL was sent, but the process waits in the kernel (a dead disk or network mount, a driver). It will run no
    more code of its own, and goes when the kernel lets it."""
    LIVES = "still there after SIGKILL"
    FORBIDDEN = "not permitted"


def lift_thread() -> bool:
    """Let the calling thread run before ordinary ones, where the system allows it (root, CAP_SYS_NICE). For those who
    watch: they need little, and must not be the first to starve.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -10)  # on Linux this is about the thread alone
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Stat:
    """Of a process or a thread. `state`: R running or ready, S and D asleep, T stopped, t traced, Z or X dead."""

    state: str
    cpu_s: float
    threads: int
    start_ticks: int

    @property
    def is_dead(self) -> bool:
        """A zombie whose other threads still run is not."""
        return self.state in "ZXx" and self.threads <= 1


def parse_stat(raw: bytes) -> Stat:
    """One line of /proc/PID/stat (proc(5)). The name in brackets may hold brackets and blanks itself."""
    fields = raw[raw.rindex(b")") + 2 :].split()
    return Stat(
        state=fields[0].decode(),
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
    )


class ProcessReader:
    """One process, named by pid and start. Keeps its stat file open: that file never speaks of a later process with the
    same pid.
    """

    def __init__(self, pid: int, ticks: int) -> None:
        self.pid, self.start_ticks = pid, ticks
        self._fd = -1
        with suppress(FileNotFoundError, ProcessLookupError):
            self._fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        self._waits: dict[int, _Wait] = {}
        self._held_up_s: float | None = 0.0

    def stat(self) -> Stat | None:
        """None when the process is gone; a zombie counts as gone."""
        if self._fd < 0:
            return None
        try:
            found = parse_stat(os.pread(self._fd, _READ_BYTES, 0))
        except (ProcessLookupError, ValueError):
            return None
        return None if found.is_dead or found.start_ticks != self.start_ticks else found

    def thread_state(self, thread: int) -> str | None:
        """The state of one thread; None when it is gone."""
        try:
            return parse_stat(Path(f"/proc/{self.pid}/task/{thread}/stat").read_bytes()).state
        except (OSError, ValueError):
            return None

    def held_up_s(self, thread: int, state: str | None, now_s: float, *, whole: bool) -> float | None:
        """Seconds, summed over the calls, in which a thread was ready to run and got no processor: of `thread` (whose
        present state is `state`), or, if `whole`, of the thread that it happened to most since the last call: the
        training thread may wait for a helper of its own. None when the kernel does not say.

        From /proc/PID/task/TID/schedstat: nanoseconds run, nanoseconds waited, times run.
        """
        threads = [thread]
        if whole:
            with suppress(OSError):
                threads = [int(path.name) for path in Path(f"/proc/{self.pid}/task").iterdir()]
        most_s, known = 0.0, False
        for one in threads:
            counted = self._schedule(one)
            if counted is None:
                continue
            known = True
            wait = self._waits.get(one)
            if wait is None:
                self._waits[one] = _Wait(counted, now_s)
            else:
                most_s = max(most_s, wait.advance(counted, now_s, ready=one == thread and state == "R"))
        if whole:
            self._waits = {one: wait for one, wait in self._waits.items() if one in set(threads)}
        else:  # what others waited meanwhile is not looked at; it must not be counted later
            self._waits = {one: wait for one, wait in self._waits.items() if one == thread}
        if not known:
            return None if self._held_up_s == 0.0 else self._held_up_s
        assert self._held_up_s is not None
        self._held_up_s += most_s
        return self._held_up_s

    def _schedule(self, thread: int) -> tuple[int, int, int] | None:
        try:
            run, waited, times = Path(f"/proc/{self.pid}/task/{thread}/schedstat").read_bytes().split()
            return int(run), int(waited), int(times)
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Wait:
    """The waiting of one thread. The kernel adds a wait only when it ends; one that still lasts is counted ahead."""

    def __init__(self, counted: tuple[int, int, int], now_s: float) -> None:
        self._counted, self._changed_s = counted, now_s
        self._total_s = counted[1] / 1e9

    def advance(self, counted: tuple[int, int, int], now_s: float, *, ready: bool) -> float:
        """Seconds waited since the last call."""
        ran = counted != self._counted
        if ran:
            self._counted, self._changed_s = counted, now_s
        ahead_s = now_s - self._changed_s if ready and not ran else 0.0
        total_s = max(self._total_s, counted[1] / 1e9 + ahead_s)
        delta_s, self._total_s = total_s - self._total_s, total_s
        return delta_s


def end_process(pid: int, ticks: int, deadline_s: float) -> KillAnswer:
    """SIGKILL to the process that started at `ticks` with this pid, never to a later one, and wait until it is gone.

    A pidfd is opened before the start is compared, so that signal and wait are for the very process that was compared.
    """
    try:
        handle = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            return KillAnswer.GONE
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return _end_without_handle(pid, ticks, deadline_s)
        raise
    try:
        if not is_same_process(pid, ticks):
            return KillAnswer.GONE
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            return KillAnswer.GONE
        except PermissionError:
            return KillAnswer.FORBIDDEN
        waiter = select.poll()
        waiter.register(handle, select.POLLIN)
        return KillAnswer.GONE if waiter.poll(deadline_s * 1000) else _why_it_lives(pid)
    finally:
        os.close(handle)


def _end_without_handle(pid: int, ticks: int, deadline_s: float) -> KillAnswer:
    """For kernels without pidfd (before 5.3, some sandboxes): compare, kill, look again until it is gone."""
    reader = ProcessReader(pid, ticks)
    try:
        if reader.stat() is None:
            return KillAnswer.GONE
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return KillAnswer.GONE
        except PermissionError:
            return KillAnswer.FORBIDDEN
        until_s = time.monotonic() + deadline_s
        while time.monotonic() < until_s:
            if reader.stat() is None:
                return KillAnswer.GONE
            time.sleep(0.005)
        return _why_it_lives(pid)
    finally:
        reader.close()


def _why_it_lives(pid: int) -> KillAnswer:
    with suppress(OSError, ValueError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            if parse_stat((thread / "stat").read_bytes()).state == "D":
                return KillAnswer.IN_KERNEL
    return KillAnswer.LIVES
