"""Wants that have travelled in columns are the wants that were sent, and all workers plan the same from them."""

from __future__ import annotations

import pickle
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings

from elastictrain_checkpoint import InvalidPiece
from elastictrain_checkpoint.reshard import ReadPlan, plan_reads
from elastictrain_checkpoint.wants import Numbering, Want, WantColumns
from tests.property.checkpoint.test_reshard import jobs
from tests.unit.checkpoint.build import State, make_state, memory_store, save


def travelled(numbering: Numbering, wants: list[Want]) -> WantColumns:
    return WantColumns(numbering, pickle.loads(pickle.dumps(numbering.columns(wants))))


@settings(deadline=None, max_examples=60)
@given(jobs())
def test_wants_in_columns_are_the_same_wants_and_give_the_same_plan(
    job: tuple[State, list[float], list[list[Want]]],
) -> None:
    state, cuts, wants = job
    manifest = save(memory_store(), state, cuts)
    numbering = Numbering(manifest)
    there = [travelled(numbering, mine) for mine in wants]
    assert [list(mine) for mine in there] == wants
    assert [mine[::-2] for mine in there] == [mine[::-2] for mine in wants]
    assert [mine[-1] for mine in there if mine] == [mine[-1] for mine in wants if mine]
    plan, from_columns = plan_reads(manifest, wants), plan_reads(manifest, there)
    for field in fields(ReadPlan):
        np.testing.assert_array_equal(getattr(from_columns, field.name), getattr(plan, field.name), field.name)


def test_a_tied_name_travels_as_its_tensor_and_wrong_boxes_are_still_refused() -> None:
    manifest = save(memory_store(), make_state({"a": ("F32", (4, 5)), "b": ("F32", (3,))}), aliases={"tied": "a"})
    numbering = Numbering(manifest)
    (want,) = travelled(numbering, [Want("tied", (1, 2), (2, 3))])
    assert want == Want("a", (1, 2), (2, 3))
    with pytest.raises(IndexError):
        travelled(numbering, [want])[1]
    with pytest.raises(KeyError, match="step 1000 has no tensor 'c'"):
        numbering.columns([Want("c", (0,), (1,))])
    with pytest.raises(InvalidPiece, match=r"^a: box \(0,\) \(1, 1\) is not of shape \(4, 5\)$"):
        numbering.columns([Want("a", (0,), (1, 1))])
    with pytest.raises(InvalidPiece, match=r"^a: box \(4, 0\) \(1, 1\) does not lie in shape \(4, 5\)$"):
        plan_reads(manifest, [[], travelled(numbering, [Want("b", (0,), (3,)), Want("a", (4, 0), (1, 1))])])
