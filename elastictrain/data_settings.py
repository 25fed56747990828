"""The `data` section of a job: one source (`Data`), or several in a mixture that may change by stages (`Mixture`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from elastictrain.settings import PositiveInt, Settings, a_number, not_a_switch

Amount = Annotated[float, BeforeValidator(a_number), Field(ge=0)]
Bytes = Annotated[int, BeforeValidator(not_a_switch), Field(ge=0)]
BatchType = Literal["int64", "int32", "narrow"]
"""`narrow`: the smallest integers that the vocabulary and the length of a row need."""


class Reservoir(Settings):
    """What is trained on while nothing new is there: the last `samples` samples, again and again, in new orders."""

    samples: PositiveInt
    steps: PositiveInt = 1
    """So many steps are taken from it at a time, before new segments are looked for."""


class Live(Settings):
    """The data are segments that arrive while training runs (`elastictrain.data.segments`).

    `policy`: what to do when training is faster than they: wait for them, end, or go on from a reservoir.
    """

    policy: Literal["wait", "stop", "reservoir"] = "wait"
    deadline_s: Annotated[float, BeforeValidator(a_number), Field(gt=0)] = 3600.0
    """Longest wait for the next segment."""
    poll_s: Annotated[float, BeforeValidator(a_number), Field(gt=0)] = 1.0
    """How often the store is asked whether there is one."""
    reservoir: Reservoir | None = None
    segments_at_once: Annotated[int, BeforeValidator(not_a_switch), Field(ge=1, le=4096)] = 16
    """At most so many new segments become part of the order at once (more where they fill no step). They are shuffled
    together."""
    record: str | None = None
    """The folder in which the order is recorded: all workers can write to it, and it is one run's own. Default: in
    checkpoint.path. Read with data.storage_options."""

    @model_validator(mode="before")
    @classmethod
    def _policy_follows(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and raw.get("reservoir") is not None and "policy" not in raw:
            return {**raw, "policy": "reservoir"}
        return raw

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        if (self.policy == "reservoir") != (self.reservoir is not None):
            raise ValueError(
                f"data.live.policy={self.policy!r}, and data.live.reservoir is "
                f"{'set' if self.reservoir is not None else 'not set'}; they belong together"
            )
        return self


class Data(Settings):
    """Where samples come from. `path`: a file, folder or glob (or a list of them), local or any fsspec URL."""

    kind: Literal["parquet", "jsonl", "arrow", "csv", "webdataset", "text", "huggingface"]
    """The format. `huggingface`: the folder of a dataset that was saved with `Dataset.save_to_disk`."""
    path: str | tuple[str, ...]
    text_column: str | None = None
    """The column to tokenise and pack. None: table mode, every column of `columns` is an array of the batch."""
    columns: tuple[str, ...] | None = None
    tokenizer: str = "bytes"
    """`bytes`, or the path of a Hugging Face `tokenizers` JSON file."""
    sequence_length: PositiveInt | None = None
    """Tokens per packed sequence; needed with `text_column`."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """Join documents and cut the rows out of that, or put whole documents (cut only where longer than a row) together
    so that little is filler; the batch then says which token is of which document."""
    document_ids: bool = False
    """Give `document_ids`, `position_ids` and `loss_mask` with joined documents too."""
    shuffle: Literal["window", "none", "strict"] = "window"
    """`window`: row groups in a permuted order, shuffled within `window_row_groups` of them per lane. `none`: every
    lane reads its part of the files in order. `strict`: a step is the next samples of the files, dealt to the lanes.
    """
    ragged: Literal["drop", "repeat"] = "drop"
    """What fills no whole step at the end of an epoch is left out, or filled up with the epoch's first samples."""
    window_row_groups: PositiveInt = 2
    rows_per_block: PositiveInt = 1024
    """JSONL, CSV, text and WebDataset have no row groups: lines, records or samples per block."""
    document: Literal["line", "file"] = "line"
    """What a document of kind `text` is."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """Files and row groups that cannot be read: stop, or leave them out and say so. With `skip` everything is read once
    when the run opens its data; what breaks later is an error all the same.
    """
    max_document_bytes: PositiveInt = 256 << 20
    """A longer text is an error: tokenising it takes many times its size in memory."""
    prefetch_bytes: PositiveInt = 256 << 20
    """What a worker has read ahead takes at most this much memory: batches a quarter, decoded row groups the rest. With
    `feeder: node` that is for all workers of a node together."""
    feeder: Literal["worker", "node"] = "worker"
    """Who decodes, tokenises and packs: every worker for itself, or one actor on each node for all workers there, which
    take row groups from it out of Ray's object store. Without Ray every worker reads for itself."""
    batch_dtype: BatchType = "int64"
    """The integers of a batch of text, from when it is made on. A `Stream` hands it out so; a run widens it (on CUDA,
    on the device) before the recipe gets it, so there it only says what lies ready and what is copied."""
    warm_cache_bytes: Bytes = 0
    """Disk that decoded, tokenised and packed data may take (in the cache folder); 0: none is kept."""
    retry_s: Annotated[float, BeforeValidator(a_number), Field(ge=0)] = 120.0
    """How long a remote store that fails is asked again, with growing pauses, before that is an error; 0: not at all.
    What another try cannot change (no such file, no permission) is an error at once."""
    live: Live | None = None
    """Set: `path` is a manifest of segments, which are read as they arrive."""
    storage_options: dict[str, Any] = Field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """All of `path`."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def tokenizer_paths(self) -> tuple[str, ...]:
        """Files of tokenizers that are read."""
        return () if self.tokenizer == "bytes" else (self.tokenizer,)

    @property
    def packing_of_rows(self) -> str:
        """How rows come about, in words; "" for a table."""
        ids = ", document_ids" if self.document_ids else ""
        return "" if self.text_column is None else f"{self.packing}, sequence_length {self.sequence_length}{ids}"

    def renamed(self, names: Mapping[str, str]) -> Self:
        """As of a mixture; one source has no name."""
        del names
        return self

    @property
    def is_remote(self) -> bool:
        """Whether any of it is read over a network."""
        return any("://" in place and not place.startswith("file://") for place in self.paths)

    @property
    def is_live(self) -> bool:
        """Whether segments arrive while it is read."""
        return self.live is not None

    @property
    def lacks_record(self) -> str:
        """Of a live source that does not say where its order is recorded, the setting it is in; "" for others."""
        return "data" if self.live is not None and self.live.record is None else ""

    def settled(self) -> Self:
        """The same of the files that are there, without those that arrive."""
        return self.model_copy(update={"live": None})

    def relocated(self, change: Callable[[str], str]) -> Self:
        """The same with `change` done to every path."""
        live = self.live
        if live is not None and live.record is not None:
            live = live.model_copy(update={"record": change(live.record)})
        path = change(self.path) if isinstance(self.path, str) else tuple(change(one) for one in self.path)
        tokenizer = self.tokenizer if self.tokenizer == "bytes" else change(self.tokenizer)
        return self.model_copy(update={"path": path, "tokenizer": tokenizer, "live": live})

    @model_validator(mode="after")
    def _modes(self) -> Self:
        if (self.text_column is None) != (self.sequence_length is None):
            raise ValueError("data.text_column and data.sequence_length belong together: set both or neither")
        if self.kind == "text" and self.text_column != "text":
            raise ValueError("data.kind: text has one column, called text; set data.text_column: text")
        if self.text_column is None and (self.packing != "concatenate" or self.document_ids):
            raise ValueError(
                "data.packing and data.document_ids are about text; set data.text_column, or leave them out"
            )
        if self.text_column is None and self.batch_dtype != "int64":
            raise ValueError(
                f"data.batch_dtype={self.batch_dtype} is about text: columns of a table come as they are in the files. "
                "Leave it out, or set data.text_column"
            )
        if self.live is not None and (not isinstance(self.path, str) or self.kind == "huggingface"):
            raise ValueError("data.live: data.path is one manifest of segments, each of them a file of data.kind")
        if self.live is not None and self.feeder != "worker":
            raise ValueError("data.feeder=node: segments of a live source are read by each worker; leave it out")
        if self.live is not None and self.ragged != "drop":
            raise ValueError("data.ragged=repeat: a live source has no epochs to fill up; leave it out")
        return self


class Proportions(Settings):
    """How much of each source: one of `weights`, `epochs`, `temperature`; with none, every source is seen as often
    as it is large. `sequence_length`: how long the sequences are that a packed row is cut into.
    """

    weights: dict[str, Amount] | None = None
    """Share of the samples by source; they need not add up to 1. A source that is not named has none."""
    epochs: dict[str, Amount] | None = None
    """How often each source is seen in the time in which the others are seen as often as they say."""
    temperature: Annotated[float, BeforeValidator(a_number), Field(gt=0)] | None = None
    """Shares go with samples ** (1 / temperature): 1 is by size, a large number makes all equal."""
    sequence_length: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("weights", "epochs", "temperature") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how much of each source to take; set one of them")
        amounts = self.weights if self.weights is not None else self.epochs
        if amounts is not None and not any(amounts.values()):
            raise ValueError(f"{given[0]} are all 0; at least one source must have more")
        return self


class MixtureStage(Proportions):
    """From `from_step` (committed steps) on, other proportions or another sequence length; the rest stays."""

    from_step: Annotated[int, BeforeValidator(not_a_switch), Field(ge=1)]


class Mixture(Proportions):
    """Several sources, each read in its own order to its end and again, in exact proportions.

    `sequence_length` is the longest one, to which all sources of text are packed; a stage may cut rows shorter, to a
    divisor of it, and then gets as many more of them in a batch.
    """

    sources: dict[str, Data] = Field(min_length=1)
    stages: tuple[MixtureStage, ...] = ()
    prefetch_bytes: PositiveInt = 256 << 20
    """What a worker has read ahead takes at most this much memory: batches a quarter, decoded row groups the rest. With
    `feeder: node` that is for all workers of a node together."""
    feeder: Literal["worker", "node"] = "worker"
    """Who decodes, tokenises and packs: every worker for itself, or one actor on each node for all workers there, which
    take row groups from it out of Ray's object store. Without Ray every worker reads for itself."""
    batch_dtype: BatchType = "int64"
    """The integers of a batch of text, from when it is made on. A `Stream` hands it out so; a run widens it (on CUDA,
    on the device) before the recipe gets it, so there it only says what lies ready and what is copied."""
    warm_cache_bytes: Bytes = 0
    """Disk that decoded, tokenised and packed data may take (in the cache folder); 0: none is kept."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths of all sources."""
        return tuple(path for source in self.sources.values() for path in source.paths)

    @property
    def tokenizer_paths(self) -> tuple[str, ...]:
        """Files of tokenizers that are read."""
        return tuple(dict.fromkeys(path for source in self.sources.values() for path in source.tokenizer_paths))

    @property
    def is_live(self) -> bool:
        """Whether segments of one of its sources arrive while it is read."""
        return any(source.is_live for source in self.sources.values())

    @property
    def lacks_record(self) -> str:
        """The setting of a live source that does not say where its order is recorded; "" if there is none."""
        return next((f"data.sources.{name}" for name, source in self.sources.items() if source.lacks_record), "")

    def settled(self) -> Self:
        """The same of the files that are there, without those that arrive."""
        return self.model_copy(update={"sources": {name: source.settled() for name, source in self.sources.items()}})

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same with other names for some sources, wherever they are named."""
        if not names:
            return self

        def other(amounts: Mapping[str, Any] | None) -> dict[str, Any] | None:
            return None if amounts is None else {names.get(name, name): value for name, value in amounts.items()}

        stages = [s.model_copy(update={"weights": other(s.weights), "epochs": other(s.epochs)}) for s in self.stages]
        return self.model_copy(
            update={"sources": other(self.sources), "weights": other(self.weights), "epochs": other(self.epochs),
                    "stages": tuple(stages)}
        )  # fmt: skip

    @property
    def is_remote(self) -> bool:
        """Whether any of it is read over a network."""
        return any(source.is_remote for source in self.sources.values())

    def relocated(self, change: Callable[[str], str]) -> Self:
        """The same with `change` done to every path."""
        return self.model_copy(update={"sources": {n: s.relocated(change) for n, s in self.sources.items()}})

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, raw: Any) -> Any:
        """Sources of text take the mixture's sequence_length where they name none."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("sources"), Mapping):
            return raw
        length = raw.get("sequence_length")
        sources = {
            name: {"sequence_length": length, **source}
            if length is not None and isinstance(source, Mapping) and source.get("text_column") is not None
            else source
            for name, source in raw["sources"].items()
        }
        return {**raw, "sources": sources}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        lengths = {name: source.sequence_length for name, source in self.sources.items()}
        wrong = sorted({str(length) for length in {*lengths.values(), self.sequence_length}})
        if len(wrong) > 1:
            raise ValueError(
                f"data.sources must all have data.sequence_length={self.sequence_length}, or all be tables without "
                f"one; got {', '.join(f'{name}: {length}' for name, length in lengths.items())}"
            )
        for name, source in self.sources.items():
            if source.live is not None and self.feeder != "worker":
                raise ValueError("data.feeder=node: segments of a live source are read by each worker; leave it out")
            for setting in ("prefetch_bytes", "feeder", "batch_dtype", "warm_cache_bytes"):
                if getattr(source, setting) != type(source).model_fields[setting].default:
                    raise ValueError(f"data.sources.{name}.{setting} is one for all sources: set data.{setting}")
        if self.sequence_length is None and self.batch_dtype != "int64":
            raise ValueError(
                f"data.batch_dtype={self.batch_dtype} is about text: columns of tables come as they are in the files. "
                "Leave it out"
            )
        known = ", ".join(sorted(self.sources))
        places: list[tuple[str, Proportions]] = [("data", self)]
        places += [(f"data.stages.{i}", stage) for i, stage in enumerate(self.stages)]
        for where, shares in places:
            strangers = sorted({*(shares.weights or {}), *(shares.epochs or {})} - self.sources.keys())
            if strangers:
                raise ValueError(f"{where} names {strangers[0]!r}, which is no source; the sources are: {known}")
            if shares.sequence_length and (
                self.sequence_length is None or self.sequence_length % shares.sequence_length
            ):
                raise ValueError(
                    f"{where}.sequence_length={shares.sequence_length} does not divide data.sequence_length="
                    f"{self.sequence_length}, the longest one, to which rows are packed"
                )
            if self.is_live and (shares.epochs or shares.temperature or (shares is self and not shares.weights)):
                raise ValueError(
                    f"{where} says shares by the sizes of the sources, and nobody knows how large a live source "
                    f"becomes; set {where}.weights"
                )
        records = [str(source.live.record) for source in self.sources.values() if source.live and source.live.record]
        if len(records) != len(set(records)):
            raise ValueError("data.sources.*.live.record: each live source needs a folder of its own, or none")
        for one, other in pairwise(self.stages):
            if one.from_step >= other.from_step:
                raise ValueError(f"data.stages: from_step {one.from_step}, then {other.from_step}; expected ascending")
        return self


def _which(raw: Any) -> str:
    mixed = isinstance(raw, Mixture) or (isinstance(raw, Mapping) and "sources" in raw)
    return "<Mixture>" if mixed else "<Data>"


AnyData = Annotated[Annotated[Data, Tag("<Data>")] | Annotated[Mixture, Tag("<Mixture>")], Discriminator(_which)]
"""What `Job.data` may be. The tags name the class for `settings.explain`; no setting can be called so."""
