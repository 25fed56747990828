"""Ranges that overlap, and blocks that are wanted in part: what is read straight into place is what was stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastictrain_checkpoint import Reader, Request, Store, posix, reader, windows
from tests.unit.checkpoint.build import make_state, memory_store, save


def test_two_buffers_may_want_the_same_bytes() -> None:
    state = make_state({"a": ("U8", (300_000,)), "b": ("U8", (200_000,))})
    store = memory_store()
    source = Reader(store, save(store, state, ()))
    ranges = [("a", 0, 300_000), ("a", 100, 250_000), ("a", 100, 250_000), ("b", 0, 200_000)]
    found = source.read_many([Request(*one) for one in ranges])
    assert [part.tobytes() for part in found] == [state[name][2][start:stop] for name, start, stop in ranges]
    assert source.read_bytes == source.manifest.size_bytes


def test_tensor_after_tensor_reads_each_block_once() -> None:
    state = make_state({f"t{i}": ("F32", (100, 100)) for i in range(9)})
    store = memory_store()
    source = Reader(store, save(store, state, ()))
    assert [source.read(name).tobytes() for name in state] == [raw for _, _, raw in state.values()]
    assert source.read_bytes == source.manifest.size_bytes


def test_of_a_block_that_was_wanted_in_part_the_rest_is_kept() -> None:
    """What lies before the rest was wanted: who wants that again reads the block again."""
    state = make_state({"a": ("U8", (3 << 20,))})
    store, raw = memory_store(), state["a"][2]
    manifest = save(store, state, ())
    block = manifest.block_bytes
    at = block - manifest.files[0].data_start  # the second block begins here
    for ranges, blocks in [
        ([(0, 1000), (1000, 3000), (3000, block)], 1),
        ([(0, 1000), (2000, block + 10), (block + 10, block + 500)], 2),
        ([(0, 1000), (999, 3000), (999, 3000)], 2),
        ([(1000, 2000), (0, 1000), (500, 4000)], 1),  # with something unwanted before it all of the block is kept
    ]:
        source = Reader(store, manifest)
        for start, stop in ranges:
            assert source.read_flat("a", at + start, at + stop).tobytes() == raw[at + start : at + stop]
        assert source.read_bytes == blocks * block, ranges


@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        ([], 100),
        ([(0, 90), (40, 50)], 100),  # ends before the block, which begins at 100
        ([(90, 120)], 120),
        ([(100, 110), (105, 130), (130, 140)], 140),
        ([(100, 110), (120, 200)], 110),  # what lies in between may be asked for
        ([(110, 200)], 100),
        ([(0, 200)], 200),
    ],
)
def test_of_a_block_what_lies_behind_its_wanted_beginning_is_kept(wanted: list[tuple[int, int]], first: int) -> None:
    copies = [(start, memoryview(bytearray(stop - start))) for start, stop in wanted]
    assert windows.unwanted_from(copies, 100, 200) == first


def test_a_block_is_hashed_before_the_next_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has just been read lies in the processor's cache; a window of several blocks does not."""
    store = Store(tmp_path)
    manifest = save(store, make_state({"t": ("F32", (2 << 20,))}), ())
    seen: list[str] = []
    fill, block_sum = posix._fill, reader.block_sum_of

    def filled(*args: Any) -> int:
        seen.append("read")
        return fill(*args)

    def summed(parts: Any) -> int:
        seen.append("hashed")
        return block_sum(parts)

    monkeypatch.setattr(posix, "_fill", filled)
    monkeypatch.setattr(reader, "block_sum_of", summed)
    Reader(store, manifest, threads=1).read("t")
    blocks = len(manifest.sums[0])
    assert blocks == 9, "8 MiB and a header"
    assert seen == ["read", "hashed"] * blocks
