"""The cost model against published runs, and the laws it obeys. The fits are in benchmarks/planner.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elastictrain.planner.collectives import all_gather_s, all_reduce_s, share_across
from elastictrain.planner.compute import DEFAULTS, alignment, gemm_share, layer_time
from elastictrain.planner.cost import step_time
from elastictrain.planner.memory import memory_of, probability
from elastictrain.planner.model import Cut, Transformer, gated_width
from elastictrain.planner.profiles import DEVICES, LINKS
from elastictrain.planner.schedule import replay
from elastictrain.planner.split import split_tables
from tests.support.planner_cases import (
    A100,
    cases,
    cephalo_tables,
    fit_times,
    layouts,
    megatron,
    predicted_s,
    rank_correlation,
)

MODEL = Transformer(layers=24, hidden=2048, heads=16, sequence=2048, vocab=32000, ffn=gated_width(2048), gated=True)
CUT = Cut(workers=8, micro_batch=2, micro_batches=8)


def test_the_defaults_explain_the_published_layouts() -> None:
    runs = [run for run in layouts() if run.seconds is not None]
    truth, found = [run.seconds or 0 for run in runs], [predicted_s(run, DEFAULTS) for run in runs]
    assert np.mean([abs(a / b - 1) for a, b in zip(found, truth, strict=True)]) < 0.06
    assert rank_correlation(found, truth) > 0.95


def test_runs_that_are_foreseen_alike_share_a_rank() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [5.0, 5.0, 9.0]) == pytest.approx(0.75**0.5)
    assert rank_correlation([1.0, 2.0, 3.0], [5.0, 6.0, 9.0]) == pytest.approx(1.0)


def test_the_defaults_know_which_layouts_fit() -> None:
    runs = layouts()
    fits = [memory_of(run.model, run.cut, A100.device).fits > 0.5 for run in runs]
    right = [fit == (run.seconds is not None) for fit, run in zip(fits, runs, strict=True)]
    assert np.mean(right) > 0.97
    assert sum(fit and run.seconds is None for fit, run in zip(fits, runs, strict=True)) <= 10


def test_six_constants_explain_megatrons_table() -> None:
    runs = megatron()
    constants = fit_times(runs)
    assert len(runs) == 10
    assert max(abs(predicted_s(run, constants) / (run.seconds or 0) - 1) for run in runs) < 0.1


def test_cephalos_example() -> None:
    tables = cephalo_tables()
    found = split_tables(64, tables)
    assert found.makespan == pytest.approx(342.3, abs=0.05)
    assert max(table[16] for table in tables) == pytest.approx(958.8, abs=0.05)
    plan = cases()["cephalo"]["plan"]
    assert max(table[n] for table, n in zip(tables, plan, strict=True)) == pytest.approx(found.makespan)
    assert sorted(found.parts[:2]) == sorted(plan[:2])
    assert found.parts[2:] == tuple(plan[2:])


def test_more_bandwidth_or_speed_never_costs_time() -> None:
    cut = Cut(tensor=4, pipeline=2, workers=4, micro_batch=1, micro_batches=8)
    base = step_time(MODEL, cut, A100).total_s
    wider = A100.across.model_copy(update={"beta_bytes_s": 2 * A100.across.beta_bytes_s})
    quicker = A100.device.model_copy(update={"peak_flops": {"bf16": 1e15}})
    assert step_time(MODEL, cut, replace(A100, across=wider)).total_s < base
    assert step_time(MODEL, cut, replace(A100, device=quicker)).total_s < base
    assert step_time(MODEL, cut, replace(A100, slowdown=1.5)).total_s > base


def test_parts_of_a_step_add_up_and_one_limits_it() -> None:
    time = step_time(MODEL, CUT, A100)
    assert time.bubble_s == time.send_s == time.tensor_s == 0
    assert time.limit == "compute"
    slow = replace(A100, across=LINKS["eth-10"])
    assert step_time(MODEL, replace(CUT, workers=64), slow).limit.startswith("the links between workers")
    bubbly = step_time(MODEL, Cut(pipeline=8, micro_batches=2), A100)
    assert bubbly.limit == "the pipeline's bubble"
    half = step_time(MODEL, Cut(pipeline=8, micro_batches=2, chunks=2), A100)
    assert half.bubble_s == pytest.approx(bubbly.bubble_s / 2)
    assert step_time(MODEL, Cut(pipeline=8, micro_batches=2, schedule="zb-h1"), A100).bubble_s == pytest.approx(
        bubbly.bubble_s / 3
    )


def test_checkpointing_trades_time_for_memory() -> None:
    again = replace(CUT, checkpointing="every_layer")
    assert step_time(MODEL, again, A100).total_s > step_time(MODEL, CUT, A100).total_s
    assert memory_of(MODEL, again, A100.device).total < memory_of(MODEL, CUT, A100.device).total


def test_memory_by_parts() -> None:
    one = memory_of(MODEL, replace(CUT, workers=1, zero_stage=0), A100.device)
    assert one.parameters == 2 * MODEL.params
    assert one.optimizer == 12 * MODEL.params
    assert one.mirrors == 0
    sharded = memory_of(MODEL, replace(CUT, zero_stage=3, mirrors=True), A100.device)
    assert sharded.parameters == one.parameters / 8
    assert sharded.mirrors == sharded.optimizer == one.optimizer / 8
    assert probability(1.0, 1.0) == 0.5
    assert probability(1e15, 1.0) == 0.0


def test_alignment_and_measured_tables() -> None:
    assert [alignment(side) for side in (128, 96, 48, 1800, 7)] == [1.0, 0.95, 0.9, 0.8, 0.5]
    device = DEVICES["l4"].model_copy(update={"gemm_efficiency": {64: 0.2, 1024: 0.6}})
    assert gemm_share(device, 4096, 4096, 16, DEFAULTS) == 0.2
    assert gemm_share(device, 4096, 4096, 256, DEFAULTS) == pytest.approx(0.4)
    assert gemm_share(device, 4096, 4096, 4096, DEFAULTS) == 0.6
    odd = replace(MODEL, hidden=2040, ffn=5432)
    cut, link = Cut(), LINKS["nvlink3"]
    per_flop = layer_time(odd, cut, A100.device, link, DEFAULTS).compute_s / odd.layer_params
    assert per_flop > 1.1 * layer_time(MODEL, cut, A100.device, link, DEFAULTS).compute_s / MODEL.layer_params


def test_unfused_attention_costs_time_and_memory() -> None:
    plain = replace(MODEL, attention="plain")
    assert step_time(plain, CUT, A100).total_s > step_time(MODEL, CUT, A100).total_s
    assert memory_of(plain, CUT, A100.device).total > memory_of(MODEL, CUT, A100.device).total


def test_collectives() -> None:
    link = LINKS["ib-hdr"].model_copy(update={"alpha_s": 1.0, "beta_bytes_s": 10.0})
    assert all_gather_s(40.0, 4, link) == 3 * 1.0 + 3 / 4 * 4.0
    assert all_reduce_s(40.0, 4, link) == 2 * all_gather_s(40.0, 4, link)
    assert all_reduce_s(40.0, 1, link) == 0.0
    assert link.beta_bytes_s * share_across(link, 8, 8, 1) == 80.0
    assert (
        link.beta_bytes_s * share_across(link, 2, 8, 1) == 20.0
    )  # a strided group has the ports of its own members only
    assert link.beta_bytes_s * share_across(link, 8, 8, 16) == 10.0
    shared = link.model_copy(update={"per": "node"})
    assert shared.beta_bytes_s * share_across(shared, 2, 8, 1) == 2.5


def test_the_replay_agrees_with_the_closed_form_for_equal_stages() -> None:
    operations = replay([1.0] * 4, [2.0] * 4, 8)
    assert len(operations) == 4 * 8 * 2
    assert max(op.end_s for op in operations) == 4 * 3 + 7 * 3
    assert max(op.end_s for op in replay([1.0] * 4, [2.0] * 4, 8, schedule="gpipe")) == 4 * 3 + 7 * 3
    assert max(op.end_s for op in replay([1.0] * 2, [2.0] * 2, 1, send_s=[0.5])) == 7.0


def test_a_replay_keeps_the_order_of_data() -> None:
    done = {(op.stage, op.kind, op.micro_batch): op for op in replay([1.0, 3.0, 2.0], [2.0, 1.0, 4.0], 5)}
    for (stage, kind, m), op in done.items():
        if kind == "forward" and stage:
            assert op.begin_s >= done[stage - 1, "forward", m].end_s
        if kind == "backward" and stage < 2:
            assert op.begin_s >= done[stage + 1, "backward", m].end_s
