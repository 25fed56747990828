"""Batches of a lane that follow each other, made in one go: what costs time by call is paid once for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from elastictrain.data.ids import SampleIds

Arrays = dict[str, npt.NDArray[Any]]


class Batch(dict[str, npt.NDArray[Any]]):
    """A batch's arrays by name; `ids`: the ids of its samples (see `data.ids`), in the order of its rows."""

    __slots__ = ("ids",)

    def __init__(self, arrays: Arrays, ids: SampleIds) -> None:
        super().__init__(arrays)
        self.ids = ids


class Run:
    """`count` batches of `lane`, of `step` and the steps after it: parts of the same arrays, each handed out once.

    `arrays` by name: [count, rows of a batch, …]; `ids` of their samples: [count, samples of a batch]. `next`: the
    step whose batch is handed out next. `tensors`: who makes tensors of a run keeps them here, by name one for each
    batch.
    """

    __slots__ = ("_batches", "arrays", "bytes", "count", "ids", "lane", "next", "step", "tensors")

    def __init__(self, step: int, lane: int, count: int, arrays: Arrays, ids: SampleIds) -> None:
        """`arrays` [rows of all batches, …] and `ids` [samples of all batches], batch after batch."""
        self.step = self.next = step
        self.lane, self.count = lane, count
        self.bytes = sum(array.nbytes for array in arrays.values())
        self.arrays = {
            name: array.reshape(count, len(array) // count, *array.shape[1:]) for name, array in arrays.items()
        }
        self.ids = np.ascontiguousarray(ids).reshape(count, len(ids) // count)
        self.tensors: Any = None
        self._batches: list[Batch] = []

    def batch(self, number: int) -> Batch:
        """Return the batch of step `step + number`; its arrays are views."""
        if not self._batches:  # all at once: a batch costs a fifth of what it costs by itself
            new = Batch.__new__  # `__init__` takes as long as all the rest
            made = [new(Batch) for _ in range(self.count)]
            for name, array in self.arrays.items():
                for batch, view in zip(made, array, strict=True):
                    batch[name] = view
            for batch, ids in zip(made, self.ids, strict=True):
                batch.ids = ids
            self._batches = made  # whole at once: several threads may come for batches of one run
        return self._batches[number]
