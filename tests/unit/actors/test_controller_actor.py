"""The controller's actor without Ray: on a real run directory, with a disk that takes no more."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastictrain.controller import commands as cmd
from elastictrain.controller import events as ev
from elastictrain.controller.journal import dump_event
from elastictrain.errors import ClusterError
from elastictrain.job import Data, Job, Workers
from elastictrain.observe import RunDirectory
from elastictrain.protocol import ModelFacts, Restore, Row
from elastictrain_actors import controller_actor
from elastictrain_actors.controller_actor import ControllerActor, RunOrder
from elastictrain_actors.driver import Outcome
from elastictrain_actors.journal_file import JournalFile
from tests.unit.actors.test_driver import DONE, READY, Scripted

FACTS = ModelFacts((4096,) * 4, 16384, "AdamW", 2, 0, 0)
LIMIT_BYTES = 4096


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The system refuses every write beyond `size` bytes of a file (EFBIG), as a full disk does (ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class OneWorker(Scripted):
    """Does all that it is asked; stands for `RayEffects`."""

    made: list[OneWorker]

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__([READY], [ev.Sealed(0.0, 1, 0, 0), Row({"step": 1, "loss": 1.0})], DONE[1:])
        OneWorker.made.append(self)

    def close(self) -> None:
        self.commands.append("close")


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunOrder]:
    monkeypatch.setattr(controller_actor, "RayEffects", OneWorker)
    monkeypatch.setattr(controller_actor, "LINGER_S", 0.0)
    ended: list[Any] = []
    ray = SimpleNamespace(
        get_actor=lambda name, namespace: (name, namespace), kill=lambda handle, **how: ended.append(handle)
    )
    monkeypatch.setattr(controller_actor, "ray", ray)
    OneWorker.made = []
    job = Job(
        recipe="unused.py:Recipe",
        data=Data(kind="jsonl", path="unused.jsonl"),
        lanes=4,
        steps=8,
        workers=Workers(max=1, replace=False),
    )
    RunDirectory.create(tmp_path / "run", job).close()
    yield RunOrder(job, str(tmp_path / "run"), FACTS, Restore(0, None), (), (), {}, "namespace", "token")
    for thread in threading.enumerate():
        if thread.name == "elastictrain-controller":
            thread.join(60)
    assert ended == [("controller", "namespace")], "when all is over it ends its own actor"


def run_to_its_end(actor: ControllerActor) -> tuple[list[tuple[str, Any]], Outcome]:
    """As the watcher sees it."""
    items: list[tuple[str, Any]] = []
    until_s, outcome = time.monotonic() + 60.0, None
    while outcome is None and time.monotonic() < until_s:
        found, outcome = actor.take(1.0)
        items += found
    assert outcome is not None, "the outcome never reached the watcher"
    return items, outcome


def test_with_room_the_run_finishes(order: RunOrder) -> None:
    with no_file_larger_than(LIMIT_BYTES):
        items, outcome = run_to_its_end(ControllerActor(order))
    assert (outcome.outcome, outcome.digest) == ("finished", "abc")
    assert [values["step"] for kind, values in items if kind == "row"] == [1, 8]


def test_with_nobody_watching_it_writes_the_summary_itself(order: RunOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_actor, "ALONE_S", 0.0)
    ControllerActor(order)
    for thread in threading.enumerate():
        if thread.name == "elastictrain-controller":
            thread.join(20)
    found = RunDirectory.open(order.run_dir).read_summary()
    assert found is not None
    assert (found["outcome"], found["digest"]) == ("finished", "abc")


def journal(file: Path) -> None:
    file.write_text((dump_event(ev.Tick(0.0)) + "\n") * (LIMIT_BYTES // 20))


def lines(file: Path) -> None:
    file.write_text("\n" * LIMIT_BYTES)


FILLED: dict[str, Callable[[Path], None]] = {
    "journal.jsonl": journal,
    "events.jsonl": lines,
    "metrics.jsonl": lines,
    "status.json": Path.mkdir,  # no file can be put in its place
}


@pytest.mark.parametrize("full", FILLED)
def test_the_watcher_hears_of_a_full_disk_and_the_workers_are_killed(full: str, order: RunOrder) -> None:
    FILLED[full](Path(order.run_dir) / full)
    with no_file_larger_than(LIMIT_BYTES):
        actor = ControllerActor(order)
        _, outcome = run_to_its_end(actor)
    assert outcome.outcome == "failed"
    error = outcome.error or ""
    assert error.startswith("ClusterError: "), error
    assert full in error
    assert "cannot be written" in error
    assert "run_dir" in error.replace(order.run_dir, "")
    (effects,) = OneWorker.made
    started = {c.worker for c in effects.commands if isinstance(c, cmd.StartWorker)}
    assert {c.worker for c in effects.commands if isinstance(c, cmd.Kill)} == started
    assert effects.commands[-1] == "close"


def test_the_watcher_hears_of_what_nobody_has_thought_of(order: RunOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is none of ours ends the thread; a watcher that hears nothing would wait for ever."""

    def broken(self: OneWorker, timeout_s: float) -> list[Any]:
        raise RuntimeError("nobody has thought of this")

    monkeypatch.setattr(OneWorker, "poll", broken)
    _, outcome = run_to_its_end(ControllerActor(order))
    assert outcome == Outcome("failed", 0, None, "InternalError: RuntimeError: nobody has thought of this")
    assert OneWorker.made[0].commands[-1] == "close", "and its workers end with it"


def test_closing_a_journal_on_a_full_disk_fails_again(tmp_path: Path) -> None:
    """What could not be written still waits in the file's buffer: hence the care with which the actor closes."""
    journal(tmp_path / "journal.jsonl")
    full = JournalFile(tmp_path)
    with no_file_larger_than(LIMIT_BYTES):
        with pytest.raises(ClusterError, match=r"^journal .*journal\.jsonl cannot be written: .*under run_dir$"):
            full.append("line")
        with pytest.raises(OSError, match="File too large"):
            full.close()
