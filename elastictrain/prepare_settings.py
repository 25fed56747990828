"""What `elastictrain data prepare` is to do: one YAML of settings (`Preparation`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from elastictrain.errors import ConfigError
from elastictrain.settings import PositiveInt, Settings, a_number, explain, kind, not_a_switch

Share = Annotated[float, BeforeValidator(a_number), Field(ge=0)]
Seed = Annotated[int, BeforeValidator(not_a_switch), Field(ge=0)]

WHERE_ONLY = ("out", "out_options", "storage_options", "workers", "cpus", "gpus", "segments")
"""Settings that say where and how fast something is made, and not what."""


class NearDuplicates(Settings):
    """Documents that share about `threshold` of their runs of `ngram` words with an earlier one are left out."""

    threshold: Annotated[float, BeforeValidator(a_number), Field(gt=0, lt=1)] = 0.8
    """The Jaccard similarity from which two documents are nearly the same."""
    ngram: Annotated[int, BeforeValidator(not_a_switch), Field(ge=1, le=64)] = 5
    """Words in a row that are compared."""
    permutations: Annotated[int, BeforeValidator(not_a_switch), Field(ge=1, le=512)] = 128
    """Values of a signature: more of them are more exact, and take more time."""


class Preparation(Settings):
    """Documents or rows are read, mapped, filtered, deduplicated, tokenised, shuffled and written as Parquet."""

    kind: Literal["parquet", "jsonl", "arrow", "csv", "webdataset", "text", "huggingface"]
    """The format of what is read; as `Data.kind`."""
    path: str | tuple[str, ...]
    """A file, folder or glob (or a list of them), local or any fsspec URL."""
    out: str
    """The folder to write, local or any fsspec URL."""
    text_column: str | None = None
    """The column of documents; None: rows of a table."""
    columns: tuple[str, ...] | dict[str, str] | None = None
    """Columns that are read, and kept, beside the documents; a mapping gives their Arrow types. None: none beside
    documents, all of a table.
    """
    map: str | None = None
    """`module:function` or `file.py:function` that gets a `pyarrow.Table` and returns one, of any number of rows."""
    filter: str | None = None
    """The same, but it returns which rows stay, an array of booleans. It sees what `map` has returned."""
    tokenizer: str | None = None
    """`bytes`, or the path of a Hugging Face `tokenizers` file. None: documents stay text."""
    deduplicate: Literal["no", "exact"] = "no"
    """`exact`: of documents with the same text the first one stays."""
    near_duplicates: NearDuplicates | None = None
    """Set: of documents that are nearly the same the first one stays."""
    shuffle: Literal["global", "none"] = "global"
    """Order rows by a keyed hash, or leave them in the order in which they are read."""
    seed: Seed = 0
    batch_rows: PositiveInt = 1024
    """Rows that `map` and `filter` get at once, at most."""
    row_group_bytes: PositiveInt = 16 << 20
    """Row groups of what is written, decoded."""
    file_bytes: PositiveInt = 256 << 20
    """Files that are written, decoded. One of them has to fit into a task's memory, about three times."""
    part_bytes: PositiveInt = 256 << 20
    """What one task reads, and loses when it is killed."""
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    rows_per_block: PositiveInt = 1024
    """JSONL, CSV, text and WebDataset have no row groups: lines, records or samples that are read at once."""
    document: Literal["line", "file"] = "line"
    """What a document of kind `text` is."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """What cannot be read ends the preparation, or is left out and named in the index."""
    max_document_bytes: PositiveInt = 256 << 20
    """A longer text is an error."""
    segments: bool = False
    """Append files to a manifest of segments in `out` as they are finished: a job with `data.live` begins on them."""
    workers: PositiveInt | None = None
    """Tasks at the same time; None: as many as the cluster has room for."""
    cpus: Share = 1.0
    """Of each task."""
    gpus: Share = 0.0
    """Of each task; for `map` and `filter` that compute on one."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    out_options: dict[str, Any] = Field(default_factory=dict)

    @property
    def column_names(self) -> tuple[str, ...] | None:
        """All columns that are read, the documents first; None: all that there are."""
        if self.text_column is None:
            return None if self.columns is None else tuple(self.columns)
        return tuple(dict.fromkeys((self.text_column, *(self.columns or ()))))

    @property
    def identity(self) -> dict[str, Any]:
        """All settings that what is written follows from; JSON."""
        return self.model_dump(mode="json", exclude=set(WHERE_ONLY))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "text" and (self.text_column != "text" or self.columns):
            raise ValueError("kind: text has one column, called text; set text_column: text and leave columns out")
        for name in ("tokenizer", "deduplicate", "near_duplicates"):
            if self.text_column is None and getattr(self, name) not in (None, "no"):
                raise ValueError(f"{name} is about documents; set text_column, or leave {name} out")
        if self.deduplicate != "no" and self.shuffle == "none":
            raise ValueError(
                "deduplicate brings equal documents together by the shuffle; set shuffle: global, or deduplicate: no"
            )
        for name in ("map", "filter"):
            reference = getattr(self, name)
            if reference is not None and not all(reference.rpartition(":")[::2]):
                raise ValueError(f'{name}={reference!r}: expected "module:function" or "file.py:function"')
        return self


def load_preparation(path: str | Path, **overrides: Any) -> Preparation:
    """Read a YAML of settings; `overrides` replace some, of mappings the entries that they name. Raises ConfigError."""
    file = Path(path)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error}); expected YAML with at least kind, path and out") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a mapping of settings, got {kind(raw)}")
    for name, value in overrides.items():
        raw[name] = raw[name] | value if isinstance(value, dict) and isinstance(raw.get(name), dict) else value
    return parse_preparation(raw, where=str(file))


def parse_preparation(raw: dict[str, Any], where: str = "preparation") -> Preparation:
    """Check settings. Raises ConfigError that names each one that is wrong."""
    try:
        return Preparation.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, Preparation, where)) from None
