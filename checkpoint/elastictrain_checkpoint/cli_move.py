"""`ckpt diff | cp | import | export`: the commands with two places."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from elastictrain_checkpoint import convert
from elastictrain_checkpoint.cli_common import (
    EXIT_CODES,
    NARROW_COLUMNS,
    All,
    AsJson,
    MapFile,
    Options,
    Step,
    Where,
    bar,
    counted,
    fail,
    guarded,
    make_store,
    offering_older,
    open_store,
    parse_options,
    pick,
    print_json,
    read_rules,
)
from elastictrain_checkpoint.commit import list_steps
from elastictrain_checkpoint.convert.out_safetensors import DEFAULT_SHARD_BYTES
from elastictrain_checkpoint.difference import TensorDifference, diff
from elastictrain_checkpoint.errors import InvalidMapping
from elastictrain_checkpoint.mapping import Mapped, apply_rules
from elastictrain_checkpoint.reader import Reader
from elastictrain_checkpoint.source import Source
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.transfer import Copied, copy_checkpoint
from elastictrain_checkpoint.true_types import TrueTypes

Other = Annotated[
    list[str] | None,
    typer.Option(
        "--to-storage-option",
        metavar="KEY=VALUE",
        help="For the second place. Without it, --storage-option is for both, or the one that is no local folder.",
    ),
]
_EVERY = "(?s:.*)"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("diff", epilog=EXIT_CODES)(diff_command)
    app.command("cp", epilog=EXIT_CODES)(cp)
    app.command("import", epilog=EXIT_CODES)(import_command)
    app.command("export", epilog=EXIT_CODES)(export)


@guarded
def diff_command(
    a: Annotated[str, typer.Argument(metavar="A[@STEP]", help="Store, or a checkpoint of another format.")],
    b: Annotated[str, typer.Argument(metavar="B[@STEP]", help="The same, to compare with A.")],
    only: Annotated[str, typer.Option("--only", metavar="REGEX", help="Only names that this fits, whole.")] = _EVERY,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="A relative difference up to this counts as none.")
    ] = 0.0,
    every: Annotated[bool, typer.Option("--all", help="List equal tensors, too.")] = False,
    option: Options = None,
    to_option: Other = None,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor: B − A in numbers.

    L2 is the norm of the difference, max the largest of it, rel. L2 over the norm of A.
    """
    first, second = _both_options(a, b, option, to_option)
    try:
        fits = re.compile(only)
    except re.error as error:
        fail(f"--only {only!r} is not a regular expression: {error}", 2)
    one, two = (TrueTypes(_chosen(_source_at(*place), fits)) for place in ((a, first), (b, second)))
    if only != _EVERY and not one.tensors and not two.tensors:
        raise InvalidMapping(f"--only {only!r} fits no tensor of either, whole: nothing was compared")
    with bar("comparing", quiet=as_json) as progress:
        found = list(diff(one, two, progress))
    different = [entry for entry in found if not _equal(entry, tolerance)]
    shown = found if every else different
    if as_json:
        print_json({"equal": not different, "compared": len(found), "tensors": [asdict(entry) for entry in shown]})
    else:
        console = Console(highlight=False)
        if shown:
            console.print(_difference_table(shown, narrow=console.width < NARROW_COLUMNS))
        console.print(
            f"{len(different)} of {len(found)} tensors differ"
            if different
            else f"{counted(len(found), 'tensor')}, all equal"
        )
    raise typer.Exit(1 if different else 0)


def _equal(entry: TensorDifference, tolerance: float) -> bool:
    if entry.kind == "same":
        return True
    return entry.kind in ("values", "bits") and tolerance > 0 and entry.relative <= tolerance and not entry.not_finite


def _difference_table(entries: list[TensorDifference], *, narrow: bool) -> Table:
    """Fits into 80 columns without the number of elements."""
    table = Table()
    table.add_column("tensor", overflow="fold", ratio=1)
    table.add_column("what", overflow="fold", max_width=24 if narrow else 40)
    titles = ("L2", "max", "rel.") if narrow else ("elements", "L2", "max", "rel.")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for entry in entries:
        what = _what(entry)
        numbers = [f"{entry.elements}", f"{entry.l2:.3g}", f"{entry.max_abs:.3g}", f"{entry.relative:.3g}"]
        if entry.kind in ("missing", "extra", "shape", "same", "bits"):
            numbers = ["" if entry.kind != "bits" else f"{entry.elements}", "", "", ""]
        table.add_row(escape(entry.name), what, *numbers[-len(titles) :])
    return table


def _what(entry: TensorDifference) -> str:
    """In a few words, as markup."""
    match entry.kind:
        case "missing":
            return f"[red]missing in B[/] ({escape(entry.a or '')})"
        case "extra":
            return f"[red]only in B[/] ({escape(entry.b or '')})"
        case "shape":
            return escape(f"{entry.a} → {entry.b}")
        case "dtype":
            return " → ".join((side or "").partition(" ")[0] for side in (entry.a, entry.b))
        case "same":
            return "[green]same"
    return entry.kind + (f", {entry.not_finite} NaN or inf" if entry.not_finite else "")


@guarded
def cp(
    source: Where,
    target: Annotated[str, typer.Argument(help="Folder or URL to copy into; other steps there stay.")],
    step: Step = None,
    every: All = False,
    check: Annotated[bool, typer.Option("--check", help="Read back what was written, too.")] = False,
    option: Options = None,
    to_option: Other = None,
    as_json: AsJson = False,
) -> None:
    """Copy checkpoints to another store, every block checked, the manifest last; run again to go on after a failure."""
    first, second = _both_options(source, target, option, to_option)
    here, there = open_store(source, first), make_store(target, second)
    steps: list[int | None] = [*list_steps(here)] if every else [step]
    done, damaged = [], 0
    for number in steps:
        try:
            copied = _copy(here, there, number, check=check, quiet=as_json)
        except typer.Exit as failed:  # damaged, and said: the others are copied all the same
            if not every or failed.exit_code != 1:
                raise
            damaged += 1
            continue
        done.append(asdict(copied))
        if not as_json:
            state = "copied" if copied.committed else "was there already"
            typer.echo(
                f"step {copied.step}: {state}, {counted(len(copied.copied), 'pack')} written "
                f"({decimal(copied.copied_bytes)}), {len(copied.present)} there before"
            )
    if as_json:
        print_json(done)
    if damaged:
        fail(f"{counted(damaged, 'step')} of {len(steps)} not copied: damaged in {here.url}", 1)


def _copy(here: Store, there: Store, step: int | None, *, check: bool, quiet: bool) -> Copied:
    manifest = pick(here, step)
    with offering_older(here, manifest), bar(f"step {manifest.step}", quiet=quiet) as progress:
        return copy_checkpoint(here, manifest, there, check=check, progress=progress)


@guarded
def import_command(
    source: Annotated[str, typer.Argument(help="Folder, URL or .safetensors file of another format.")],
    store: Annotated[str, typer.Argument(help="Folder or URL that shall hold the checkpoint.")],
    kind: Annotated[
        str, typer.Option("--format", help=f"auto, {', '.join(convert.FORMATS)}.", show_default=True)
    ] = "auto",
    step: Annotated[int, typer.Option("--step", min=0, help="The step that it becomes.")] = 0,
    cast: Annotated[
        str | None, typer.Option("--cast", help="Floating-point tensors as this type; F32 is what a run keeps.")
    ] = None,
    rules: MapFile = None,
    as_named: Annotated[
        bool, typer.Option("--as-named", help="Keep the names as they are there, before --map.")
    ] = False,
    alias: Annotated[
        list[str] | None,
        typer.Option("--alias", metavar="NEW=EXISTING", help="A further name of a tied tensor; repeatable."),
    ] = None,
    tree: Annotated[Path | None, typer.Option("--tree", help="JSON file: state that is not tensors.")] = None,
    no_crc: Annotated[bool, typer.Option("--no-crc", help="Do not check CRC-32 sums of torch's files.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written under which name.")] = False,
    option: Options = None,
    to_option: Other = None,
    as_json: AsJson = False,
) -> None:
    """Bring a checkpoint of another format in: Hugging Face safetensors, torch DCP, DeepSpeed universal, Megatron.

    Names become those of a run (model/<parameter>, optim/<parameter>/<key>). No file is unpickled freely.
    """
    first, second = _both_options(source, store, option, to_option)
    ties = dict(_pair(text, "--alias") for text in alias or ())
    told = None if tree is None else _read_json(tree)
    foreign = convert.open_source(source, kind, storage_options=first, check_crc=not no_crc)
    mapped = Mapped(foreign, [*([] if as_named else convert.default_rules(foreign)), *read_rules(rules)])
    unused = mapped.unused()
    made = {name: sorted(view.inputs()) for name, view in mapped.views.items()}
    mapped = mapped if cast is None else convert.cast_floats(mapped, cast)
    report: dict[str, Any] = {"format": foreign.format, "tensors": len(mapped.tensors), "unused": unused,
                              "skipped": foreign.skipped, "dry_run": dry_run}  # fmt: skip
    if dry_run:
        report["names"] = {
            name: {"from": made[name], "dtype": d, "shape": s} for name, (d, s) in mapped.tensors.items()
        }
    else:
        info = {"imported": {"from": source, "format": foreign.format}}
        with bar("importing", quiet=as_json) as progress:
            manifest = convert.import_checkpoint(
                mapped, make_store(store, second), step=step, tree=told, aliases=ties, info=info, progress=progress
            )
        report |= {"step": manifest.step, "bytes": manifest.size_bytes, "digest": manifest.digest}
    if as_json:
        print_json(report)
        return
    console = Console(highlight=False)
    if dry_run:
        console.print(_names_table(report["names"]))
    else:
        console.print(
            f"step {report['step']}: {counted(len(mapped.tensors), 'tensor')}, {decimal(report['bytes'])}, "
            f"from {foreign.format}\ndigest {report['digest']}",
            markup=False,
        )
    for name in unused:
        console.print(f"not taken: {name}", markup=False)
    for said in foreign.skipped:
        console.print(f"skipped: {said}", markup=False)


def _names_table(names: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table()
    for title in ("tensor", "from"):
        table.add_column(title, overflow="fold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("shape", overflow="fold")
    for name, facts in names.items():
        table.add_row(escape(name), escape(", ".join(facts["from"])), facts["dtype"], escape(str(list(facts["shape"]))))
    return table


@guarded
def export(
    store: Where,
    target: Annotated[str, typer.Argument(help="Empty folder or URL to write into.")],
    kind: Annotated[str, typer.Option("--format", help="safetensors or dcp.")] = "safetensors",
    step: Step = None,
    cast: Annotated[
        str | None, typer.Option("--cast", help="Floating-point tensors as this type (BF16, F16, F32, F64).")
    ] = None,
    shard: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Most bytes in a safetensors file (5GB, 512MiB).")
    ] = f"{DEFAULT_SHARD_BYTES // 10**9}GB",
    rules: MapFile = None,
    as_named: Annotated[
        bool, typer.Option("--as-named", help="All tensors under our names (safetensors: else only the model's).")
    ] = False,
    tied: Annotated[bool, typer.Option("--tied", help="Safetensors: write tied tensors under each name.")] = False,
    option: Options = None,
    to_option: Other = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint for others: Hugging Face safetensors of the model, or torch DCP of model and optimizer."""
    first, second = _both_options(store, target, option, to_option)
    if kind not in ("safetensors", "dcp"):
        raise InvalidMapping(f"--format {kind!r} is not one of safetensors, dcp")
    if kind == "dcp" and tied:
        raise InvalidMapping("--tied is for safetensors: DCP holds tied tensors under each name anyway")
    shard_bytes = _parse_size(shard)
    here = open_store(store, first)
    manifest = pick(here, step)
    reader: Source = Reader(here, manifest)
    if kind == "safetensors" and not tied:
        views = {n: v for n, v in apply_rules(reader.tensors, []).items() if n not in manifest.alias}
        reader = Mapped.of(reader, views)
    after = convert.only_the_model() if kind == "safetensors" and not as_named else []
    mapped: Source = Mapped(reader, [*read_rules(rules), *after])
    out = make_store(target, second)
    with offering_older(here, manifest), bar(f"step {manifest.step}", quiet=as_json) as progress:
        if kind == "safetensors":
            done = convert.export_safetensors(mapped, out, shard_bytes=shard_bytes, cast=cast, progress=progress)
            files, size = list(done.files), done.size_bytes
        else:
            if cast is not None:
                mapped = convert.cast_floats(mapped, cast)
            size = convert.export_dcp(mapped, out, progress=progress)
            files = [name for name in out.list() if name == ".metadata" or name.endswith(".distcp")]
    report = {"step": manifest.step, "format": kind, "tensors": len(mapped.tensors), "bytes": size, "files": files}
    if as_json:
        print_json(report)
    else:
        typer.echo(
            f"step {manifest.step}: {counted(len(mapped.tensors), 'tensor')}, {decimal(size)}, "
            f"into {counted(len(files), 'file')} of {target}"
        )


def _both_options(
    one: str, two: str, option: list[str] | None, to_option: list[str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    first = parse_options(option)
    if to_option is not None:
        return first, parse_options(to_option)
    if get_protocol(one) == get_protocol(two):
        return first, first
    return ({}, first) if get_protocol(one) in LocalFileSystem.protocol else (first, {})


def _source_at(place: str, options: Mapping[str, Any]) -> Source:
    """A checkpoint of ours (``store@step``; the newest without a step), or one of another format with our names."""
    url, at, digits = place.rpartition("@")
    step = int(digits) if at and digits.isascii() and digits.isdigit() else None
    url = url if step is not None else place
    if not url.endswith(".safetensors"):
        store = open_store(url, options)
        if step is not None or list_steps(store):
            return Reader(store, pick(store, step))
    foreign = convert.open_source(url, storage_options=options)
    return Mapped(foreign, convert.default_rules(foreign))


def _chosen(source: Source, fits: re.Pattern[str]) -> Source:
    views = apply_rules(source.tensors, [])
    return Mapped.of(source, {name: view for name, view in views.items() if fits.fullmatch(name)})


def _pair(text: str, what: str) -> tuple[str, str]:
    new, sign, old = text.partition("=")
    if not (sign and new and old):
        raise InvalidMapping(f"{what} {text!r} is not NEW=EXISTING")
    return new, old


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidMapping(f"{path} is not JSON: {error}") from None


def _parse_size(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS or not int(found[1]):
        raise InvalidMapping(f"--shard-size {text!r} is not a size such as 5GB or 512MiB")
    return int(found[1]) * _UNITS[found[2].upper()]
