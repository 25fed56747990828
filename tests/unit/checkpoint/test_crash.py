"""Kill the writer at every call to storage: the newest checkpoint is the old one or the whole new one, never else.

On a local disk the calls are those to the operating system, and three things may then happen to what was not synced:
nothing (the process was killed), or the machine lost power and names are gone, or names are there and bytes are not.
"""

from __future__ import annotations

import contextlib
import os
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from elastictrain_checkpoint import (
    Manifest,
    Store,
    commit,
    digest,
    disk,
    list_steps,
    load,
    newest,
    posix,
    prune,
    verify,
)
from tests.unit.checkpoint.build import make_state, memory_store, save, write_parts

OLD, NEW = make_state(seed=1), make_state(seed=2)
SMALL = make_state({"t": ("U8", (10,))})


class Killed(BaseException):
    """The process is gone: nothing that runs afterwards reaches storage."""


class Counter:
    def __init__(self, at: int | None) -> None:
        self.at = at
        self.calls = 0

    def tick(self) -> bool:
        """Whether this call is the fatal one; raises if the process is already dead."""
        self.calls += 1
        if self.at is not None and self.calls > self.at:
            raise Killed
        return self.calls == self.at


class KilledOs:
    """Stands in for `os` and `disk`: dies at one call (a write dies half done) and knows what is durable."""

    CALLS = (
        "open",
        "pwrite",
        "fsync",
        "close",
        "link",
        "unlink",
        "replace",
        "makedirs",
        "rmdir",
        "reserve",
        "start_writing_back",
    )

    def __init__(self, at: int | None, root: Path) -> None:
        self.counter = Counter(at)
        self.root = root
        self.opened: dict[int, Path] = {}
        self.synced_bytes = {f.stat().st_ino: f.stat().st_size for f in root.rglob("*") if f.is_file()}
        folders = [d for d in (root.parent, root, *root.rglob("*")) if d.is_dir()]
        self.synced_names = {folder: {entry.name for entry in folder.iterdir()} for folder in folders}

    def __getattr__(self, name: str) -> Any:
        real = getattr(disk if hasattr(disk, name) else os, name)
        if name not in self.CALLS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.counter.tick():
                if name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                raise Killed
            result = real(*args, **kwargs)
            self.note(name, args, result)
            return result

        return call

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self.opened[result] = Path(args[0])
        elif name == "fsync" and self.opened[args[0]].is_dir():
            self.synced_names[self.opened[args[0]]] = {entry.name for entry in self.opened[args[0]].iterdir()}
        elif name == "fsync":
            found = os.fstat(args[0])
            self.synced_bytes[found.st_ino] = found.st_size

    def lose_bytes(self) -> None:
        for file in [f for f in self.root.rglob("*") if f.is_file()]:
            kept = self.synced_bytes.get(file.stat().st_ino, 0)
            if kept < file.stat().st_size:
                os.truncate(file, kept)

    def lose_names(self) -> None:
        folders = [self.root.parent, self.root, *sorted(d for d in self.root.rglob("*") if d.is_dir())]
        for folder in folders:
            for entry in list(folder.iterdir()) if folder.is_dir() else []:
                if entry.name not in self.synced_names.get(folder, set()):
                    remove_tree(entry)


def remove_tree(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            remove_tree(entry)
        path.rmdir()
    else:
        path.unlink()


def save_new(store: Store) -> Manifest:
    parts = write_parts(store, NEW, step=2, attempt="new", pack_bytes=60_000)
    return commit(store, step=2, attempt="new", generation=2, parts=parts)


def check_whole(store: Store, *, must_be_new: bool, had_old: bool = True) -> int:
    found = newest(store)
    if found is None:
        assert not had_old
        assert not must_be_new
        return 0
    assert found.step == 2 or (had_old and not must_be_new)
    assert verify(store, found) == []
    assert digest(store, found) == found.digest
    return found.step


@pytest.mark.parametrize("had_old", [True, False])
@pytest.mark.parametrize("loss", ["process", "names", "bytes", "both"])
def test_killed_at_every_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, had_old: bool) -> None:
    outcomes = set()
    for at in range(1, 1000):
        root = tmp_path / f"{at}" / "store"
        root.parent.mkdir()
        store = Store(root)
        if had_old:
            save(store, OLD, step=1)
        system = KilledOs(at, root)
        returned = False
        with monkeypatch.context() as patch:
            patch.setattr(posix, "os", system)
            patch.setattr(posix, "disk", system)
            patch.setattr(posix, "WRITE_BACK_BYTES", 40_000)
            try:
                save_new(store)
                returned = True
            except Killed:
                pass
        if loss in ("bytes", "both"):
            system.lose_bytes()
        if loss in ("names", "both"):
            system.lose_names()
        outcomes.add(check_whole(store, must_be_new=returned, had_old=had_old))
        if system.counter.calls < at:
            break
    assert at > 40, "the crashes must go through the whole save"
    assert returned
    assert outcomes == {1 if had_old else 0, 2}


class KilledBackend:
    """A backend that dies at one verb: before it, half way through a new file, or after it (a lost answer)."""

    VERBS = ("create", "replace", "publish", "put", "remove", "size", "read_all", "list", "modified_s", "read_into")

    def __init__(self, backend: Any, at: int | None, when: str) -> None:
        self.backend = backend
        self.counter = Counter(at)
        self.when = when

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.backend, name)
        assert name in self.VERBS

        def call(*args: Any) -> Any:
            if not self.counter.tick():
                return real(*args)
            if self.when == "after":
                real(*args)
            elif self.when == "torn" and name in ("create", "replace"):
                real(args[0], half(args[1]))
            raise Killed

        return call


def half(blocks: Iterable[memoryview]) -> list[memoryview]:
    data = b"".join(bytes(block) for block in blocks)
    return [memoryview(data[: len(data) // 2])]


def dying(store: Store, at: int | None, when: str) -> tuple[Store, KilledBackend]:
    backend = KilledBackend(store._backend, at, when)
    return Store("dying", backend=backend), backend  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize("when", ["before", "torn", "after"])
def test_killed_at_every_verb_and_saved_again(tmp_path: Path, kind: str, when: str) -> None:
    outcomes = set()
    for at in range(1, 1000):
        store = memory_store() if kind == "memory" else Store(tmp_path / str(at))
        save(store, OLD, step=1)
        killed, backend = dying(store, at, when)
        returned = False
        try:
            save_new(killed)
            returned = True
        except Killed:
            pass
        step = check_whole(store, must_be_new=returned)
        outcomes.add(step)
        if step == 1:  # the next coordinator makes another attempt at the same step
            assert save(store, NEW, step=2, attempt="again", generation=3).attempt == "again"
            check_whole(store, must_be_new=True)
        if backend.counter.calls < at:
            break
    assert at > 8
    assert outcomes == {1, 2}


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_killed_at_every_verb_of_prune(tmp_path: Path, kind: str) -> None:
    for at in range(1, 1000):
        store = memory_store() if kind == "memory" else Store(tmp_path / str(at))
        for step in (1, 2, 3):
            save(store, SMALL, step=step, attempt="0f")  # sorts before MANIFEST.json
        write_parts(store, SMALL, step=4, attempt="given-up")
        killed, backend = dying(store, at, "before")
        with contextlib.suppress(Killed):
            prune(killed, 1, lease_s=0, now_s=1e12)
        found = newest(store)
        assert found is not None
        assert found.step == 3
        for step in list_steps(store):
            load(store, step)  # a manifest never outlives its data
        assert verify(store, found) == []
        result = prune(store, 1, lease_s=0, now_s=1e12)  # the next call finishes the work
        assert result.kept == [3]
        assert [name for name in store.list() if name.startswith("step")] == ["step-00000003"]
        if backend.counter.calls < at:
            break
    assert at > 20


def test_the_stand_in_replaces_all_that_the_module_uses() -> None:
    """If posix.py starts to use another call that changes the disk, the crash tests must learn it."""
    assert isinstance(posix.os, types.ModuleType)
    harmless = {
        "O_WRONLY",
        "O_CREAT",
        "O_EXCL",
        "O_CLOEXEC",
        "O_RDONLY",
        "O_DIRECTORY",
        "preadv",
        "fstat",
        "stat_result",
        "listdir",
        "statvfs",
    }
    source = Path(posix.__file__).read_text()
    used = set(re.findall(r"\b(?:os|disk)\.(\w+)", source))
    assert used <= harmless | set(KilledOs.CALLS)
    assert not re.search(r"\.write_(bytes|text)\(|\.mkdir\(|\.rename\(|\.touch\(|[^.\w]open\(", source)
