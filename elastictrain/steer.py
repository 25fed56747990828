"""Commands for a run that is under way, from another terminal: watch it, change it, end it; and its incidents."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.terminal import EXIT_CLUSTER, EXIT_USER, AsJson, Run, end_with

if TYPE_CHECKING:
    from elastictrain.observe.answers import Request

Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done, or only ask.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.0, metavar="SECONDS", help="Wait this long at most.")]
TIMEOUT_S = 300.0


def attach(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of standard output: the summary as JSON.")] = False,
) -> None:
    """Watch a run that is under way, from here; Ctrl-C leaves it alone."""
    from elastictrain.observe import find_run
    from elastictrain.observe.follow import follow
    from elastictrain.observe.live import LiveView, ViewConsole
    from elastictrain.observe.standing import AWAY_S, complete

    found = find_run(run)
    view = LiveView(ViewConsole(stderr=as_json))
    try:
        end = follow(found, view)
    except KeyboardInterrupt:
        view.close()
        typer.echo(f"left it alone, it goes on; `elastictrain stop {run}` would end it", err=as_json)
        return
    finally:
        view.close()
    if end is None:
        raise ClusterError(
            f"RUN {str(found.path)!r}: nobody has written to it for {AWAY_S:.0f} s, although it has not ended: its "
            "controller is gone, and its cluster with it; go on from the newest checkpoint with --resume"
        )
    typer.echo("the run is over", err=True)
    end_with(complete(found), as_json=as_json)


def add(run: Run, wait: Wait = True, timeout_s: Timeout = TIMEOUT_S, as_json: AsJson = False) -> None:
    """Ask a run for one worker more."""
    from elastictrain.observe.answers import Request

    _ask(run, Request("add"), wait, timeout_s, as_json)


def drain(
    run: Run,
    worker: Annotated[int, typer.Argument(min=0, metavar="WORKER", help="Its number, as `elastictrain status` says.")],
    wait: Wait = True,
    timeout_s: Timeout = TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Let a worker hand over and leave; nothing is redone."""
    from elastictrain.observe.answers import Request

    _ask(run, Request("drain", worker), wait, timeout_s, as_json)


def resize(
    run: Run,
    size: Annotated[int, typer.Argument(min=1, metavar="N", help="Workers, within workers.min and workers.max.")],
    wait: Wait = True,
    timeout_s: Timeout = TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Let a run go on with N workers."""
    from elastictrain.observe.answers import Request

    _ask(run, Request("resize", size), wait, timeout_s, as_json)


def stop(run: Run, wait: Wait = True, timeout_s: Timeout = TIMEOUT_S, as_json: AsJson = False) -> None:
    """End a run at its next commit, with a checkpoint if the job stores any; `run --resume` goes on from there."""
    from elastictrain.observe.answers import Request

    _ask(run, Request("stop", "stopped by the user (elastictrain stop)"), wait, timeout_s, as_json)


def incidents(
    run: Run,
    number: Annotated[int | None, typer.Argument(min=1, metavar="[N]", help="This one in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """What went wrong in a run, who was blamed, what was decided, and where the seconds went."""
    from elastictrain.observe import find_run
    from elastictrain.observe.incidents import incidents as incidents_of

    folder = find_run(run)
    found = incidents_of(folder.events())
    if number is not None and number > len(found):
        there = f"it has {len(found)}" if found else "it has none"
        raise ConfigError(f"RUN {str(folder.path)!r}: no incident {number}; {there}")
    if as_json:
        records = [incident.model_dump(mode="json") for incident in found]
        typer.echo(json.dumps(records if number is None else records[number - 1]))
        return
    from rich.console import Console

    from elastictrain.observe import report

    console = Console(highlight=False)
    if number is not None:
        console.print(report.full(found[number - 1]))
    elif found:
        console.print(report.table(found))
        console.print(f"one in full: elastictrain incidents {run} {found[-1].number}", style="dim", markup=False)
    else:
        console.print("no incident: nothing was lost, frozen or preempted")


def register(app: typer.Typer) -> None:
    """Make these commands of the program."""
    for command in (attach, stop, resize, drain, add, incidents):
        app.command()(command)


def _ask(run: str, request: Request, wait: bool, timeout_s: float, as_json: bool) -> None:
    """Make the request, say what comes of it, and leave with the exit code that says so."""
    from elastictrain.observe import find_run

    folder = find_run(run)
    _tell_ray(folder.path)
    from elastictrain_actors.reach import ask

    begun_s = time.monotonic()
    with _live_line(str(request), quiet=as_json or not wait) as say:
        found = ask(folder, request, wait=wait, timeout_s=timeout_s, say=say)
    seconds = time.monotonic() - begun_s
    outcome = "asked" if found is None else found.outcome
    words = f"asked to {request}" if found is None else found.words
    if as_json:
        typer.echo(json.dumps({"request": request.kind, "argument": request.argument, "outcome": outcome,
                               "words": words, "seconds": round(seconds, 3)}))  # fmt: skip
    elif outcome in ("asked", "done"):
        typer.echo(words if found is None else f"{words} ({seconds:.1f} s after it was asked for)")
    else:
        typer.secho(f"refused: {words}" if outcome == "refused" else words, fg=typer.colors.RED, err=True)
    if outcome not in ("asked", "done"):
        raise typer.Exit(EXIT_CLUSTER if outcome == "failed" else EXIT_USER)


def _tell_ray(folder: Path) -> None:
    """What Ray reads from the environment when it is imported: which authentication the run's cluster wants."""
    from elastictrain.observe.address import FILE, Address

    if (folder / FILE).exists() and (mode := Address.read(folder).auth_mode):
        os.environ.setdefault("RAY_AUTH_MODE", mode)


@contextmanager
def _live_line(what: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is waited for, since when, and why; elsewhere than on a terminal a line
    for every new reason.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False)
    begun_s, last = time.monotonic(), ""
    if quiet or not console.is_terminal:

        def tell(words: str) -> None:
            nonlocal last
            if words != last and not quiet:
                typer.echo(f"waiting: {words}", err=True)
            last = words

        yield tell
        return
    with console.status(escape(what)) as line:

        def show(words: str) -> None:
            text = f"{what}, {time.monotonic() - begun_s:.0f} s" + (f": {words}" if words else "")
            width = console.width - 3
            line.update(escape(text if len(text) <= width else text[: width - 1] + "…"))

        yield show
