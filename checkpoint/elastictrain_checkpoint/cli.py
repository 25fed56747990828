"""`ckpt ls | show | verify | digest`: look at checkpoints without a GPU, a cluster or the code that made
them.

Exit codes: 0 all well, 1 problems found, 2 wrong use (no such step, no such place). With ``--json``
standard output is one JSON document, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.pretty import Pretty
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from elastictrain_checkpoint import check
from elastictrain_checkpoint.commit import Skipped, list_steps, load, newest
from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.errors import CheckpointError, CorruptData, NoCheckpoint
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.store import Store

app = typer.Typer(name="ckpt", help="Look at checkpoints and check them.", no_args_is_help=True, add_completion=False)

Where = Annotated[str, typer.Argument(help="Folder or URL that holds the checkpoints (file, s3, memory …).")]
Step = Annotated[int | None, typer.Option("--step", min=0, help="Step; the newest sound one if not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
All = Annotated[bool, typer.Option("--all", help="Every step, not only one.")]


@app.command("ls")
def ls(store: Where, as_json: AsJson = False) -> None:
    """List the steps in a store."""
    place = _open(store)
    rows = [_row(place, step) for step in list_steps(place)]
    if as_json:
        _print_json(rows)
    else:
        table = Table("step", "attempt", "generation", "time (UTC)", "tensors", "bytes", "digest", "state")
        for row in rows:
            shown = [row.get(key, "") for key in ("attempt", "generation", "time", "tensors")]
            state = "[green]sound" if row["sound"] else "[red]damaged"
            size = decimal(row["bytes"]) if "bytes" in row else ""
            table.add_row(str(row["step"]), *map(str, shown), size, row.get("digest", "")[:16], state)
        console = Console(soft_wrap=True, highlight=False)
        console.print(table, soft_wrap=False)
        for row in rows:
            if not row["sound"]:
                console.print(f"step {row['step']}: {row['problem']}", markup=False)
    raise typer.Exit(0 if all(row["sound"] for row in rows) else 1)


@app.command("show")
def show(store: Where, step: Step = None, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds: tensors, aliases, tree, facts about the run."""
    manifest = _pick(_open(store), step)
    if as_json:
        document = json.loads(manifest.raw)
        keys = ("step", "attempt", "generation", "time", "info", "alias", "tree", "base")
        shown = {key: document[key] for key in keys}
        tensors = {name: {"dtype": d, "shape": list(s)} for name, (d, s) in manifest.tensors.items()}
        files = [{"path": p, "bytes": f.size_bytes} for p, f in zip(manifest.paths, manifest.files, strict=True)]
        _print_json({**shown, "digest": manifest.digest, "tensors": tensors, "files": files})
        return
    console = Console()
    console.print(
        f"step [bold]{manifest.step}[/] · attempt {manifest.attempt} · generation {manifest.generation} · "
        f"{manifest.time}\ndigest {manifest.digest}\n{len(manifest.files)} packs, {decimal(manifest.size_bytes)}"
    )
    table = Table("tensor", "dtype", "shape", "bytes", "chunks")
    for number, name in enumerate(manifest.table.names):
        dtype, shape = manifest.tensors[name]
        chunks = manifest.table.bounds[number + 1] - manifest.table.bounds[number]
        size = num_elements(shape) * item_bytes(dtype)
        table.add_row(escape(name), dtype, str(list(shape)), decimal(size), str(chunks))
    for alias, target in manifest.alias.items():
        table.add_row(escape(alias), "→", escape(target), "", "")
    console.print(table)
    for title, value in (("info", manifest.info), ("tree", manifest.tree)):
        console.print(f"[bold]{title}[/]", Pretty(value))


@app.command("verify")
def verify(store: Where, step: Step = None, every: All = False, as_json: AsJson = False) -> None:
    """Read every byte and compare it with its hash; name what is damaged."""
    place = _open(store)
    found: list[dict[str, Any]] = []
    for number in list_steps(place) if every else [step]:
        manifest, broken = _pick_or_problem(place, number)
        if manifest is None:
            found.append({"step": number, "sound": False, "problems": [broken]})
            continue
        with _bar(f"step {manifest.step}", quiet=as_json) as progress:
            problems = check.verify(place, manifest, progress)
        shown = [{"file": p.file, "block": p.block, "tensors": list(p.tensors), "message": p.message} for p in problems]
        found.append({"step": manifest.step, "sound": not problems, "problems": shown})
    if as_json:
        _print_json(found)
    for entry in [] if as_json else found:
        console = Console(soft_wrap=True, highlight=False)
        console.print(f"step {entry['step']}: " + ("[green]sound" if entry["sound"] else "[red]damaged"))
        for problem in entry["problems"]:
            console.print(f"  {problem['message']}", markup=False)
    raise typer.Exit(0 if all(entry["sound"] for entry in found) else 1)


@app.command("digest")
def digest(store: Where, step: Step = None, as_json: AsJson = False) -> None:
    """Compute the digest of a checkpoint from its bytes; independent of how it is laid out."""
    place = _open(store)
    manifest = _pick(place, step)
    try:
        with _bar(f"step {manifest.step}", quiet=as_json) as progress:
            value = check.digest(place, manifest, progress)
    except CorruptData as error:
        _fail(str(error), 1)
    equal = value == manifest.digest
    if as_json:
        _print_json({"step": manifest.step, "digest": value, "recorded": manifest.digest, "equal": equal})
    else:
        typer.echo(value)
        if not equal:
            typer.echo(f"the manifest says {manifest.digest}", err=True)
    raise typer.Exit(0 if equal else 1)


def _open(url: str) -> Store:
    try:
        store = Store(url)
        empty = not store.list()
    except (ValueError, ImportError, OSError) as error:
        _fail(f"cannot open {url}: {error}", 2)
    if empty:
        _fail(f"{url} is not there, or there is nothing in it", 2)
    return store


def _pick(store: Store, step: int | None) -> Manifest:
    manifest, problem = _pick_or_problem(store, step)
    if manifest is None:
        _fail(problem["message"], 1)
    return manifest


def _pick_or_problem(store: Store, step: int | None) -> tuple[Manifest | None, dict[str, Any]]:
    """The step's manifest, or the newest; else one problem. Ends the command if there is no such step."""
    try:
        if step is not None:
            return load(store, step), {}
    except NoCheckpoint as error:
        _fail(str(error), 2)
    except CorruptData as error:
        return None, {"file": error.file, "block": None, "tensors": list(error.tensors), "message": str(error)}
    skipped: list[Skipped] = []
    manifest = newest(store, skipped)
    for passed in skipped:
        typer.echo(f"passed over step {passed.step}: {passed.why}", err=True)
    if manifest is None:
        _fail(f"{store.url} has no sound checkpoint", 1 if skipped else 2)
    return manifest, {}


def _row(store: Store, step: int) -> dict[str, Any]:
    try:
        manifest = load(store, step)
    except CheckpointError as error:
        return {"step": step, "sound": False, "problem": str(error)}
    return {
        "step": step,
        "sound": True,
        "attempt": manifest.attempt,
        "generation": manifest.generation,
        "time": manifest.time,
        "tensors": len(manifest.tensors),
        "bytes": manifest.size_bytes,
        "digest": manifest.digest,
    }


@contextlib.contextmanager
def _bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    if quiet:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)
