"""The run directory: everything a run leaves behind for people.

`job.yaml` (the job as it ran), `events.jsonl`, `metrics.jsonl`, `status.json`, `summary.json`, `loss.png`, `lock`;
`data.json` (the stages of the data order and the fingerprint of the data), `data/` (the index of data that it used),
`skips.json` (what is to be taken out);
`signals.jsonl` (what every worker said of its steps).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.job import Job, dump_job
from elastictrain.observe.events import Event, iso, make_event, parse_events, step_back
from elastictrain.observe.lines import LineWriter, read_lines, replace_file
from elastictrain.observe.lock import RunLock
from elastictrain.observe.metrics import Happened, MetricsRow, history, parse_rows
from elastictrain.observe.status import Status

if TYPE_CHECKING:
    from elastictrain.observe.signal_log import Records, SignalLog

RUNS = Path("runs")
_NONE: Mapping[str, str] = {}
T = TypeVar("T")


class RunDirectory:
    """Reads a run directory, and, while it holds the lock, writes to it.

    `create` and `resume` take the lock (a context manager, or `close`, gives it back); `open` only reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: RunLock | None = None
        self._events: LineWriter | None = None
        self._metrics: LineWriter | None = None
        self._signals: SignalLog | None = None
        self._happened = Happened()

    @classmethod
    def create(cls, path: str | Path | None, job: Job, *, now: datetime | None = None) -> Self:
        """A new run's directory, locked. `path` None: `job.run_dir`, or `runs/<name>-<UTC time>`.

        Raises ConfigError when the directory is in use or already holds a run, ClusterError when it cannot be written.
        """
        chosen = path or job.run_dir
        folder = Path(chosen) if chosen else _unused(RUNS / default_name(job.name, now or datetime.now(UTC)))
        run = cls(folder)
        run._take(make=True)
        if (folder / "events.jsonl").exists() or (folder / "job.yaml").exists():
            run.close()
            raise ConfigError(
                f"run_dir={str(folder)!r} already holds a run; go on with it (--resume) or set run_dir (--run-dir) "
                "to another folder"
            )
        run._write_from_now_on(job)
        return run

    @classmethod
    def resume(cls, path: str | Path, job: Job) -> Self:
        """An existing run's directory, locked, to be appended to; `job.yaml` becomes the job as it runs now.

        The job as it ran before is kept as `job-1.yaml`, `job-2.yaml`, ... when it differs. Raises as `create`.
        """
        run = cls.open(path)
        run._take(make=False)
        before, number = run._read_text("job.yaml"), 1
        if before is not None and before != dump_job(job):
            while (run.path / f"job-{number}.yaml").exists():
                number += 1
            replace_file(run.path / f"job-{number}.yaml", before)
        run._happened = run._read_happened()
        run._happened.last_step = max((row.step for row in run._rows(run._happened)), default=0)
        run._write_from_now_on(job)
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing run's directory, to read. Raises ConfigError when there is none."""
        folder = Path(path)
        if not (folder / "job.yaml").is_file() and not (folder / "events.jsonl").is_file():
            raise ConfigError(f"RUN {str(folder)!r}: not a run directory; expected a folder with job.yaml in it")
        return cls(folder)

    @property
    def loss_png(self) -> Path:
        return self.path / "loss.png"

    @property
    def data_folder(self) -> Path:
        """Where the index of the data is kept."""
        return self.path / "data"

    @property
    def last_step(self) -> int:
        """The last step written to metrics.jsonl that has not been taken back."""
        return self._happened.last_step

    def event(self, kind: str, data: Mapping[str, Any] | None = None, *, generation: int | None = None) -> Event:
        """Append to events.jsonl. Where it says that the run went back, later steps are written again."""
        event = make_event(kind, data, generation=generation, time=datetime.now(UTC))
        self._writer(self._events).append(event.model_dump())
        _note_back(self._happened, event)
        return event

    def row(self, metrics: Mapping[str, Any]) -> bool:
        """Append to metrics.jsonl; False (nothing is written) for a step that is there already, or was taken back."""
        writer = self._writer(self._metrics)
        if not self._happened.add(int(metrics["step"]), int(metrics.get("generation") or 0)):
            return False
        writer.append(metrics)
        return True

    def signals(self, generation: int, step: int, workers: Sequence[int], records: Records, *, excused: int) -> bool:
        """Append to signals.jsonl what `workers` said of a step (structured records in their order); `excused`: bits of
        their `flags` with which a step says nothing of speed. False when this step is left out, as in long runs.
        """
        self._writer(self._metrics)  # only who writes
        if self._signals is None:
            from elastictrain.observe.signal_log import SignalLog  # NumPy: only where there are signals

            self._signals = SignalLog(self.path, records.dtype, excused=excused)
        return self._signals.append(generation, step, workers, records)

    def status(self, status: Mapping[str, Any]) -> None:
        """Replace status.json; the time is added."""
        record = Status.model_validate({"run_dir": str(self.path), **status, "updated": iso(datetime.now(UTC))})
        replace_file(self.path / "status.json", record.model_dump_json(indent=2, exclude_none=True) + "\n")

    def write_summary(self, summary_json: str) -> None:
        replace_file(self.path / "summary.json", summary_json + "\n")

    def write_data(
        self, stages: Sequence[Mapping[str, Any]], fingerprint: Mapping[str, Any], sources: Mapping[str, str] = _NONE
    ) -> None:
        """Replace data.json: the stages of the data order, the last one in force, and what the data are. `sources`: by
        name what identifies the sources of a mixture; those that the run had before stay known.
        """
        record = {"version": 1, "stages": [dict(stage) for stage in stages], "fingerprint": dict(fingerprint)}
        if known := {**(self.read_data() or {}).get("sources", {}), **sources}:
            record["sources"] = known
        replace_file(self.path / "data.json", json.dumps(record) + "\n")

    def read_data(self) -> dict[str, Any] | None:
        """`{"stages": […], "fingerprint": {…}}`, of a mixture also "sources"; None when it was not written yet. Raises
        ClusterError for a file that cannot be read.
        """
        return self._read_json("data.json", dict)

    def read_skips(self) -> list[dict[str, Any]]:
        """What `elastictrain data skip` was asked for, in order. Raises as `read_data`."""
        return self._read_json("skips.json", list) or []

    def add_skip(self, skip: Mapping[str, Any]) -> int:
        """Append to skips.json; returns how many there are. Raises ConfigError while the run is being written to."""
        self._take(make=False)
        try:
            skips = [*self.read_skips(), dict(skip)]
            replace_file(self.path / "skips.json", json.dumps(skips, indent=2) + "\n")
        finally:
            self.close()
        return len(skips)

    def events(self) -> list[Event]:
        return parse_events(read_lines(self.path / "events.jsonl"))

    def metrics(self) -> list[MetricsRow]:
        """What happened, steps ascending, each once (see `metrics.history`)."""
        return self._rows(self._read_happened())

    def _rows(self, happened: Happened) -> list[MetricsRow]:
        rows = parse_rows(read_lines(self.path / "metrics.jsonl"))
        return history(row for row in rows if happened.has(row.step, row.generation))

    def _read_happened(self) -> Happened:
        """What the events say was taken back."""
        happened = Happened()
        for event in self.events():
            _note_back(happened, event)
        return happened

    def read_status(self) -> Status | None:
        """None when no status was written yet, or none that can be read."""
        text = self._read_text("status.json")
        try:
            return None if text is None else Status.model_validate_json(text)
        except ValueError:
            return None

    def read_summary(self) -> dict[str, Any] | None:
        text = self._read_text("summary.json")
        try:
            found = None if text is None else json.loads(text)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        for writer in (self._events, self._metrics, self._signals):
            if writer is not None:
                writer.close()
        self._events = self._metrics = self._signals = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, *, make: bool) -> None:
        try:
            if make:
                self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClusterError(
                f"run_dir={str(self.path)!r} cannot be made: {error.strerror or error}; "
                "set run_dir (--run-dir) elsewhere"
            ) from error
        lock = RunLock(self.path)
        lock.take()
        self._lock = lock

    def _write_from_now_on(self, job: Job) -> None:
        try:
            replace_file(self.path / "job.yaml", dump_job(job))
            self._events = LineWriter(self.path / "events.jsonl")
            self._metrics = LineWriter(self.path / "metrics.jsonl")
        except ClusterError:
            self.close()
            raise

    def _writer(self, writer: LineWriter | None) -> LineWriter:
        if writer is None:
            raise ConfigError(f"run directory {self.path} is open for reading only; use RunDirectory.resume to write")
        return writer

    def _read_json(self, name: str, kind: type[T]) -> T | None:
        text = self._read_text(name)
        try:
            found = None if text is None else json.loads(text)
        except ValueError as error:
            raise ClusterError(f"{self.path / name}: not JSON ({error}); put it back, or remove it") from error
        if found is not None and not isinstance(found, kind):
            raise ClusterError(f"{self.path / name}: expected a JSON {kind.__name__}, got {type(found).__name__}")
        return found

    def _read_text(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        except OSError as error:
            raise ClusterError(f"{self.path / name}: cannot be read: {error.strerror or error}") from error


def _note_back(happened: Happened, event: Event) -> None:
    back_to, up_to = step_back(event), event.data.get("up_to_generation")
    if back_to is not None:
        happened.went_back(back_to, up_to if isinstance(up_to, int) else None)


def default_name(name: str, now: datetime) -> str:
    """`<name>-<UTC time>`, safe as the name of a folder."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".") or "run"
    return f"{safe}-{now.astimezone(UTC):%Y%m%dT%H%M%SZ}"


def _unused(folder: Path) -> Path:
    """Two runs of one name may start within a second."""
    number, free = 2, folder
    while free.exists():
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return free


def find_run(run: str, runs: Path = RUNS) -> RunDirectory:
    """The run that a person means: a path, a name under ./runs, or `latest`.

    Raises ConfigError that names the runs there are.
    """
    if run == "latest":
        newest = max(_runs_in(runs), key=_started, default=None)
        if newest is None:
            raise ConfigError(f"RUN latest: no runs under {runs.resolve()}; give the path of a run directory")
        return RunDirectory.open(newest)
    for folder in (Path(run), runs / run):
        if (folder / "job.yaml").is_file() or (folder / "events.jsonl").is_file():
            return RunDirectory.open(folder)
    known = [folder.name for folder in sorted(_runs_in(runs), key=_started, reverse=True)[:5]]
    there = f"the newest under {runs}/: {', '.join(known)}" if known else f"there are none under {runs.resolve()}"
    raise ConfigError(f"RUN {run!r}: no such run; expected a path, a name under {runs}/, or latest; {there}")


def latest_of(name: str, runs: Path = RUNS) -> Path:
    """The newest run of a job's name. Raises ConfigError."""
    prefix = default_name(name, datetime.now(UTC)).rpartition("-")[0] + "-"
    newest = max((folder for folder in _runs_in(runs) if folder.name.startswith(prefix)), key=_started, default=None)
    if newest is None:
        raise ConfigError(
            f"--resume: no run of name={name!r} under {runs.resolve()}; name its folder with --run-dir or run_dir"
        )
    return newest


def _runs_in(runs: Path) -> list[Path]:
    return [folder for folder in runs.iterdir() if (folder / "job.yaml").is_file()] if runs.is_dir() else []


def _started(folder: Path) -> tuple[float, str]:
    """Newest last: by the time the job was written, then by name."""
    return ((folder / "job.yaml").stat().st_mtime, folder.name)
