"""Following a run from outside: what is added arrives once and in order, whoever writes, whenever it is looked at."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.errors import ClusterError
from elastictrain.observe import Blind, Event, MetricsRow, RunDirectory, summarise
from elastictrain.observe.follow import Tail, follow, followed_events
from elastictrain.observe.standing import AWAY_S, complete, is_gone, silent_for_s, status_of
from tests.unit.observe.story import STEPS, job, tell


@given(
    records=st.lists(st.integers(0, 10**6), max_size=30),
    cuts=st.lists(st.integers(1, 12), max_size=60),
    torn=st.integers(0, 29),
)
def test_a_tail_gives_every_whole_line_once_however_it_is_cut(
    records: list[int], cuts: list[int], torn: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Written in pieces of any size; after record `torn` a writer died in the middle of a line, closed later."""
    path = tmp_path_factory.mktemp("tail") / "lines"
    text = "".join(f'{{"n":{n}}}\n' + ('{"n":\n' if i == torn else "") for i, n in enumerate(records)).encode()
    tail, got = Tail(path), []
    assert tail.more() == []
    for cut in cuts:
        piece, text = text[:cut], text[cut:]
        with path.open("ab") as file:
            file.write(piece)
        got += tail.more()
    with path.open("ab") as file:
        file.write(text)
    got += tail.more()
    assert got == [{"n": n} for n in records]
    assert tail.more() == []


def test_a_tail_may_begin_near_the_end(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("".join(f'{{"n":{n}}}\n' for n in range(1000, 1100)))
    tail = Tail(path, last_bytes=50)
    assert [record["n"] for record in tail.more()] == [1096, 1097, 1098, 1099], "whole lines only"
    with path.open("a") as file:
        file.write('{"n":7}\n')
    assert tail.more() == [{"n": 7}]


def test_a_tail_of_a_file_that_was_replaced_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"n":1}\n{"n":2}\n')
    tail = Tail(path)
    assert len(tail.more()) == 2
    path.write_text('{"n":3}\n')
    assert tail.more() == [{"n": 3}]


def test_a_tail_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot be read"):
        Tail(tmp_path).more()


class Seen(Blind):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.before: tuple[int, int] = (0, 0)
        self.rows: list[int] = []
        self.kinds: list[str] = []
        self.states: list[str] = []

    def catch_up(self, status: Mapping[str, Any], rows: Sequence[MetricsRow], events: Sequence[Event]) -> None:
        self.states.append(status["state"])
        self.before = (rows[-1].step if rows else 0, len(events))

    def update(self, status: Mapping[str, Any]) -> None:
        self.states.append(status["state"])

    def row(self, metrics: Mapping[str, Any]) -> None:
        self.rows.append(metrics["step"])

    def event(self, event: Event) -> None:
        self.kinds.append(event.kind)


def acting(*acts: Callable[[], object]) -> Callable[[float], None]:
    """Stands for waiting: each wait, one act; one wait more than acts is a watcher that does not end."""
    left = list(acts)

    def pause(seconds: float) -> None:
        assert seconds > 0
        assert left, "waits although nothing will come"
        left.pop(0)()

    return pause


@pytest.fixture
def going(tmp_path: Path) -> Iterator[RunDirectory]:
    """A run under way, at step 40 of 44, held by this process."""
    tell(tmp_path / "run", end=None)
    run = RunDirectory.resume(tmp_path / "run", job())
    run.status({"state": "running", "steps": 44, "step": STEPS, "world": 2})
    yield run
    run.close()


def test_follow_shows_what_comes_until_the_end(going: RunDirectory) -> None:
    def last_steps() -> None:
        going.row({"step": 43, "loss": 1.0})
        with (going.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": "none"}\n')
        going.row({"step": 44, "loss": 1.0})
        going.event("finished", {"step": 44, "digest": "ab"})

    first, second = Seen(), Seen()
    known = len(going.events())
    end = follow(
        RunDirectory.open(going.path),
        first,
        pause=acting(
            lambda: going.row({"step": 41, "loss": 1.0}),
            lambda: (going.event("worker_lost", {"worker": 2}), going.status({"state": "parking"})),
            lambda: going.row({"step": 42, "loss": 1.0}),
            last_steps,
        ),
    )
    assert end is not None
    assert (end.kind, end.data["digest"]) == ("finished", "ab")
    assert first.before == (STEPS, known)
    assert first.rows == [41, 42, 43, 44]
    assert first.kinds == ["worker_lost", "finished"]
    assert first.states[0] == "running"
    assert "parking" in first.states
    assert first.states[-1] == "finished"
    assert follow(going, second, pause=acting()) == end, "one that comes late sees the end at once"
    assert (second.rows, second.kinds) == ([], [])


def test_a_run_that_was_taken_up_again_is_followed_on(going: RunDirectory) -> None:
    going.event("stopped", {"step": STEPS})
    going.event("run_resumed", {"step": STEPS})
    end = follow(going, Seen(), pause=acting(lambda: going.event("failed", {"error": "x"})))
    assert end is not None
    assert end.kind == "failed"


def grow_old(run: RunDirectory, seconds: float) -> None:
    for file in run.path.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


def test_a_controller_that_is_away_is_waited_for_one_that_is_gone_is_not(going: RunDirectory) -> None:
    assert not is_gone(going), "it is held"
    grow_old(going, 10 * AWAY_S)
    assert not is_gone(going), "a process that lives holds it: frozen, perhaps"
    going.close()
    assert not is_gone(going), "it has just been let go"
    viewer = Seen()
    gone = follow(going, viewer, pause=acting(lambda: grow_old(going, AWAY_S / 2), lambda: grow_old(going, AWAY_S + 1)))
    assert gone is None
    assert is_gone(going)
    assert AWAY_S < silent_for_s(going) < 2 * AWAY_S
    assert list(followed_events(going, pause=acting())) == going.events()


def test_what_was_written_before_the_silence_is_still_shown(going: RunDirectory) -> None:
    """Death between two looks: the last words count."""

    def die() -> None:
        going.event("checkpoint", {"step": 41, "path": "p"})
        going.row({"step": 41, "loss": 1.0})
        going.close()
        grow_old(going, AWAY_S + 1)

    viewer = Seen()
    assert follow(going, viewer, pause=acting(die)) is None
    assert (viewer.kinds, viewer.rows) == (["checkpoint"], [41])


def test_the_status_of_a_run_whose_controller_has_not_said_anything_yet(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", job()) as run:
        run.event("run_started", {"name": "gpt", "steps": 9})
        status = status_of(run)
    assert (status.state, status.name, status.step, status.steps) == ("gathering", "gpt", 0, 9)


def test_whoever_looks_completes_what_a_killed_driver_has_left(tmp_path: Path) -> None:
    run = tell(tmp_path / "run")
    assert run.read_summary() is None
    summary = complete(run)
    assert run.read_summary() == json.loads(summary.line())
    assert summary == summarise(run)
    assert run.loss_png.read_bytes().startswith(b"\x89PNG")
    run.loss_png.unlink()
    assert complete(run) == summary
    assert not run.loss_png.exists(), "a run that is complete is left alone"


def test_a_summary_of_an_earlier_end_is_replaced(tmp_path: Path) -> None:
    run = tell(tmp_path / "run", end="stopped")
    complete(run)
    with RunDirectory.resume(run.path, job()) as more:
        more.event("run_resumed", {"step": STEPS})
        assert complete(run).outcome == "running"
        assert (run.read_summary() or {})["outcome"] == "stopped", "it has not ended again yet"
        more.event("finished", {"step": STEPS, "digest": "cd"})
    assert complete(run).digest == "cd"
    assert (run.read_summary() or {})["digest"] == "cd"


def test_a_folder_that_may_only_be_read_is_looked_at_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tell(tmp_path / "run")

    def full(path: Path, text: str) -> None:
        raise ClusterError(f"{path}: cannot be written")

    monkeypatch.setattr("elastictrain.observe.rundir.replace_file", full)
    assert complete(run).outcome == "finished"
    assert run.read_summary() is None
