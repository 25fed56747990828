"""`ckpt ls | show | verify | heal | digest | diff | cp | import | export | prune | pin | unpin`: everything about
checkpoints that needs neither a GPU, a cluster, nor the code that made them.

Exit codes: 0 all well, 1 damaged or different, 2 wrong use (no such step, no such place). With ``--json`` standard
output is one JSON document, and nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.pretty import Pretty
from rich.table import Table

from elastictrain_checkpoint import check, cli_keep, cli_move
from elastictrain_checkpoint.cast import values
from elastictrain_checkpoint.cli_common import (
    EXIT_CODES,
    NARROW_COLUMNS,
    All,
    AsJson,
    Options,
    Step,
    Where,
    bar,
    counted,
    guarded,
    offering_older,
    older_step,
    open_store,
    parse_options,
    pick,
    pick_or_problem,
    print_json,
    why_of,
)
from elastictrain_checkpoint.commit import list_steps, load
from elastictrain_checkpoint.difference import statistics
from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.errors import CheckpointError, InvalidMapping
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.retain import pinned
from elastictrain_checkpoint.source import Source, tensor_bytes
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.true_types import TrueTypes

SHOWN_VALUES = 10

app = typer.Typer(
    name="ckpt",
    help="Look at checkpoints, check them, compare, copy, convert and prune them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
)


@app.command("ls", epilog=EXIT_CODES)
@guarded
def ls(store: Where, option: Options = None, as_json: AsJson = False) -> None:
    """List the steps in a store. Whole: the manifest can be believed, and all packs have their sizes; `verify` reads
    every byte.
    """
    place = open_store(store, parse_options(option))
    held = set(pinned(place))
    rows = [_row(place, step) | {"pinned": step in held} for step in list_steps(place)]
    if as_json:
        print_json(rows)
    else:
        console = Console(soft_wrap=True, highlight=False)
        if rows:
            console.print(_steps_table(rows, narrow=console.width < NARROW_COLUMNS), soft_wrap=False)
        else:
            console.print(f"{place.url} holds no checkpoint of this format", markup=False)
        for row in rows:
            if not row["whole"]:
                console.print(f"step {row['step']}: {why_of(row['step'], row['problem'])}", markup=False)
    raise typer.Exit(0 if all(row["whole"] for row in rows) else 1)


def _steps_table(rows: list[dict[str, Any]], *, narrow: bool) -> Table:
    """Fits into 80 columns without the attempt and with half of the digest."""
    table = Table()
    for title in (
        "step",
        *([] if narrow else ["attempt"]),
        "gen.",
        "time (UTC)",
        "tensors",
        "bytes",
        "digest",
        "state",
    ):
        justify = "right" if title in ("gen.", "tensors", "bytes") else "left"
        table.add_column(title, justify=justify, no_wrap=title != "attempt", overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        cells = [str(row["step"])]
        if not narrow:
            cells.append(row.get("attempt", ""))
        cells += [
            str(row.get("generation", "")),
            row.get("time", "")[:16].replace("T", " "),
            str(row.get("tensors", "")),
            decimal(row["bytes"]) if "bytes" in row else "",
            row.get("digest", "")[: 8 if narrow else 16],
            ("[green]whole" if row["whole"] else "[red]damaged") + (", pinned" if row["pinned"] else ""),
        ]
        table.add_row(*cells)
    return table


@app.command("show", epilog=EXIT_CODES)
@guarded
def show(
    store: Where,
    step: Step = None,
    tensor: Annotated[str | None, typer.Option("--tensor", help="Values and statistics of this one.")] = None,
    span: Annotated[
        str | None,
        typer.Option("--range", metavar="START:STOP", help="Elements to show, row-major; only their bytes are read."),
    ] = None,
    option: Options = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: tensors, aliases, tree, facts about the run; or one tensor.

    With --tensor all of it is read for the statistics, in blocks; with --range too, only the elements named.
    """
    place = open_store(store, parse_options(option))
    if span is not None and tensor is None:
        raise InvalidMapping("--range is for one tensor: give --tensor NAME too")
    manifest = pick(place, step)
    if tensor is not None:
        with offering_older(place, manifest):
            _show_tensor(place, manifest, tensor, span, as_json=as_json)
    elif as_json:
        document = json.loads(manifest.raw)
        keys = ("step", "attempt", "generation", "time", "info", "alias", "tree", "base")
        shown = {key: document[key] for key in keys}
        seen = TrueTypes(Reader(place, manifest)).tensors
        tensors = {name: {"dtype": d, "shape": list(s)} for name in manifest.tensors for d, s in [seen[name]]}
        files = [{"path": p, "bytes": f.size_bytes} for p, f in zip(manifest.paths, manifest.files, strict=True)]
        print_json({**shown, "digest": manifest.digest, "tensors": tensors, "files": files})
    else:
        _show_all(manifest, TrueTypes(Reader(place, manifest)))


def _show_all(manifest: Manifest, seen: Source) -> None:
    console = Console(highlight=False)
    console.print(
        f"step [bold]{manifest.step}[/] · attempt {manifest.attempt} · generation {manifest.generation} · "
        f"{manifest.time}\ndigest {manifest.digest}\n"
        f"{counted(len(manifest.files), 'pack')}, {decimal(manifest.size_bytes)}"
    )
    table = Table()
    table.add_column("tensor", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("shape", overflow="fold")
    for title in ("bytes", "chunks"):
        table.add_column(title, justify="right", no_wrap=True)
    for number, name in enumerate(manifest.table.names):
        dtype, shape = seen.tensors[name]
        chunks = manifest.table.bounds[number + 1] - manifest.table.bounds[number]
        size = tensor_bytes(seen, name)
        table.add_row(escape(name), dtype, escape(str(list(shape))), decimal(size), str(chunks))
    for alias, target in manifest.alias.items():
        table.add_row(escape(f"{alias} → {target}"), "", "", "", "")
    console.print(table)
    for title, value in (("info", manifest.info), ("tree", manifest.tree)):
        if value:
            console.print(f"[bold]{title}")
            console.print(Pretty(value, max_string=100, max_length=30))


def _show_tensor(place: Store, manifest: Manifest, name: str, span: str | None, *, as_json: bool) -> None:
    reader = TrueTypes(Reader(place, manifest))
    if name not in reader.tensors:
        near = get_close_matches(name, reader.tensors, 3)
        raise KeyError(
            f"step {manifest.step} has no tensor {name!r}" + (f"; there are {', '.join(near)}" if near else "")
        )
    dtype, shape = reader.tensors[name]
    count = num_elements(shape)
    start, stop = (0, min(count, SHOWN_VALUES)) if span is None else _parse_span(span, count)
    found = values(reader.read_flat(name, start, stop), dtype)
    shown = None if found is None else [_scalar(value) for value in found.tolist()]
    facts = None
    if span is None:
        with bar(name, quiet=as_json) as progress:
            facts = asdict(statistics(reader, name, progress))
    if as_json:
        print_json({"step": manifest.step, "tensor": name, "dtype": dtype, "shape": list(shape),
                    "range": [start, stop], "values": shown, "statistics": facts})  # fmt: skip
        return
    console = Console(highlight=False)
    tied = f" → {manifest.alias[name]}" if name in manifest.alias else ""
    size = decimal(tensor_bytes(reader, name))
    console.print(f"step {manifest.step} · {name}{tied}\n{dtype} {list(shape)}, {size}", markup=False)
    for key, value in (facts or {}).items():
        if value is not None:
            console.print(f"  {key:<10} {value:.6g}" if isinstance(value, float) else f"  {key:<10} {value}")
    if shown is None:
        console.print(f"{dtype} has no values to print")
    elif stop > start:
        more = " …" if stop < count else ""
        text = " ".join(f"{one:.6g}" if isinstance(one, float) else str(one) for one in shown)
        console.print(f"elements {start} to {stop}: {text}{more}", markup=False)


def _scalar(value: Any) -> Any:
    return str(value) if isinstance(value, complex) else value


def _parse_span(text: str, count: int) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    try:
        start, stop = int(first or 0), int(last or count)
    except ValueError:
        start, stop = -1, -1
    if not colon or not 0 <= start <= stop <= count:
        raise InvalidMapping(f"--range {text!r} is not START:STOP with 0 <= START <= STOP <= {count}")
    return start, stop


@app.command("verify", epilog=EXIT_CODES)
@guarded
def verify(
    store: Where, step: Step = None, every: All = False, option: Options = None, as_json: AsJson = False
) -> None:
    """Read every byte and compare it with its hash; damage is named by file, block and tensors.

    Without --step it is the newest that is whole as far as sizes tell; newer ones that are not count as damaged.
    """
    place = open_store(store, parse_options(option))
    found: list[dict[str, Any]] = []
    passed_over = False
    for number in list_steps(place) if every else [step]:
        manifest, broken = pick_or_problem(place, number)
        if manifest is None:
            found.append({"step": number, "sound": False, "problems": [broken]})
            continue
        passed_over = number is None and manifest.step != list_steps(place)[-1]
        with bar(f"step {manifest.step}", quiet=as_json) as progress:
            problems = check.verify(place, manifest, progress)
        shown = [{"file": p.file, "block": p.block, "tensors": list(p.tensors), "message": p.message} for p in problems]
        found.append({"step": manifest.step, "sound": not problems, "problems": shown})
    if as_json:
        print_json(found)
    for entry in [] if as_json else found:
        console = Console(soft_wrap=True, highlight=False)
        console.print(f"step {entry['step']}: " + ("[green]sound" if entry["sound"] else "[red]damaged"))
        for problem in entry["problems"]:
            console.print(f"  {problem['message']}", markup=False)
        damaged = {problem["file"] for problem in entry["problems"]}
        if damaged and (offer := older_step(place, entry["step"], damaged)):
            console.print(offer, markup=False)
    raise typer.Exit(0 if all(entry["sound"] for entry in found) and not passed_over else 1)


@app.command("digest", epilog=EXIT_CODES)
@guarded
def digest(store: Where, step: Step = None, option: Options = None, as_json: AsJson = False) -> None:
    """Compute the digest of a checkpoint from its bytes; independent of how it is laid out."""
    place = open_store(store, parse_options(option))
    manifest = pick(place, step)
    with offering_older(place, manifest), bar(f"step {manifest.step}", quiet=as_json) as progress:
        value = check.digest(place, manifest, progress)
    equal = value == manifest.digest
    if as_json:
        print_json({"step": manifest.step, "digest": value, "recorded": manifest.digest, "equal": equal})
    else:
        typer.echo(value)
        if not equal:
            typer.echo(f"the manifest says {manifest.digest}", err=True)
    raise typer.Exit(0 if equal else 1)


def _row(store: Store, step: int) -> dict[str, Any]:
    try:
        manifest = load(store, step)
    except CheckpointError as error:
        return {"step": step, "whole": False, "problem": str(error)}
    return {
        "step": step,
        "whole": True,
        "attempt": manifest.attempt,
        "generation": manifest.generation,
        "time": manifest.time,
        "tensors": len(manifest.tensors),
        "bytes": manifest.size_bytes,
        "digest": manifest.digest,
    }


cli_move.register(app)
cli_keep.register(app)
