"""A pipeline as it stands: agrees with the planner's own account of a plan, and with its memory."""

from __future__ import annotations

import math

import pytest

from elastictrain.errors import ConfigError
from elastictrain.planner.compute import DEFAULTS
from elastictrain.planner.cuts import Cuts
from elastictrain.planner.model import Transformer, parse_model
from elastictrain.planner.pipelines import Placement, pipelines_of
from elastictrain.planner.plan import Plan, Task
from elastictrain.planner.profiles import parse_cluster
from tests.support.planner_instances import leaves
from tests.support.stage_scenarios import MODEL, work

SHAPE = Transformer(layers=16, hidden=4096, heads=32, sequence=2048, vocab=32000, ffn=11008, gated=True)


def plan_of(stages: int, device: str) -> tuple[Cuts, Plan]:
    """The plan of one pipeline, 1F1B, on so many devices of this name."""
    cluster = parse_cluster({"groups": [{"device": device, "nodes": stages}]})
    cuts = Cuts(Task(model=SHAPE, lanes=12, lane_batch=1, mirrors=False), cluster, DEFAULTS)
    found = (candidate.work_out(math.inf) for branch in cuts.grid() for _, candidate in leaves(branch))
    (plan,) = [
        one for one in found
        if one is not None and one.cut is not None and one.devices == stages == one.cut.pipeline
        and (one.cut.schedule, one.cut.chunks) == ("1f1b", 1)
    ]  # fmt: skip
    return cuts, plan


@pytest.mark.parametrize(("stages", "device"), [(2, "h100"), (4, "a100-40"), (5, "h100"), (2, "a100-40")])
def test_a_healthy_pipeline_is_the_planners(stages: int, device: str) -> None:
    cuts, plan = plan_of(stages, device)
    made = pipelines_of(SHAPE, [device] * stages, stages=stages, pipelines=1, micro_batches=12)
    placement = made.best(range(stages), made.healthy())
    assert placement is not None
    assert (placement.layers, placement.again) == (plan.layers, plan.again)
    # The forward's share is that of a layer; the head has another one, and the exchange here is that of an even cut.
    assert made.step_s(placement, made.healthy()) == pytest.approx(cuts.replayed(plan).seconds, rel=0.01)


def test_a_slow_place_has_fewer_layers_and_its_memory_bounds_the_others() -> None:
    slow = (1.0, 2.0, 1.0)
    free, tight = work(workers=3, head=0.0), work(workers=3, head=0.0, memory=6.5e9)
    start = free.best(range(3), free.healthy())
    assert start is not None
    assert start.layers == (4, 4, 4)
    found = free.best(range(3), slow)
    assert found is not None
    assert found.layers == (5, 2, 5)
    assert free.step_s(found, slow) < free.step_s(start, slow)
    # Five layers and three micro-batches in flight are 6.5 GB; a little less and the first stage keeps four.
    assert tight.best(range(3), slow) == found
    tighter = work(workers=3, head=0.0, memory=6.4e9)
    other = tighter.best(range(3), slow)
    assert other is not None
    assert other.layers[0] == 4
    assert max(tighter.need_bytes(other)) <= 6.4e9
    assert work(workers=3, memory=4e9).best(range(3), slow) is None


def test_who_receives_most_decides_how_long_a_move_takes() -> None:
    made = work(workers=4)
    before, after = Placement((0, 1, 2), (4, 4, 4), (0, 0, 0)), Placement((0, 1, 2), (5, 2, 5), (0, 0, 0))
    assert made.moved_bytes(before, before) == 0
    assert made.moved_bytes(before, after) == 1e9  # each neighbour one layer, side by side
    assert made.moved_bytes(before, Placement((0, 2, 1), (4, 4, 4), (0, 0, 0))) == 4e9
    assert made.moved_bytes(before, Placement((0, 3, 2), (4, 4, 4), (0, 0, 0))) == 4e9


def test_a_model_is_read_from_plain_data() -> None:
    assert parse_model(MODEL).ffn == 5632
    for wrong, words in (([], "expected a mapping"), (MODEL | {"layer": 3}, "'layer'; did you mean 'layers'"),
                         (MODEL | {"gated": 1}, "expected true or false")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            parse_model(wrong)
