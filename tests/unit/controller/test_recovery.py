"""The recovery rule, case by case."""

from __future__ import annotations

import re
from typing import Any

import pytest

from elastictrain.controller.recovery import Standing, take_stock
from elastictrain.errors import InternalError
from elastictrain.layout import balanced
from elastictrain.protocol import ParkReport

LAYOUT = balanced(4, [0, 1, 2], 6, [10] * 6)
NEWER = balanced(5, [0, 1, 3], 6, [10] * 6)


def report(worker: int, applied: int, **rest: Any) -> ParkReport:
    facts: dict[str, Any] = {"sealed_generation": 4, "gathered": True, "vote": f"vote {applied}".encode()}
    return ParkReport(worker, 4, applied, **(facts | rest))


def stock(*reports: ParkReport, sealed: int = 4, published: int = 0, newer: bool = False) -> Standing:
    layouts = {4: LAYOUT, 5: NEWER} if newer else {4: LAYOUT}
    return take_stock(layouts, sealed, {r.worker: r for r in reports}, published)


def test_all_at_the_same_step_go_on_from_it() -> None:
    assert stock(report(0, 7), report(2, 7)) == Standing(LAYOUT, 7)


def test_if_one_has_applied_the_next_step_all_apply_it_with_its_vote() -> None:
    standing = stock(report(0, 8), report(1, 7), report(2, 7))
    assert (standing.step, standing.behind, standing.roll_forward) == (8, (1, 2), b"vote 8")


def test_a_complete_vote_that_nobody_applied_is_discarded() -> None:
    assert stock(report(0, 7, holds_next=True), report(1, 7, holds_next=True), report(2, 7)).step == 7


def test_a_joiner_has_no_say_in_the_step() -> None:
    assert stock(report(0, 7), report(1, 7), report(2, 7), report(9, 0, sealed_generation=0)).step == 7
    assert stock(report(0, 7), report(1, 7), report(2, 7), report(9, 30, sealed_generation=0)).step == 7


def test_a_survivor_that_saw_the_seal_makes_the_newer_layout_the_truth() -> None:
    reports = [report(0, 7), report(1, 7, sealed_generation=5), report(3, 7, sealed_generation=0)]
    assert stock(*reports, newer=True).truth == NEWER


def test_what_the_controller_itself_knows_to_be_sealed_counts() -> None:
    assert stock(report(0, 7), report(1, 7), report(3, 7), sealed=5, newer=True).truth == NEWER
    assert stock(report(0, 7), report(1, 7), report(2, 7), sealed=4, newer=True).truth == LAYOUT


def test_a_seal_of_a_layout_that_is_void_does_not_count() -> None:
    assert take_stock({}, 0, {0: report(0, 7)}, 0) == Standing(None)


def test_blocks_without_a_holder_are_lost() -> None:
    assert LAYOUT.shards[0].holders() == (0, 1)
    assert stock(report(2, 7)).lost == (LAYOUT.shards[0],)
    assert len(stock().lost) == 3
    assert stock(report(2, 7), published=9).step == 9  # how far the job had come


@pytest.mark.parametrize(
    ("reports", "published", "message"),
    [
        (
            [report(0, 9), report(1, 7), report(2, 9)],
            0,
            "survivors have applied steps {0: 9, 1: 7, 2: 9}; expected at most one step between them",
        ),
        (
            [report(0, 7), report(1, 7), report(2, 7)],
            8,
            "step 8 was published, but the survivors have applied only {0: 7, 1: 7, 2: 7}",
        ),
        (
            [report(0, 8, vote=None), report(1, 7), report(2, 7)],
            0,
            "workers (1, 2) are one step behind 8, but no survivor kept that step's vote",
        ),
        (
            [report(0, 8, vote=b"a"), report(1, 8, vote=b"b"), report(2, 7)],
            0,
            "survivors hold different results of the vote for step 8",
        ),
    ],
)
def test_reports_that_contradict_the_protocol(reports: list[ParkReport], published: int, message: str) -> None:
    with pytest.raises(InternalError, match=f"^{re.escape(message)}$"):
        stock(*reports, published=published)
