"""From real votes to the answer of `elastictrain whatif`; what the workers say of their times is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastictrain.observe.signal_log import SignalLog, read_signals
from elastictrain.observe.whatif_view import replan
from elastictrain.stragglers.signals import LEFT_OUT, RECORD, decode
from elastictrain.stragglers.whatif import timings_of, what_if
from tests.processes.test_stragglers import FIRST, LANES, STEPS, says, straggling_job
from tests.support.process_cluster import run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def test_a_slow_workers_cost_is_found_in_what_the_run_has_recorded(tmp_path: Path) -> None:
    run = run_job(straggling_job(tmp_path, action="watch"), patch=says({2: 2.0}, since=FIRST))
    assert run.outcome.outcome == "finished"
    assert not run.record.of("lanes_moved")
    log = SignalLog(tmp_path, RECORD, excused=LEFT_OUT)
    for said, workers in run.record.signalled:
        log.append(said.generation, said.step, workers, decode(said.records))
    log.close()
    records, excused = read_signals(tmp_path)
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    timings, left_out = timings_of([(r.step, r.workers, r.records) for r in records], excused)
    answer = what_if(timings, left_out=left_out)
    assert answer.left_out == 0
    assert [cost.worker for cost in answer.costs] == [2]
    lane_s, slow = 0.01, STEPS - FIRST + 1
    assert answer.costs[0].without_s == pytest.approx(slow * LANES / 4 * lane_s, rel=0.05)
    assert [cause for cause, _ in answer.costs[0].causes] == ["compute"]
    plan = replan(timings, recent=10)
    assert plan.lanes == (4, 4, 4, 4)
    assert plan.split.parts[2] == 2
