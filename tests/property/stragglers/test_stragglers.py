"""What must hold of detector and decider whatever the workers say."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastictrain.stragglers.decision import Decider, Policy, Situation
from elastictrain.stragglers.detector import Detector
from elastictrain.stragglers.rental import Case, pays, prior_s
from elastictrain.stragglers.signals import RECORD, RECORD_BYTES, Signal, checked, decode, parts, table
from elastictrain.stragglers.watch import StragglerWatch

anything = st.floats(width=32)
seconds = st.floats(0, 1000, width=32)


@given(st.lists(st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES), min_size=1, max_size=5), st.integers(1, 30))
@example([bytes(10) + b"\x81\x7f" + bytes(RECORD_BYTES - 12)], 1)  # a NaN that signals
@example(
    [b"\x00\x03\x01\x00" + bytes(7) + b"\x7f" + bytes(RECORD_BYTES - 12)], 1
)  # too long for four times as many lanes
@settings(max_examples=60, deadline=None)
def test_no_bytes_at_all_can_break_the_watch(raws, steps):
    """Any bytes are records of something; what comes out is finite, and a split of all lanes if it is one."""
    watch = StragglerWatch(10_000, policy=Policy(evict=True))
    good = Signal(4, 0.1, arrive_s=0.1, exchange_s=0.01).encode()
    workers = tuple(range(len(raws) + 1))
    for step in range(1, steps + 12):
        verdict = watch.feed(1, workers, step, b"".join([*(raws if step > 10 else [good] * len(raws)), good]))
        for finding in verdict.findings:
            assert math.isfinite(finding.factor)
        if verdict.decision is not None and verdict.decision.lanes:
            assert len(verdict.decision.lanes) == len(workers)
            assert min(verdict.decision.lanes) >= 0
    assert watch.detector is not None
    assert np.isfinite(watch.detector.level).all()


@given(anything, anything, anything, st.integers(0, 2**40), anything)
def test_a_record_always_has_its_size(a, b, c, lanes, tokens):
    raw = Signal(lanes, a, b, c, tokens=float(tokens)).encode()
    assert len(raw) == RECORD_BYTES == RECORD.itemsize
    assert decode(raw)["lanes"][0] == min(lanes, 0xFFFF)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=20))
def test_waiting_and_transfer_add_up_and_are_never_negative(pairs):
    records = table(arrive_s=[a for a, _ in pairs], exchange_s=[e for _, e in pairs])
    wait, transfer = parts(records, np.ones(len(pairs), dtype=bool))
    assert (wait >= 0).all()
    assert (transfer >= 0).all()
    assert np.allclose(wait + transfer, records["exchange_s"])
    assert wait[int(np.argmax(records["arrive_s"]))] == 0


def times(seed: int, steps: int, workers: int, factors: dict[int, float], since: int) -> list[np.ndarray]:
    rng = Random(seed)
    found = []
    for step in range(steps):
        own = [0.4 * rng.lognormvariate(0, 0.01) * (factors.get(w, 1.0) if step >= since else 1.0)
               for w in range(workers)]  # fmt: skip
        last = max(own)
        found.append(table(lanes=[4] * workers, compute_s=own, arrive_s=own, exchange_s=[last - o + 0.01 for o in own]))
    return found


@given(st.integers(0, 10**6), st.integers(3, 12), st.data())
@settings(max_examples=40, deadline=None)
def test_names_follow_the_workers_however_they_are_numbered(seed, workers, data):
    order = data.draw(st.permutations(range(workers)))
    slow = data.draw(st.integers(0, workers - 1))
    one, other = Detector(workers), Detector(workers)
    alarms, others = [], []
    for step, records in enumerate(times(seed, 40, workers, {slow: 1.5}, 20)):
        alarms += one.observe(step, records)
        others += other.observe(step, records[order])
    assert [(a.step, a.worker, a.cause) for a in alarms] == [(a.step, order[a.worker], a.cause) for a in others]
    assert [a.worker for a in alarms] == [slow]


@given(st.integers(0, 10**6), st.floats(0.01, 100.0))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_time_does_not_matter(seed, scale):
    one, other = Detector(6), Detector(6)
    for step, records in enumerate(times(seed, 40, 6, {2: 1.4}, 20)):
        scaled = records.copy()
        for name in ("compute_s", "arrive_s", "exchange_s"):
            scaled[name] *= scale
        said, same = one.observe(step, records), other.observe(step, scaled)
        assert [(a.worker, a.cause, round(a.factor, 3)) for a in said] == [
            (a.worker, a.cause, round(a.factor, 3)) for a in same
        ]


@given(
    st.integers(2, 6), st.lists(st.tuples(st.integers(0, 5), st.floats(1.0, 20.0), st.integers(1, 40)), max_size=12),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_lanes_add_up_and_never_swing(workers, changes, evict):
    """Speeds change as they like: every split has all lanes, one at least for each; between two changes of speed the
    lanes come to rest after at most two moves.
    """
    decider, lanes, total = Decider(workers, Policy(evict=evict)), (4,) * workers, 4 * workers
    units, slow, step, moves_since = [1.0] * workers, dict[int, int](), 0, 0
    for worker, factor, steps in [*changes, (0, 1.0, 60)]:
        units[worker % workers] = factor
        if factor >= 1.1:
            slow[worker % workers] = step
        else:
            slow.pop(worker % workers, None)
        moves_since = 0
        for _ in range(steps):
            arrived = max(unit * own for unit, own in zip(units, lanes, strict=True))
            now = Situation(step, lanes, tuple(units), arrived, float(step), 10**6, slow=dict(slow))
            decision = decider.decide(now)
            step += 1
            if decision is None or not decision.lanes:
                continue
            assert sum(decision.lanes) == total
            assert min(decision.lanes) >= 1
            assert decision.action == "move_lanes", "what was promised came, so nothing is taken back"
            lanes = decision.lanes
            moves_since += 1
    assert moves_since <= 2


@given(
    saved=st.floats(0.01, 10.0), cost=st.floats(0.1, 500.0), lasts=st.integers(1, 400), prior=st.floats(1.0, 10_000.0),
)  # fmt: skip
def test_never_more_than_twice_the_optimum_and_one_change(saved, cost, lasts, prior):
    """Ski rental: whatever the duration turns out to be, and whatever was expected of it."""
    paid = lost = 0.0
    for step in range(lasts):
        case = Case(saved, cost, cost, 1.0, lost, float(step), 1e9)
        if pays(case, prior=prior) is not None:
            paid = cost
            break
        lost += saved
    optimum = min(cost, lasts * saved)
    assert lost + paid <= 2 * optimum + cost + saved + 1e-9
    if paid:
        assert lost <= cost + saved + 1e-9


@given(st.integers(1, 20_000))
def test_more_workers_never_shorten_what_is_expected(workers):
    assert prior_s(workers) <= prior_s(workers + 1)


@given(st.lists(st.tuples(st.integers(0, 8), anything, anything, anything), min_size=1, max_size=8))
def test_what_is_believed_is_finite(rows):
    records = table(
        lanes=[lanes for lanes, _, _, _ in rows], compute_s=[a for _, a, _, _ in rows],
        data_s=[b for _, _, b, _ in rows], arrive_s=[c for _, _, _, c in rows],
    )  # fmt: skip
    sound = checked(records)
    for name in ("compute_s", "data_s", "arrive_s"):
        assert (records[name][sound] >= 0).all()
        assert np.isfinite(records[name][sound]).all()
