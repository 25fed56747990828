"""The command `elastictrain whatif`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from elastictrain.terminal import AsJson, Run

if TYPE_CHECKING:
    from elastictrain.observe.whatif_view import Replan
    from elastictrain.stragglers.whatif import Answer


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(whatif)


def whatif(
    run: Run,
    against: Annotated[
        Literal["peers", "itself"],
        typer.Option(help="A worker is slow by what its peers take, or (mixed devices) by its own usual time."),
    ] = "peers",
    picture: Annotated[Path | None, typer.Option(help="PNG or SVG to write: a heat map of workers x steps.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how fast a run would have been without each worker's slowness, and what the planner would do now."""
    from elastictrain.observe.rundir import find_run
    from elastictrain.observe.signal_log import read_signals
    from elastictrain.observe.whatif_view import cost_table, draw_whatif, replan, sentences
    from elastictrain.stragglers.whatif import timings_of, what_if

    folder = find_run(run).path
    records, excused = read_signals(folder)
    timings, left_out = timings_of([(step.step, step.workers, step.records) for step in records], excused)
    answer = what_if(timings, left_out=left_out, against=against)
    plan = replan(timings)
    if picture is not None:
        draw_whatif(answer, picture, title=folder.name)
    if as_json:
        typer.echo(json.dumps(as_dict(answer, plan)))
        return
    from rich.console import Console

    console = Console()
    for sentence in sentences(answer, plan):
        console.print(sentence, highlight=False)
    if answer.costs:
        console.print(cost_table(answer))


def as_dict(answer: Answer, plan: Replan) -> dict[str, Any]:
    """The answer as plain data; seconds."""
    return {
        "steps": len(answer.steps), "left_out": answer.left_out, "actual_s": answer.actual_s,
        "healthy_s": answer.healthy_s, "even_s": answer.even_s, "link_s": answer.link_s, "slowdown": answer.slowdown,
        "workers": [
            {"worker": cost.worker, "without_s": cost.without_s, "alone_s": cost.alone_s, "steps": cost.steps,
             "causes": dict(cost.causes)}
            for cost in answer.costs
        ],
        "now": {
            "workers": plan.workers, "lanes": plan.lanes, "planned": plan.split.parts, "before_s": plan.before_s,
            "after_s": plan.after_s, "bound_s": plan.split.bound,
        },
    }  # fmt: skip
