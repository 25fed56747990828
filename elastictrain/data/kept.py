"""The index of data that a run has used, kept beside the run: where its samples lay can be said without the files.

When the data of a run change and become a new stage, the files of the stages before may be gone. The order of a stage
follows from the rows of its blocks, so what is kept here is enough to compute again which samples a step used, and to
name file, row group and tokens. Files are named by the *identity* of the data (`fingerprint.identity`), which a
fingerprint made of what is kept must give again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from elastictrain.data.columns import Schema
from elastictrain.data.files import DataFile, FileSet
from elastictrain.data.fingerprint import identity
from elastictrain.data.index import BlockTable, Hole, TokenIndex, load_cached, store_cached
from elastictrain.data.locate import Part, SampleLocation
from elastictrain.data.mixed import MixedSource
from elastictrain.data.packing import Tails, TokenArray
from elastictrain.data.source import Source, lay_down
from elastictrain.data.sources import AnySource
from elastictrain.data_settings import Data
from elastictrain.errors import DataError

KEPT_VERSION = 1
_NOT_NEEDED = ("storage_options", "live", "path")  # credentials may be among the options


@dataclass(frozen=True)
class Kept:
    """What is kept of one source. `identity` names it; `arrays` are those of the source and not copied."""

    identity: str
    arrays: Mapping[str, npt.NDArray[Any]]
    notes: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write it where it is not there yet. A folder that takes no files is only logged."""
        place = _place(folder, self.identity)
        if not place.exists():
            store_cached(place, dict(self.arrays), dict(self.notes))


def kept_of(source: AnySource) -> dict[str, Kept]:
    """What is to be kept of a run's data; of a mixture by name. Nothing of a live source: its order is recorded."""
    if isinstance(source, MixedSource):
        return {name: _kept(one) for name, one in source.sources.items() if isinstance(one, Source)}
    return {"": _kept(source)} if isinstance(source, Source) else {}


def _kept(source: Source) -> Kept:
    table, tokens = source._blocks.blocks, source._token_index
    arrays = {"order_rows": source.order.block_rows}
    arrays |= {f"block_{name}": value for name, value in vars(table).items()}
    if tokens is not None:  # without the tails themselves, which are text
        arrays |= {name: value for name, value in tokens.arrays().items() if name != "token_tails"}
    notes = {
        "version": KEPT_VERSION,
        "spec": source.spec.model_dump(mode="json", exclude=set(_NOT_NEEDED)),
        "schema": [list(pair) for pair in source.columns],
        "files": [[file.name, file.size_bytes] for file in source._files.files],
        "holes": [list(hole) for hole in source._blocks.holes],
        "tokenizer": None if source._tokenizer is None else [
            source._tokenizer.name, source._tokenizer.fingerprint, source._tokenizer.vocabulary_size,
            source._tokenizer.end_of_document,
        ],
        "null_documents": 0 if tokens is None else tokens.null_documents,
    }  # fmt: skip
    return Kept(identity(source.fingerprint), arrays, notes)


class PastSource(Source):
    """Data as they were, by their index alone: every place is known, and nothing can be read."""

    def location(self, block: int, row: int, epoch: int = 0) -> SampleLocation:
        """As `Source.location`. Of `packing: best_fit` only the row group is known: what a row consists of follows
        from the lengths of the documents.
        """
        if self.spec.packing != "best_fit" or self._packed is None:
            return super().location(block, row, epoch)
        own = block < len(self._blocks.blocks)
        part = self._part(block, None, None) if own else Part("packed tails", block - len(self._blocks.blocks), block,
                                                              None, None)  # fmt: skip
        return SampleLocation("", epoch, block, row, (part,))

    def rows_of(self, part: Part) -> tuple[int, int]:
        """Known where the index holds them; raises DataError else, since the files are not those any more."""
        return part.rows if part.rows is not None else _gone(part.file)


def recall(folder: Path, name: str, *, seed: int, lanes: int, lane_batch_size: int) -> PastSource | None:
    """Return the data of an identity, in the order of a stage; None if nothing (whole) is kept of them in `folder`."""
    found = load_cached(_place(folder, name))
    if found is None or found[1].get("version") != KEPT_VERSION:
        return None
    arrays, notes = found
    spec = Data.model_validate({**notes["spec"], "path": "(gone)"})
    files = FileSet(None, tuple(DataFile(n, n, int(size), "") for n, size in notes["files"]))
    blocks = _PastBlocks(
        BlockTable(**{field: arrays[f"block_{field}"] for field in BlockTable.__dataclass_fields__}),
        tuple((str(column), str(kind)) for column, kind in notes["schema"]),
        tuple(Hole(*hole) for hole in notes["holes"]),
        files,
    )
    index, tails, tokenizer = None, None, None
    if notes["tokenizer"] is not None:
        tokenizer = _PastTokenizer(*notes["tokenizer"])
        index = TokenIndex.restore({**arrays, "token_tails": np.zeros(0, dtype=np.int32)}, notes)
        tails = Tails(np.zeros((0, int(spec.sequence_length or 0) + 1), dtype=np.int32), 0)
    order = lay_down(spec, arrays["order_rows"], seed=seed, lanes=lanes, lane_batch_size=lane_batch_size)
    source = PastSource(spec, files, blocks, order, tokenizer=tokenizer, token_index=index, tails=tails)
    return source if identity(source.fingerprint) == name else None


def whole_fingerprint(source: AnySource) -> dict[str, Any]:
    """The fingerprint with a list of all files of every source, however many there are."""
    if isinstance(source, MixedSource):
        whole = {name: whole_fingerprint(one) for name, one in source.sources.items()}
        return {**source.fingerprint, "sources": whole}
    return source.whole_fingerprint if isinstance(source, Source) else source.fingerprint


def with_files(fingerprint: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """A fingerprint as it was recorded, with the lists of files that were too long for it, if they are kept."""
    if "sources" in fingerprint:
        return {**fingerprint, "sources": {n: with_files(one, folder) for n, one in fingerprint["sources"].items()}}
    if folder is None or fingerprint.get("files", ()) is not None:
        return dict(fingerprint)
    how = {"lanes": int(fingerprint["lanes"]), "lane_batch_size": int(fingerprint["lane_batch_size"])}
    found = recall(folder, identity(fingerprint), seed=0, **how)
    return dict(fingerprint) if found is None else {**fingerprint, "files": found.whole_fingerprint["files"]}


@dataclass(frozen=True)
class Beside:
    """What is kept beside a run. `sources`: the identity of every source that a mixture of the run has ever named.
    `now`: that of the data in force, where the run's stages name it.
    """

    folder: Path
    sources: Mapping[str, str]
    now: str | None = None

    def past(self, name: str, how: Mapping[str, Any]) -> PastSource | None:
        """See `mixed.Past`."""
        return recall(self.folder, self.sources[name], **how) if name in self.sources else None


def _place(folder: Path, name: str) -> Path:
    return folder / f"index-{name}.npz"


def _gone(what: str) -> NoReturn:
    raise DataError(
        f"{what}: the data have changed since this stage of the run, and of what they were only the index is kept "
        "beside it; to read them, put the files back where they were"
    )


@dataclass
class _PastBlocks:
    blocks: BlockTable
    schema: Schema
    holes: tuple[Hole, ...]
    files: FileSet

    def read(self, block: int) -> pa.Table:
        _gone(self.where(block))

    def where(self, block: int) -> str:
        return f"{self.files.files[int(self.blocks.file[block])].name}, row group {int(self.blocks.number[block])}"

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class _PastTokenizer:
    name: str
    fingerprint: str
    vocabulary_size: int
    end_of_document: int

    def encode(self, documents: pa.ChunkedArray) -> TokenArray:
        del documents
        _gone(self.name)

    def encode_with_offsets(self, documents: pa.ChunkedArray) -> tuple[TokenArray, npt.NDArray[np.int64]]:
        del documents
        _gone(self.name)
