"""What a DTensor is made of, without a process group."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.tensor import Shard

from elastictrain_checkpoint import InvalidPiece
from elastictrain_checkpoint.torch.sharded import common_aliases, cuts_of


def test_names_are_tied_also_where_a_rank_cannot_see_it() -> None:
    tied, blind, apart = ({"head": "embed"}, ()), ({}, ("embed", "head")), ({}, ())
    assert common_aliases([tied, tied]) == common_aliases([tied, blind]) == {"head": "embed"}
    assert common_aliases([blind, tied, blind]) == {"head": "embed"}
    assert common_aliases([apart, apart]) == {}
    with pytest.raises(InvalidPiece) as refused:
        common_aliases([blind, tied, apart])
    assert str(refused.value) == (
        "head and embed share memory on some ranks, but not on rank 2; tie them on every rank, or on none"
    )
    with pytest.raises(InvalidPiece, match=r"^head and other share memory on some ranks, but not on rank 0;"):
        common_aliases([tied, ({"head": "other"}, ())])


def test_axes_that_cut_in_another_order_than_the_mesh_has_are_refused() -> None:
    def placed(*axes: int) -> Any:
        spec = SimpleNamespace(shard_order=(SimpleNamespace(tensor_dim=0, mesh_dims=axes),))
        return SimpleNamespace(placements=(Shard(0), Shard(0)), dim=lambda: 2, _spec=spec)

    assert [cut is not None and cut.dim for cut in cuts_of(placed(0, 1), "w")] == [0, 0]
    with pytest.raises(InvalidPiece, match=r"^w is placed as .*: dimension 0 is cut by the axes \(1, 0\) of its mesh"):
        cuts_of(placed(1, 0), "w")
