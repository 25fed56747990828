"""Any boxes are read by any number of workers: every byte once from storage, every wanted element delivered once."""

from __future__ import annotations

import itertools
import json
import math
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain_checkpoint import (
    ITEM_BYTES,
    CorruptData,
    InvalidPiece,
    Manifest,
    Reader,
    Store,
    hashing,
    reader,
    rounds,
)
from elastictrain_checkpoint import commit as commit_function
from elastictrain_checkpoint.host_exchange import HostExchange
from elastictrain_checkpoint.manifest import parse_manifest
from elastictrain_checkpoint.pack import BoxData, write_pack
from elastictrain_checkpoint.reshard import ReadPlan, plan_reads
from elastictrain_checkpoint.rounds import most_sent_bytes, most_shared_bytes
from elastictrain_checkpoint.together import TURNS, Exchange, read_boxes, read_together
from elastictrain_checkpoint.wants import Want
from tests.unit.checkpoint.build import State, flip, make_state, memory_store, save, sign
from tests.unit.checkpoint.workers import Workers

BLOCK = 4096
SPAN = 3000


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "SUM_BLOCK_BYTES", BLOCK)
        patch.setitem(commit_function.__globals__, "SUM_BLOCK_BYTES", BLOCK)
        patch.setattr(reader, "WINDOW_BYTES", 3 * BLOCK)
        patch.setattr(reader, "CACHED_BLOCKS", 2)
        patch.setattr(reader, "SCATTERED_BYTES", 64)
        yield


dims = st.sampled_from([0, 1, 2, 3, 7, 64, 90])
specs = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(st.sampled_from(["U8", "BF16", "F32", "F64"]), st.lists(dims, max_size=3).map(tuple)),
    min_size=1,
    max_size=4,
).filter(lambda made: all(math.prod(shape) < 60_000 for _, shape in made.values()))
states = st.builds(make_state, specs, st.integers(0, 99))


@st.composite
def boxes(draw: st.DrawFn, state: State) -> Want:
    name = draw(st.sampled_from(sorted(state)))
    low, size = [], []
    for dim in state[name][1]:
        a, b = sorted(draw(st.tuples(*[st.integers(0, dim)] * 2)))
        whole = draw(st.booleans())
        low.append(0 if whole else a)
        size.append(dim if whole else b - a)
    return Want(name, tuple(low), tuple(size))


@st.composite
def jobs(draw: st.DrawFn) -> tuple[State, list[float], list[list[Want]]]:
    state = draw(states)
    cuts = draw(st.lists(st.floats(0, 1, exclude_max=True), max_size=4))
    wants = draw(st.lists(st.lists(boxes(state), max_size=4), min_size=1, max_size=4))
    return state, cuts, wants


def numbered(state: State, name: str) -> np.ndarray:
    dtype, shape, raw = state[name]
    return np.frombuffer(raw, dtype=f"V{ITEM_BYTES[dtype]}").reshape(shape)


def expected(state: State, want: Want) -> bytes:
    part = tuple(slice(a, a + b) for a, b in zip(want.offsets, want.sizes, strict=True))
    return np.ascontiguousarray(numbered(state, want.name)[part]).tobytes()


def spans_of(manifest: Manifest, plan: ReadPlan) -> list[tuple[str, tuple[slice, ...]]]:
    """(tensor, the elements of it) of each span."""
    out = []
    for row, low, high in zip(plan.row.tolist(), plan.low.tolist(), plan.high.tolist(), strict=True):
        offsets, sizes = manifest.table.boxes[row]
        part = tuple(slice(a, a + b) for a, b in zip(offsets, sizes, strict=True))
        if part:
            part = (slice(offsets[0] + low, offsets[0] + high), *part[1:])
        out.append((manifest.table.names[manifest.table.tensor[row]], part))
    return out


@settings(deadline=None)
@given(jobs())
def test_every_wanted_element_is_delivered_once_and_every_span_read_once(
    job: tuple[State, list[float], list[list[Want]]],
) -> None:
    state, cuts, wants = job
    manifest = save(memory_store(), state, cuts, pack_bytes=20_000)
    plan = plan_reads(manifest, wants, span_bytes=SPAN)
    places = spans_of(manifest, plan)

    read = {name: np.zeros(shape, dtype=np.int64) for name, (_, shape, _) in state.items()}
    for (name, part), size in zip(places, plan.size_bytes, strict=True):
        read[name][part] += 1
        assert read[name][part].size * ITEM_BYTES[state[name][0]] == size
    wanted = {name: np.zeros(shape, dtype=np.int64) for name, (_, shape, _) in state.items()}
    delivered = {(w, i): np.zeros(state[x.name][1], np.int64) for w, m in enumerate(wants) for i, x in enumerate(m)}
    for span, worker, want in zip(plan.span.tolist(), plan.worker.tolist(), plan.want.tolist(), strict=True):
        name, part = places[span]
        box = wants[worker][want]
        assert name == box.name
        for taken, begin, size in zip(part, box.offsets, box.sizes, strict=True):
            assert max(taken.start, begin) < min(taken.stop, begin + size), "a delivery of nothing"
        delivered[worker, want][part] += 1
    for (worker, number), count in delivered.items():
        want = wants[worker][number]
        inside = tuple(slice(a, a + b) for a, b in zip(want.offsets, want.sizes, strict=True))
        assert (count[inside] == 1).all()
        wanted[want.name][inside] = 1
    for name, count in read.items():
        assert (count <= 1).all(), "a byte is read twice"
        assert (count >= wanted[name]).all()
    assert all(plan.bounds[s] < plan.bounds[s + 1] for s in range(len(places))), "a span that nobody wants is read"

    for row, high, end in zip(
        plan.row.tolist(), plan.high.tolist(), (plan.start + plan.size_bytes).tolist(), strict=True
    ):
        whole = int(manifest.table.boxes.heights(np.array([row]))[0])
        row_bytes = int(manifest.table.size_bytes[row]) // max(whole, 1)
        assert high == whole or -end % SPAN < row_bytes, "a span ends where the next row would end before a multiple"

    assert (np.diff(plan.owner) >= 0).all()
    most = plan.read_bytes / len(wants) + plan.size_bytes.max(initial=0)
    assert plan.owned_bytes().max(initial=0) <= most
    assert plan.owned_bytes().sum() == plan.read_bytes


HOW = ("sent", "posted", "shared")


class Threads(Workers):
    """Workers as threads, and an exchange between them that sends."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.sent: list[list[bytes]] = [[] for _ in range(workers)]
        self.largest = 0

    def exchange(self, worker: int) -> Exchange:
        def call(sent: Sequence[Sequence[np.ndarray]], sizes: Sequence[int]) -> list[memoryview]:
            self.sent[worker] = [b"".join(part.tobytes() for part in parts) for parts in sent]
            self.largest = max(self.largest, sum(map(len, self.sent[worker])))
            self.barrier.wait()
            came = [memoryview(theirs[worker]) for theirs in self.sent]
            assert [len(data) for data in came] == list(sizes)
            self.barrier.wait()
            return came

        return call


class Posted:
    """An exchange in which what comes is expected before it is sent, and put where it belongs when it is waited for."""

    def __init__(self, worker: int, exchange: Exchange, boxes: dict[tuple[int, int], queue.SimpleQueue[bytes]]) -> None:
        self._worker, self._exchange, self._boxes = worker, exchange, boxes
        self._room = (0, 0)
        self._expected = 0

    def __call__(self, sent: Sequence[Sequence[np.ndarray]], sizes: Sequence[int]) -> Sequence[memoryview]:
        return self._exchange(sent, sizes)

    def make_room(self, sent_bytes: int, come_bytes: int) -> None:
        self._room = sent_bytes, come_bytes

    def expect(self, come: Sequence[Sequence[np.ndarray]]) -> Callable[[], None]:
        self._expected += 1
        assert self._expected <= TURNS
        assert sum(part.nbytes for parts in come for part in parts) <= self._room[1]

        def wait() -> None:
            self._expected -= 1
            for other, parts in enumerate(come):
                for part in parts:
                    data = self._boxes[other, self._worker].get(timeout=30)
                    part[...] = np.frombuffer(data, dtype=part.dtype).reshape(part.shape)

        return wait

    def send(self, sent: Sequence[Sequence[np.ndarray]]) -> None:
        assert sum(part.nbytes for parts in sent for part in parts) <= self._room[0]
        assert not sent[self._worker]
        for other, parts in enumerate(sent):
            for part in parts:
                self._boxes[self._worker, other].put(part.tobytes())


def load_together(
    store: Store, manifest: Manifest, wants: list[list[Want]], *, how: str = "sent", **more: Any
) -> tuple[list[Any], int, int]:
    """What each worker got, how many bytes all have read, and how many were planned."""
    plan = plan_reads(manifest, wants, span_bytes=SPAN)
    threads = Threads(len(wants))
    boxes: dict[tuple[int, int], Any] = {
        pair: queue.SimpleQueue() for pair in itertools.product(range(len(wants)), repeat=2)
    }
    readers = [Reader(store, manifest) for _ in wants]

    def work(worker: int) -> list[bytes]:
        outs = [bytearray(size(manifest, want)) for want in wants[worker]]
        exchange: Any = threads.exchange(worker)
        if how == "posted":
            exchange = Posted(worker, exchange, boxes)
        if how == "shared":
            exchange = HostExchange(worker, len(wants), threads.gather(worker))
            exchange.make_room(most_shared_bytes(plan, **more))
        read_together(readers[worker], plan, wants, outs, worker=worker, exchange=exchange, **more)
        return [bytes(out) for out in outs]

    found = threads.run(work)
    assert not any(isinstance(one, AssertionError | ValueError | TypeError) for one in found), found
    assert threads.largest <= most_sent_bytes(plan, **more)
    assert (how == "shared") == (threads.largest == 0)
    return found, sum(reader.read_bytes for reader in readers), plan.read_bytes


def size(manifest: Manifest, want: Want) -> int:
    return math.prod(want.sizes) * ITEM_BYTES[manifest.tensors[want.name][0]]


@settings(deadline=None, max_examples=60)
@given(jobs(), st.sampled_from([1, 5_000, 1 << 30]), st.sampled_from(HOW))
def test_reading_together_gives_everybody_what_is_wanted(
    job: tuple[State, list[float], list[list[Want]]], round_bytes: int, how: str
) -> None:
    state, cuts, wants = job
    store = memory_store()
    manifest = save(store, state, cuts, pack_bytes=20_000)
    found, read_bytes, planned = load_together(store, manifest, wants, round_bytes=round_bytes, how=how)
    assert found == [[expected(state, want) for want in mine] for mine in wants]
    # Whole blocks are read: at most one more at each end of a run of spans, and runs end where something is unwanted.
    assert read_bytes <= manifest.size_bytes + len(wants) * 2 * BLOCK or round_bytes < planned
    for mine in wants:
        outs = [bytearray(size(manifest, want)) for want in mine]
        read_boxes(Reader(store, manifest), mine, outs)
        assert [bytes(out) for out in outs] == [expected(state, want) for want in mine]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (1, 4)])
def test_a_turned_layout_reads_every_stored_byte_once(rows: int, columns: int, how: str) -> None:
    """Shard(0) or Shard(1) of everything, saved by others: what N readers read together is what is stored."""
    state = make_state({f"t{i}": ("F32", (64, 96)) for i in range(20)})
    store = memory_store()
    manifest = save(store, state, (0.25, 0.5, 0.75))
    high, wide = 64 // rows, 96 // columns
    wants = [[Want(name, (high * (w % rows), wide * (w % columns)), (high, wide)) for name in state] for w in range(4)]
    found, read_bytes, planned = load_together(store, manifest, wants, how=how)
    assert found == [[expected(state, want) for want in mine] for mine in wants]
    assert planned == sum(len(raw) for _, _, raw in state.values())
    assert read_bytes <= manifest.size_bytes + 3 * BLOCK


def test_a_row_longer_than_a_span_is_never_cut() -> None:
    manifest = save(memory_store(), make_state({"t": ("U8", (9, 7000))}), ())
    plan = plan_reads(manifest, [[Want("t", (1, 0), (7, 7000))]], span_bytes=SPAN)
    rows = [row for low, high in zip(plan.low.tolist(), plan.high.tolist(), strict=True) for row in range(low, high)]
    assert rows in [list(range(low, high)) for low in (0, 1) for high in (8, 9)]
    assert set((plan.high - plan.low).tolist()) <= {1, 2}


def test_rounds_end_where_hash_blocks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for less than a row: what is read of the next block would have to be kept, and copied."""
    monkeypatch.setattr(rounds, "_GAP_BYTES", BLOCK)
    ends: list[tuple[int, int]] = []

    class Told(Reader):
        def read_spans(self, spans: Any) -> None:
            ends.append(max((file, start + len(out)) for file, start, out in spans))
            super().read_spans(spans)

    store, wants = memory_store(), [[Want("t", (0, 0), (250, 300))]]
    manifest = save(store, make_state({"t": ("U8", (250, 300))}), (0.3, 0.6))
    plan = plan_reads(manifest, wants, span_bytes=BLOCK)
    exchange = HostExchange(0, 1, lambda value: [value])
    exchange.make_room(most_shared_bytes(plan, 2 * BLOCK))
    more: Any = {"worker": 0, "exchange": exchange, "round_bytes": 2 * BLOCK}
    read_together(Told(store, manifest), plan, wants, [bytearray(75_000)], **more)
    assert len(manifest.files) > 1
    assert len(ends) > 6
    for file, end in ends:
        assert end == manifest.files[file].size_bytes or -end % (2 * BLOCK) < 300


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**9), st.integers(1, 4), st.sampled_from(HOW))
def test_damage_is_known_to_every_worker_and_nobody_waits(at: int, workers: int, how: str) -> None:
    state = make_state({"a": ("F32", (64, 96)), "b": ("U8", (5000,))})
    store = memory_store()
    manifest = save(store, state, ())
    begin = manifest.files[0].data_start
    at = begin + at % (manifest.files[0].size_bytes - begin)
    flip(store, manifest.paths[0], at)
    wants = [[Want("a", (0, 0), (64, 96)), Want("b", (0,), (5000,))]] * workers
    found, _, _ = load_together(store, manifest, wants, how=how)
    assert all(isinstance(error, CorruptData) for error in found), found
    block = f"block {at // BLOCK} "
    assert all(block in str(error) for error in found)
    assert sum(str(error).startswith("worker ") for error in found) >= workers - 2  # a block may lie in two shares


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_boxes_whose_ends_do_not_ascend_are_all_found(data: st.DataObject) -> None:
    """A grid of uneven boxes, as another format's import may hold: a long box comes before short ones."""
    rows, columns = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    right, low = data.draw(st.integers(1, columns - 1)), data.draw(st.integers(1, rows - 1))
    whole = np.random.default_rng(0).integers(0, 2**31, (rows, columns), dtype=np.int32)
    store, files, chunks = memory_store(), [], []
    grid = [
        ((0, 0), (rows, right)),
        ((0, right), (low, columns - right)),
        ((low, right), (rows - low, columns - right)),
    ]
    for number, (at, size) in enumerate(grid):
        part = whole[at[0] : at[0] + size[0], at[1] : at[1] + size[1]]
        box = BoxData("t", "I32", (rows, columns), (at, size), (memoryview(np.ascontiguousarray(part)).cast("B"),))
        files.append(write_pack(store, f"step-00000001/tp/w{number}-00.safetensors", [box]))
        chunks.append([number, files[-1].data_start, list(at), list(size)])
    state = {"t": ("I32", (rows, columns), whole.tobytes())}
    document = json.loads(save(store, state, step=1).raw)
    document["files"] = [file.model_dump(by_alias=True) for file in files]
    document["tensors"]["t"]["chunks"] = chunks
    manifest = parse_manifest(sign(document))
    wants = data.draw(st.lists(st.lists(boxes(state), max_size=3), min_size=1, max_size=3))
    found, _, _ = load_together(store, manifest, wants)
    assert found == [[expected(state, want) for want in mine] for mine in wants]


def test_boxes_that_only_touch_are_not_read() -> None:
    store = memory_store()
    state = {"t": ("I32", (4, 6), np.arange(24, dtype=np.int32).tobytes())}
    document = json.loads(save(store, state, step=1).raw)
    [[file, start, _, _]] = document["tensors"]["t"]["chunks"]
    halves = [((0, 0), (2, 2)), ((0, 2), (2, 4)), ((2, 0), (2, 6))]
    at = [start, start + 16, start + 48]
    document["tensors"]["t"]["chunks"] = [[file, a, list(o), list(s)] for a, (o, s) in zip(at, halves, strict=True)]
    manifest = parse_manifest(sign(document))
    for box in halves:
        plan = plan_reads(manifest, [[Want("t", *box)]])
        assert plan.start.tolist() == [at[halves.index(box)]]
        assert len(plan.span) == 1


def test_wrong_wants_are_refused() -> None:
    store = memory_store()
    manifest = save(store, make_state({"a": ("F32", (4, 5))}), aliases={"tied": "a"})
    with pytest.raises(KeyError, match="step 1000 has no tensor 'b'"):
        plan_reads(manifest, [[Want("b", (0,), (1,))]])
    with pytest.raises(InvalidPiece, match=r"^a: box \(0,\) \(1,\) is not of shape \(4, 5\)$"):
        plan_reads(manifest, [[Want("a", (0,), (1,))]])
    for offsets, sizes in (((0, 0), (5, 5)), ((-1, 0), (1, 1)), ((4, 0), (1, 1)), ((0, 0), (-1, 1))):
        with pytest.raises(InvalidPiece, match=r"^tied: box .* does not lie in shape \(4, 5\)$"):
            plan_reads(manifest, [[Want("tied", offsets, sizes)]])
    source = Reader(store, manifest)
    want = Want("tied", (1, 2), (2, 3))
    with pytest.raises(InvalidPiece, match=r"^tied: out must be a writable contiguous buffer of 24 bytes, got 23"):
        read_boxes(source, [want], [bytearray(23)])
    with pytest.raises(InvalidPiece, match=r"got 24 bytes, read-only$"):
        read_boxes(source, [want], [bytes(24)])
    with pytest.raises(InvalidPiece, match=r"^1 buffers for 0 wants$"):
        read_boxes(source, [], [bytearray(1)])
    assert plan_reads(manifest, []).read_bytes == 0
