"""What a controller must find again when it comes back: the journal, the generations taken, the controllers before it.

All lie in the run directory: `journal.jsonl`, `generations/`, `controllers/`. Numbers are taken by creating a file,
which only one process can do (compare-and-set, R5): so a second controller, or one that was thought dead and wakes,
changes nothing that anyone can see.
"""

from __future__ import annotations

import time
from pathlib import Path

from elastictrain.errors import ClusterError


class Replaced(ClusterError):
    """Another controller has taken over this run; this one must end without touching anything."""


class JournalFile:
    """`driver.Journal` on a folder. Opening it takes the next controller's number, the epoch."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal.jsonl"
        self._generations, self._controllers = folder / "generations", folder / "controllers"
        try:
            for made in (self._generations, self._controllers):
                made.mkdir(exist_ok=True)
            self.epoch = _newest(self._controllers) + 1
            while not _create(self._controllers / f"{self.epoch:04d}", ""):
                self.epoch += 1
            self._file = self._path.open("a+", encoding="utf-8")
            self._close_torn_line()
        except OSError as error:
            raise self._unwritable(error) from error

    def lines(self) -> list[str]:
        """All that earlier controllers of this run have written."""
        return self._path.read_text(encoding="utf-8").splitlines()

    def silent_for_s(self) -> float:
        """Since the last line was written, by the clock of the machine that holds the folder."""
        return max(0.0, time.time() - self._path.stat().st_mtime)

    def claim(self, generation: int) -> bool:
        """Take a generation. False when a controller that this one knows nothing of has it. What a predecessor has
        taken is ours: its journal led us to the same plan.
        """
        path = self._generations / f"{generation:08d}"
        try:
            if _create(path, str(self.epoch)):
                return True
            return int(path.read_text(encoding="utf-8") or 0) <= self.epoch
        except OSError as error:
            raise self._unwritable(error) from error

    def append(self, line: str) -> None:
        """Raises Replaced when a newer controller has begun, ClusterError when the disk does not take it."""
        if (self._controllers / f"{self.epoch + 1:04d}").exists():
            raise Replaced(f"controller {self.epoch} of {self._path.parent} has been replaced by a newer one")
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        self._file.close()

    def _close_torn_line(self) -> None:
        """A predecessor may have died in the middle of a line, which nobody has acted on: cut it off."""
        text = self._path.read_bytes()
        if text and not text.endswith(b"\n"):
            self._file.truncate(text.rfind(b"\n") + 1)

    def _unwritable(self, error: OSError) -> ClusterError:
        return ClusterError(f"journal {self._path} cannot be written: {error}; free the disk under run_dir")


def begin_anew(folder: Path) -> int:
    """Before a run is resumed from a checkpoint: set the old journal aside (`journal-1.jsonl`, ...). Returns the newest
    generation that was ever taken here; new ones must be above it.
    """
    journal, number = folder / "journal.jsonl", 1
    if journal.exists():
        while (folder / f"journal-{number}.jsonl").exists():
            number += 1
        journal.rename(folder / f"journal-{number}.jsonl")
    return _newest(folder / "generations")


def _newest(folder: Path) -> int:
    return max((int(file.name) for file in folder.iterdir()), default=0) if folder.is_dir() else 0


def _create(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True
