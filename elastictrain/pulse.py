"""The pulse of a worker: a few words in shared memory that say what it is doing and when it last got on with it.

The training thread writes at every sign of progress (phase change, lane, gradient), which must cost next to nothing,
and it must not need anybody's help to be read: a stopped or spinning process answers no question. So the pulse is a
small mapped file, written in place, and read by the node's agent. Standard library only: the agent imports no torch.

A beat is written into one of two slots in turn, between two copies of its count. A reader takes the newest slot whose
counts agree and that reads the same twice (a sequence lock, Lamport 1977, with the older slot to fall back on when a
writer was stopped in the middle of the newer one).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic_ns

from elastictrain.errors import ClusterError
from elastictrain.signs import Activity, Beat

MAGIC = b"etpulse1"
SUFFIX = ".pulse"
FILE_BYTES = 4096
_HEADER = struct.Struct("<8sqqqq")  # magic, worker, pid, start ticks, thread
_THREAD = struct.Struct("<q")
_THREAD_AT = _HEADER.size - _THREAD.size
_SLOT = struct.Struct("<10q")  # count, generation, step, activity, steps done, step ns, entered ns, beat ns, 0, count
_SLOTS_AT = (64, 192)
_COUNT_AT = 0
_READ_TRIES = 3
_PREFIX = "elastictrain-"


def start_ticks(pid: int) -> int | None:
    """When a process started, in the kernel's ticks since boot: with the pid it names the process for good. None when
    there is no such process; 0 where the kernel does not say (no /proc).
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else 0
    except ProcessLookupError:
        return None
    return int(text[text.rindex(b")") + 2 :].split()[19])


def pulse_home() -> Path:
    """Where the folders of all runs lie: memory where the node has a writable /dev/shm, else its temporary folder."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def pulse_folder(run: str, home: Path | None = None) -> Path:
    """This node's folder for the pulses of `run`, made if it is not there, closed to other users.

    Raises ClusterError when something else has the name: in a folder that all may write to, somebody could have put a
    link there.
    """
    name = hashlib.sha256(run.encode()).hexdigest()[:16]
    folder = (home or pulse_home()) / f"{_PREFIX}{os.getuid()}-{name}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ClusterError(f"{folder} should be this user's folder for signs of life, but is not; remove it")
    return folder


class Pulse:
    """Written by one thread at a time. `path` None: nobody reads it (tests, a node without room for the file)."""

    __slots__ = (
        "_activity", "_count", "_entered_ns", "_generation", "_memory", "_pack", "_step", "_step_ns",
        "_step_started_ns", "_steps_done", "path",
    )  # fmt: skip

    def __init__(self, path: Path | None, memory: mmap.mmap | bytearray) -> None:
        self.path, self._memory, self._pack = path, memory, _SLOT.pack_into
        self._count = self._generation = self._step = self._steps_done = 0
        self._activity = int(Activity.STARTING)
        self._step_ns = self._step_started_ns = 0
        self._entered_ns = monotonic_ns()

    @classmethod
    def create(cls, folder: Path, worker: int) -> Pulse:
        """Of the calling process. Raises OSError when the file cannot be made; `create_or_mute` goes on without."""
        pid = os.getpid()
        path = folder / f"{worker}-{pid}{SUFFIX}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, FILE_BYTES)  # a write into a hole of a full file system would be a SIGBUS
            memory = mmap.mmap(fd, FILE_BYTES)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(fd)
        pulse = cls(path, memory)
        pulse.beat()
        _HEADER.pack_into(memory, 0, b"", worker, pid, start_ticks(pid) or 0, threading.get_native_id())
        memory[: len(MAGIC)] = MAGIC  # last: a file without it has no pulse yet
        return pulse

    @classmethod
    def create_or_mute(cls, folder: Path | None, worker: int) -> tuple[Pulse, str]:
        """(the pulse, why nobody will read it): a node without room for 4 KiB must not keep a worker from starting."""
        if folder is None:
            return cls(None, bytearray(FILE_BYTES)), "no folder"
        try:
            return cls.create(folder, worker), ""
        except OSError as error:
            return cls(None, bytearray(FILE_BYTES)), f"{type(error).__name__}: {error}"

    def adopt(self) -> None:
        """The calling thread is the training thread from now on."""
        _THREAD.pack_into(self._memory, _THREAD_AT, threading.get_native_id())

    @property
    def activity(self) -> Activity:
        return Activity(self._activity)

    def beat(self) -> None:
        """Progress, of whatever kind. About a microsecond: call it for every gradient."""
        count = self._count = self._count + 1
        self._pack(
            self._memory, _SLOTS_AT[count & 1], count, self._generation, self._step, self._activity, self._steps_done,
            self._step_ns, self._entered_ns, monotonic_ns(), 0, count,
        )  # fmt: skip

    def enter(self, activity: Activity) -> None:
        """Begin another activity (or the same one again: it then counts anew)."""
        self._activity = int(activity)
        self._entered_ns = monotonic_ns()
        self.beat()

    def begin_step(self, generation: int, step: int, activity: Activity = Activity.COMPUTE) -> None:
        """Step `step` begins. What went before it in this generation is measured only between `begin_step` and
        `end_step`: evaluation and storing between steps do not count as a step.
        """
        self._generation, self._step = generation, step
        self._step_started_ns = monotonic_ns()
        self.enter(activity)

    def end_step(self) -> None:
        """The step that was begun is complete (applied and gathered)."""
        self._step_ns = monotonic_ns() - self._step_started_ns
        self._steps_done += 1
        self.beat()

    def at(self, generation: int, step: int, activity: Activity) -> None:
        """A place outside of steps: forming, idle."""
        self._generation, self._step = generation, step
        self.enter(activity)

    def close(self) -> None:
        """Leave in order: the agent need not ask what became of this worker."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class PulseFile:
    """The reader's side of one pulse. Reads with `pread`, not through a mapping: a file cut short by somebody must not
    end the reader with SIGBUS.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file cannot be opened, ValueError when it is no pulse (yet)."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        header = os.pread(self._fd, _HEADER.size, 0)
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            os.close(self._fd)
            self._fd = -1
            raise ValueError(f"{path} is no pulse")
        _, self.worker, self.pid, self.start_ticks, _ = _HEADER.unpack(header)

    def thread(self) -> int:
        """Kernel id of the training thread."""
        raw = os.pread(self._fd, _THREAD.size, _THREAD_AT)
        return (_THREAD.unpack(raw)[0] if len(raw) == _THREAD.size else 0) or self.pid

    def read(self) -> Beat | None:
        """The newest whole beat; the one before it while the newest is being written; None when none can be read."""
        for _ in range(_READ_TRIES):
            newest: tuple[int, ...] | None = None
            for offset in _SLOTS_AT:
                first, second = os.pread(self._fd, _SLOT.size, offset), os.pread(self._fd, _SLOT.size, offset)
                if first != second or len(first) != _SLOT.size:
                    continue
                slot = _SLOT.unpack(first)
                if slot[0] == slot[-1] > 0 and (newest is None or slot[0] > newest[0]):
                    newest = slot
            if newest is not None:
                return self._beat(newest)
        return None

    def _beat(self, slot: tuple[int, ...]) -> Beat | None:
        count, generation, step, activity, steps_done, step_ns, entered_ns, beat_ns, _, _ = slot
        if activity not in _ACTIVITIES:
            return None
        return Beat(
            self.worker, self.pid, self.start_ticks, self.thread(), count, generation, step, Activity(activity),
            steps_done, step_ns / 1e9, beat_ns / 1e9, entered_ns / 1e9,
        )  # fmt: skip

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_ACTIVITIES = frozenset(int(activity) for activity in Activity)


def pulse_paths(folder: Path) -> Iterator[Path]:
    """The pulses that lie in a folder; none when it is gone."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from (Path(entry.path) for entry in entries if entry.name.endswith(SUFFIX))


def is_same_process(pid: int, ticks: int) -> bool:
    """Whether the process that started at `ticks` still has this pid (a zombie counts)."""
    found = start_ticks(pid)
    return found is not None and found == ticks


def sweep(home: Path | None = None) -> list[Path]:
    """Remove this user's folders of runs whose workers have all gone without an agent to clean up after them. Folders
    that are empty are left: somebody may be about to use them.
    """
    removed = []
    for folder in (home or pulse_home()).glob(f"{_PREFIX}{os.getuid()}-*"):
        with suppress(OSError):
            paths = list(pulse_paths(folder))
            if paths and all(_is_orphan(path) for path in paths):
                for path in paths:
                    path.unlink(missing_ok=True)
                folder.rmdir()
                removed.append(folder)
    return removed


def _is_orphan(path: Path) -> bool:
    try:
        file = PulseFile(path)
    except ValueError:
        return False  # just being made
    file.close()
    return not is_same_process(file.pid, file.start_ticks)
