"""Dropping the lanes of a step that are late, by one worker after the other on one board of claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastictrain.engine import dropping
from elastictrain.engine.claims import ClaimBoard
from elastictrain.engine.commit import apply_step
from elastictrain.engine.dropping import AGAIN_S, Dropper, lane_key
from elastictrain.engine.replaying import ReplayedLanes
from elastictrain.engine.step import StepRunner
from elastictrain.engine.vote import Shares, Tally
from elastictrain.errors import ConfigError, InternalError
from elastictrain.layout import Layout, Shard, deal_lanes
from elastictrain.observe.dropped import recorded_drops
from elastictrain.redundancy import Claim, Pace, droppable_lanes
from tests.unit.engine.test_claims import Words
from tests.unit.engine.test_shares import STEP, Rank0, Tree, Work, looks_always

LANES = deal_lanes(6, [1.0, 1.0], "contiguous")
GONE = Claim(STEP, 2, True)
"""Nobody's: there are two ranks."""


class Looker:
    """Worker 0 of two with three lanes each, of which two may be dropped; a lane usually takes a second."""

    def __init__(self, at_most: int = 2, *, firsts: bool = True, usual_s: float = 1.0) -> None:
        self.words, self.phases = Words(), []
        self.board, self.other = ClaimBoard(self.words, lambda: None), ClaimBoard(self.words, lambda: None)
        pace = Pace(2)
        pace.learn([usual_s, usual_s])
        sharing = droppable_lanes(LANES, at_most, firsts=firsts)
        self.dropper = Dropper(sharing, 0, at_most, self.board, pace)

    def look(self, now_s: float, step: int = STEP) -> float:
        return self.dropper.look(step, now_s, self.phases.append)

    def word(self, lane: int) -> Claim | None:
        return self.board.read(lane_key(lane), STEP)

    def does(self, lane: int, step: int = STEP) -> Claim:
        return self.other.finish(lane_key(lane), self.other.claim(lane_key(lane), Claim(step, 1)), Claim(step, 1, True))


def test_late_lanes_are_dropped_and_their_worker_hears_of_it() -> None:
    """Lane 4 was begun, lane 5 not."""
    one = Looker()
    begun = one.other.claim(lane_key(4), Claim(STEP, 1))
    assert one.look(3.0) == pytest.approx(1.0), "two of six lanes are worth a third of three seconds"
    assert one.look(3.9) == pytest.approx(0.1)
    assert one.look(4.0) == 0.0
    assert one.word(4) == one.word(5) == GONE
    assert one.phases == ["drop", "drop"]
    assert one.other.finish(lane_key(4), begun, Claim(STEP, 1, True)) == GONE
    assert one.other.claim(lane_key(5), Claim(STEP, 1)) == GONE


def test_what_was_done_meanwhile_counts() -> None:
    one = Looker()
    one.look(3.0)
    one.does(4)
    assert one.look(3.4) == pytest.approx(0.1), "one lane is worth half as much"
    assert one.look(3.5) == 0.0
    assert (one.word(4), one.word(5)) == (Claim(STEP, 1, True), GONE)


def test_a_lane_that_is_done_before_its_word_is_replaced_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Looker(1)
    real: Callable[..., Any] = one.board.claim

    def claim(key: str, claim: Claim) -> Claim:
        if key == lane_key(5):
            one.does(5)
        return real(key, claim)

    monkeypatch.setattr(one.board, "claim", claim)
    assert one.look(99.0) > 0
    assert one.look(199.0) == 0.0
    assert one.word(5) == Claim(STEP, 1, True)


def test_more_than_may_be_are_waited_for() -> None:
    one = Looker(1)
    one.dropper._others = [4, 5]
    assert one.look(99.0) == AGAIN_S
    one.does(4)
    assert 0 < one.look(99.0) < AGAIN_S, "since now"


def test_only_one_drops() -> None:
    """So never more than may be: what one does not see as done another may."""
    one = Looker()
    one.other.claim(dropping.CUT, Claim(STEP, 1))
    assert one.look(3.0) > 0
    assert one.look(9.0) == 0.0
    assert one.word(4) is None
    assert one.look(3.0, STEP + 1) > 0, "in the next step it may"
    assert one.look(9.0, STEP + 1) == 0.0
    assert one.board.read(lane_key(4), STEP + 1) == Claim(STEP + 1, 2, True)


def test_nothing_is_waited_for_where_all_are_done_or_somebody_has_dropped() -> None:
    one = Looker()
    one.does(4)
    one.does(5)
    assert one.look(1.0) == 0.0
    two = Looker()
    two.other.claim(lane_key(4), GONE)
    assert two.look(1.0) == 0.0
    assert two.word(5) is None
    assert Looker(usual_s=0.0).look(99.0) == 0.0, "the pace is not known"


def test_a_lane_that_must_count_is_waited_for() -> None:
    """In a model with integer buffers the first lane of each worker: three may be dropped, and lane 3 is not done."""
    one = Looker(3, firsts=False)
    assert one.look(99.0) == AGAIN_S
    one.does(3)
    assert one.look(99.0) > 0
    assert one.look(199.0) == 0.0
    assert (one.word(3), one.word(4), one.word(5)) == (Claim(STEP, 1, True), GONE, GONE)


# --- the worker whose lanes are late ---


def test_a_lane_that_was_dropped_before_it_was_begun_is_skipped() -> None:
    one = Rank0("drop_slowest", drop_at_most=2)
    one.words.words["lane/2"] = GONE.encode()
    assert one.run().counted == [0, 1]


def test_who_is_dropped_breaks_off_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    looks_always(monkeypatch)
    one = Rank0("drop_slowest", drop_at_most=2)

    def drop(lane: int) -> None:
        if lane == 1:
            for late in (1, 2):
                one.words.words[f"lane/{late}"] = GONE.encode()

    work = one.run(drop)
    assert (work.computed, work.counted) == ([0], [0])
    assert one.doing.in_vain == 1
    assert one.tree.said == ["give up"]
    assert work.forgotten == 1, "nor in the counters"


def test_who_is_done_too_late_throws_it_away() -> None:
    one = Rank0("drop_slowest", paced=False)

    def drop(lane: int) -> None:
        if lane == 2:
            one.words.words["lane/2"] = GONE.encode()

    work = one.run(drop)
    assert (work.computed, work.counted, work.forgotten) == ([0, 1, 2], [0, 1], 1)
    assert "release 2" in one.tree.said


def test_what_nobody_may_have_dropped_is_our_error() -> None:
    one = Rank0("drop_slowest", paced=False)
    one.words.words["lane/2"] = GONE.encode()
    one.run()
    one.doing.mine.remove(1)
    with pytest.raises(InternalError, match="do not fit together"):
        one.lanes.agree()


def test_counters_of_a_lane_that_does_not_count_are_forgotten() -> None:
    from elastictrain.engine.flat import FlatModel

    flat = FlatModel.__new__(FlatModel)
    flat._new_counters, flat._rules = {}, {"n": "max"}
    flat._merge_counter("n", torch.tensor(3), first=True)
    flat.mark_lane()
    flat._merge_counter("n", torch.tensor(7), first=False)
    flat.forget_lane()
    assert int(flat._new_counters["n"]) == 3
    flat.forget_lane()
    flat._merge_counter("n", torch.tensor(5), first=False)
    assert int(flat._new_counters["n"]) == 5


# --- the run again ---


def layout() -> Layout:
    return Layout(1, (4, 7), LANES, (Shard(0, 1, 4, 7),), 6)


def test_a_run_is_repeated_without_the_same_lanes() -> None:
    lanes, work = ReplayedLanes({STEP: (1, 5)}, layout(), 0, counters=True), Work(Tree())
    doing = lanes.compute(STEP, work, closed=frozenset(), stays=False)
    assert (work.counted, doing.dropped) == ([0, 2], [1])
    assert lanes.agree() == (((0, 2), (3, 4)), {1, 5})
    assert lanes.compute(STEP + 1, Work(Tree()), closed=frozenset(), stays=False).mine == [0, 1, 2]
    assert lanes.agree() == (LANES, frozenset())


def test_a_lane_that_does_not_count_is_checked_by_nobody() -> None:
    layout = Layout(1, (4, 7), LANES, (Shard(0, 1, 4, 7),), 6)
    runner: Any = StepRunner.__new__(StepRunner)
    runner.job = SimpleNamespace(integrity=SimpleNamespace(recompute_every=1), seed=3)
    runner.layout, runner.kinds, runner.shares = layout, None, None
    checked = [runner.lane_check(step) for step in range(1, 7)]
    assert sorted(check.lane for check in checked) == list(range(6))
    dropped = {step: (checked[step - 1].lane,) for step in (2, 5)}
    runner.shares = ReplayedLanes(dropped, layout, 0, counters=False)
    left = [None if step in dropped else checked[step - 1] for step in range(1, 7)]
    assert [runner.lane_check(step) for step in range(1, 7)] == left


def test_means_of_a_step_are_over_the_lanes_that_count() -> None:
    """A run and its own replay would agree on a wrong mean too."""
    applied: list[dict[str, Any]] = []
    shares = Shares((0, 1), LANES, ((0, 1, 2), (3,)), (0.0, 0.0), (0, 0), (4, 5))
    tally: Any = SimpleNamespace(step=STEP, lanes=None, counters_agree=True, is_finite=True, weight=4.0, norm=1.0,
                                 largest=(), losses=(1.0,) * 6, shares=shares)  # fmt: skip
    tally.lanes = Tally.lanes.fget(tally)  # type: ignore[attr-defined]
    quiet = SimpleNamespace(at=lambda *_: None, flips=lambda *_: None)
    model = SimpleNamespace(
        recipe=SimpleNamespace(schedule=lambda _: 1.0), space=SimpleNamespace(),
        held=SimpleNamespace(apply=lambda _, **how: applied.append(how)),
        flat=SimpleNamespace(commit_counters=lambda _: None),
    )  # fmt: skip
    session: Any = SimpleNamespace(
        committed=SimpleNamespace(step=STEP - 1, tearing=False), model=model, probes=quiet, worker=0,
        job=SimpleNamespace(clip_grad_norm=None, on_nan="stop", lanes=6),
    )  # fmt: skip
    votes: Any = SimpleNamespace(tally=lambda _: tally)
    apply_step(session, SimpleNamespace(step=STEP, reduced={}), b"", votes, 1)  # type: ignore[arg-type]
    assert [how["lanes"] for how in applied] == [4]


def test_a_worker_without_a_lane_has_no_counters_to_give() -> None:
    none = {STEP: (0, 1, 2)}
    assert not ReplayedLanes(none, layout(), 0, counters=False).compute(
        STEP, Work(Tree()), closed=frozenset(), stays=False
    ).mine  # fmt: skip
    with pytest.raises(ConfigError, match=r"in step 3 no lane of worker rank 0 counts .* with fewer workers"):
        ReplayedLanes(none, layout(), 0, counters=True).compute(
            STEP, Work(Tree()), closed=frozenset(), stays=False
        )  # fmt: skip


def test_the_record_is_what_happened_last(tmp_path: Path) -> None:
    rows = [
        {"step": step, "lanes_dropped": dropped}
        for step, dropped in ((1, []), (2, [3]), (3, [4]), (2, []), (3, [1, 2]))
    ]
    record = tmp_path / "metrics.jsonl"
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert recorded_drops(str(record)) == {3: (1, 2)}
    record.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 4, "lanes_dropped": []}) + "\n")
    with pytest.raises(ConfigError, match=r"there is no row of step 2 and 1 more, so what it was without is not known"):
        recorded_drops(str(record))
    with pytest.raises(ConfigError, match=r"no such run directory or metrics\.jsonl"):
        recorded_drops(str(tmp_path / "nothing"))
    record.write_text("")
    with pytest.raises(ConfigError, match="there is no row of step 1,"):
        recorded_drops(str(record))
