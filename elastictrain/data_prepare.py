"""`elastictrain data prepare`: tokenise, filter, deduplicate and shuffle on Ray, into Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastictrain.data_inspect import bars, telling
from elastictrain.errors import ConfigError
from elastictrain.terminal import AsJson

if TYPE_CHECKING:
    from elastictrain.prepare_settings import Preparation


def prepare(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A PREPARE.yaml, or a file, folder, glob or URL of data.")
    ],
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder or URL to write.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Format; default: what the names say.")] = None,
    text_column: Annotated[str | None, typer.Option("--text-column", help="The column of documents.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="A column that is read and kept beside; may be repeated.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="bytes, or a tokenizers file.")] = None,
    map_: Annotated[str | None, typer.Option("--map", help="module:function, or file.py:function.")] = None,
    filter_: Annotated[str | None, typer.Option("--filter", help="module:function, or file.py:function.")] = None,
    deduplicate: Annotated[bool | None, typer.Option("--deduplicate", help="Of equal documents keep one.")] = None,
    near_duplicates: Annotated[
        float | None, typer.Option("--near-duplicates", help="Of documents that are so similar (0.8, say) keep one.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the shuffle.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Tasks at the same time.")] = None,
    segments: Annotated[
        bool, typer.Option("--segments", help="Let a job with data.live begin on files that are finished.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was begun in --out.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster: auto, or host:port of its head; default: an embedded one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise, filter, deduplicate and shuffle data on Ray, into Parquet that is ready to train on."""
    given: dict[str, Any] = {
        "out": out, "kind": kind, "text_column": text_column, "columns": columns or None, "tokenizer": tokenizer,
        "map": map_, "filter": filter_, "seed": seed, "workers": workers,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if segments:
        given["segments"] = True
    if deduplicate is not None:
        given["deduplicate"] = "exact" if deduplicate else "no"
    if near_duplicates is not None:
        given["near_duplicates"] = {"threshold": near_duplicates}
    settings = _settings(source, given)

    from elastictrain.data.preparing.summary import advice, data_settings
    from elastictrain_actors.preparation import prepare as on_ray

    with bars(quiet=as_json) as shown:
        index = on_ray(settings, resume=resume, address=address, progress=telling(shown))
    said = advice(index, settings)
    job = data_settings(settings, settings.out)
    counts = index["counts"]
    if as_json:
        typer.echo(json.dumps({"out": settings.out, "digest": index["digest"], "counts": counts,
                               "files": len(index["files"]), "holes": index["holes"], "advice": said,
                               "data": job}))  # fmt: skip
        return
    _print(settings.out, index, said, job)


def _settings(source: str, given: dict[str, Any]) -> Preparation:
    from elastictrain.prepare_settings import load_preparation, parse_preparation

    if Path(source).suffix in (".yaml", ".yml") and Path(source).is_file():
        return load_preparation(source, **given)
    if "out" not in given:
        raise ConfigError("--out is missing: name the folder or URL to write")
    if "kind" not in given:
        from elastictrain.data.inspection import guess_kind

        given["kind"] = guess_kind(source)
    if given["kind"] == "text":
        given.setdefault("text_column", "text")
    return parse_preparation({"path": source, **given}, where="data prepare")


def _print(out: str, index: dict[str, Any], said: list[str], job: dict[str, Any]) -> None:
    counts = index["counts"]
    typer.echo(
        f"{counts['read']:,} rows read, {counts['filtered']:,} filtered, {counts['duplicates']:,} duplicates, "
        + (f"{counts['near_duplicates']:,} near-duplicates, " if "near_duplicates" in counts else "")
        + f"{counts['rows']:,} written"
        + (f", {counts['tokens']:,} tokens" if counts["tokens"] is not None else "")
    )
    groups = sum(file["row_groups"] for file in index["files"])
    typer.echo(f"{out}: {len(index['files'])} file(s), {counts['bytes']:,} bytes, {groups} row groups")
    typer.echo(f"digest {index['digest']}")
    typer.echo("train on it with\n  data:")
    for name, value in job.items():
        typer.echo(f"    {name}: {value}")
    for sentence in said:
        typer.secho(f"advice: {sentence}", fg=typer.colors.YELLOW)
