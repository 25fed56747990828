"""The manifest: one JSON document that says what a checkpoint is. A step exists if and only if its manifest
does.

The text is canonical (one way to write each document) and ends with a hash of itself, so that any changed
byte is found. Nothing in it is believed before it is checked: see `parse_manifest`.
"""

from __future__ import annotations

import datetime
import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, ValidationError

from elastictrain_checkpoint import sidecar, tagged
from elastictrain_checkpoint.canonical import canonical, fields_of, joined, signed
from elastictrain_checkpoint.collector import no_collections
from elastictrain_checkpoint.errors import InvalidManifest
from elastictrain_checkpoint.hashing import DIGEST_ALGORITHM, Sums, root_sum, unpack_sums
from elastictrain_checkpoint.part import (
    Count,
    FileRecord,
    ShortName,
    SidecarRecord,
    Strict,
    TensorRecord,
    check_tensor_names,
    describe,
)
from elastictrain_checkpoint.paths import manifest_path, resolve_pack
from elastictrain_checkpoint.table import ChunkTable, Columns, check_records, columns_of, table_of

FORMAT = "elastictrain.ckpt"
VERSION = 1

MOST_SAID = 2000
"""Characters of a refusal: it repeats what the manifest says, which may be anything."""

Fetch = Callable[[str], bytes]
"""The whole content of a small file of the store; `Store.read_all` is one."""


class HashSpec(Strict):
    """How files are hashed."""

    algo: Literal["xxh3-64"] = "xxh3-64"
    block: int = Field(ge=1 << 12, le=1 << 28)


class DigestSpec(Strict):
    """The digest and how it is made."""

    algo: str = DIGEST_ALGORITHM
    hex: str = Field(pattern="^[0-9a-f]{64}$")


class Document(Strict):
    """The JSON document, field by field. ``base`` lists the other steps whose packs are used.

    ``chunks``: the Arrow file that stands for ``tensors`` where there are too many; ``cells``: the file of cell hashes
    (see `elastictrain_checkpoint.sidecar`). Both are left out where there is no such file.
    """

    format: Literal["elastictrain.ckpt"] = "elastictrain.ckpt"
    version: Literal[1] = 1
    step: Count
    attempt: ShortName
    generation: int = Field(ge=0, lt=1 << 60)
    time: str
    info: dict[str, Any]
    hash: HashSpec
    digest: DigestSpec
    files: list[FileRecord]
    tensors: dict[str, TensorRecord]
    alias: dict[str, str]
    tree: Any
    base: list[Count]
    chunks: SidecarRecord | None = None
    cells: SidecarRecord | None = None
    self_hash: str = Field(alias="self")


@dataclass(frozen=True, eq=False)
class Manifest:
    """A checkpoint that was committed, checked and ready to be read.

    Attributes:
        step, attempt, generation: who committed what.
        time: when, UTC, ISO 8601.
        info: facts about the run that wrote it; readers need none of them.
        digest: digest of the state, 64 hexadecimal digits.
        block_bytes: bytes that share one sum.
        files: packs; ``paths[i]`` is where ``files[i]`` lies in the store, ``sums[i]`` its block sums.
        tensors: name → (dtype, shape), aliases not among them.
        alias: further name → name of the tensor it is tied to.
        tree: state that is not tensors.
        base: other steps whose packs this one uses; they must be kept.
        table: where every element lies.
        chunks, cells: files beside the manifest, if any (see `elastictrain_checkpoint.sidecar`).
        raw: the text.

    """

    step: int
    attempt: str
    generation: int
    time: str
    info: dict[str, Any]
    digest: str
    block_bytes: int
    files: tuple[FileRecord, ...]
    paths: tuple[str, ...]
    sums: tuple[Sums, ...] = field(repr=False)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(repr=False)
    alias: dict[str, str] = field(repr=False)
    tree: Any = field(repr=False)
    base: tuple[int, ...]
    table: ChunkTable = field(repr=False)
    chunks: SidecarRecord | None
    cells: SidecarRecord | None
    raw: bytes = field(repr=False)

    @property
    def path(self) -> str:
        """Where the manifest lies in the store."""
        return manifest_path(self.step)

    @property
    def size_bytes(self) -> int:
        """Bytes of all packs, those of other steps included."""
        return sum(file.size_bytes for file in self.files)

    @property
    def own_paths(self) -> tuple[str, ...]:
        """Packs that were written for this step; the others are those of ``base``."""
        return tuple(path for file, path in zip(self.files, self.paths, strict=True) if not file.path.startswith("../"))

    @property
    def sidecars(self) -> tuple[tuple[str, SidecarRecord], ...]:
        """(path in the store, record) of the files beside the packs."""
        there = ((sidecar.CHUNKS, self.chunks), (sidecar.CELLS, self.cells))
        return tuple((sidecar.sidecar_path(kind, self.step, one), one) for kind, one in there if one is not None)

    def resolve(self, name: str) -> str:
        """The tensor that a name, possibly an alias, stands for.

        Raises:
            KeyError: neither a tensor nor an alias.

        """
        name = self.alias.get(name, name)
        if name not in self.tensors:
            raise KeyError(f"step {self.step} has no tensor {name!r}")
        return name


@dataclass(frozen=True)
class Draft:
    """A manifest as it was just written.

    Attributes:
        raw: the text.
        rest: the text without its tensors, which are nearly all of it.
        tensors: the tensors.

    """

    raw: bytes
    rest: bytes
    tensors: Mapping[str, TensorRecord]


@no_collections()
def write_manifest(
    *,
    step: int,
    attempt: str,
    generation: int,
    time: datetime.datetime,
    info: Mapping[str, Any],
    block_bytes: int,
    digest: str,
    files: list[FileRecord],
    tensors: Mapping[str, TensorRecord],
    alias: Mapping[str, str],
    tree: Any,
    chunks: SidecarRecord | None = None,
    cells: SidecarRecord | None = None,
) -> Draft:
    """Text of a manifest. It may still contradict itself: whoever writes one has it read by `read_own` before it is
    published.

    Raises:
        InvalidPiece: the tree or info hold something that JSON cannot give back.

    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "attempt": attempt,
        "generation": generation,
        "time": time.astimezone(datetime.UTC).isoformat(timespec="milliseconds"),
        "info": {str(key): tagged.encode(value, f"info.{key}") for key, value in info.items()},
        "hash": {"algo": "xxh3-64", "block": block_bytes},
        "digest": {"algo": DIGEST_ALGORITHM, "hex": digest},
        "files": [file.model_dump(by_alias=True) for file in files],
        "tensors": {
            name: {"dtype": record.dtype, "shape": record.shape, "chunks": record.chunks}
            for name, record in sorted(tensors.items() if chunks is None else ())
        },
        "alias": dict(sorted(alias.items())),
        "tree": tagged.encode(tree),
        "base": sorted({found[0] for file in files if (found := resolve_pack(step, file.path))} - {step}),
        **{key: one.model_dump(by_alias=True) for key, one in (("chunks", chunks), ("cells", cells)) if one},
    }
    fields = fields_of(document)
    rest = joined({**fields, "tensors": b'"tensors":{}'})
    return Draft(signed(joined(fields)), signed(rest), tensors if chunks is None else {})


@no_collections()
def parse_manifest(raw: bytes, step: int | None = None, fetch: Fetch | None = None) -> Manifest:
    """Read a manifest and believe nothing.

    Checked: the text is canonical and its hash right, the version is known, every path is that of a pack
    inside the store, every chunk lies in its file, every tensor is tiled exactly, sums fit sizes, aliases
    resolve.

    Args:
        raw: the text.
        step: the step of the folder that it was found in, if known.
        fetch: reads a small file of the store; needed where the chunks do not lie in the text itself.

    Raises:
        InvalidManifest: saying what is wrong.

    """
    where = "manifest" if step is None else manifest_path(step)
    with _refusing(where):
        document = _check_text(raw)
        if step is not None and document.step != step:
            raise ValueError(f"it says step {document.step}, but lies in the folder of step {step}")
        return _check_document(document, document.tensors, raw, fetch)


@no_collections()
def read_own(draft: Draft, fetch: Fetch) -> Manifest:
    """As `parse_manifest`, for what `write_manifest` has just given: all that it says is checked, but not that nobody
    has altered it since; and the tensors are taken from where the text has them, which may be very many to parse.

    Raises:
        InvalidManifest: what was to be written contradicts itself.

    """
    with _refusing("manifest"):
        check_records(draft.tensors)
        return _check_document(Document.model_validate_json(draft.rest), draft.tensors, draft.raw, fetch)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        said = describe(error)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        said = str(error) or type(error).__name__
    else:
        return
    raise InvalidManifest(f"{where}: {said[:MOST_SAID]}", file=where)


def _check_text(raw: bytes) -> Document:
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"the text was altered or cut short: it is not JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'not a checkpoint manifest (no "format": "{FORMAT}")')
    if document.get("version") != VERSION:
        raise ValueError(
            f"version {reprlib.repr(document.get('version'))}; this library reads version {VERSION}: "
            f"use the library that wrote it, or a newer one"
        )
    if canonical(document) != raw:
        raise ValueError("the text was altered after it was written (not canonical)")
    # Canonical text: the fields stand in the order in which they were read.
    if signed(raw.rpartition(b',"self":')[0] + b"}") != raw:
        raise ValueError("the text was altered after it was written (its own hash differs)")
    return Document.model_validate_json(raw)


def _check_document(
    document: Document, records: Mapping[str, TensorRecord], raw: bytes, fetch: Fetch | None
) -> Manifest:
    columns = columns_of(records) if document.chunks is None else _chunks_beside(document, fetch)
    if document.cells is not None:
        sidecar.sidecar_path(sidecar.CELLS, document.step, document.cells)
    tensors = dict(zip(columns.names, zip(columns.dtypes, columns.shapes(), strict=True), strict=True))
    check_tensor_names([*tensors, *document.alias])
    paths = _check_paths(document)
    sums = tuple(_check_sums(file, document.hash.block) for file in document.files)
    if document.digest.algo != DIGEST_ALGORITHM:
        raise ValueError(f"digest algorithm {document.digest.algo!r}, expected {DIGEST_ALGORITHM!r}")
    for alias, target in document.alias.items():
        if alias in tensors or target not in tensors:
            raise ValueError(f"alias {alias!r} → {target!r}: it is a tensor itself, or its target is not one")
    return Manifest(
        step=document.step,
        attempt=document.attempt,
        generation=document.generation,
        time=document.time,
        info={key: tagged.decode(value) for key, value in document.info.items()},
        digest=document.digest.hex,
        block_bytes=document.hash.block,
        files=tuple(document.files),
        paths=paths,
        sums=sums,
        tensors=tensors,
        alias=document.alias,
        tree=tagged.decode(document.tree),
        base=tuple(document.base),
        table=table_of(columns, document.files),
        chunks=document.chunks,
        cells=document.cells,
        raw=raw,
    )


def _chunks_beside(document: Document, fetch: Fetch | None) -> Columns:
    assert document.chunks is not None
    path = sidecar.sidecar_path(sidecar.CHUNKS, document.step, document.chunks)
    if document.tensors:
        raise ValueError("tensors stand in the text and in the file of chunks beside it")
    if fetch is None:
        raise ValueError(f"its chunks lie in {path}: pass fetch=store.read_all to read it")
    try:
        data = fetch(path)
    except FileNotFoundError:
        raise ValueError(f"its chunks lie in {path}, which is missing") from None
    return sidecar.decode_chunks(sidecar.check_sidecar(document.chunks, data))


def _check_paths(document: Document) -> tuple[str, ...]:
    paths = []
    steps = {document.step}
    for file in document.files:
        found = resolve_pack(document.step, file.path)
        if found is None:
            raise ValueError(f"path {file.path!r} is not that of a pack inside the store")
        if found[0] == document.step and file.path.startswith("../"):
            raise ValueError(f"path {file.path!r} refers to the step itself")
        if found[0] != document.step and found[0] not in document.base:
            raise ValueError(f"path {file.path!r} leads to step {found[0]}, which is not listed in base")
        paths.append(found[1])
        steps.add(found[0])
    if len(set(paths)) != len(paths):
        raise ValueError("a file is listed twice")
    if document.base != sorted(steps - {document.step}):
        raise ValueError(f"base lists the steps {document.base}, the packs lie in {sorted(steps - {document.step})}")
    return tuple(paths)


def _check_sums(file: FileRecord, block: int) -> Sums:
    sums = unpack_sums(file.sums)
    want = -(-file.size_bytes // block)
    if len(sums) != want:
        raise ValueError(f"{file.path}: {len(sums)} block sums, expected {want} for {file.size_bytes} bytes")
    if root_sum(sums) != file.root:
        raise ValueError(f"{file.path}: the block sums do not fit their root")
    return sums
