"""What the commands of `ckpt` share: opening places, progress bars, printing, exit codes."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from elastictrain_checkpoint.commit import Skipped, load, newest
from elastictrain_checkpoint.errors import CheckpointError, CorruptData, InvalidMapping, NoCheckpoint
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.mapping import Rule, parse_rules
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.tiers import newest_older

EXIT_CODES = (
    "Exit codes: 0 all well; 1 damaged, or different; 2 wrong use, or a place that cannot be reached or written."
)

NARROW_COLUMNS = 100
"""Terminals below this are shown less."""

Where = Annotated[str, typer.Argument(help="Folder or URL that holds the checkpoints (file, s3, gs, memory …).")]
Step = Annotated[int | None, typer.Option("--step", min=0, help="Step; the newest sound one if not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")]
All = Annotated[bool, typer.Option("--all", help="Every step, not only one.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        "-o",
        metavar="KEY=VALUE",
        help="For fsspec; repeatable. Dots lead deeper (client_kwargs.endpoint_url=http://…), values may be JSON.",
    ),
]
MapFile = Annotated[
    Path | None, typer.Option("--map", help="JSON file of rules (only, rename, split, …), applied to our names.")
]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def guarded(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Errors of a command as one sentence and an exit code instead of a traceback."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except CorruptData as error:
            fail(str(error), 1)
        except KeyError as error:
            fail(str(error.args[0] if error.args else error), 2)
        except (CheckpointError, OSError) as error:
            fail(f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error), 2)

    return run


def why_of(step: int, why: str) -> str:
    """A reason, for behind the number of the step with which some begin."""
    return why.removeprefix(f"step {step}: ")


def fail(message: str, code: int) -> NoReturn:
    """End the command with a sentence on standard error."""
    typer.echo(message, err=True)
    raise typer.Exit(code)


def counted(number: int, what: str) -> str:
    """``1 pack``, ``2 packs``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def print_json(value: Any) -> None:
    """One JSON document on standard output; NaN and infinities, which JSON has not, as text."""
    typer.echo(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def parse_options(given: Sequence[str] | None) -> dict[str, Any]:
    """``["key=x", "client_kwargs.endpoint_url=http://…"]`` as a nested table.

    Raises:
        InvalidMapping: not KEY=VALUE, or a key that is a value and a table.

    """
    out: dict[str, Any] = {}
    for text in given or ():
        key, sign, value = text.partition("=")
        path = key.split(".")
        if not sign or not all(path):
            raise InvalidMapping(f"--storage-option {text!r} is not KEY=VALUE")
        at = out
        for part in path[:-1]:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise InvalidMapping(f"--storage-option {text!r}: {part} is a value already")
        if path[-1] in at:
            raise InvalidMapping(f"--storage-option {text!r}: {key} was given before")
        try:
            at[path[-1]] = json.loads(value)
        except ValueError:
            at[path[-1]] = value
    return out


def make_store(url: str, options: Mapping[str, Any]) -> Store:
    """A store that need not hold anything yet; ends the command if there can be none."""
    try:
        return Store(url, storage_options=options)
    except (ValueError, ImportError, OSError, TypeError) as error:
        fail(f"cannot open {url}: {error}", 2)


def open_store(url: str, options: Mapping[str, Any]) -> Store:
    """A store that holds something; ends the command if it does not."""
    store = make_store(url, options)
    try:
        empty = not store.list()
    except (ValueError, OSError) as error:
        fail(f"cannot open {url}: {error}", 2)
    if empty:
        fail(f"{url} is not there, or there is nothing in it", 2)
    return store


def pick(store: Store, step: int | None) -> Manifest:
    """The step's manifest, or the newest sound one; ends the command if there is none."""
    manifest, problem = pick_or_problem(store, step)
    if manifest is None:
        fail(problem["message"], 1)
    return manifest


def pick_or_problem(store: Store, step: int | None) -> tuple[Manifest | None, dict[str, Any]]:
    """The step's manifest, or the newest; else one problem. Ends the command if there is no such step."""
    try:
        if step is not None:
            return load(store, step), {}
    except NoCheckpoint as error:
        fail(str(error), 2)
    except CorruptData as error:
        return None, {"file": error.file, "block": None, "tensors": list(error.tensors), "message": str(error)}
    skipped: list[Skipped] = []
    manifest = newest(store, skipped)
    for passed in skipped:
        typer.echo(f"passed over step {passed.step}: {why_of(passed.step, passed.why)}", err=True)
    if manifest is None:
        fail(f"{store.url} has no sound checkpoint", 1 if skipped else 2)
    return manifest, {}


@contextlib.contextmanager
def offering_older(store: Store, manifest: Manifest) -> Iterator[None]:
    """Damage that is found in here ends the command, and the newest older step that is whole is named."""
    try:
        yield
    except CorruptData as error:
        offer = older_step(store, manifest.step, [error.file])
        fail(f"{error}\n{offer}" if offer else str(error), 1)


def older_step(store: Store, step: int, files: Collection[str]) -> str:
    """What to take instead of a step of which `files` are damaged, in a sentence; empty if there is nothing."""
    older = newest_older([store], step, files)
    if older is None:
        return ""
    return f"the newest older step that is whole is {older}: give --step {older} (ckpt verify reads every byte of it)"


def read_rules(path: Path | None) -> list[Rule]:
    """Rules from a file; none if there is no file. An unreadable file ends the command."""
    return [] if path is None else parse_rules(path.read_bytes())


@contextlib.contextmanager
def bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error, gone when it is done; None where nothing shall be shown."""
    if quiet:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
