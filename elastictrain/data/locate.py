"""Where a sample lies: file, row group, rows and tokens. Pure; works from the index, no data are read.

A sample of a table is one row. A packed sample is a run of tokens of one row group, or, if it was packed from
tails, a run of tokens of each of several row groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A piece of a sample that lies in one row group (Parquet) or block (other formats).

    `rows` is the range `[first, end)` of rows in the row group, `tokens` the range in the tokens of the row group
    (all its documents joined, each followed by the end-of-document token). Of a packed sample only the tokens are
    known from the index; `Source.rows_of` reads the row group and says which rows they are.
    """

    file: str
    row_group: int
    block: int  # number of the row group among all of the source
    rows: tuple[int, int] | None
    tokens: tuple[int, int] | None
    source: str = ""  # name in a mixture


@dataclass(frozen=True)
class SampleLocation:
    """One sample of a batch. `(source, block, row)` is its identity, the same in every epoch.

    `row` counts samples in the block; blocks beyond those of the files hold packed tails. `filler_tokens` stand at
    the end of the sample and come from nowhere.
    """

    source: str  # name in a mixture; "" otherwise
    epoch: int
    block: int
    row: int
    parts: tuple[Part, ...]
    filler_tokens: int = 0


@dataclass(frozen=True)
class TailMap:
    """Where the joined tails of packing come from: block `b` gave the tail tokens `[starts[b], starts[b+1])`,
    which are its own tokens from `firsts[b]` on.
    """

    starts: Int64Array
    firsts: Int64Array

    @classmethod
    def of(cls, block_tokens: Int64Array, sequence_length: int) -> TailMap:
        """Make the map from the number of tokens of every block."""
        lengths = block_tokens % (sequence_length + 1)
        starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        return cls(starts, block_tokens - lengths)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (block, first token, end) for the tail tokens `[start, stop)`; filler behind the end is left out."""
        stop = min(stop, int(self.starts[-1]))
        while start < stop:
            block = int(np.searchsorted(self.starts, start, side="right")) - 1
            end = min(stop, int(self.starts[block + 1]))
            first = int(self.firsts[block]) + start - int(self.starts[block])
            yield block, first, first + end - start
            start = end
