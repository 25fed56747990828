"""`elastictrain data inspect`: what data hold, in a page."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastictrain.errors import ConfigError
from elastictrain.terminal import AsJson

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress as Bars

    from elastictrain.data.index import Progress
    from elastictrain.data.inspection import Estimate, Inspection
    from elastictrain.data.quality import Mixing
    from elastictrain.data_settings import Data
    from elastictrain.job import Job

_BAR_COLUMNS = 40


def inspect(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A file, folder, glob or URL of data, or a JOB.yaml.")
    ],
    kind: Annotated[str | None, typer.Option("--kind", help="Format; default: what the names say.")] = None,
    text_column: Annotated[str | None, typer.Option("--text-column", help="Default: text, content, …")] = None,
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="bytes, or a Hugging Face tokenizers file.")] = "bytes",
    name: Annotated[
        str | None, typer.Option("--source", help="Of a job with a mixture: the source to look at.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Read every row group, not a sample of 32.")] = False,
    tokens_per_s: Annotated[
        float | None, typer.Option("--tokens-per-s", min=0.001, help="Speed of training, for the estimate of time.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG of the lengths of documents to write.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what data hold: columns, sizes, lengths of documents, advice, and how long they last for a job."""
    from elastictrain.data.inspection import advice, estimate, inspect_data, mixing_of

    job = _job_of(source)
    data = _data_of(job, name)
    whole = data is not None and job is not None and data is job.data
    with bars(quiet=as_json) as shown:
        found = inspect_data(
            data.path if data else source,
            kind=data.kind if data else kind,
            text_column=(data.text_column if data else None) or text_column,
            tokenizer=data.tokenizer if data else tokenizer,
            storage_options=data.storage_options if data else None,
            everything=everything,
            progress=telling(shown),
            settings=data,
        )
    told = estimate(found, job, tokens_per_s) if job and whole else None  # of a mixture it depends on the shares
    mixed = mixing_of(found, job) if job and whole else None
    picture = None
    if out is not None and found.texts is not None:
        from elastictrain.observe.lengths_plot import plot_lengths

        length = job.data.sequence_length if job else None
        picture = plot_lengths(
            found.texts.lengths, out, title=f"{source}: {found.texts.column}", sequence_length=length
        )
    said = advice(found, job)
    if as_json:
        record = found.as_json() | {"advice": said, "estimate": asdict(told) if told else None}
        record["mixing"] = asdict(mixed) | {"quality": mixed.quality} if mixed else None
        typer.echo(json.dumps(record | {"picture": str(picture) if picture else None}))
        return
    _print(found, told, mixed, said)
    if picture is not None:
        typer.echo(f"picture  {picture}")


def _job_of(source: str) -> Job | None:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    from elastictrain.job import load_job

    return load_job(path)


def _data_of(job: Job | None, name: str | None) -> Data | None:
    """What to look at of a job: its data, or one source of its mixture."""
    from elastictrain.data_settings import Mixture

    data = None if job is None else job.data
    if not isinstance(data, Mixture):
        if name is not None:
            raise ConfigError(f"--source {name}: only a job with a mixture (data.sources) has sources by name")
        return data
    if name not in data.sources:
        got = "" if name is None else f", not {name}"
        raise ConfigError(f"the data are a mixture; look at one of it: --source {' or '.join(data.sources)}{got}")
    return data.sources[name]


def _print(found: Inspection, told: Estimate | None, mixed: Mixing | None, said: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for name, words in _facts(found, told):
        table.add_row(name, words)
    if mixed is not None:
        table.add_row("mixing", mixed.words)
    console.print(table)
    if found.texts is not None:
        for line in bar_chart(found):
            console.print(line, markup=False)
    for sample in found.samples:
        console.print(f"│ {sample}", markup=False, style="dim", soft_wrap=False)
    for sentence in said:
        console.print(f"advice: {sentence}", style="yellow", markup=False)


def _facts(found: Inspection, told: Estimate | None) -> list[tuple[str, str]]:
    groups = "row groups" if found.kind == "parquet" else "blocks"
    rows, size = found.block_rows, found.block_bytes
    facts = [
        ("data", f"{found.files:,} {found.kind} file(s), {_bytes(found.bytes)}, {found.rows:,} rows"),
        ("columns", ", ".join(f"{name}: {kind}" for name, kind in found.schema)),
        (groups, (f"{found.blocks:,}; rows {rows.least:,} to {rows.most:,} (half: {rows.median:,}); "
                 f"{_bytes(size.least)} to {_bytes(size.most)} (half: {_bytes(size.median)})")),
    ]  # fmt: skip
    if found.texts is not None:
        texts, about = found.texts, "" if found.texts.is_whole else "about "
        facts.append(("tokens", f"{about}{texts.tokens:,} of {texts.column!r} with tokenizer {texts.tokenizer}"))
        facts.append(("reading", f"{texts.tokens_per_s:,.0f} tokens/s decoded and tokenised, one thread"))
    if told is not None:
        facts.append(("the job", (f"{told.samples:,} samples, {told.steps_per_epoch:,} steps an epoch, "
                                 f"{told.epochs:.2f} epochs, {told.tokens:,} tokens")))  # fmt: skip
        times = [("reading alone, by one worker", told.read_s), ("training", told.train_s)]
        said = [f"{name} {_time(seconds)}" for name, seconds in times if seconds is not None]
        facts += [("time", ", ".join(said))] if said else []
    return facts


def bar_chart(found: Inspection) -> list[str]:
    """The lengths of documents as bars of text."""
    from elastictrain.data.inspection import histogram

    assert found.texts is not None
    edges, counts = histogram(found.texts.lengths, bins=12)
    most = max(1, int(counts.max(initial=1)))
    lines = ["tokens of a document"]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "█" * round(count / most * _BAR_COLUMNS) or ("▏" if count else "")
        lines.append(f"{int(low):>9,} – {int(high) - 1:<9,} {bar} {count:,}")
    return lines


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


@contextmanager
def bars(*, quiet: bool) -> Iterator[Bars | None]:
    """Progress bars on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        yield shown


def telling(shown: Bars | None) -> Progress | None:
    """What opening and reading data report, as a bar for each thing that is done."""
    if shown is None:
        return None
    tasks: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = shown.add_task(what, total=total)
        shown.update(tasks[what], completed=done, total=total)

    return tell
