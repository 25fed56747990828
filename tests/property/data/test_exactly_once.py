"""Workers that die, come, go and read ahead, in one process: whatever happens, each committed step has used the samples
of the order, and says so by a hash that the audit computes again.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from elastictrain.data.audit import Auditor
from elastictrain.data.ids import lane_hash, show_hash, split_ids, step_hash
from elastictrain.data.stages import Skip, open_stage, with_skips
from elastictrain.protocol import Stage
from tests.support.storm import FIRST, GROUP, LANES, SIZE, audit, storm, table_job

QUIET = (
    "bcb53833f9969a5e"  # the running hash of 60 steps with one worker that never dies: the order must stay what it is
)
KILLS = {(1,): 40, (2,): 60, (3,): 100, (5,): 130, (7,): 150, (8,): 170, (13,): 300, (1, 2, 3, 5, 7, 8, 13): 130}
"""Of each storm, at least."""


def test_the_storms_are_a_thousand_kills() -> None:
    assert sum(KILLS.values()) >= 1000


@pytest.mark.parametrize("worlds", KILLS, ids=str)
def test_a_storm_of_kills_resizes_and_drains_changes_no_sample(tmp_path: Path, worlds: tuple[int, ...]) -> None:
    job = table_job(tmp_path / "data")
    found = storm(job, FIRST, list(worlds), 1, 61, random.Random(sum(worlds)))
    assert found.kills >= KILLS[worlds]
    assert found.worlds == set(worlds)
    assert found.resizes >= (30 if len(worlds) > 1 else 0)
    verdict = audit(job, (FIRST,), found.rows)
    assert verdict.agrees
    assert verdict.running == verdict.running_recorded == QUIET
    assert (verdict.steps, verdict.samples) == (60, 60 * LANES * SIZE)


def test_a_storm_over_a_skip_changes_no_sample_either(tmp_path: Path) -> None:
    job, chance = table_job(tmp_path / "data"), random.Random(4)
    skips = [Skip("a row group", 0, GROUP, block=3), Skip("a stretch", 27, 33, order=0), Skip("one", 5, 6, block=9)]
    stages = with_skips((FIRST,), skips, 20)
    before, after = storm(job, FIRST, [3, 5], 1, 21, chance), storm(job, stages[-1], [2, 7], 21, 81, chance)
    verdict = audit(job, stages, before.rows | after.rows)
    assert verdict.agrees
    assert verdict.steps == 80
    used = Auditor(stages, lambda stage: open_stage(job, stage))
    later = [split_ids(used.ids(step, lane)) for step in range(21, 81) for lane in range(LANES)]
    assert not any(((blocks == 3) | ((blocks == 9) & (rows == 5))).any() for blocks, rows in later)


@pytest.mark.parametrize("bug", ["swap", "repeat", "shift"])
def test_the_audit_sees_a_wrong_sample(tmp_path: Path, bug: str) -> None:
    job = table_job(tmp_path / "data")
    rows = storm(job, FIRST, [2], 1, 12, random.Random(0)).rows
    auditor = Auditor((FIRST,), lambda stage: open_stage(job, stage))
    ids = [auditor.ids(7, lane) for lane in range(LANES)]
    if bug == "swap":
        ids[0], ids[1] = ids[1], ids[0]
    elif bug == "repeat":
        ids[0] = ids[1]
    else:
        ids = [auditor.ids(8, lane) for lane in range(LANES)]
    rows[7] = show_hash(step_hash(lane_hash(lane, one) for lane, one in enumerate(ids)))
    verdict = audit(job, (FIRST,), rows)
    assert (verdict.differing, verdict.agrees) == ([7], False)
    assert verdict.running != verdict.running_recorded


def test_the_audit_sees_a_sample_that_comes_twice_in_an_epoch(tmp_path: Path) -> None:
    """Stages that overlap, as nothing of ours makes them: the order goes on two steps too early."""
    job = table_job(tmp_path / "data")
    stages = (FIRST, Stage(1, 10, LANES, SIZE, continues=True, begun=0, at=8))
    auditor = Auditor(stages, lambda stage: open_stage(job, stage))
    found = list(auditor.audit([(step, None) for step in range(1, 15)]))
    assert [step.step for step in found if step.repeated] == [11, 12]
    assert [step.repeated for step in found if step.repeated] == [LANES * SIZE] * 2
    assert [step.agrees for step in found] == [True] * 10 + [False] * 2 + [True] * 2
