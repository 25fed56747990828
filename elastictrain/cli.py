"""The command `elastictrain`. Exit codes: 0 done, 2 you must change something, 3 the cluster must be mended,
4 a bug of ours, 130 stopped.

Everything heavy is imported inside the commands, so that `--help` and a typing error answer at once.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from elastictrain import data_commands, plan_command, profile_command, steer, whatif_command
from elastictrain.terminal import AsJson, Commands, JobFile, Run, end_with

if TYPE_CHECKING:
    from elastictrain.job import Job
    from elastictrain.observe import Observer


app = typer.Typer(
    name="elastictrain",
    cls=Commands,
    help="Elastic, fault-tolerant PyTorch training: the mathematics is fixed, only its placement moves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    data_changed: Annotated[
        Literal["fail", "new_stage"],
        typer.Option(help="Resuming finds other data: say what has changed and end, or take them as a new stage."),
    ] = "fail",
    start_from: Annotated[
        str | None,
        typer.Option(metavar="PLACE[@STEP]", help="Begin with the weights of this checkpoint, of any known format."),
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

    resumes = resume or resume_step is not None
    job = _job(job_file, workers=workers, steps=steps, run_dir=run_dir, resume=resumes, start_from=start_from)
    script = load_faults(faults) if faults is not None else ()
    # With --json standard output belongs to programs; people look at standard error.
    observer: Observer = Blind() if quiet else LiveView(ViewConsole(stderr=as_json), come_back=True)

    from elastictrain.run import run as run_job

    try:
        summary = run_job(
            job,
            faults=script,
            resume=resume,
            resume_step=resume_step,
            data_changed=data_changed,
            observer=observer,
            address=address,
        )
    finally:
        observer.close()
    end_with(summary, as_json=as_json, quiet=quiet)


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
    from elastictrain.observe import find_run
    from elastictrain.observe.lock import holder_of
    from elastictrain.observe.standing import complete, is_gone, status_of

    found = find_run(run)
    now, holder, summary = status_of(found), holder_of(found.path), complete(found)
    if as_json:
        known = now.model_dump(mode="json") | {"held_by": holder, "summary": summary.model_dump(mode="json")}
        typer.echo(json.dumps(known))
        return
    from rich.console import Console

    from elastictrain.observe.live import picture, telling

    console = Console()
    console.print(picture(now, found.metrics()[-120:], telling(found.events())))
    if holder is not None:
        console.print(f"written by {holder}", style="dim", markup=False)
    elif summary.outcome == "running" and is_gone(found):
        words = "nobody writes to this run any more: it ended without a word; go on with --resume"
        console.print(words, style="yellow")
    elif summary.outcome == "running":
        console.print("nobody writes to this run at this moment; its controller may be coming back", style="yellow")


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
    from elastictrain.observe.follow import followed_events
    from elastictrain.observe.live import EVENT_STYLES

    found = find_run(run)
    console = Console(soft_wrap=True, highlight=False)
    for event in followed_events(found) if follow else found.events():
        if as_json:
            typer.echo(event.model_dump_json())
        else:
            line = Text(f"{iso(event.time)}  ", style="dim")
            console.print(line.append(Text(describe(event), style=EVENT_STYLES.get(event.kind, "default"))))


steer.register(app)
plan_command.register(app)
whatif_command.register(app)
profile_command.register(app)
app.add_typer(data_commands.app, name="data")


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
    from elastictrain.data import MixedSource, Source
    from elastictrain.data.stages import first_stage, open_stage

    source = open_stage(job, first_stage(job))
    if isinstance(source, Source):
        typer.echo(f"data      {source.order.samples} samples, {source.order.steps_per_epoch} steps an epoch")
    elif not isinstance(source, MixedSource):
        said = source.describe()
        words = f"{said['segments_of_the_order']} segments in the order, {said['segments_that_wait']} to come"
        typer.echo(f"data      live: {words}; {said['steps_decided']} steps are decided")
    else:
        for segment in source.describe()["segments"]:
            shares = ", ".join(f"{share:.1%} {name}" for name, share in segment["shares"].items())
            typer.echo(f"data      {source.samples} samples; from step {segment['from_step']} on: {shares}")
    if job.plan is not None:
        from elastictrain.engine.planned import plan_job

        for sentence in plan_job(job)[1]["said"]:
            typer.echo(f"plan      {sentence}")
    if job.start_from is not None:
        from elastictrain.engine.origins import pin

        said = pin(job).said
        step = "" if said["step"] is None else f", step {said['step']}"
        typer.echo(f"weights   {said['tensors']} tensors of {said['checkpoint']}{step}")


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
    """Let the real controller run a virtual cluster with seeded faults; print goodput and recoveries.

    With `pipeline` in the scenario: pipelines with slow places, and what would be done about them.
    """
    from elastictrain.sim import PipelineReport, make_scenario, read_settings, simulate_pipelines
    from elastictrain.sim import simulate as run_scenario

    options = {"workers": workers, "hours": hours, "seed": seed, "spares": spares, "check": check}
    settings = {} if scenario is None else read_settings(scenario)
    settings |= {name: value for name, value in options.items() if value is not None}
    chosen = make_scenario(settings, worse=worse)
    begun_s = time.monotonic()
    report = run_scenario(chosen) if chosen.pipeline is None else simulate_pipelines(chosen)
    wall_s = time.monotonic() - begun_s
    if as_json:
        typer.echo(json.dumps(report.as_dict() | {"wall_s": round(wall_s, 3)}))
        return
    from rich.console import Console

    from elastictrain.sim.picture import picture, pipeline_picture

    shown = pipeline_picture(report, wall_s) if isinstance(report, PipelineReport) else picture(report, wall_s)
    Console().print(shown)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    help="Look at checkpoints and check them: ls, show, verify, digest (see ckpt --help).",
)
def ckpt(ctx: typer.Context) -> None:
    # Handed on whole instead of mounted: mounting would import the checkpoint library for every command.
    from elastictrain_checkpoint.cli import app as checkpoint_app

    checkpoint_app(args=list(ctx.args) or ["--help"], prog_name="elastictrain ckpt")


def _job(
    path: Path, *, workers: int | None, steps: int | None, run_dir: Path | None, resume: bool, start_from: str | None
) -> Job:
    """The job with the command line's settings in place of the file's."""
    from elastictrain.job import load_job
    from elastictrain.observe.rundir import latest_of

    overrides: dict[str, Any] = {} if steps is None else {"steps": steps}
    if run_dir is not None:
        overrides["run_dir"] = str(run_dir)
    job = load_job(path, **overrides)
    if resume and job.run_dir is None:
        overrides["run_dir"] = str(latest_of(job.name))
    if start_from is not None:
        place, at, digits = start_from.rpartition("@")
        where = {"checkpoint": place, "step": int(digits)} if at and digits.isdecimal() else {"checkpoint": start_from}
        settings = {} if job.start_from is None else job.start_from.model_dump(exclude={"step", "fingerprint"})
        overrides["start_from"] = settings | where
    if workers is not None:
        now = job.workers
        bounds = {"start": workers, "min": min(now.min, workers), "max": max(now.max, workers)}
        overrides["workers"] = now.model_dump() | bounds
    return load_job(path, **overrides) if overrides else job


def main() -> None:
    """Entry point of the command `elastictrain`."""
    app()


if __name__ == "__main__":
    main()
