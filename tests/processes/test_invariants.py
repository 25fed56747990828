"""R1 to R7, each by a scenario that ends with the reference's bits, and that fails when the rule is taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastictrain.faults import add, fail, kill
from tests.support import plants
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

Plant = Callable[[int], None] | None


def keeps_its_bits(run: Run, reference: Run) -> bool:
    return (
        run.outcome.digest == reference.digest
        and run.losses == reference.losses
        and not run.record.of("went_back")
        and all(r["seconds"] < 5.0 and r["steps_redone"] <= 1 for r in run.record.of("recovery"))
    )


def with_plant(base: Plant, bug: Plant) -> Plant:
    if base is None or bug is None:
        return base or bug
    return plants.both(base, bug)


SPLIT = plants.hold_vote((2,), 4)
ALL_HOLD = plants.hold_vote((0, 2), 4)
LATE_HOLD = plants.hold_vote((1, 2), 4)

SCENARIOS: dict[str, tuple[dict[str, Any], list[Any], Plant, Plant]] = {
    # rule: (job settings, faults, delays, the bug that takes the rule out)
    "R1 the vote is part of the log": ({}, [kill(1, 4, "gather")], SPLIT, plants.forget_pending),
    "R2 no vote before the data": ({}, [], None, plants.vote_early),
    "R3 a report is a promise": ({}, [kill(1, 4, "apply")], ALL_HOLD, plants.park_without_latch),
    "R5 nothing is published that could be redone": ({}, [kill(0, 4, "gather")], LATE_HOLD, plants.publish_at_once),
    "R6 drop, do not abort": (
        {"workers": {"max": 4, "replace": False}},
        [kill(1, 4, "mirror")],
        plants.wait_for_waiting(4),
        plants.never_drop,
    ),
    "R7 a torn apply is a death": ({}, [fail(1, 4, "apply")], None, plants.torn_is_harmless),
    "the sum is a tree": ({}, [], None, plants.combine_as_they_come),
}


@pytest.mark.parametrize("rule", SCENARIOS)
def test_the_rule_keeps_the_bits(folder, reference, rule):
    settings, faults, delay, _ = SCENARIOS[rule]
    run = run_job(byte_job(folder, **settings), faults, patch=delay)
    assert keeps_its_bits(run, reference), (run.outcome, run.record.events[-6:])


@pytest.mark.parametrize("rule", SCENARIOS)
def test_without_the_rule_they_are_lost(folder, reference, rule):
    settings, faults, delay, bug = SCENARIOS[rule]
    run = run_job(byte_job(folder, **settings), faults, patch=with_plant(delay, bug), deadline_s=15.0)
    assert not keeps_its_bits(run, reference), rule


def test_r1_rolls_forward_with_the_survivors_vote(folder, reference):
    """One survivor has applied step 4, the other only holds it: nothing is redone."""
    run = run_job(byte_job(folder), [kill(1, 4, "gather")], patch=SPLIT)
    assert keeps_its_bits(run, reference)
    (recovery,) = run.record.of("recovery")
    assert (recovery["step"], recovery["steps_redone"]) == (4, 0)


def test_r4_ranges_are_mirrored_again_first(folder, reference, monkeypatch):
    faults = [kill(1, 3, "exchange"), kill(2, 6, "exchange")]
    assert keeps_its_bits(run_job(byte_job(folder), faults), reference)
    # Without a new mirror the second death loses blocks for good, and the job goes back.
    monkeypatch.setattr("elastictrain.layout.choose_mirror", lambda *_: None)
    run = run_job(byte_job(folder), faults)
    assert run.record.of("went_back")


def test_r4_the_old_copy_counts_until_the_seal(folder):
    """A joiner takes blocks over and dies before the seal; then a holder dies. The old holders must still have all."""
    job = byte_job(folder, steps=30, workers={"max": 3, "start": 2, "replace": False})
    alone = run_job(byte_job(folder, steps=30, workers=1))
    faults = [add(1), *(kill(2, step, "seal") for step in range(2, 31))]
    company = plants.wait_for_company(3, generations=1)
    run = run_job(job, faults, patch=company)
    assert run.outcome.digest == alone.digest
    assert not run.record.of("went_back")
    assert [lost["worker"] for lost in run.record.of("worker_lost")] == [2]
    broken = run_job(job, faults, patch=plants.both(company, plants.free_before_seal), deadline_s=15.0)
    assert broken.outcome.digest != alone.digest or broken.record.of("went_back")
