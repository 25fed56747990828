"""Memory that is used again only when nobody has it, and of which not too much lies free."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest

from elastictrain.data.buffers import Buffers

SIZE = 100_000


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_every_view_of_it_has_gone() -> None:
    buffers = Buffers()
    first = buffers.take(SIZE)
    where, view = address(first), first.view(np.uint16)[100:].reshape(2, -1)[1]
    del first
    other = buffers.take(SIZE)
    assert address(other) != where, "a view of it is in use"
    del view
    again = buffers.take(SIZE - 10)
    assert address(again) == where
    again[:] = 1
    other[:] = 2
    assert set(again.tolist()) == {1}


def test_memory_that_does_not_fit_is_not_used_and_stays_for_who_needs_it() -> None:
    buffers = Buffers()
    large, where = buffers.take(10 * SIZE), 0
    where = address(large)
    del large
    small = buffers.take(SIZE)
    assert small.nbytes == SIZE
    assert small.base is not None
    assert len(small.base) < 2 * SIZE, "a small array does not keep a large one"
    assert len(buffers.take(20 * SIZE)) == 20 * SIZE
    assert address(buffers.take(10 * SIZE)) == where


@pytest.mark.parametrize(("kept_bytes", "kept"), [(0, 2), (int(3.5 * SIZE), 3), (100 * SIZE, 6)])
def test_so_much_lies_free_at_most_and_two_always(kept_bytes: int, kept: int) -> None:
    buffers = Buffers(kept_bytes)
    several = [buffers.take(SIZE) for _ in range(6)]
    last = address(several[-1])
    while several:
        del several[0]
    assert len(buffers._free) == kept
    assert address(buffers.take(SIZE)) == last, "what was used last comes first"


@pytest.mark.parametrize("size", [0, 1, 100])
def test_small_arrays_are_of_the_allocator(size: int) -> None:
    buffers = Buffers()
    assert buffers.take(size).shape == (size,)
    assert not buffers._free


def test_arrays_of_any_shape_and_type_but_of_objects() -> None:
    buffers = Buffers()
    for shape, dtype in (((100, 300), np.int64), ((7, 0, 3), np.uint16), ((40_000,), np.bool_), ((3,), np.float32)):
        found = buffers.empty(shape, dtype)
        assert found.shape == shape
        assert found.dtype == dtype
        assert found.flags.c_contiguous
        assert found.flags.writeable
    assert buffers.empty((20_000,), object)[0] is None


def test_nobody_gets_memory_that_another_thread_has() -> None:
    buffers, wrong = Buffers(), []

    def work(number: int) -> None:
        for turn in range(300):
            mine = [buffers.take(SIZE) for _ in range(3)]
            for array in mine:
                array[:8] = number
            if turn % 50 == 0:
                gc.collect()
            wrong.extend(array for array in mine if not np.all(array[:8] == number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
