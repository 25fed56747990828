"""A writer's vote: what it has made durable. Small; it travels to whoever commits, as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from elastictrain_checkpoint.errors import InvalidPiece

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""Attempts and writers: path segments that cannot climb, hide, or mean something to a shell."""

Count = Annotated[int, Field(ge=0, lt=1 << 60)]
ShortName = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
Chunk = tuple[Count, Count, list[Count], list[Count]]
"""(number of the file in `files`, byte in the file, offsets, sizes): one box, its elements row-major."""


class Strict(BaseModel):
    """Frozen, no unknown keys, no conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class FileRecord(Strict):
    """A pack.

    Attributes:
        path: relative to the folder of the step.
        size_bytes: "bytes" in JSON.
        data_start: where the tensors begin, after the header.
        sums: base64 of one xxh3-64 (little-endian) per block of the file, header included.
        root: xxh3-128 over the sums.

    """

    path: str
    size_bytes: Count = Field(alias="bytes")
    data_start: Count
    sums: str
    root: str


class SidecarRecord(Strict):
    """A file beside the packs, published whole: its path relative to the folder of the step, and xxh3-128 of it."""

    path: str
    size_bytes: Count = Field(alias="bytes")
    hash: str = Field(pattern="^[0-9a-f]{32}$")


@dataclass(slots=True)
class TensorRecord:
    """Type, full shape and the chunks of a tensor. Checked like the rest where it is read from JSON; what this library
    makes itself is not: a state may have very many tensors.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    dtype: str
    shape: list[Count]
    chunks: list[Chunk]


@dataclass(slots=True)
class PartTensor(TensorRecord):
    """A tensor's share in a part; ``cells`` are (first cell of the digest grid, base64 of the cell hashes)."""

    cells: list[tuple[Count, str]]


class Part(Strict):
    """What one writer wrote for one attempt."""

    version: int = Field(default=1, ge=1, le=1)
    step: Count
    attempt: ShortName
    writer: ShortName
    files: list[FileRecord]
    tensors: dict[str, PartTensor]

    def to_json(self) -> str:
        """One line of JSON."""
        return self.model_dump_json(by_alias=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Part:
        """Inverse of `to_json`.

        Raises:
            InvalidPiece: this is not a part that this version knows.

        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InvalidPiece(f"not a part of a checkpoint: {describe(error)}") from None

    @property
    def size_bytes(self) -> int:
        """Bytes of all packs of this part."""
        return sum(file.size_bytes for file in self.files)


def describe(error: ValidationError) -> str:
    """The first complaint of pydantic in one line, with its place."""
    first = error.errors(include_url=False)[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{'.'.join(str(at) for at in first['loc']) or 'document'}: {first['msg']}{more}"


def check_names(**names: str) -> None:
    """Refuse attempt and writer names that are not plain path segments.

    Raises:
        InvalidPiece: naming the argument.

    """
    for what, name in names.items():
        if not re.fullmatch(NAME, name):
            raise InvalidPiece(f"{what} {name!r} must be letters, digits, '_' and '-' (up to 64)")


def check_tensor_names(names: Iterable[str]) -> None:
    """Refuse names that a pack or a manifest cannot hold.

    Raises:
        InvalidPiece: naming the tensor.

    """
    for name in names:
        if not name or name == "__metadata__" or len(name) > 1024 or not name.isprintable():
            raise InvalidPiece(f"tensor name {name!r} is empty, reserved, longer than 1024, or not printable")
