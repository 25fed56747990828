"""Following a run that is under way by what it writes: needs no connection to it, and any number may do so at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from elastictrain.errors import ClusterError
from elastictrain.observe.events import Event, parse_events
from elastictrain.observe.lines import decode
from elastictrain.observe.metrics import MetricsRow, history, parse_rows
from elastictrain.observe.observer import Observer
from elastictrain.observe.rundir import RunDirectory
from elastictrain.observe.standing import is_gone, status_of
from elastictrain.observe.summary import ENDINGS

POLL_S = 0.25
ROWS_BYTES = 2**20
"""Rows before these last bytes are too old to be looked at."""


class Tail:
    """The whole records that are added to a file of JSON lines, each once. A file that is not there yet is empty.

    `last_bytes`: leave out what lies before them.
    """

    def __init__(self, path: Path, *, last_bytes: int | None = None) -> None:
        self._path, self._last_bytes = path, last_bytes
        self._at, self._torn = 0, b""

    def more(self) -> list[dict[str, Any]]:
        """What is new since the last call. Raises ClusterError when it cannot be read."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self._at:  # it has been replaced
                    self._at, self._torn = 0, b""
                if self._at == 0 and self._last_bytes is not None:
                    self._at = max(0, size - self._last_bytes)  # what is left of a record cut there is none
                file.seek(self._at)
                data = file.read(size - self._at)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ClusterError(f"{self._path}: cannot be read: {error.strerror or error}") from error
        self._at += len(data)
        *whole, self._torn = (self._torn + data).split(b"\n")
        found = (decode(line) for line in whole)
        return [record for record in found if record is not None]


class Viewer(Observer, Protocol):
    """An observer that may come late."""

    def catch_up(self, status: Mapping[str, Any], rows: Sequence[MetricsRow], events: Sequence[Event]) -> None:
        """What has been before: where it stands, and the last rows and events, oldest first."""


def follow(run: RunDirectory, viewer: Viewer, *, pause: Callable[[float], None] = time.sleep) -> Event | None:
    """Show the run until it is over; returns its end (finished, failed or stopped), or None when nobody writes to it
    any more although it has not ended. `pause`: waits for so many seconds.
    """
    events, rows = _Events(run), Tail(run.path / "metrics.jsonl", last_bytes=ROWS_BYTES)
    known = events.more()
    viewer.catch_up(status_of(run).model_dump(), history(parse_rows(rows.more())), known)
    status_at: int | None = None
    while events.end is None:
        gone = is_gone(run)  # asked first: what was written before the end is still read
        new = events.more()
        for record in rows.more():
            if parse_rows([record]):
                viewer.row(record)
        for event in new:
            viewer.event(event)
        changed_at = _changed(run.path / "status.json")
        if changed_at != status_at and events.end is None:
            status_at, status = changed_at, run.read_status()
            if status is not None:
                viewer.update(status.model_dump())
        if events.end is None:
            if gone:
                return None
            pause(POLL_S)
    viewer.update(status_of(run).model_dump())
    return events.end


def followed_events(run: RunDirectory, *, pause: Callable[[float], None] = time.sleep) -> Iterator[Event]:
    """All events, those that come later too, until the run is over or nobody writes to it any more."""
    events = _Events(run)
    while True:
        gone = is_gone(run)
        yield from events.more()
        if gone or events.end is not None:
            return
        pause(POLL_S)


class _Events:
    """The events of a run as they come. `end`: that of the run, unless it was taken up again."""

    def __init__(self, run: RunDirectory) -> None:
        self._tail = Tail(run.path / "events.jsonl")
        self.end: Event | None = None

    def more(self) -> list[Event]:
        found = parse_events(self._tail.more())
        for event in found:
            if event.kind in ENDINGS:
                self.end = event
            elif event.kind in ("run_started", "run_resumed"):
                self.end = None
        return found


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
