"""Runs that go on in the background: on processes, on Ray, or plain DDP. They can be paused, so that several take turns
on one machine in slices of a second or two; what disturbs the machine then disturbs all of them alike.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import yaml

import stamps
from common import DATA, HERE, child_environment, median

START_DEADLINE_S = 300.0
RUN_DEADLINE_S = 1200.0
EXAMPLE = {"vocabulary_size": 320, "sequence_length": 128, "layers": 6, "heads": 6, "width": 192, "dropout": 0.1}
"""The model of examples/gpt: 2.8 million parameters."""
FOREVER = 1_000_000
STEPS_PER_TURN = 4


class BenchmarkError(Exception):
    """A run did not do what the benchmark needs."""


def gpt_job(folder: Path, *, workers: int, lanes: int, batch: int = 2, model: Mapping[str, Any] = EXAMPLE,
            memory: bool = False, clip: float | None = 1.0, **settings: Any) -> dict[str, Any]:  # fmt: skip
    """A job of the example's GPT on the example's text, stamping into `folder`. `lanes`: of the whole step."""
    return {
        "name": folder.name,
        "recipe": f"{HERE / 'recipes.py'}:MeasuredGPT",
        "recipe_args": {"model": dict(model), "stamp": str(folder), "memory": memory, "total_steps": FOREVER},
        "data": {
            "kind": "parquet",
            "path": str(DATA),
            "text_column": "text",
            "sequence_length": model["sequence_length"],
        },
        "lanes": lanes,
        "lane_batch_size": batch,
        "steps": FOREVER,
        "clip_grad_norm": clip,
        "workers": {"min": 1, "max": workers, "replace": False},
        "run_dir": str(folder / "run"),
        **settings,
    }


class Running:
    """Processes in the background that stamp into `folder`. A context manager: leaving it ends them."""

    def __init__(self, folder: Path, commands: Sequence[Sequence[str]], workers: int) -> None:
        self.folder, self.world = folder, workers
        self.leaders = [
            subprocess.Popen(
                [sys.executable, *command], env=child_environment(), cwd=folder, start_new_session=True,
                stdout=subprocess.PIPE, stderr=(folder / f"error-{i}.txt").open("wb"),
            )
            for i, command in enumerate(commands)
        ]  # fmt: skip

    @classmethod
    def elastictrain(cls, folder: Path, job: Mapping[str, Any], *, ray: bool = False, more: Sequence[str] = ()) -> Self:
        """`more`: for the command line, on Ray."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "job.yaml"
        file.write_text(yaml.safe_dump(dict(job)), encoding="utf-8")
        started = ["-m", "elastictrain.cli", "run", str(file), "--quiet", "--json", *more]
        return cls(folder, [started if ray else [str(HERE / "process_run.py"), str(file)]], job["workers"]["max"])

    @classmethod
    def ddp(cls, folder: Path, *, workers: int, lanes: int, form: str, batch: int = 2,
            model: Mapping[str, Any] = EXAMPLE, memory: bool = False, clip: float | None = 1.0) -> Self:  # fmt: skip
        """Plain DDP; `lanes`: micro-batches per step and rank."""
        folder.mkdir(parents=True, exist_ok=True)
        shared = [str(HERE / "ddp_worker.py"), "--world", str(workers), "--lanes", str(lanes), "--batch", str(batch)]
        shared += ["--store", str(folder / "store"), "--stamp", str(folder), "--model", json.dumps(dict(model))]
        shared += ["--form", form, *(["--memory"] if memory else []), *(["--clip", str(clip)] if clip else [])]
        return cls(folder, [[*shared, "--rank", str(rank)] for rank in range(workers)], workers)

    @classmethod
    def with_faults(
        cls, folder: Path, job: Mapping[str, Any], faults: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """What a run on Ray that these happen to has stamped, when it is over."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "faults.yaml").write_text(yaml.safe_dump(list(faults)), encoding="utf-8")
        with cls.elastictrain(folder, job, ray=True, more=("--faults", str(folder / "faults.yaml"))) as run:
            if run.leaders[0].wait(timeout=RUN_DEADLINE_S):
                raise BenchmarkError((folder / "error-0.txt").read_text(errors="replace")[-2000:])
            return run.lines()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lines(self) -> list[dict[str, Any]]:
        return stamps.read(self.folder)

    def members(self) -> list[int]:
        """Pids of the live processes that have begun a step."""
        pids = [int(path.stem) for path in self.folder.glob("*.jsonl")]
        return [pid for pid in pids if _lives(pid)]

    def wait_for(self, what: str, holds: Any, deadline_s: float = START_DEADLINE_S) -> Any:
        """The first true result of `holds(lines)`. Raises BenchmarkError with the run's own words."""
        until = time.monotonic() + deadline_s
        while time.monotonic() < until:
            found = holds(self.lines())
            if found:
                return found
            if any(leader.poll() is not None for leader in self.leaders):
                break
            time.sleep(0.02)
        said = "\n".join(p.read_text(errors="replace")[-2000:] for p in sorted(self.folder.glob("error-*.txt")))
        raise BenchmarkError(f"{self.folder.name}: {what} did not happen; it said:\n{said}")

    def warm_up(self, steps: int = 3) -> None:
        """Until every worker has ended `steps` steps."""

        def ended(lines: list[dict[str, Any]]) -> bool:
            counts = [sum(x["k"] == "end" for x in lines if x["pid"] == pid) for pid in self.members()]
            return len(counts) >= self.world and min(counts) >= steps

        self.wait_for(f"{steps} steps", ended)

    def signal_members(self, number: int) -> None:
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def pause(self) -> None:
        self.signal_members(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal_members(signal.SIGCONT)

    def go_on(self, seconds: float, steps: int) -> None:
        """Wait for as long, and until a worker has ended as many steps."""
        path = next(iter(self.folder.glob("*.jsonl")))
        before, until = path.stat().st_size, time.monotonic() + seconds
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < until or _ended_since(path, before) < steps:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{self.folder.name}: {steps} steps took longer than {START_DEADLINE_S:.0f} s")
            time.sleep(0.02)

    def stop(self, deadline_s: float = 60.0) -> dict[str, Any]:
        """Ask an elastictrain run to stop at a commit; returns its last line."""
        self.resume()
        for leader in self.leaders:
            leader.terminate()
        try:
            out = self.leaders[0].communicate(timeout=deadline_s)[0]
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"{self.folder.name} did not stop within {deadline_s:.0f} s") from error
        lines = out.decode().strip().splitlines()
        return dict(json.loads(lines[-1])) if lines else {}

    def close(self) -> None:
        members = self.members()
        for leader in self.leaders:
            with suppress(ProcessLookupError):
                os.killpg(leader.pid, signal.SIGTERM)
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for leader in self.leaders:
            try:
                leader.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(leader.pid, signal.SIGKILL)
                leader.communicate()
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _ended_since(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().count(b'"k": "end"')


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


@dataclass(frozen=True)
class Step:
    """One step of rank 0, from end to end: nothing between steps is left out. `cpu_s`: processor time of rank 0."""

    begun: float
    ended: float
    cpu_s: float
    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


@dataclass
class Turns:
    """What several runs did in their turns. `rounds[name]`: the median step time of every turn, seconds; a step counts
    when it began and ended inside one turn. `steps[name]`: all of them.
    """

    rounds: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)

    def step_s(self, name: str) -> float:
        return median(self.rounds[name])

    def cpu_s(self, name: str) -> float:
        """Processor time of rank 0 in a step."""
        return median(step.cpu_s for step in self.steps[name])

    def speed(self, name: str, against: str) -> float:
        """Median over rounds of (step time of `against`) / (step time of `name`), which were neighbours in time."""
        return median(b / a for a, b in zip(self.rounds[name], self.rounds[against], strict=True))

    def spread(self, name: str) -> str:
        """Fastest and slowest turn, milliseconds per step."""
        values = [1000 * seconds for seconds in self.rounds[name]]
        return f"{min(values):.0f} .. {max(values):.0f}"


def take_turns(runs: Mapping[str, Running], *, rounds: int, turn_s: float) -> Turns:
    """Let one run at a time go on, in an order that rotates; the others are stopped (SIGSTOP)."""
    slices: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    names = list(runs)
    for run in runs.values():
        run.pause()
    for number in range(rounds):
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            begun = time.monotonic()
            runs[name].resume()
            runs[name].go_on(turn_s, STEPS_PER_TURN)
            slices[name].append((begun, time.monotonic()))
            runs[name].pause()
    turns = Turns()
    for name, run in runs.items():
        steps = _steps(run.lines())
        turns.rounds[name], turns.steps[name] = [], []
        for begun, ended in slices[name]:
            inside = [step for step in steps if begun <= step.begun and step.ended <= ended]
            if not inside:
                raise BenchmarkError(f"{name}: no whole step within a turn of {turn_s} s; make turns longer")
            turns.rounds[name].append(median(step.seconds for step in inside))
            turns.steps[name] += inside
    return turns


def _steps(lines: list[dict[str, Any]]) -> list[Step]:
    ends = [x for x in lines if x["k"] == "end" and x["rank"] == 0]
    return [
        Step(a["t"], b["t"], b["cpu"] - a["cpu"], b.get("phases", {}))
        for a, b in pairwise(ends)
        if b["step"] == a["step"] + 1
    ]


def side_by_side(runs: Mapping[str, Any], *, rounds: int, turn_s: float) -> Turns:
    """Start every run (a function that returns a Running) one after the other, warm it up, then take turns."""
    with ExitStack() as stack:
        started: dict[str, Running] = {}
        for name, start in runs.items():
            started[name] = stack.enter_context(start())
            started[name].warm_up()
            started[name].pause()
        return take_turns(started, rounds=rounds, turn_s=turn_s)
