"""What goes through pages comes out whole and in order; no page is used twice at a time; errors leave none in use."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from elastictrain_checkpoint.bounce import Chunk, chunks, pass_through


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(1, 20))
def test_chunks_cover_every_source_once(sizes: list[int], page: int) -> None:
    found = list(chunks(sizes, page))
    assert [(chunk.source, at) for chunk in found for at in range(chunk.start, chunk.stop)] == [
        (source, at) for source, size in enumerate(sizes) for at in range(size)
    ]
    assert all(0 < chunk.stop - chunk.start <= page for chunk in found)
    assert len(found) == sum(-(-size // page) for size in sizes)


class Failed(Exception):
    pass


class Machine:
    """Fills a page only when it is waited for, in the order of the beginnings, as a stream does."""

    def __init__(self, fails: tuple[str, int] | None = None) -> None:
        self.fails, self.calls = fails, {"begin": 0, "wait": 0, "take out": 0}
        self.filling: dict[int, str] = {}
        self.pages: dict[str, Any] = {}
        self.out: list[int] = []
        self.most = 0

    def enter(self, call: str) -> None:
        self.calls[call] += 1
        if self.fails == (call, self.calls[call]):
            raise Failed

    def begin(self, piece: int, page: str) -> int:
        assert page not in self.filling.values(), "the page is being filled"
        assert page not in self.pages, "the page is not empty"
        self.enter("begin")
        self.filling[piece] = page
        self.most = max(self.most, len(self.filling))
        return piece

    def wait(self, piece: int) -> None:
        if piece in self.filling:
            assert piece == next(iter(self.filling)), "a later one is waited for first"
            self.pages[self.filling.pop(piece)] = piece
        self.enter("wait")

    def take_out(self, piece: int, page: str) -> None:
        self.enter("take out")
        assert self.pages.pop(page) == piece
        self.out.append(piece)


@given(st.integers(0, 12), st.integers(1, 5))
def test_everything_comes_through_in_order(count: int, pages: int) -> None:
    machine = Machine()
    pass_through([f"p{n}" for n in range(pages)], range(count), machine.begin, machine.wait, machine.take_out)
    assert machine.out == list(range(count))
    assert (machine.filling, machine.pages) == ({}, {})
    assert machine.most == min(count, pages), "all pages are being filled at once"


@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from(["begin", "wait", "take out"]), st.integers(1, 12))
def test_after_an_error_nothing_is_being_filled(count: int, pages: int, call: str, at: int) -> None:
    machine = Machine((call, at))
    names = [f"p{n}" for n in range(pages)]
    if at > count:
        pass_through(names, range(count), machine.begin, machine.wait, machine.take_out)
        return
    with pytest.raises(Failed):
        pass_through(names, range(count), machine.begin, machine.wait, machine.take_out)
    event(f"were being filled: {machine.calls['begin'] - len(machine.out)}")
    assert machine.filling == {}
    assert machine.out == list(range(len(machine.out)))


@given(st.integers(0, 5))
def test_what_plans_the_pieces_may_fail_too(before: int) -> None:
    def pieces() -> Any:
        yield from range(before)
        raise Failed

    machine = Machine()
    with pytest.raises(Failed):
        pass_through(["a", "b"], pieces(), machine.begin, machine.wait, machine.take_out)
    assert machine.filling == {}


def test_without_pages_nothing_is_begun() -> None:
    machine = Machine()
    with pytest.raises(ValueError, match=r"^no page to bring anything through$"):
        pass_through([], [1], machine.begin, machine.wait, machine.take_out)
    assert machine.calls["begin"] == 0
    assert list(chunks([3], 2)) == [Chunk(0, 0, 2), Chunk(0, 2, 3)]
