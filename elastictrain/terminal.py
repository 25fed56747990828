"""What all commands share: exit codes, errors as messages, the way a run is named, and its end on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from elastictrain.errors import ElasticTrainError, InternalError, UserError

if TYPE_CHECKING:
    from elastictrain.observe import Summary

EXIT_USER, EXIT_CLUSTER, EXIT_INTERNAL, EXIT_STOPPED = 2, 3, 4, 130

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job: recipe, data, lanes, steps, workers.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Path of a run, its name under ./runs, or latest.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Commands(TyperGroup):
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


def end_with(summary: Summary, *, as_json: bool, quiet: bool = False) -> None:
    """Print what became of a run, and leave with the exit code that says so."""
    if as_json:
        typer.echo(summary.line())
    elif not quiet:
        from elastictrain.observe.live import ViewConsole
        from elastictrain.observe.report import summary_table

        ViewConsole().print(summary_table(summary))
    if summary.outcome == "stopped":
        raise typer.Exit(EXIT_STOPPED)
    if summary.outcome == "failed":
        typer.secho(f"failed: {summary.error or 'see events.jsonl'}", fg=typer.colors.RED, err=True)
        raise typer.Exit(EXIT_CLUSTER)
