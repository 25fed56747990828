"""Train the example GPT while a worker is killed and others join; train it again undisturbed; compare all bits.

    make demo        or: python examples/gpt/demo.py [--steps 60] [--workers 3]

Exit code 0 when both runs end with the same digest, 1 when they do not, 2 when a run could not be made.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prepare import prepare
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import elastictrain as et
from elastictrain.observe import RunDirectory
from elastictrain.observe.live import LiveView, ViewConsole

HERE = Path(__file__).resolve().parent
KILL_AT, ADD_AT = 0.2, 0.1  # of the steps; the earlier a worker is asked for, the more of the run it sees
VICTIM, PHASE = 1, "exchange"
FEWEST_STEPS = 20


@dataclass(frozen=True)
class Part:
    """One of the two runs."""

    summary: et.Summary
    seconds: float


def main() -> int:
    """Run the demo; the exit code."""
    options = _options()
    console = Console()
    started_s = time.monotonic()
    notes = prepare()
    train = notes["files"]["train/stdlib.parquet"]
    console.print(
        f"Python's standard library: {train['documents']:,} files, {train['text_bytes'] / 1e6:.0f} MB of text",
        style="dim",
    )
    runs = Path("runs") / f"demo-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    try:
        elastic = _elastic(console, options, runs)
        if elastic.summary.outcome != "finished":
            return 130
        reference = _reference(console, options, runs)
        if reference.summary.outcome != "finished":
            return 130
    except et.ElasticTrainError as error:
        console.print(Text(str(error), style="red"))
        return 2
    equal = elastic.summary.digest == reference.summary.digest
    _report(console, elastic, reference, equal=equal)
    console.print(f"{time.monotonic() - started_s:.0f} s in all", style="dim")
    return 0 if equal else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of both runs (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=3, help="workers of the first run (default: %(default)s)")
    options = parser.parse_args()
    lanes = et.load_job(HERE / "job.yaml").lanes
    if options.steps < FEWEST_STEPS:
        parser.error(f"--steps {options.steps}: expected {FEWEST_STEPS} or more, so that a new worker can join in time")
    if not 2 <= options.workers < lanes:
        parser.error(
            f"--workers {options.workers}: expected 2 to {lanes - 1}: one is killed, and the job has {lanes} lanes"
        )
    return options


def _job(steps: int, workers: int, most: int, folder: Path) -> et.Job:
    """The example's job with another length, world and place: all that the mathematics depends on is as it was."""
    file = HERE / "job.yaml"
    job = et.load_job(file)
    schedule = {"total_steps": steps, "warmup_steps": min(20, steps // 4)}
    return et.load_job(
        file,
        name="gpt-demo",
        recipe=f"{HERE / 'recipe.py'}:GPTRecipe",
        recipe_args=job.recipe_args | schedule,
        data=job.data.model_dump() | {"path": str(HERE / "data" / "train")},
        steps=steps,
        evaluate_every=max(1, steps // 4),
        workers={"min": 1, "max": most, "start": workers},
        checkpoint={"path": str(folder / "checkpoints"), "every_steps": max(1, steps // 2)},
        run_dir=str(folder),
    )


def _elastic(console: Console, options: argparse.Namespace, runs: Path) -> Part:
    kill_at, add_at = max(3, int(options.steps * KILL_AT)), max(2, int(options.steps * ADD_AT))
    console.rule(f"[bold]{options.workers} workers, one killed, one added[/]")
    console.print(
        f"step {add_at}: one more is asked for; step {kill_at}: worker {VICTIM} is killed in the {PHASE}, and replaced",
        style="dim",
    )
    script = [et.faults.add(add_at), et.faults.kill(VICTIM, kill_at, PHASE)]
    folder = runs.with_name(f"{runs.name}-elastic")
    return _run(_job(options.steps, options.workers, options.workers + 1, folder), script)


def _reference(console: Console, options: argparse.Namespace, runs: Path) -> Part:
    workers = options.workers - 1
    console.rule(f"[bold]undisturbed, with {workers} worker{'s' if workers > 1 else ''}[/]")
    folder = runs.with_name(f"{runs.name}-reference")
    return _run(_job(options.steps, workers, workers, folder), [])


def _run(job: et.Job, script: list[et.faults.Fault]) -> Part:
    started_s = time.monotonic()
    view = LiveView(ViewConsole())
    try:
        summary = et.run(job, faults=script, observer=view)
    finally:
        view.close()
    return Part(summary, time.monotonic() - started_s)


def _report(console: Console, elastic: Part, reference: Part, *, equal: bool) -> None:
    table = Table(
        box=box.SIMPLE_HEAD, title="The same bits, whatever happens" if equal else "The bits differ", pad_edge=False
    )
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("disturbed", overflow="fold")
    table.add_column("undisturbed", overflow="fold")
    for name, *values in _rows(elastic, reference):
        table.add_row(name, *values)
    verdict = Text("equal", style="bold green") if equal else Text("DIFFERENT", style="bold red")
    table.add_row("digests", verdict, "")
    console.print(table)
    for part, name in ((elastic, "disturbed  "), (reference, "undisturbed")):
        console.print(f"digest, {name}  {part.summary.digest}", highlight=False, soft_wrap=True)
    plot, folder = (
        _short(path) for path in (RunDirectory.open(elastic.summary.run_dir).loss_png, elastic.summary.run_dir)
    )
    console.print(f"loss, with the faults marked  {plot}", highlight=False, soft_wrap=True)
    console.print(f"what happened, line by line   elastictrain events {folder}", highlight=False, soft_wrap=True)


def _short(path: str | Path) -> Path:
    here = Path.cwd()
    return Path(path).relative_to(here) if Path(path).is_relative_to(here) else Path(path)


def _rows(elastic: Part, reference: Part) -> list[tuple[str, str, str]]:
    parts = (elastic, reference)
    both = [part.summary for part in parts]
    rows = [
        ("workers", *(" → ".join(map(str, s.world_sizes)) for s in both)),
        ("steps", *(str(s.steps) for s in both)),
        ("loss, first → last", *(f"{s.first_loss:.4f} → {s.last_loss:.4f}" for s in both)),
        ("validation loss", *(f"{(s.evaluation or {}).get('validation_loss'):.4f}" for s in both)),
        ("tokens/s", *(f"{s.tokens_per_s:,.0f}" for s in both)),
        ("seconds, Ray and torch included", *(f"{part.seconds:.0f}" for part in parts)),
    ]
    for name, words in _interruptions(elastic.summary):
        rows.append((name, words, "–"))
    rows.append(
        ("steps computed twice", *(str(sum(r.steps_redone for r in [*s.recoveries, *s.resizes])) for s in both))
    )
    return rows


def _interruptions(summary: et.Summary) -> list[tuple[str, str]]:
    """What stopped the disturbed run, in order, and for how long."""
    found = []
    for event in RunDirectory.open(summary.run_dir).events():
        facts = event.data
        if event.kind == "recovery":
            who = ", ".join(map(str, facts["workers"]))
            found.append(("recovery", f"{facts['seconds']:.2f} s, worker {who} lost in step {facts['step'] + 1}"))
        elif event.kind == "resized":
            who = ", ".join(map(str, facts["joined"])) or "none"
            found.append(("pause", f"{facts['seconds']:.2f} s, worker {who} joined after step {facts['step']}"))
    if not summary.resizes:
        found.append(("pause", "none: no new worker was ready in time; try more --steps"))
    return found


if __name__ == "__main__":
    sys.exit(main())
