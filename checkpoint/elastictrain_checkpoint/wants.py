"""What workers want of a checkpoint: boxes of tensors, one by one, or in columns, which are quick to send and to plan.

128 workers that want a part of 1,500 tensors each are 200,000 boxes: as objects they take longer to send and to read
than the plan of the whole load takes to make. Pure, no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import overload

import numpy as np

from elastictrain_checkpoint.boxes import Ints
from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.manifest import Manifest

Columns = tuple[Ints, Ints]
"""Of a worker's wants: the number of each one's tensor in the table of the manifest, shape [wants], and all offsets and
sizes, want by want, shape [sum of 2 x dimensions]."""


@dataclass(frozen=True)
class Want:
    """A box of a tensor (or alias) that one worker wants; sizes and offsets in elements, one per dimension."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Numbering:
    """The tensors of a manifest by number, and their numbers of dimensions."""

    def __init__(self, manifest: Manifest) -> None:
        self._step = manifest.step
        self.names: Sequence[str] = manifest.table.names
        self.shapes = [manifest.tensors[name][1] for name in self.names]
        self.ndims = np.fromiter(map(len, self.shapes), dtype=np.int64, count=len(self.shapes))
        self._number = {name: number for number, name in enumerate(self.names)}
        self._number |= {alias: self._number[target] for alias, target in manifest.alias.items()}

    def columns(self, wants: Sequence[Want]) -> Columns:
        """The same wants in columns.

        Raises:
            KeyError: no such tensor.
            InvalidPiece: a box of another number of dimensions than its tensor.

        """
        if isinstance(wants, WantColumns):
            return wants.columns
        try:
            found = map(self._number.__getitem__, map(attrgetter("name"), wants))
            tensor = np.fromiter(found, dtype=np.int64, count=len(wants))
        except KeyError as error:
            raise KeyError(f"step {self._step} has no tensor {error.args[0]!r}") from None
        offsets, sizes = list(map(attrgetter("offsets"), wants)), list(map(attrgetter("sizes"), wants))
        ndims = self.ndims[tensor]
        for corner in (offsets, sizes):
            wrong = np.fromiter(map(len, corner), dtype=np.int64, count=len(wants)) != ndims
            if wrong.any():
                place = int(np.argmax(wrong))
                raise InvalidPiece(
                    f"{wants[place].name}: box {wants[place].offsets} {wants[place].sizes} is not of shape "
                    f"{self.shapes[int(tensor[place])]}"
                )
        both = chain.from_iterable(chain.from_iterable(zip(offsets, sizes, strict=True)))
        return tensor, np.fromiter(both, dtype=np.int64, count=2 * int(ndims.sum()))


class WantColumns(Sequence[Want]):
    """Wants in columns, as another worker has sent them; each is made an object only when it is asked for."""

    def __init__(self, numbering: Numbering, columns: Columns) -> None:
        self.columns = columns
        self._names = numbering.names
        self._ends = np.cumsum(2 * numbering.ndims[columns[0]])

    def __len__(self) -> int:
        return len(self.columns[0])

    @overload
    def __getitem__(self, at: int) -> Want: ...
    @overload
    def __getitem__(self, at: slice) -> list[Want]: ...
    def __getitem__(self, at: int | slice) -> Want | list[Want]:
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        tensor, corners = self.columns
        box = corners[int(self._ends[at - 1]) if at else 0 : int(self._ends[at])].tolist()
        return Want(self._names[int(tensor[at])], tuple(box[: len(box) // 2]), tuple(box[len(box) // 2 :]))
