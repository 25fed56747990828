"""Pipelines: what a plan says of itself agrees with the cost model, and the choices trade what they should."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from elastictrain.planner.compute import DEFAULTS
from elastictrain.planner.cost import layer_s, round_s, step_time
from elastictrain.planner.cuts import Cuts
from elastictrain.planner.memory import memory_of, param_bytes, stage_memory
from elastictrain.planner.model import Cut, Transformer
from elastictrain.planner.plan import SURE, Plan, Task
from elastictrain.planner.profiles import LINKS, parse_cluster
from elastictrain.planner.search import search
from elastictrain.planner.shapes import Candidate, place_of
from tests.support.planner_cases import A100
from tests.support.planner_instances import leaves

MODEL = Transformer(layers=16, hidden=4096, heads=32, sequence=2048, vocab=32000, ffn=11008, gated=True)
UNFUSED = replace(MODEL, attention="fused")


def tight_cuts() -> Cuts:
    group = {"device": "a100-40", "nodes": 2, "per_node": 4, "memory_limit_bytes": 17e9}
    return Cuts(
        Task(model=UNFUSED, lanes=32, lane_batch=1, mirrors=False), parse_cluster({"groups": [group]}), DEFAULTS
    )


def plans_of(cuts: Cuts) -> list[Plan]:
    """Every plan of the grid, without any pruning."""
    found = (candidate.work_out(math.inf) for branch in cuts.grid() for _, candidate in leaves(branch))
    return [plan for plan in found if plan is not None]


@pytest.fixture(scope="module")
def tight() -> list[Plan]:
    return plans_of(tight_cuts())


def test_a_plans_seconds_are_those_of_the_cost_model(tight: list[Plan]) -> None:
    cluster = parse_cluster({"groups": [{"device": "a100-40", "nodes": 2, "per_node": 4}]})
    place = place_of(cluster, cluster.groups[0])
    for plan in tight:
        assert plan.cut is not None
        time = step_time(UNFUSED, plan.cut, place, layers=plan.layers, again=plan.again)
        assert time.total_s == pytest.approx(plan.step_s)
        assert min(time.compute_s, time.bubble_s, time.send_s, time.gradients_s, time.optimizer_s) >= 0


def test_every_choice_is_made_somewhere(tight: list[Plan]) -> None:
    cuts = [plan.cut for plan in tight if plan.cut is not None]
    assert {cut.zero_stage for cut in cuts} == {1, 2, 3}
    assert {(cut.schedule, cut.chunks) for cut in cuts} == {("1f1b", 1), ("zb-h1", 1), ("1f1b", 2), ("1f1b", 4)}
    assert {cut.checkpointing for cut in cuts} >= {"none", "selective"}
    assert any(0 < sum(plan.again) < sum(plan.layers) for plan in tight)
    assert any(plan.cut.schedule == "zb-h1" and any(plan.again) for plan in tight if plan.cut) is False


def test_what_is_found_fits_and_one_layer_less_computed_again_does_not(tight: list[Plan]) -> None:
    for plan in tight:
        assert plan.cut is not None
        assert plan.fits >= SURE - 1e-9
        for stage, (layers, again) in enumerate(zip(plan.layers, plan.again, strict=True)):
            if again and plan.cut.chunks == 1 and plan.cut.checkpointing != "every_layer":
                fewer = stage_memory(UNFUSED, plan.cut, 17e9, layers=layers, stage=stage, again=again - 1)
                assert fewer.fits < SURE


def test_what_one_look_rules_out_takes_no_less(tight: list[Plan]) -> None:
    best, cuts = min(plan.step_s for plan in tight), tight_cuts()
    late = 0
    for branch in cuts.grid():
        waiting = [branch]
        while waiting:
            for child in waiting.pop().open(best * 1.02):
                if isinstance(child, Candidate):
                    continue
                waiting += [child] if child.bound_s < best * 1.02 else []
                for _, candidate in leaves(child) if child.bound_s == best * 1.02 else ():
                    late += 1
                    plan = candidate.work_out(math.inf)
                    assert plan is None or plan.step_s >= best * 1.02 * (1 - 1e-9)
    assert late > 10


def test_a_replay_is_near_the_closed_form(tight: list[Plan]) -> None:
    for plan in tight:
        assert tight_cuts().replayed(plan).seconds == pytest.approx(plan.step_s, rel=0.12)


def test_zero_stages_trade_memory_for_traffic() -> None:
    cut = Cut(pipeline=2, workers=8, micro_batches=16)
    need = [memory_of(MODEL, replace(cut, zero_stage=n), A100.device).total for n in (0, 1, 2, 3)]
    assert need == sorted(need, reverse=True)
    assert len(set(need)) == 4
    slow = replace(A100, per_node=1, across=LINKS["eth-10"])
    seconds = [step_time(MODEL, replace(cut, zero_stage=n), slow).total_s for n in (1, 2, 3)]
    assert seconds == sorted(seconds)
    assert seconds[2] > 2 * seconds[0]
    assert [param_bytes(replace(cut, zero_stage=n)) for n in (0, 1, 2, 3)] == [16, 5.5, 3.75, 2.0]
    assert param_bytes(replace(cut, mirrors=True)) == 2 + 2 + 2 * 12 / 8


def test_an_exchange_hides_behind_the_computation_of_a_layer() -> None:
    cut = Cut(workers=8, micro_batches=4, zero_stage=3)
    plain = layer_s(MODEL, replace(cut, zero_stage=1), A100, DEFAULTS)
    assert layer_s(MODEL, replace(cut, micro_batch=8), A100, DEFAULTS) == pytest.approx(
        layer_s(MODEL, replace(cut, micro_batch=8, zero_stage=1), A100, DEFAULTS)
    )
    slow = replace(A100, per_node=1, across=LINKS["eth-10"])
    around = round_s(MODEL.layer_params, cut, slow, DEFAULTS)
    assert layer_s(MODEL, cut, slow, DEFAULTS) == pytest.approx(3 * around)
    between = layer_s(MODEL, replace(cut, zero_stage=2), slow, DEFAULTS)
    assert around < between < around + plain


def test_scores_that_are_computed_again_are_not_kept() -> None:
    cut = Cut(micro_batches=4)
    again = replace(cut, checkpointing="selective")
    whole = replace(cut, checkpointing="every_layer")
    need = [memory_of(UNFUSED, c, A100.device).total for c in (cut, again, whole)]
    seconds = [step_time(UNFUSED, c, A100).total_s for c in (cut, again, whole)]
    assert need == sorted(need, reverse=True)
    assert seconds == sorted(seconds)
    assert len(set(need)) == len(set(seconds)) == 3


def test_gradients_stay_on_the_groups_own_network_and_activations_cross_once() -> None:
    """Two islands with quick networks of their own and a slow link between them (Holmes, ICPP 2024)."""
    fast = {"device": "a100-40", "nodes": 2, "per_node": 8}
    groups = [{**fast, "inter": "ib-hdr", "island": "ib"}, {**fast, "inter": "roce-100", "island": "roce"}]
    found = search(Task(model=MODEL, lanes=128), parse_cluster({"groups": groups, "between": "eth-10"}))
    best = found.plans[0]
    assert best.family == "mixed"
    order = list(best.stage_groups)
    assert set(order) == {0, 1}
    assert sum(a != b for a, b in pairwise(order)) == 1
    lanes = search(
        Task(model=MODEL, lanes=128), parse_cluster({"groups": groups, "between": "eth-10"}), families=("lanes",)
    )
    assert not lanes.plans or lanes.plans[0].step_s > best.step_s


def test_chunks_of_a_stage_are_alike_and_micro_batches_come_in_rounds(tight: list[Plan]) -> None:
    for plan in tight:
        if plan.cut is not None and plan.cut.chunks > 1:
            assert all(layers % plan.cut.chunks == 0 for layers in plan.layers)
            assert plan.cut.micro_batches % plan.cut.pipeline == 0
            assert len(plan.groups) == 1
