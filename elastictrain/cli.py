"""The command `elastictrain`. Exit codes: 0 done, 2 you must change something, 3 the cluster must be mended,
4 a bug of ours, 130 stopped.

Everything heavy is imported inside the commands, so that `--help` and a typing error answer at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from elastictrain.errors import ElasticTrainError, InternalError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from elastictrain.job import Job
    from elastictrain.observe import Event, Observer, RunDirectory, Status, Summary

EXIT_USER, EXIT_CLUSTER, EXIT_INTERNAL, EXIT_STOPPED = 2, 3, 4, 130
FOLLOW_POLL_S = 0.25


class _Commands(TyperGroup):
    """Turns our errors into a message and an exit code; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            code, message = EXIT_USER, str(error)
        except InternalError as error:
            code, message = EXIT_INTERNAL, f"{error}\nThis is a bug in elastictrain; please report it."
        except ElasticTrainError as error:
            code, message = EXIT_CLUSTER, str(error)
        except KeyboardInterrupt:
            code, message = EXIT_STOPPED, "stopped"
        # typer.secho, not rich: a message may hold [brackets], and must not be wrapped.
        typer.secho(message, fg=typer.colors.RED, err=True)
        raise typer.Exit(code)


app = typer.Typer(
    name="elastictrain",
    cls=_Commands,
    help="Elastic, fault-tolerant PyTorch training: the mathematics is fixed, only its placement moves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job: recipe, data, lanes, steps, workers.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Path of a run, its name under ./runs, or latest.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def run(
    job_file: JobFile,
    faults: Annotated[Path | None, typer.Option(help="YAML list of faults to commit on the way.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of standard output: the summary as JSON.")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/<name>-<time>.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint (of --run-dir, or the latest).")
    ] = False,
    resume_step: Annotated[
        int | None, typer.Option(min=1, help="Go on from the checkpoint of this step instead of the newest.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Start with this many workers.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Train to this step instead of the job's.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to run on: auto, or host:port of its head; default: an embedded one."),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="No live view.")] = False,
) -> None:
    """Train a job, here or on a Ray cluster, and watch it."""
    from elastictrain.faults import load_faults
    from elastictrain.observe import Blind
    from elastictrain.observe.live import LiveView, ViewConsole

    job = _job(job_file, workers=workers, steps=steps, run_dir=run_dir, resume=resume or resume_step is not None)
    script = load_faults(faults) if faults is not None else ()
    # With --json standard output belongs to programs; people look at standard error.
    observer: Observer = Blind() if quiet else LiveView(ViewConsole(stderr=as_json))

    from elastictrain.run import run as run_job

    try:
        summary = run_job(
            job, faults=script, resume=resume, resume_step=resume_step, observer=observer, address=address
        )
    finally:
        observer.close()
    if as_json:
        typer.echo(summary.line())
    elif not quiet:
        _print_summary(ViewConsole(), summary)
    if summary.outcome == "stopped":
        raise typer.Exit(EXIT_STOPPED)
    if summary.outcome == "failed":
        typer.secho(f"failed: {summary.error or 'see events.jsonl'}", fg=typer.colors.RED, err=True)
        raise typer.Exit(EXIT_CLUSTER)


@app.command()
def submit(
    job_file: JobFile,
    address: Annotated[str, typer.Option(help="Dashboard of the Ray cluster, as http://host:8265.")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run to its end, or leave it.")] = True,
    as_json: AsJson = False,
) -> None:
    """Hand a job to a Ray cluster; the code travels along."""
    from elastictrain.job import load_job

    load_job(job_file)  # what is wrong with the job is said here, not in a log on the cluster

    from elastictrain.run import submit as submit_job

    submission = submit_job(job_file, address, wait=wait)
    typer.echo(json.dumps({"submission_id": submission, "address": address}) if as_json else submission)


@app.command()
def status(run: Run, as_json: AsJson = False) -> None:
    """Show where a run stands."""
    from elastictrain.observe import find_run, summarise
    from elastictrain.observe.lock import holder_of

    found = find_run(run)
    now, holder = _status_of(found), holder_of(found.path)
    summary = summarise(found)
    if as_json:
        known = now.model_dump(mode="json") | {"held_by": holder, "summary": summary.model_dump(mode="json")}
        typer.echo(json.dumps(known))
        return
    from rich.console import Console

    from elastictrain.observe.live import DETAILS, EVENTS_SHOWN, picture

    console = Console()
    console.print(
        picture(now, found.metrics()[-120:], [e for e in found.events() if e.kind not in DETAILS][-EVENTS_SHOWN:])
    )
    if holder is not None:
        console.print(f"written by {holder}", style="dim", markup=False)
    elif summary.outcome == "running":
        console.print(
            "nobody writes to this run any more: it ended without a word; go on with --resume", style="yellow"
        )


@app.command()
def events(
    run: Run,
    as_json: AsJson = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing until the run ends.")] = False,
) -> None:
    """Print what happened to a run, a line each."""
    from rich.console import Console
    from rich.text import Text

    from elastictrain.observe import describe, find_run
    from elastictrain.observe.events import iso
    from elastictrain.observe.live import EVENT_STYLES

    found = find_run(run)
    console = Console(soft_wrap=True, highlight=False)
    for event in _followed(found) if follow else found.events():
        if as_json:
            typer.echo(event.model_dump_json())
        else:
            line = Text(f"{iso(event.time)}  ", style="dim")
            console.print(line.append(Text(describe(event), style=EVENT_STYLES.get(event.kind, "default"))))


@app.command()
def plot(
    run: Run,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG to write; default loss.png in the run.")] = None,
) -> None:
    """Draw the loss of a run with what happened to it; print the picture's path."""
    from elastictrain.observe import find_run
    from elastictrain.observe.plot import plot_run

    typer.echo(plot_run(find_run(run), out))


@app.command()
def validate(job_file: JobFile) -> None:
    """Check a job without training: settings, recipe, data."""
    from elastictrain.job import load_job

    job = load_job(job_file)
    typer.echo(f"settings  {job.steps} steps of {job.lanes} lanes, {job.workers.min} to {job.workers.max} workers")
    from elastictrain.recipe import load_recipe

    recipe = load_recipe(job.recipe, job.recipe_args)
    typer.echo(f"recipe    {type(recipe).__module__}:{type(recipe).__qualname__}")
    from elastictrain.data import open_source

    source = open_source(job.data, seed=job.seed, lanes=job.lanes, lane_batch_size=job.lane_batch_size)
    typer.echo(f"data      {source.order.samples} samples, {source.order.steps_per_epoch} steps an epoch")


@app.command()
def simulate(
    workers: Annotated[int | None, typer.Option(help="Workers of the virtual cluster (default 1000).")] = None,
    hours: Annotated[float | None, typer.Option(help="Simulated hours (default 24).")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the faults (default 0); the same seed, the same day.")
    ] = None,
    spares: Annotated[int | None, typer.Option(help="Warm spares (default one in a hundred).")] = None,
    worse: Annotated[float, typer.Option(help="Faults so many times as often.")] = 1.0,
    check: Annotated[str | None, typer.Option(help="Invariants: auto, all (after every event), sampled, off.")] = None,
    scenario: Annotated[Path | None, typer.Option(help="YAML with more settings: rates, costs, min_workers …")] = None,
    as_json: AsJson = False,
) -> None:
    """Let the real controller run a virtual cluster with seeded faults; print goodput and recoveries."""
    from elastictrain.sim import make_scenario, read_settings
    from elastictrain.sim import simulate as run_scenario

    options = {"workers": workers, "hours": hours, "seed": seed, "spares": spares, "check": check}
    settings = {} if scenario is None else read_settings(scenario)
    settings |= {name: value for name, value in options.items() if value is not None}
    chosen = make_scenario(settings, worse=worse)
    begun_s = time.monotonic()
    report = run_scenario(chosen)
    wall_s = time.monotonic() - begun_s
    if as_json:
        typer.echo(json.dumps(report.as_dict() | {"wall_s": round(wall_s, 3)}))
        return
    from rich.console import Console

    from elastictrain.sim.picture import picture

    Console().print(picture(report, wall_s))


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    help="Look at checkpoints and check them: ls, show, verify, digest (see ckpt --help).",
)
def ckpt(ctx: typer.Context) -> None:
    # Handed on whole instead of mounted: mounting would import the checkpoint library for every command.
    from elastictrain_checkpoint.cli import app as checkpoint_app

    checkpoint_app(args=list(ctx.args) or ["--help"], prog_name="elastictrain ckpt")


def _job(path: Path, *, workers: int | None, steps: int | None, run_dir: Path | None, resume: bool) -> Job:
    """The job with the command line's settings in place of the file's."""
    from elastictrain.job import load_job
    from elastictrain.observe.rundir import latest_of

    overrides: dict[str, Any] = {} if steps is None else {"steps": steps}
    if run_dir is not None:
        overrides["run_dir"] = str(run_dir)
    job = load_job(path, **overrides)
    if resume and job.run_dir is None:
        overrides["run_dir"] = str(latest_of(job.name))
    if workers is not None:
        now = job.workers
        bounds = {"start": workers, "min": min(now.min, workers), "max": max(now.max, workers)}
        overrides["workers"] = now.model_dump() | bounds
    return load_job(path, **overrides) if overrides else job


def _status_of(run: RunDirectory) -> Status:
    """status.json brought up to the newest row and event: it is replaced seldom, and not at all by a run that dies."""
    from elastictrain.observe import Status, summarise
    from elastictrain.observe.live import RATE_STEPS
    from elastictrain.observe.metrics import tokens_per_s

    found = run.read_status() or Status(run_dir=str(run.path), name=run.path.name)
    rows, summary = run.metrics(), summarise(run)
    facts: dict[str, Any] = {"run_dir": str(run.path)}
    if rows:
        facts |= {"step": rows[-1].step, "loss": rows[-1].loss, "generation": rows[-1].generation}
        facts |= {"world": rows[-1].world or found.world, "tokens_per_s": tokens_per_s(rows[-RATE_STEPS:])}
    recoveries = [event.data for event in run.events() if event.kind == "recovery"]
    if recoveries:
        facts["last_recovery"] = recoveries[-1]
    if summary.outcome != "running":
        facts |= {"state": summary.outcome, "error": summary.error, "step": summary.steps}
    return found.model_copy(update=facts)


def _followed(run: RunDirectory) -> Iterator[Event]:
    """All events, those that come later too, until the run has ended or nobody writes to it any more."""
    from elastictrain.observe.lock import holder_of
    from elastictrain.observe.summary import ENDINGS

    shown = 0
    while True:
        written_to = holder_of(run.path) is not None  # asked first: what was written before the end is still read
        known = run.events()
        yield from known[shown:]
        shown = max(shown, len(known))
        if not written_to or (known and known[-1].kind in ENDINGS):
            return
        time.sleep(FOLLOW_POLL_S)


def _print_summary(console: Console, summary: Summary) -> None:
    from rich.table import Table
    from rich.text import Text

    from elastictrain.observe.live import number, recovery_words

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    rows = [
        ("outcome", f"{summary.outcome}, {summary.steps} steps"),
        ("loss", f"{number(summary.first_loss)} → {number(summary.last_loss)}"),
        ("tokens/s", f"{summary.tokens_per_s:,.0f}" if summary.tokens_per_s else "–"),
        ("world", " → ".join(map(str, summary.world_sizes)) or "–"),
        *(("recovery", f"{recovery_words(r.model_dump())}, generation {r.generation}") for r in summary.recoveries),
        ("digest", summary.digest or "–"),
        ("run", summary.run_dir),
    ]
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)


def main() -> None:
    """Entry point of the command `elastictrain`."""
    app()


if __name__ == "__main__":
    main()
