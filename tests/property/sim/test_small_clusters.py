"""Small clusters under every kind of fault at once, hundreds of times as often as anywhere real, with every invariant
of the controller checked after every event and the simulator's own books after every plan.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from elastictrain.sim import Costs, FaultRates, Scenario, simulate

HOURS = st.sampled_from([None, 0.5, 2.0, 10.0])


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    workers = draw(st.integers(1, 12))
    rates = FaultRates(
        worker_death_h=draw(HOURS),
        worker_freeze_h=draw(HOURS),
        torn_apply_h=draw(HOURS),
        node_loss_h=draw(HOURS),
        node_notice_h=draw(HOURS),
        node_partition_h=draw(HOURS),
        controller_death_h=draw(st.sampled_from([None, 0.1, 1.0])),
        start_failure=draw(st.sampled_from([0.0, 0.05])),
        corrupt_checkpoint=draw(st.sampled_from([0.0, 0.3])),
        unseen_freeze=draw(st.sampled_from([0.0, 0.1, 1.0])),
        split_vote=draw(st.sampled_from([0.0, 0.5, 1.0])),
        late_seal=draw(st.sampled_from([0.0, 0.5])),
    )
    return Scenario(
        workers=workers,
        hours=draw(st.sampled_from([0.5, 1.0, 3.0])),
        seed=draw(st.integers(0, 2**32)),
        spares=draw(st.integers(0, 3)),
        min_workers=draw(st.integers(1, workers)),
        workers_per_node=draw(st.integers(1, 4)),
        spare_nodes=draw(st.integers(0, 2)),
        blocks_per_worker=draw(st.integers(1, 4)),
        mirrors=draw(st.sampled_from([True, True, True, False])),
        steps=draw(st.sampled_from([None, 300])),
        check="all",
        rates=rates,
        costs=Costs(
            checkpoint_every_s=120.0,
            checkpoint_write_s=10.0,
            restore_s=draw(st.sampled_from([2.0, 60.0])),
            report_every_s=20.0,
        ),
    )


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # a gate must not be a lottery; to search further, take this out and raise max_examples
    phases=[Phase.explicit, Phase.generate],  # a smaller seed is no smaller day: shrinking takes minutes for nothing
    suppress_health_check=[HealthCheck.too_slow],
)
@given(scenarios())
def test_no_step_is_lost_or_doubled_whatever_happens(scenario: Scenario) -> None:
    report = simulate(scenario)
    assert report.steps_lost == report.steps_twice == 0
    assert report.checks == report.events
    if report.phase == "finished":
        assert report.steps == scenario.steps
    else:
        assert report.phase == "stopped" or "WorkerStartError" in (report.error or "")
