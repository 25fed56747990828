"""DTensors on meshes of two and three dimensions: any of them saves, any other, or one process, loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import CheckpointError, Store, digest, load, verify
from tests.support.gloo_ranks import on_ranks
from tests.unit.checkpoint.test_torch import Gate

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

PLACES: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "hsdp": ((2, 2), (Replicate(), Shard(0))),
    "hsdp, inside": ((2, 2), (Shard(0), Replicate())),
    "rows twice": ((2, 2), (Shard(0), Shard(0))),
    "fsdp and tp, rows": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "fsdp and tp, columns": ((2, 2), (Shard(0), Shard(1))),
    "columns and rows": ((2, 2), (Shard(1), Shard(0))),
    "columns repeated": ((2, 2), (Replicate(), Shard(1))),
    "scattered rows": ((2, 2), (_StridedShard(0, split_factor=3), Replicate())),
    "scattered columns": ((4,), (_StridedShard(1, split_factor=2),)),
    "three": ((2, 1, 2), (Shard(1), Shard(0), Shard(1))),
}


def whole_state() -> dict[str, Any]:
    made = torch.Generator().manual_seed(5)
    return {
        "large": torch.randn(1030, 1204, generator=made),
        "uneven": torch.randn(101, 83, generator=made).to(torch.bfloat16),
        "odd": torch.randn(70, 9, 2, dtype=torch.complex128, generator=made),
        "few": torch.randn(2, 3, generator=made),
        "none": torch.zeros(0, 4),
        "plain": torch.randn(7, generator=made),
    }


def on_mesh(how: str, *, empty: bool = False) -> dict[str, Any]:
    """The state as this rank has it; two names share memory, of which some ranks have nothing."""
    from torch.distributed.device_mesh import init_device_mesh

    shape, placements = PLACES[how]
    mesh = init_device_mesh("cpu", shape)
    state: dict[str, Any] = {}
    for name, value in whole_state().items():
        value = torch.zeros_like(value) if empty else value
        state[name] = value if name == "plain" else distribute_tensor(value, mesh, placements, src_data_rank=None)
    return {"model": state | {"tied": state["few"]}}


def equal_to_whole(state: dict[str, Any]) -> None:
    for name, value in whole_state().items():
        found = state["model"][name]
        assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, value), name


def from_all_to_all(mesh: Any, rank: int, folder: Path) -> list[tuple[str, dict[str, int]]]:
    """Each placement saves; each loads what the one before it has saved, and what one process has saved."""
    found = []
    ways = list(PLACES)
    for number, how in enumerate(ways):
        manifest = checkpoint.save(on_mesh(how), folder / "c", step=number)
        written: dict[str, int] = {}
        for file in manifest.files:
            writer = file.path.rpartition("/")[2][:6]
            written[writer] = written.get(writer, 0) + file.size_bytes
        found.append((manifest.digest, written))
        for other, path, step in ((how, "alone", 0), (ways[(number + 3) % len(ways)], "c", number)):
            state = on_mesh(other, empty=True)
            checkpoint.load(state, folder / path, step=step)
            equal_to_whole(state)
    return found


def test_any_mesh_saves_and_any_other_loads(tmp_path: Path) -> None:
    state: dict[str, Any] = {"model": whole_state()}
    state["model"]["tied"] = state["model"]["few"]
    alone = checkpoint.save(state, tmp_path / "alone", step=0, group=None)
    found = on_ranks(4, tmp_path, from_all_to_all)
    assert all(one == found[0] for one in found)
    store = Store(tmp_path / "c")
    state_bytes = sum(value.nbytes for value in whole_state().values())
    for step, (made, written) in enumerate(found[0]):
        manifest = load(store, step)
        assert made == manifest.digest == digest(store, manifest) == alone.digest
        assert verify(store, manifest) == []
        assert manifest.alias == {"model/tied": "model/few"}
        assert sum(written.values()) < 1.05 * state_bytes, "what several ranks hold is stored once"
        assert set(written) == {f"r0000{rank}" for rank in range(4)}
        assert max(written.values()) < 0.3 * state_bytes, "all ranks write"
        again: dict[str, Any] = {"model": {name: torch.zeros_like(value) for name, value in whole_state().items()}}
        again["model"]["tied"] = again["model"]["few"]
        checkpoint.load(again, store, step=step)
        equal_to_whole(again)


def refusals(mesh: Any, rank: int, folder: Path) -> list[str]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    said = []

    def refused(state: dict[str, Any], group: Any = "world") -> None:
        try:
            checkpoint.save(state, folder / "refused", group=group)
        except CheckpointError as error:
            said.append(str(error))
        else:
            raise AssertionError("it was saved")

    square = init_device_mesh("cpu", (2, 2))
    partial = DTensor.from_local(torch.ones(8, 3), square, [Replicate(), Partial()])
    refused({"w": partial})
    rows = distribute_tensor(torch.ones(8, 3), square, [Shard(0), Shard(0)])
    half = dist.new_group([0, 1])
    if rank < 2:
        refused({"w": rows}, half)
    refused({"w": rows}, None)
    wrong = DTensor.from_local(
        torch.ones(3 - rank % 2, 3), square, [Shard(0), Replicate()], shape=(5, 3), stride=(3, 1)
    )
    refused({"w": wrong})
    tied = torch.ones(3)
    refused({"a": tied, "b": tied if rank else torch.ones(3)})
    checkpoint.save({"w": rows}, folder / "c")
    try:
        checkpoint.load({"w": partial}, folder / "c")
    except CheckpointError as error:
        said.append(str(error))
    return said


def test_what_cannot_be_saved_or_filled_is_refused_in_words(tmp_path: Path) -> None:
    said = on_ranks(4, tmp_path, refusals)
    partial = (
        "w is placed as (Replicate(), Partial(sum)): axis 1 of its mesh is P(sum), and its ranks hold terms of a sum, "
        "not elements; redistribute it to Shard or Replicate first"
    )
    assert said[0][0] == partial
    part = "w: the {} ranks that save hold {} of 24 elements between them; the group that saves must have all ranks of "
    part += "the mesh that the tensor is placed on"
    assert said[0][1:3] == [part.format(2, 12), part.format(1, 6)]
    assert said[1][3] == (
        "w is placed as (Shard(dim=0), Replicate()) over a mesh of (2, 2); at (0, 1) that is a local tensor of [3, 3], "
        "but it is of [2, 3]: distribute it in chunks as torch cuts them (ceil(size / chunks)), or make the size "
        "divisible"
    )
    assert said[0][3] == f"rank 1 could not begin to save: {said[1][3]}"
    assert {one[-2] for one in said} == {
        "b and a share memory on some ranks, but not on rank 0; tie them on every rank, or on none"
    }
    assert all(f"\n  {partial}\n" in one[-1] for one in said)
    assert not (tmp_path / "refused").exists()


class Model(torch.nn.Module):
    """Sizes that neither axis divides, except where tensor parallelism asks for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = torch.nn.Linear(15, 36)
        self.down = torch.nn.Linear(36, 7)
        self.norm = torch.nn.LayerNorm(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(self.down(torch.relu(self.up(x))))
        return normed


KINDS = ("fsdp and tp", "hsdp", "ddp and tp")


def sharded_model(kind: str) -> tuple[Any, Any]:
    """FSDP2 over tensor parallelism, hybrid sharding, or tensor parallelism in two replicas of which no tensor knows;
    and AdamW.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = Model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "other"))
    if kind != "hsdp":
        parallelize_module(model, mesh["other"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind != "ddp and tp":
        fully_shard(model, mesh=mesh if kind == "hsdp" else mesh["data"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: Any, optimizer: Any, number: int) -> None:
    x = torch.randn(4, 15, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": optimizer.state_dict()}


def full(state: Any) -> Any:
    """Copies of whole tensors: what is replicated, and what is no DTensor, would be live memory."""
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    return {name: value.clone() for name, value in whole.items()}


def copied(state: Any) -> Any:
    """The same with copies of whole tensors, in whatever containers."""
    if isinstance(state, torch.Tensor):
        return full({"": state})[""]
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state


def train_and_save(mesh: Any, rank: int, folder: Path) -> list[dict[str, Any]]:
    """Train, save without waiting, train on; load into the same and the other kind of mesh."""
    import torch.distributed as dist

    out = []
    for number, how in enumerate(KINDS):
        model, optimizer = sharded_model(how)
        step(model, optimizer, 0)
        saved = full(model.state_dict())
        place = folder / how
        whole = {"model": saved, "optim": copied(optimizer.state_dict())}
        gate = Gate(place)
        handle = checkpoint.async_save(
            state_of(model, optimizer),
            checkpoint_id=Store(place, backend=gate),
            process_group=dist.group.WORLD,
            step=1,
        )
        step(model, optimizer, 1)  # nobody has attached anything
        gate.opened.set()
        assert handle.result(60).digest == checkpoint.save(whole, folder / f"{how}-{rank}", no_dist=True).digest
        dist.barrier()
        ended = full(model.state_dict())
        for other in (how, KINDS[number - 1]):
            model, optimizer = sharded_model(other)
            step(model, optimizer, 7)
            state = state_of(model, optimizer)
            checkpoint.load(state, place)
            optimizer.load_state_dict(state["optim"])
            differ = [name for name, value in full(model.state_dict()).items() if not torch.equal(value, saved[name])]
            assert not differ, (how, other)
            step(model, optimizer, 1)
            for name, value in full(model.state_dict()).items():
                torch.testing.assert_close(value, ended[name], atol=0 if other == how else 1e-3, rtol=0)
        out.append({name: value.numpy() for name, value in saved.items()})
    return out


def test_fsdp_with_tensor_parallelism_and_hybrid_sharding(tmp_path: Path) -> None:
    for how, saved in zip(KINDS, on_ranks(4, tmp_path, train_and_save)[0], strict=True):
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        state = state_of(model, optimizer) | {"optim": {}}
        checkpoint.load(state, tmp_path / how)
        for name, value in model.state_dict().items():
            assert torch.equal(value, torch.from_numpy(saved[name])), name
        optimizer.load_state_dict(state["optim"])
        assert {one["step"].item() for one in optimizer.state.values()} == {1.0}
        step(model, optimizer, 1)
