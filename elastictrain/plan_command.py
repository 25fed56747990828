"""The command `elastictrain plan`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastictrain.terminal import AsJson, JobFile

if TYPE_CHECKING:
    from elastictrain.job import Job
    from elastictrain.planner.model import Transformer
    from elastictrain.planner.plan import Found, Plan
    from elastictrain.planner.profiles import Cluster
    from elastictrain.planner.workload import Workload


NARROW_COLUMNS = 110
"""A terminal below this is shown a smaller table."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(plan)


def plan(
    job_file: JobFile,
    cluster: Annotated[Path, typer.Option(help="YAML: groups of nodes, with their devices and links.")],
    model: Annotated[
        Path | None, typer.Option(help="YAML: a decoder's layers, hidden, heads, … Plans with pipeline and tensor too.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to write: the best plan's timeline.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="End the search after this long, and say how far it came.")
    ] = 60,
    as_json: AsJson = False,
) -> None:
    """Say how a job would run best on a cluster, why, and which of it can be used today."""
    from elastictrain.job import load_job
    from elastictrain.planner.profiles import load_cluster

    job, there = load_job(job_file), load_cluster(cluster)
    shape, work = (None, _looked_at(job)) if model is None else (load_model(model), None)
    shape = work.decoder if work is not None else shape
    if shape is None:
        assert work is not None
        found = now = _by_recipe(work, there)
    else:
        found, now = _searched(job, shape, there, seconds)
    if picture is not None:
        from elastictrain.observe.plan_view import draw_plan

        draw_plan(found.plans[0], picture)
    if as_json:
        typer.echo(json.dumps(as_dict(found, now)))
        return
    _print(found, now)


def load_model(path: Path) -> Transformer:
    """Read a decoder's shape. Raises ConfigError naming what is wrong."""
    import yaml

    from elastictrain.errors import ConfigError
    from elastictrain.planner.model import parse_model

    if not path.is_file():
        raise ConfigError(f"model file {path}: no such file; expected YAML with layers, hidden, heads, sequence, vocab")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    return parse_model(raw, where=str(path))


def _by_model(job: Job, model: Transformer, cluster: Cluster, seconds: float) -> tuple[Found, Found]:
    from elastictrain.errors import CapacityError
    from elastictrain.planner.advice import smallest_help
    from elastictrain.planner.plan import Task
    from elastictrain.planner.search import fits, search, search_and_replay

    task = Task(
        model=model, lanes=job.lanes, lane_batch=job.lane_batch_size, dtype=job.numerics.compute_dtype,
        mirrors=job.mirrors,
    )  # fmt: skip
    found = search_and_replay(task, cluster, enough=_after(seconds))
    if not found.plans:
        what = f"a model of {model.params:,} parameters with sequences of {model.sequence}"
        where = f"the {cluster.size} devices of this cluster"
        late = _after(seconds)
        helps = smallest_help(lambda other: fits(task, other, enough=late), cluster)
        if found.ended_early:
            raise CapacityError(
                f"no way to cut up {what} for {where} was found: {found.examined:,} of {found.candidates:,} were tried "
                f"until the search ended (--seconds {seconds:g}); {helps}"
            )
        raise CapacityError(f"{what} does not fit on {where}, however it is cut up; {helps}")
    return found, search(task, cluster, families=("lanes",), enough=_after(seconds))


def _searched(job: Job, model: Transformer, cluster: Cluster, seconds: float) -> tuple[Found, Found]:
    """The same, with a sign of life on a terminal's standard error."""
    from rich.console import Console

    with Console(stderr=True).status(f"Searching plans, for {seconds:g} s at most …"):
        return _by_model(job, model, cluster, seconds)


def _after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def _looked_at(job: Job) -> Workload:
    """The recipe's model; what was recognised in it is said on standard error."""
    from elastictrain.engine.planned import look_at

    work = look_at(job)
    less = "; only lanes and blocks are planned. Describe a decoder in a file for more: --model model.yaml"
    typer.echo(work.decoder_said + ("" if work.decoder else less), err=True)
    return work


def _by_recipe(work: Workload, cluster: Cluster) -> Found:
    from elastictrain.errors import CapacityError
    from elastictrain.planner.advice import smallest_help
    from elastictrain.planner.plan import Found
    from elastictrain.planner.workload import found_of, plan_workload, workload_plans

    best = workload_plans(work, cluster)
    if not best:
        helps = smallest_help(lambda other: plan_workload(work, other) is not None, cluster)
        raise CapacityError(
            f"a model of {work.params:,} parameters, whole on every worker, does not fit on the {cluster.size} devices "
            f"of this cluster; {helps}"
        )
    plans = tuple(found_of(*each) for each in best)
    tried = min(cluster.size, work.lanes)
    return Found(plans, plans[0].step_s, tried, tried)


def as_dict(found: Found, now: Found) -> dict[str, Any]:
    """The answer as plain data."""
    from elastictrain.observe.plan_view import reasons, settings_of

    usable: Plan | None = now.plans[0] if now.plans else None
    return {
        "plans": [_plain(plan) for plan in found.plans],
        "bound_s": found.bound_s,
        "gap": found.gap,
        "why": reasons(found),
        "usable_now": None if usable is None else _plain(usable) | {"workers": settings_of(usable)},
    }


def _plain(plan: Plan) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "family": plan.family, "step_s": plan.step_s, "replayed_s": plan.replayed_s, "groups": plan.groups,
        "devices": plan.devices, "fits": plan.fits, "limit": plan.limit,
        "cut": None if plan.cut is None else asdict(plan.cut),
        "layers": plan.layers, "stage_groups": plan.stage_groups, "usable_now": plan.usable_now,
        "lanes": None if plan.lane_plan is None else plan.lane_plan.lanes,
        "blocks_share": None if plan.lane_plan is None else plan.lane_plan.blocks_share,
    }  # fmt: skip


def _print(found: Found, now: Found) -> None:
    import yaml
    from rich.console import Console

    from elastictrain.observe.plan_view import dealt, plan_table, reasons, settings_of

    console = Console()
    console.print(plan_table(found, narrow=console.width < NARROW_COLUMNS))
    for sentence in reasons(found):
        console.print(sentence, highlight=False)
    console.print()
    if not now.plans:
        console.print("Nothing of it can be used today: the whole model fits on no single device.", highlight=False)
        return
    usable = now.plans[0]
    console.print(f"What a job can use today: {usable.step_s:.3g} s a step", highlight=False)
    for line in dealt(usable):
        console.print(f"  {line}", highlight=False)
    if usable.devices <= 64:
        typer.echo(yaml.safe_dump({"workers": settings_of(usable)}, sort_keys=False, default_flow_style=None).rstrip())
