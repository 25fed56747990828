"""The order of a live source: whatever arrives when, whoever decides, reads, dies and comes back, what was read is what
the recorded eras say; and it holds every sample once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.data.holes import samples_of_run
from elastictrain.data.ids import sample_ids
from elastictrain.data.live import LiveSource, open_live
from elastictrain.data.live_order import NOTHING, Era, EraOrder, Held, fresh_era, reservoir_era
from elastictrain.data.order import Piece
from elastictrain.data.segments import SegmentWriter
from elastictrain.errors import DataError, NoSamples
from elastictrain.job import Data

SEGMENTS = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=12)
"""Samples of the blocks of segments."""


@given(SEGMENTS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.sampled_from(["window", "none", "strict"]),
       st.integers(1, 3), st.data())  # fmt: skip
def test_eras_hold_every_sample_once_however_they_are_cut(
    segments: list[list[int]], lanes: int, size: int, most: int, shuffle: str, window: int, data: st.DataObject
) -> None:
    last, carry, used = NOTHING, (), []
    firsts = list(itertools.accumulate([0, *(len(blocks) for blocks in segments)]))
    there = 0
    while there < len(segments) or last.segments < there:
        if there < len(segments):
            there += data.draw(st.integers(1, len(segments) - there))
        held = [Held(sum(b), len(b), str(n)) for n, b in enumerate(segments[last.segments : there])]
        era = fresh_era(last, carry, held, per_step=lanes * size, most=most)
        if era is None:
            assert sum(stop - start for _, start, stop in carry) + sum(one.samples for one in held) < lanes * size
            if there == len(segments):
                break
            continue
        assert Era.from_json(era.as_json()) == era
        assert era.number == last.number + 1
        assert era.from_step == last.stop
        assert era.steps >= 1
        assert era.first_segment == last.segments
        assert era.first_block == firsts[last.segments]
        taken = sum(sum(blocks) for blocks in segments[era.first_segment : era.segments])
        without_last = taken - sum(segments[era.segments - 1]) + sum(stop - start for _, start, stop in carry)
        assert len(era.held) <= most or without_last < lanes * size
        pieces = [Piece(*one) for one in carry] + [
            Piece(firsts[n] + b, 0, rows)
            for n in range(era.first_segment, era.segments)
            for b, rows in enumerate(segments[n])
            if rows
        ]
        order = EraOrder(era, pieces, seed=3, lanes=lanes, lane_batch_size=size, shuffle=shuffle, window_blocks=window)
        for step in range(era.from_step, era.stop):
            for lane in range(lanes):
                got = [samples_of_run(*run) for run in order.spans(step, lane)]
                ids = np.concatenate([sample_ids(b, r) for b, r in got])
                assert len(ids) == size
                used += ids.tolist()
        last, carry = era, order.left_over()
        assert sum(stop - start for _, start, stop in carry) < lanes * size
    everything = [
        (firsts[n] + b) << 32 | row
        for n in range(last.segments)
        for b, rows in enumerate(segments[n])
        for row in range(rows)
    ]
    left = [block << 32 | row for block, start, stop in carry for row in range(start, stop)]
    assert sorted(used + left) == everything
    if shuffle == "strict":
        assert used + left == everything


@given(st.integers(1, 50), st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_a_reservoir_takes_from_its_samples_and_from_all_of_them_before_one_comes_again(
    decided: int, samples: int, steps: int, lanes: int, size: int
) -> None:
    last = Era(4, "fresh", 10, 3, 2, 7, held=(Held(decided, 1, ""),))
    era = reservoir_era(last, ((8, 1, 2),), samples=samples, steps=steps, decided=decided, per_step=lanes * size)
    assert era is not None
    assert (era.carry, era.segments, era.first_block) == (((8, 1, 2),), 2, 8)
    assert 1 <= era.steps <= steps
    first = decided - era.reservoir
    assert first == max(0, decided - samples)
    order = EraOrder(
        era, [Piece(7, first, decided)], seed=3, lanes=lanes, lane_batch_size=size, shuffle="none", window_blocks=2
    )
    rows = [
        row
        for step in range(era.from_step, era.stop)
        for lane in range(lanes)
        for run in order.spans(step, lane)
        for row in samples_of_run(*run)[1].tolist()
    ]
    assert set(rows) <= set(range(first, decided))
    assert len(rows) - len(set(rows)) <= order.repeated_per_epoch


def test_of_a_reservoir_of_nothing_there_is_none() -> None:
    assert reservoir_era(NOTHING, (), samples=5, steps=1, decided=0, per_step=4) is None


def test_an_order_whose_segments_hold_less_than_its_eras_say_is_refused() -> None:
    era = Era(0, "fresh", 0, 5, 1, 0, held=(Held(20, 1, ""),))
    with pytest.raises(DataError, match="has 5 steps, but its segments hold only 3"):
        EraOrder(era, [Piece(0, 0, 12)], seed=1, lanes=2, lane_batch_size=2, shuffle="none", window_blocks=1)


@pytest.mark.parametrize("record", [{"v": 2}, {"v": 1}, {"v": 1, "number": 0}])
def test_what_is_no_era(record: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        Era.from_json(record)


def test_the_first_eras_of_a_seed_are_fixed() -> None:
    """Golden: these may only change with LIVE_VERSION."""
    era = fresh_era(NOTHING, (), [Held(5, 2, "a"), Held(4, 1, "b")], per_step=4, most=9, schema="x: int64")
    assert era is not None
    assert era.digest == "c94f8c07b29c1d38e39d0379de2bfa23"
    order = EraOrder(
        era, [Piece(0, 0, 2), Piece(1, 0, 3), Piece(2, 0, 4)], seed=7, lanes=2, lane_batch_size=2, shuffle="window",
        window_blocks=2,
    )  # fmt: skip
    found = [
        (b, r)
        for step in range(2)
        for lane in range(2)
        for run in order.spans(step, lane)
        for b, r in zip(*(part.tolist() for part in samples_of_run(*run)), strict=True)
    ]
    assert found == [(2, 3), (2, 2), (1, 1), (1, 0), (2, 0), (2, 1), (1, 2), (0, 0)]
    assert order.left_over() == ((0, 1, 2),)


# --- the shell: sources that come and go over one manifest and one record ---

_numbers = itertools.count()


@dataclass
class Opened:
    """A stand-in for `Source`: a segment whose file holds the samples of its blocks, `1,0,3`."""

    rows: list[int]
    name: str

    def __post_init__(self) -> None:
        self.order = SimpleNamespace(block_rows=np.asarray(self.rows, dtype=np.int64))
        self.samples, self.columns = sum(self.rows), (("x", "int64"),)
        self.fingerprint = {"hash": self.name}
        self._files = SimpleNamespace(files=[SimpleNamespace(size_bytes=len(",".join(map(str, self.rows))))])

    def close(self) -> None:
        pass


def fake_open(spec: Data, **_: Any) -> Opened:
    text = fsspec.filesystem("memory").cat_file(str(spec.path)).decode()
    rows = [int(n) for n in text.split(",") if n]
    if not sum(rows):
        raise NoSamples("nothing")
    return Opened(rows, text)


class World:
    """One manifest, one record, and workers that come and go."""

    def __init__(self, policy: str, steps: int = 2) -> None:
        self.url = f"memory://live-{next(_numbers)}"
        self.writer = SegmentWriter(self.url)
        live: dict[str, Any] = {"record": f"{self.url}-order", "segments_at_once": 2, "policy": policy}
        if policy == "reservoir":
            live["reservoir"] = {"samples": 15, "steps": steps}
        self.spec = Data(kind="jsonl", path=self.url, live=live)  # type: ignore[arg-type]
        self.workers: list[LiveSource | None] = [None, None]
        self.read: dict[tuple[int, int], list[int]] = {}

    def source(self) -> LiveSource:
        return open_live(self.spec, seed=11, lanes=3, lane_batch_size=2)

    def append(self, rows: list[int]) -> None:
        name = f"{self.writer.log.count():04d}"
        fsspec.filesystem("memory").pipe_file(f"{self.url}/{name}", ",".join(map(str, rows)).encode())
        self.writer.append(f"{self.url}/{name}")

    def worker(self, number: int) -> LiveSource:
        source = self.workers[number]
        if source is None:
            source = self.workers[number] = self.source()
        return source

    def use(self, source: LiveSource, step: int, lane: int) -> None:
        ids = ids_of(source, step, lane)
        assert self.read.setdefault((step, lane), ids) == ids


def ids_of(source: LiveSource, step: int, lane: int) -> list[int]:
    found = [source.ids_of(window, *samples_of_run(window, a, b)) for window, a, b in source.spans(step, lane)]
    return list(np.concatenate(found).tolist())


ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.lists(st.integers(0, 5), max_size=3)),
    st.tuples(st.just("advance"), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("kill"), st.integers(0, 1)),
    st.tuples(st.just("read"), st.integers(0, 1), st.integers(0, 2), st.integers(0, 5)),
)


@pytest.mark.parametrize("policy", ["wait", "reservoir", "stop"])
@settings(max_examples=40, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=40))
def test_any_interleaving_gives_the_order_that_is_recorded(policy: str, actions: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elastictrain.data.live_segments.open_source", fake_open)
        world = World(policy)
        for action, *what in actions:
            if action == "append":
                world.append(what[0])
            elif action == "advance":
                worker = world.worker(what[0])
                before = worker.decided
                grown = worker.advance(needed=what[1])
                assert worker.decided >= before + (grown and worker.ended is None)
            elif action == "kill":
                world.workers[what[0]] = None
            else:
                number, lane, back = what
                worker = world.worker(number)
                if worker.decided:
                    world.use(worker, max(0, worker.decided - 1 - back), lane)
        check_against_a_replay(world, policy)


def check_against_a_replay(world: World, policy: str) -> None:
    replay = world.source()
    fresh: list[int] = []
    for step in range(replay.decided):
        for lane in range(3):
            ids = ids_of(replay, step, lane)
            assert len(ids) == 2
            assert world.read.get((step, lane), ids) == ids
            if replay.order_of(next(replay.spans(step, lane))[0])[0] == "":
                fresh += ids
    assert len(set(fresh)) == len(fresh)
    if policy == "wait":
        assert len(fresh) == 6 * replay.decided
        while replay.advance(needed=False):
            pass
        assert replay.samples - 6 * replay.decided < 6 or replay._log.count() > replay._eras.last.segments


@settings(deadline=None)
@given(
    segments=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=6),
    policy=st.sampled_from(["wait", "reservoir"]),
    wanted=st.integers(1, 12),
    steps=st.integers(1, 3),
)
def test_windows_follow_each_other_in_every_lane(
    segments: list[list[int]], policy: str, wanted: int, steps: int
) -> None:
    """What reads ahead asks only for `after` and `batches_in`: they must say the same as `spans`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elastictrain.data.live_segments.open_source", fake_open)
        world = World(policy, steps)
        for rows in segments:
            world.append(rows)
        source = world.source()
        while source.decided < wanted and source.advance(needed=True):
            pass
        for lane in range(3):
            spans = [span for step in range(source.decided) for span in source.spans(step, lane)]
            windows = [window for window, _ in itertools.groupby(span[0] for span in spans)]
            for one, other in itertools.pairwise(windows):
                assert source.after(one) == other
                assert source.rows_per_step(one, 0) == 2
            if windows:
                assert source.after(windows[-1]) == windows[-1]
                assert source.rows_per_step(windows[-1], 0) == 0
            for step in range(source.decided):
                first, *more = source.spans(step, lane)
                if not more:
                    for ahead in range(source.batches_in(first[0], first[1])):
                        place = (first[0], first[1] + 2 * ahead, first[1] + 2 * ahead + 2)
                        assert list(source.spans(step + ahead, lane)) == [place]
