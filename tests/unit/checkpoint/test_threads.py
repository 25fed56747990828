"""Items in several threads: all are done, the earliest error is the one that is raised, and a reader reads the same."""

from __future__ import annotations

import gc
import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastictrain_checkpoint import CorruptData, Reader, Request, Store, hashing, reader
from elastictrain_checkpoint import commit as commit_function
from elastictrain_checkpoint.threads import Standby, in_threads, processors
from tests.unit.checkpoint.build import flip, make_state, save

BLOCK = 4096


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_every_item_is_done_once(threads: int, count: int) -> None:
    done: list[int] = []
    in_threads(threads, iter(range(count)), done.append)
    assert sorted(done) == list(range(count))
    if threads < 2:
        assert done == sorted(done)


def test_so_many_threads_work_at_the_same_time() -> None:
    together, names = threading.Barrier(3, timeout=30), set()

    def work(_: int) -> None:
        names.add(threading.current_thread().name)
        together.wait()

    in_threads(3, range(3), work)
    assert threading.current_thread().name in names, "the caller works too"
    assert processors() >= 1
    assert not [one for one in threading.enumerate() if one.name == "elastictrain-read"]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_earliest_error_is_raised_and_nothing_further_begun(threads: int) -> None:
    late, begun = threading.Event(), []

    def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            if threads > 1:
                assert late.wait(30)  # number 3 has failed already
            raise ValueError(f"item {item}")
        if item == 3:
            late.set()
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match=r"^item 2$"):
        in_threads(threads, range(1000), work)
    assert set(begun) >= {0, 1, 2}
    assert len(begun) < 1000


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_plan_is_raised_and_what_an_item_raises_never_ends_it_quietly(threads: int) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("plan")

    with pytest.raises(KeyError, match="plan"):
        in_threads(threads, items(), lambda _: None)

    def stop(_: int) -> None:
        raise StopIteration

    with pytest.raises(StopIteration):
        in_threads(threads, range(10), stop)


# --- reading ---


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and windows so small that every read has many, and all are read in parallel."""
    monkeypatch.setattr(hashing, "SUM_BLOCK_BYTES", BLOCK)
    monkeypatch.setitem(commit_function.__globals__, "SUM_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(reader, "WINDOW_BYTES", 2 * BLOCK)
    monkeypatch.setattr(reader, "PARALLEL_BYTES", 1)


SPECS = {
    "a": ("F32", (300, 100)),
    "b": ("U8", (9000,)),
    "c": ("BF16", (3, 50, 70)),
    **{f"t{n}": ("U8", (50,)) for n in range(99)},
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_several_threads_read_the_same(tmp_path: Path, threads: int) -> None:
    state = make_state(SPECS)
    store = Store(tmp_path)
    manifest = save(store, state, (0.5,), pack_bytes=100_000)
    source = Reader(store, manifest, threads=threads)
    wanted = [(name, raw) for name, (_, _, raw) in state.items()]
    sizes = {"F32": 4, "U8": 1, "BF16": 2}
    for _ in range(3):
        found = source.read_many([Request(name, 0, len(raw) // sizes[state[name][0]]) for name, raw in wanted])
        assert [bytes(one) for one in found] == [raw for _, raw in wanted]
    assert source.read_bytes <= 3 * manifest.size_bytes


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_damage_is_named_or_healed(tmp_path: Path, threads: int) -> None:
    state = make_state(SPECS)
    store, other = Store(tmp_path / "a"), Store(tmp_path / "b")
    manifest = save(store, state, ())
    save(other, state, ())
    for block in (20, 5, 28):
        flip(store, manifest.paths[0], block * BLOCK + 7)
    with pytest.raises(CorruptData, match=r", block 5 \("):
        Reader(store, manifest, threads=threads).read("a")
    source = Reader(store, manifest, others=[other], threads=threads)
    assert bytes(source.read("a")) == state["a"][2]
    assert sorted(one.block for one in source.healed) == [5, 20, 28]
    assert Reader(store, manifest)._threads == store.read_threads >= 1


# --- a thread that waits for work ---


def test_work_is_done_by_the_thread_that_waits_for_it() -> None:
    standby, seen = Standby("et-test"), []
    for _ in range(3):
        standby.give(lambda: seen.append((threading.get_ident(), threading.current_thread().name)))
        assert standby.wait(30)
    assert len(set(seen)) == 1
    assert seen[0][1] == "et-test"
    assert seen[0][0] != threading.get_ident()


def test_work_that_is_given_while_another_is_done_does_not_wait_for_it() -> None:
    standby, held, done = Standby("et-test"), threading.Event(), threading.Event()
    standby.give(lambda: held.wait(30))
    first = standby._hand.thread
    standby.give(done.set)
    assert done.wait(30)
    assert first.is_alive()
    held.set()
    first.join(30)
    assert not first.is_alive(), "one thread waits, not two"


def test_what_the_work_held_on_to_goes_with_it() -> None:
    class Large:
        def work(self) -> None:
            """Nothing."""

    standby, large = Standby("et-test"), Large()
    seen = weakref.ref(large)
    standby.give(large.work)
    del large
    assert standby.wait(30)
    assert seen() is None


def test_the_thread_ends_with_its_owner_and_when_it_is_closed() -> None:
    standby = Standby("et-test")
    thread = standby._hand.thread
    standby.close()
    thread.join(30)
    assert not thread.is_alive()
    done = threading.Event()
    standby.give(done.set)
    assert done.wait(30), "it may be given work again"
    thread = standby._hand.thread
    del standby
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_work_is_not_given_to_a_thread_that_is_told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was closed while it worked: it says that it is idle, and ends only a moment later."""
    standby, held, done = Standby("et-test"), threading.Event(), threading.Event()
    idle, thread = standby._hand.idle, standby._hand.thread
    standby.give(lambda: held.wait(30))
    standby.close()
    held.set()
    assert idle.wait(30)
    thread.join(30)
    monkeypatch.setattr(thread, "is_alive", lambda: True)  # that moment
    standby.give(done.set)
    assert done.wait(30)


def test_a_forked_process_has_a_thread_of_its_own() -> None:
    standby = Standby("et-test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: what is tested here
        child = os.fork()
    if not child:
        done = threading.Event()
        standby.give(done.set)
        os._exit(0 if done.wait(20) else 1)
    assert os.waitpid(child, 0)[1] == 0
