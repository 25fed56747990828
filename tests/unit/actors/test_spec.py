"""Every setting that the controller decides by reaches its machine."""

from __future__ import annotations

from typing import Any

import pytest

import elastictrain as et
from elastictrain.controller.facts import GradientSpec
from elastictrain.protocol import ModelFacts
from elastictrain_actors.spec import machine_spec

FACTS = ModelFacts(
    block_elements=(10, 10),
    parameters=20,
    optimizer="AdamW",
    state_tensors=2,
    fixed_bytes=1,
    bytes_per_held_element=4.0,
    active_blocks=2,
)


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"workers": {"domain_label": "rack"}}, "domain_label", "rack"),
        ({"workers": {"max": 3, "min": 2}}, "min_workers", 2),
        ({"workers": {"max": 3, "start": 2}}, "initial_workers", 2),
        ({"workers": {"spares": 2}}, "spares", 2),
        ({"workers": {"replace": False}}, "replace", False),
        ({"mirrors": False}, "mirrors", False),
        ({"gradients": "hand_over"}, "lane_order", "round_major"),
        ({"gradients": "hand_over"}, "gradients", None),
        ({"micro_batches": 2, "lane_batch_size": 2}, "gradients", GradientSpec(2, apart=True)),
        (
            {"redundancy": {"lanes": "first_result", "depth": 3}, "workers": {"max": 2}},
            "gradients",
            GradientSpec(2, way="first_result", depth=3, group=2),
        ),
        (
            {"redundancy": {"lanes": "drop_slowest", "drop_at_most": 3}, "workers": {"max": 2}},
            "gradients",
            GradientSpec(2, way="drop_slowest", depth=3, group=2),
        ),
        (
            {"redundancy": {"replay": {3: [1]}}, "lanes": 5},
            "gradients",
            GradientSpec(2, way="drop_slowest", depth=5),
        ),
        ({"plan": "auto", "cluster": "c.yaml"}, "plans", True),
        ({"checkpoint": {"path": "c"}}, "checkpoint", True),
        ({"checkpoint": {"path": "c", "keep": 7}}, "checkpoints_kept", 7),
    ],
)
def test_a_setting_reaches_the_machine(settings: dict[str, Any], field: str, value: object) -> None:
    base = {
        "recipe": "m:R",
        "data": {"kind": "jsonl", "path": "d", "text_column": "t", "sequence_length": 8},
        "steps": 1,
    }
    found, default = (machine_spec(et.Job(**(base | more)), FACTS) for more in (settings, {}))
    assert getattr(found, field) == value
    assert getattr(default, field) != value


def test_who_may_forget_a_checkpoint_is_not_the_machine_where_another_place_may_have_it() -> None:
    base = {"recipe": "m:R", "data": {"kind": "jsonl", "path": "d"}, "steps": 1}
    kept = {"path": "c", "keep": 7, "copy_to": [{"path": "s3://b/c"}]}
    assert machine_spec(et.Job(**base, checkpoint=kept), FACTS).checkpoints_kept is None
