"""What data hold, before a job uses them: sizes, lengths of documents, advice, and how long they will last.

Of Parquet the footers are read, and documents of some row groups, spread over all files by the keyed permutation of the
data order. Numbers that come from a part are marked as estimates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from elastictrain.data.columns import is_text, nearest, show_schema
from elastictrain.data.files import SUFFIXES, find_files
from elastictrain.data.formats import first_schema, open_blocks
from elastictrain.data.index import BlockFormat, Progress, read_texts
from elastictrain.data.order import derive_key, permutation
from elastictrain.data.quality import Mixing, mixing
from elastictrain.data.retry import RETRY_LIMIT_S
from elastictrain.data.source import lay_down
from elastictrain.data.tokenizers import Tokenizer, load_tokenizer
from elastictrain.data_settings import Data, Mixture
from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.job import Job

TEXT_NAMES = ("text", "content", "document", "body")
BLOCKS_READ = 32
SHOWN = 3
_SHOWN_CHARACTERS = 160
_SMALL_BYTES, _LARGE_BYTES = 1 << 20, 256 << 20
_MANY_FILES = 10_000

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sizes:
    """Smallest, middle and largest of something."""

    least: int
    median: int
    most: int

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Sizes:
        """Of some values; zeros if there are none."""
        found = np.asarray(values, dtype=np.int64)
        return cls(int(found.min()), int(np.median(found)), int(found.max())) if found.size else cls(0, 0, 0)


@dataclass(frozen=True)
class Texts:
    """Of the documents that were read. `tokens`: of all data, each document's end included; an estimate unless
    `is_whole`. `lengths`: tokens of each document read, without its end. `tokens_per_s`: of reading and tokenising.
    """

    column: str
    tokenizer: str
    is_whole: bool
    tokens: int
    documents_read: int
    nulls: int
    empty: int
    tokens_per_s: float
    lengths: Lengths = field(repr=False)


@dataclass(frozen=True)
class Inspection:
    """What there is. `block_bytes`: of row groups as they are decoded (Parquet), or of lines (JSON lines)."""

    kind: str
    files: int
    bytes: int
    rows: int
    blocks: int
    schema: tuple[tuple[str, str], ...]
    block_rows: Sizes
    block_bytes: Sizes
    texts: Texts | None
    samples: tuple[str, ...]
    rows_of_blocks: Lengths = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)

    def as_json(self) -> dict[str, Any]:
        """For programs; of the lengths their quantiles."""
        record = asdict(self)
        del record["rows_of_blocks"]
        if self.texts is not None:
            record["texts"] = {k: v for k, v in record["texts"].items() if k != "lengths"}
            record["texts"]["lengths"] = quantiles(self.texts.lengths)
        return record


@dataclass(frozen=True)
class Estimate:
    """For a job. `samples`: in an epoch. `read_s`: reading alone, by one worker; `train_s`: at the speed given."""

    samples: int
    steps_per_epoch: int
    epochs: float
    tokens: int
    read_s: float | None
    train_s: float | None


def quantiles(lengths: Lengths) -> dict[str, int]:
    """Some quantiles of lengths; empty for none."""
    if not len(lengths):
        return {}
    parts = {"min": 0.0, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: int(np.quantile(lengths, part)) for name, part in parts.items()}


def inspect_data(
    path: str | Sequence[str],
    *,
    kind: str | None = None,
    text_column: str | None = None,
    tokenizer: str = "bytes",
    storage_options: dict[str, Any] | None = None,
    everything: bool = False,
    progress: Progress | None = None,
    settings: Data | None = None,
) -> Inspection:
    """Look at data. `text_column` None: the first of `TEXT_NAMES` that is there, if any; `everything`: read it all.
    `settings`: a job's, for what is not said here, such as the rows of a block and what to do with corrupt files.

    Raises DataError as `open_source` does.
    """
    kind = kind or guess_kind(path)
    files = find_files(path, kind, storage_options, settings.retry_s if settings else RETRY_LIMIT_S)
    spec = settings.settled() if settings else Data.model_validate(
        {"kind": kind, "path": path if isinstance(path, str) else tuple(path), "tokenizer": tokenizer,
         "storage_options": storage_options or {}}
        | ({"text_column": "text", "sequence_length": 1} if kind == "text" else {})
    )  # fmt: skip
    schema = first_schema(spec, files)
    column = text_column or guess_text_column(schema)
    if column is not None and column not in schema.names:
        raise DataError(f"no column {column!r}{nearest(column, schema.names)}: {show_schema(_pairs(schema))}")
    names = tuple(f.name for f in schema if not is_text(f.type))
    # Packed rows are not looked at, so their length and what goes with it say nothing here.
    plain = {"text_column": None, "sequence_length": None, "packing": "concatenate", "document_ids": False}
    read = plain | ({"text_column": column, "sequence_length": 1} if column else {"columns": names})
    blocks, _ = open_blocks(spec.model_copy(update=read), files, None, progress)
    try:
        texts: Texts | None = None
        samples: tuple[str, ...] = ()
        if column is not None:
            texts, samples = _read_texts(
                blocks, column, load_tokenizer(tokenizer, storage_options), everything, progress
            )
        table = blocks.blocks
        return Inspection(
            kind=kind,
            files=len(files.files),
            bytes=sum(file.size_bytes for file in files.files),
            rows=int(table.rows.sum()),
            blocks=len(table),
            schema=_pairs(schema),
            block_rows=Sizes.of(table.rows),
            block_bytes=Sizes.of(table.stop - table.start),
            texts=texts,
            samples=samples,
            rows_of_blocks=table.rows,
        )
    finally:
        blocks.close()


def guess_kind(path: str | Sequence[str]) -> str:
    """The format that the names or the files in the folder say. Raises DataError if they say none or several."""
    first = path if isinstance(path, str) else path[0]
    for kind, suffixes in SUFFIXES.items():
        if first.lower().endswith(suffixes):
            return kind
    found, said = [], []
    for kind in SUFFIXES:
        try:
            find_files(path, kind)
        except DataError as error:
            said.append(str(error))
        else:
            found.append(kind)
    if "huggingface" in found:  # a folder that says so itself, with files that look like those of other formats
        return "huggingface"
    if len(found) > 1 and "text" in found:  # texts lie beside data to say what they are
        found.remove("text")
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{first!r} holds files of several formats ({', '.join(found)}): choose one with --kind")
    raise DataError(said[0])


def guess_text_column(schema: pa.Schema) -> str | None:
    """The column that most likely holds the documents; None when every column is numbers."""
    texts = [field.name for field in schema if is_text(field.type)]
    return next((name for name in TEXT_NAMES if name in texts), texts[0] if texts else None)


def _pairs(schema: pa.Schema) -> tuple[tuple[str, str], ...]:
    return tuple((field.name, str(field.type)) for field in schema)


def _read_texts(
    blocks: BlockFormat, column: str, tokenizer: Tokenizer, everything: bool, progress: Progress | None
) -> tuple[Texts, tuple[str, ...]]:
    rows = blocks.blocks.rows
    filled = np.flatnonzero(rows)
    chosen = filled if everything else np.sort(filled[permutation(derive_key("inspect"), len(filled))[:BLOCKS_READ]])
    lengths, nulls, begun_s = [np.zeros(0, dtype=np.int64)], 0, time.perf_counter()
    samples: list[str] = []
    for done, block in enumerate(chosen.tolist(), start=1):
        documents = read_texts(blocks, block, column)
        _, starts = tokenizer.encode_with_offsets(documents)
        lengths.append(np.diff(starts) - 1)
        nulls += documents.null_count
        if len(samples) < SHOWN:
            samples.append(_shown(documents[len(documents) // 2].as_py()))
        if progress:
            progress("reading documents", done, len(chosen))
    joined, seconds = np.concatenate(lengths), time.perf_counter() - begun_s
    read, is_whole = int(joined.sum()) + len(joined), len(chosen) == len(filled)
    total = read if is_whole else round(read / max(1, len(joined)) * int(rows.sum()))
    texts = Texts(
        column=column, tokenizer=tokenizer.name, is_whole=is_whole, tokens=total, documents_read=len(joined),
        nulls=nulls, empty=int((joined == 0).sum()) - nulls, tokens_per_s=read / max(seconds, 1e-9), lengths=joined,
    )  # fmt: skip
    return texts, tuple(samples)


def _shown(value: str | bytes | list[int] | None) -> str:
    if isinstance(value, list):  # tokenised already
        value = " ".join(map(str, value))
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value or ""
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[: _SHOWN_CHARACTERS - 1] + "…"


def estimate(found: Inspection, job: Job, tokens_per_s: float | None = None) -> Estimate:
    """How often a job goes through the data, and for how long. `tokens_per_s`: of training, if it is known."""
    width = (job.data.sequence_length or 0) + 1
    samples = found.texts.tokens // width if found.texts is not None else found.rows
    of_step = job.lanes * job.lane_batch_size
    tokens = job.steps * of_step * (width - 1 if found.texts is not None else 0)
    speed = found.texts.tokens_per_s if found.texts is not None else None
    return Estimate(
        samples=samples,
        steps_per_epoch=samples // of_step,
        epochs=job.steps * of_step / samples if samples else 0.0,
        tokens=tokens,
        read_s=tokens / speed if speed else None,
        train_s=tokens / tokens_per_s if tokens_per_s and tokens else None,
    )


def mixing_of(found: Inspection, job: Job) -> Mixing | None:
    """How well the job's order mixes these data; None where it does not shuffle, or the order is not one of blocks (a
    mixture, a live source), or they fill no step. Of text the samples of a block are worked out from its documents.
    """
    data = job.data
    if isinstance(data, Mixture) or data.is_live or data.shuffle != "window":
        return None
    samples = found.rows_of_blocks
    if found.texts is not None:
        each = found.texts.tokens / max(1, found.rows) / ((data.sequence_length or 0) + 1)
        samples = np.diff(np.floor(np.cumsum(samples) * each).astype(np.int64), prepend=0)
    if samples.sum() < job.lanes * job.lane_batch_size:
        return None
    return mixing(lay_down(data, samples, seed=job.seed, lanes=job.lanes, lane_batch_size=job.lane_batch_size))


def advice(found: Inspection, job: Job | None = None) -> list[str]:
    """What should be changed before a long run, a sentence each. Of a job with a mixture only the lengths count."""
    data = job.data if job is not None and not isinstance(job.data, Mixture) else None
    said: list[str] = []
    bytes_of, name = found.block_bytes, "row groups" if found.kind == "parquet" else "blocks"
    setting = "write them again with row_group_size" if found.kind == "parquet" else "set data.rows_per_block"
    if bytes_of.most > _LARGE_BYTES:
        said.append(
            f"the largest of the {name} takes {_mib(bytes_of.most)} decoded, and a lane holds "
            f"{data.window_row_groups if data else 2} of them: {setting} for 8 to 64 MiB"
        )
    if found.blocks > 1 and bytes_of.median < _SMALL_BYTES:
        said.append(
            f"half of the {name} are below {_mib(_SMALL_BYTES)}: each costs a request; {setting} for 8 to 64 MiB"
        )
    if found.files > _MANY_FILES:
        said.append(
            f"{found.files} files: listing them and their footers takes long; fewer and larger files are faster"
        )
    if found.block_rows.least == 0:
        said.append(f"some of the {name} are empty: they are passed over")
    if job is not None and data is not None:
        wanted = job.lanes * data.window_row_groups
        if data.shuffle == "window" and found.blocks < wanted:
            said.append(
                f"{found.blocks} {name} for {job.lanes} lanes with windows of {data.window_row_groups}: they share "
                f"them, so they are read more than once an epoch and mix little; have at least {wanted}"
            )
        told = estimate(found, job)
        if told.steps_per_epoch == 0:
            said.append(
                f"{told.samples} samples are fewer than a step needs; lower lanes or lane_batch_size, or add data"
            )
    texts = found.texts
    if texts is None:
        return said
    if texts.nulls:
        said.append(f"{texts.nulls} of {texts.documents_read} documents are null: they count as empty ones")
    if texts.empty:
        said.append(f"{texts.empty} of {texts.documents_read} documents are empty")
    if job is not None and job.data.sequence_length and len(texts.lengths):
        short = float((texts.lengths < job.data.sequence_length / 8).mean())
        if short > 0.9:
            said.append(
                f"{short:.0%} of the documents are shorter than an eighth of data.sequence_length: a packed sample "
                "holds many that have nothing to do with each other"
            )
    return said


def histogram(lengths: Lengths, bins: int = 24) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Edges and counts over logarithmic bins, as lengths of documents spread over decades; shapes [n + 1] and [n]."""
    most = max(2, int(lengths.max(initial=1)))
    edges = np.unique(np.round(np.geomspace(1, most + 1, bins + 1)))
    counts, _ = np.histogram(np.maximum(lengths, 1), bins=edges)
    return edges, counts.astype(np.int64)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB" if size >= 1 << 20 else f"{size / 1024:.0f} KiB"
