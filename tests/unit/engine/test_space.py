"""The address space: what lies where follows from the model alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from elastictrain.engine.space import ALIGN_ELEMENTS, MAX_BLOCKS, Space, default_block_elements
from elastictrain.errors import RecipeError
from tests.unit.engine.worlds import Net


def space_of(model: nn.Module, *, size: int | None = None, whole: bool = False) -> Space:
    return Space(model, block_elements=size, whole_parameters=whole)


def test_entries_are_parameters_then_buffers_then_frozen_each_on_a_border() -> None:
    space = space_of(Net())
    assert [(e.name, e.kind) for e in space.entries] == [
        ("gain", "param"),
        ("unused", "param"),
        ("inp.weight", "param"),
        ("inp.bias", "param"),
        ("norm.weight", "param"),
        ("norm.bias", "param"),
        ("mid.weight", "param"),
        ("mid.bias", "param"),
        ("out.bias", "param"),
        ("norm.running_mean", "buffer"),
        ("norm.running_var", "buffer"),
        ("frozen", "frozen"),
    ]
    at = 0
    for entry in space.entries:
        assert entry.start == at
        assert entry.start % ALIGN_ELEMENTS == 0
        at += -(-entry.elements // 128) * 128
    assert space.total_elements == at
    assert space.param_elements == space.by_name["norm.running_mean"].start
    assert space.active_elements == space.by_name["frozen"].start
    assert space.counters == ("seen", "norm.num_batches_tracked")
    assert space.transient == ("scale",)
    assert space.aliases == {"out.weight": "mid.weight"}
    assert space.by_name["gain"].shape == ()
    assert space.by_name["gain"].elements == 1


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [None, 4096, 8192])
def test_blocks_tile_every_entry_in_order(size: int | None, whole: bool) -> None:
    space = space_of(Net(), size=size, whole=whole)
    assert [b.number for b in space.blocks] == list(range(len(space.blocks)))
    for entry in space.entries:
        mine = [b for b in space.blocks if b.entry == entry]
        assert mine[0].start == entry.start
        assert mine[-1].stop == entry.stop
        assert all(a.stop == b.start and b.start % ALIGN_ELEMENTS == 0 for a, b in pairwise(mine))
        assert all(b.elements == space.block_size for b in mine[:-1])
        assert [b.offset for b in mine] == [b.start - entry.start for b in mine]
        if whole and entry.kind == "param":
            assert len(mine) == 1
    assert sum(space.block_elements) == sum(e.elements for e in space.entries)
    assert len([b for b in space.blocks if b.entry.name == "mid.weight"]) == (2 if size == 4096 and not whole else 1)
    assert space.active_blocks == len(space.blocks) - 1


def test_spans_hold_their_blocks_and_leave_out_what_is_frozen() -> None:
    space = space_of(Net())
    end = len(space.blocks)
    assert space.span(0, end) == (0, space.entries[-1].stop)
    assert space.span(1, 3) == (space.blocks[1].start, space.blocks[2].stop)
    assert space.active_span(0, end) == (0, space.by_name["norm.running_var"].stop)
    assert space.active_span(end - 1, end) == (0, 0)
    for block in space.blocks:
        assert space.block_at(block.start) is block
        assert space.block_at(block.stop - 1) is block


def test_the_block_size_depends_on_the_size_of_the_model_alone() -> None:
    assert default_block_elements(1) == 65536
    assert default_block_elements(65536 * MAX_BLOCKS) == 65536
    assert default_block_elements(65536 * MAX_BLOCKS + 1) == 131072
    assert default_block_elements(70 * 10**9) == 1 << 25
    for elements in (10**6, 10**8, 7 * 10**9, 10**12):
        size = default_block_elements(elements)
        assert size & (size - 1) == 0
        assert elements / size <= MAX_BLOCKS


def test_a_model_on_meta_has_the_same_space() -> None:
    real = space_of(Net())
    with torch.device("meta"):
        meta = space_of(Net())
    assert meta.entries == real.entries
    assert meta.blocks == real.blocks
    assert meta.aliases == real.aliases


def holder(**tensors: torch.Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Flatten(), r"^recipe\.model\(\) has no trainable parameters; at least one must require a gradient$"),
        (nn.Linear(2, 2, dtype=torch.float64), r"^parameter 'weight' is torch\.float64; expected float32, bfloat16"),
        (nn.Linear(2, 2, dtype=torch.complex64), r"^parameter 'weight' is torch\.complex64; expected"),
        (holder(empty=torch.zeros(0, 3)), r"^buffer 'empty' of shape \(0, 3\) has no elements; remove it$"),
        (
            holder(turn=torch.zeros(2, dtype=torch.complex64)),
            r"^the persistent buffer 'turn' is torch\.complex64; keep",
        ),
    ],
)
def test_what_has_no_place_is_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        space_of(model)


def test_all_parameters_frozen_is_no_training() -> None:
    with pytest.raises(RecipeError, match="no trainable parameters"):
        space_of(nn.Linear(2, 2).requires_grad_(False))
