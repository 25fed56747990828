"""One worker's computation of a step whose lanes are shared, against a board on which others claim too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastictrain.engine import shares
from elastictrain.engine.claims import ClaimBoard
from elastictrain.engine.collective import GroupSet
from elastictrain.engine.doing import Doing
from elastictrain.engine.one_lane import LaneResult
from elastictrain.engine.shares import SharedLanes
from elastictrain.errors import InternalError
from elastictrain.layout import Layout, Shard, deal_lanes
from elastictrain.redundancy import Claim, Pace
from elastictrain.straggler_settings import Redundancy
from elastictrain.tree import Node
from tests.unit.engine.test_claims import Words
from tests.unit.engine.worlds import CPU

STEP = 3


class Tree:
    """What of the lane tree is used, by name."""

    def __init__(self) -> None:
        self.nodes: dict[Node, str] = {}
        self.interrupted: Callable[[], None] = lambda: None
        self.said: list[str] = []

    def join(self, lane: int) -> None:
        self.said.append(f"join {lane}")

    def give_up(self) -> None:
        self.said.append("give up")

    def release(self, node: Node) -> None:
        self.said.append(f"release {node.lo}")
        del self.nodes[node]

    def abandon(self) -> None:
        self.said.append("abandon")
        self.nodes.clear()


class Work:
    """Notes what is computed and what counts; `during(lane)` happens in the middle of a lane."""

    def __init__(self, tree: Tree, during: Callable[[int], None] = lambda _: None) -> None:
        self.tree, self.during = tree, during
        self.computed: list[int] = []
        self.counted: list[int] = []
        self.forgotten = 0

    def compute(self, lane: int, *, first: bool, merge: bool) -> LaneResult:
        assert first == (not self.computed)
        self.during(lane)
        self.tree.interrupted()
        self.computed.append(lane)
        if not merge:
            self.tree.nodes[Node(lane, lane + 1)] = "sum"
        return LaneResult(1.0, 1.0, 0, 0, {})

    def count(self, lane: int, result: LaneResult) -> None:
        del result
        self.counted.append(lane)

    def forget(self) -> None:
        self.forgotten += 1


class Rank0:
    """Worker 0 of two with three lanes each: 0..2 are its own, 3..5 the other's."""

    def __init__(
        self, way: Any = "first_result", *, counters: bool = False, paced: bool = True, rank: int = 0, **more: Any
    ) -> None:
        self.words, self.tree, self.phases = Words(), Tree(), []
        self.board, self.other = ClaimBoard(self.words, lambda: None), ClaimBoard(self.words, lambda: None)
        self.pace = pace = Pace(2)
        pace.learn([1e-9, 1e-9] if paced else [0.0, 0.0])
        layout = Layout(1, (4, 7), deal_lanes(6, [1.0, 1.0], "contiguous"), (Shard(0, 1, 4, 7),), 6)
        settings = Redundancy(**({"lanes": way, "depth": 2, "group": 2} | more))
        self.lanes = SharedLanes(
            settings, layout, rank, kinds=["", ""], counters=counters, board=self.board, pace=pace,
            tree=self.tree, groups=GroupSet(None, generation=1, rank=0, world=1, device=CPU, host="127.0.0.1"),
            ready=lambda _, lane: lane not in self.unread, probe=self.phases.append, check=lambda: None,
            enter=lambda _: None,
        )  # type: ignore[arg-type]  # fmt: skip
        self.unread: set[int] = set()

    def run(
        self, during: Callable[[int], None] = lambda _: None, *, closed: Any = (), stays: bool = False, step: int = STEP
    ) -> Work:
        work = Work(self.tree, during)
        self.doing = self.lanes.compute(step, work, closed=frozenset(closed), stays=stays)
        return work

    def others_are_done(self, *lanes: int, step: int = STEP) -> None:
        for lane in lanes:
            self.words.words[f"lane/{lane}"] = Claim(step, 1, True).encode()


def looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_S", "EACH_S"):
        monkeypatch.setattr(shares, name, 0.0)


def test_what_nobody_has_begun_is_taken_over_the_last_lane_first() -> None:
    one = Rank0("take_over")
    work = one.run()
    assert work.computed == work.counted == [0, 1, 2, 5, 4]
    assert one.doing.mine == [0, 1, 2, 5, 4]
    assert one.phases == ["claim"] * 4, "lane 0 is nobody else's"
    assert one.tree.said == [], "nothing can be lost"


def test_who_is_done_waits_for_what_becomes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 1 is three times as fast, and late. Lane 4 is worth it after 2.4 s, but begun; lane 5 after 4.8 s."""
    one, now_s = Rank0("take_over", paced=False), [0.0]
    one.pace.learn([3.0, 1.0])
    monkeypatch.setattr(Doing, "now_s", property(lambda _: now_s[0]))

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if now_s[0] > 2.0:
            one.words.words["lane/4"] = Claim(STEP, 1).encode()

    monkeypatch.setattr(shares.time, "sleep", sleep)
    assert one.run(lambda lane: now_s.append(now_s[0]) if lane == 5 else None).counted == [0, 1, 2, 5]
    assert now_s[1] == pytest.approx(4.8, abs=shares.SOON_S)
    assert now_s[0] == now_s[1], "then there is nothing more to wait for"


def test_what_was_taken_over_is_not_taken_again_while_copies_are_waited_for() -> None:
    """Lane 5 is taken over; lane 4 was begun by its worker, and is late."""
    one = Rank0()
    one.words.words["lane/4"] = Claim(STEP, 1).encode()
    work = one.run()
    assert work.counted == [0, 1, 2, 5, 4]
    assert one.doing.mine == [0, 1, 2, 5, 4]


@pytest.mark.parametrize(("reason", "taken"), [("pace", []), ("data", [4]), ("checked", [4]), ("claimed", [4])])
def test_what_is_not_taken_over(reason: str, taken: list[int]) -> None:
    """While no pace is known; whose batch does not lie ready; what two compute to compare it; what another one has."""
    one = Rank0("take_over", paced=reason != "pace")
    if reason == "data":
        one.unread = {5}
    if reason == "claimed":
        one.words.words["lane/5"] = Claim(STEP, 1).encode()
    assert one.run(closed={5} if reason == "checked" else ()).counted == [0, 1, 2, *taken]


def test_lanes_of_ours_that_another_one_has_are_skipped() -> None:
    one = Rank0("take_over")
    one.words.words["lane/1"] = Claim(STEP, 1).encode()
    one.words.words["lane/4"] = Claim(STEP, 1).encode()
    one.words.words["lane/5"] = Claim(STEP - 1, 1).encode()
    assert one.run().counted == [0, 2, 5], "a claim of an older step is none"


def test_a_copy_that_is_done_first_counts() -> None:
    one = Rank0()
    one.others_are_done(4)
    one.words.words["lane/5"] = Claim(STEP, 1).encode()  # begun, and late
    work = one.run()
    assert work.counted == [0, 1, 2, 5]
    assert one.words.words["lane/5"] == Claim(STEP, 0, True).encode()
    assert one.tree.said == ["join 1", "join 2", "join 5"]


def test_a_copy_that_comes_second_is_thrown_away() -> None:
    one = Rank0()
    one.others_are_done(4)
    one.words.words["lane/5"] = Claim(STEP, 1).encode()
    work = one.run(lambda lane: one.others_are_done(5) if lane == 5 else None)
    assert work.counted == [0, 1, 2]
    assert one.doing.in_vain == 1
    assert one.tree.said[-1] in ("release 5", "give up")
    assert Node(5, 6) not in one.tree.nodes


def test_what_was_done_while_we_asked_for_it_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the claim: else both results would count."""
    one = Rank0()
    one.others_are_done(4)
    monkeypatch.setattr(shares, "to_take", lambda *_: ())
    real = one.board.claim

    def claim(key: str, wanted: Claim) -> Claim:
        if key == "lane/5":
            one.others_are_done(5)
        return real(key, wanted)

    one.board.claim = claim  # type: ignore[method-assign]
    assert one.run().counted == [0, 1, 2]
    assert one.words.words["lane/5"] == Claim(STEP, 1, True).encode()


def test_who_is_overtaken_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    looks_always(monkeypatch)
    one = Rank0()
    one.others_are_done(4, 5)
    work = one.run(lambda lane: one.others_are_done(2) if lane == 2 else None)
    assert work.computed == [0, 1]
    assert work.counted == [0, 1]
    assert one.doing.in_vain == 1
    assert one.tree.said[-1] == "give up"
    assert one.lanes._tree.interrupted() is None, "and looks no more"


@pytest.mark.parametrize("stays", [True, False])
def test_in_a_group_with_the_same_lanes_the_first_one_counts(monkeypatch: pytest.MonkeyPatch, stays: bool) -> None:
    looks_always(monkeypatch)
    first = Rank0("coded").run()
    assert first.counted == [0, 1, 2, 3, 4, 5]
    second = Rank0("coded")

    def other_is_done(lane: int) -> None:
        if lane == 3:
            second.words.words["group/0"] = Claim(STEP, 1, True).encode()

    work = second.run(other_is_done, stays=stays)
    assert work.counted == []
    assert work.computed == ([0, 1, 2, 3, 4, 5] if stays else [0, 1, 2]), "one that is checked computes to the end"
    assert second.doing.in_vain == len(second.doing.begun)
    assert second.tree.said == ["abandon"]


@pytest.mark.parametrize("way", ["first_result", "begun by another", "coded"])
def test_who_is_overtaken_in_every_step_is_measured_now_and_then(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """It has no lane of its own in any step, and nobody would ever know how slow it is."""
    looks_always(monkeypatch)
    one = Rank0("coded" if way == "coded" else "first_result", depth=3)
    computed = []
    for step in range(1, 2 * shares.MEASURED_EACH + 2):
        one.others_are_done(1, 2, 3, 4, 5, step=step)
        if way == "begun by another":
            one.words.words["lane/0"] = Claim(step, 1).encode()

        def other_is_done(lane: int, step: int = step) -> None:
            one.others_are_done(lane, step=step)
            one.words.words["group/0"] = Claim(step, 1, True).encode()

        work = one.run(other_is_done, step=step)
        assert work.counted == []
        if way == "begun by another" and step % shares.MEASURED_EACH:
            assert one.doing.begun <= {0}
        computed.append(len(work.computed))
        one.tree.nodes.clear()
    lanes = {step: count for step, count in enumerate(computed, 1) if count}
    assert lanes == {shares.MEASURED_EACH: 1, 2 * shares.MEASURED_EACH: 1}
    assert one.doing.lane_s == 0.0


def test_a_model_with_integer_buffers_has_one_whole_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    looks_always(monkeypatch)
    one = Rank0("coded", counters=True)
    one.words.words["group/0"] = Claim(STEP, 1, True).encode()
    work = one.run()
    assert (work.computed, work.counted) == ([0], [])


def test_what_does_not_fit_together_is_our_error() -> None:
    one = Rank0("take_over")
    one.run()
    with pytest.raises(
        InternalError, match=r"the claims of lanes do not fit together: in step 3 nobody has lanes \[3\]"
    ):
        one.lanes.agree()


@pytest.mark.parametrize(("way", "ahead"), [("take_over", (3, 4, 5, 1, 2)), ("coded", (0, 1, 2, 3, 4, 5))])
def test_batches_are_named_in_the_order_in_which_lanes_are_computed(way: str, ahead: tuple[int, ...]) -> None:
    assert Rank0(way, rank=1).lanes.ahead == ahead
