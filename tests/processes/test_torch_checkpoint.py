"""Every rank saves its share of a state dict, any other world loads it: plain gloo processes, no elastictrain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.gloo_ranks import on_ranks

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
ROWS, COLUMNS = 1013, 70
"""Neither the rows nor the elements divide by anything, and a shard ends off the digest grid."""


def whole_state() -> dict[str, Any]:
    import torch

    made = torch.Generator().manual_seed(5)
    return {
        "rows": torch.randn(ROWS, COLUMNS, generator=made),
        "columns": torch.randn(COLUMNS, ROWS, generator=made).to(torch.bfloat16),
        "few": torch.randn(2, 3, generator=made),
        "odd": torch.randn(700, 9, dtype=torch.complex128, generator=made),
        "large": torch.randn(700_000, generator=made),
        "small": torch.randn(5, generator=made),
        "none": torch.zeros(0, 4),
        "flag": torch.tensor(True),
    }


PLACES = {"rows": 0, "columns": 1, "few": 0, "odd": 1, "large": None, "small": None, "none": 0}


def placed(mesh: Any, *, empty: bool = False) -> dict[str, Any]:
    """The state as this rank has it; `flag` is a plain tensor, and two names share memory."""
    import torch
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    state: dict[str, Any] = {}
    for name, value in whole_state().items():
        value = torch.zeros_like(value) if empty else value
        if name in PLACES:
            dim = PLACES[name]
            value = distribute_tensor(value, mesh, [Replicate() if dim is None else Shard(dim)])
        state[name] = value
    return {"model": state | {"tied": state["rows"]}, "step": 0 if empty else 7, "list": [None if empty else "x"]}


def equal_to_whole(state: dict[str, Any]) -> None:
    import torch

    for name, value in whole_state().items():
        found = state["model"][name]
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        assert torch.equal(found, value), name
    assert (state["step"], state["list"]) == (7, ["x"])


def save_it(mesh: Any, rank: int, folder: Path) -> tuple[str, list[str]]:
    import elastictrain_checkpoint.torch as checkpoint

    manifest = checkpoint.save(placed(mesh), folder / "c", step=7)
    return manifest.digest, sorted({path.rpartition("/")[2][:6] for path in manifest.paths})


def load_it(mesh: Any, rank: int, folder: Path) -> None:
    import elastictrain_checkpoint.torch as checkpoint

    state = placed(mesh, empty=True)
    assert checkpoint.load(state, folder / "c").step == 7
    equal_to_whole(state)


@pytest.mark.parametrize("world", [1, 3])
def test_any_world_saves_and_any_other_loads_with_one_digest(world: int, tmp_path: Path) -> None:
    import elastictrain_checkpoint.torch as checkpoint
    from elastictrain_checkpoint import Store, digest, load, verify

    found = on_ranks(world, tmp_path, save_it)
    assert {writers == [f"r{rank:05d}" for rank in range(world)] for _, writers in found} == {True}
    store = Store(tmp_path / "c")
    manifest = load(store, 7)
    assert {value for value, _ in found} == {manifest.digest, digest(store, manifest)}
    assert verify(store, manifest) == []
    assert manifest.alias == {"model/tied": "model/rows"}
    left = [path.name for path in (tmp_path / "c").rglob("*") if path.suffix in (".part", ".dropped")]
    assert left == [], "the parts of the ranks are gone when they are in the manifest"
    state: dict[str, Any] = {"model": whole_state(), "step": 0, "list": [None]}
    for value in state["model"].values():
        value.zero_()
    state["model"]["tied"] = state["model"]["rows"]
    checkpoint.load(state, tmp_path / "c")
    equal_to_whole(state)
    alone = checkpoint.save(state, tmp_path / "alone", step=7)
    assert alone.tensors == manifest.tensors
    on_ranks(2, tmp_path, load_it)


def train_on(mesh: Any, rank: int, folder: Path) -> tuple[str, int, float]:
    """The state changes while the save of what was before waits for its storage."""
    import threading

    import torch

    import elastictrain_checkpoint.torch as checkpoint
    from elastictrain_checkpoint import Store
    from elastictrain_checkpoint.store import _backend

    opened = threading.Event()

    class Gate:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def create(self, path: str, blocks: Any) -> int:
            assert opened.wait(60)
            return int(inner.create(path, blocks))

    inner: Any = _backend(str(folder / "c"), {})
    saver = checkpoint.AsyncSaver(Store(str(folder / "c"), backend=Gate()))
    state = placed(mesh)
    handle = saver.save(state, step=7)
    saver.before_mutation()
    with torch.no_grad():
        for value in state["model"].values():
            local = value.to_local() if hasattr(value, "to_local") else value
            local.zero_()
    assert not handle.done()
    again = saver.save(state, step=8, when_busy="skip")
    opened.set()
    manifest = handle.result(60)
    return manifest.digest, handle.copied_bytes, {"skipped": 1.0}[again.state.value]


def test_what_changes_during_the_save_is_not_in_it(tmp_path: Path) -> None:
    found = on_ranks(2, tmp_path, train_on)
    assert all(copied > 0 for _, copied, _ in found)
    on_ranks(3, tmp_path, load_it)


def differ(mesh: Any, rank: int, folder: Path) -> str:
    import torch

    import elastictrain_checkpoint.torch as checkpoint

    try:
        checkpoint.save({"w": torch.zeros(3 + rank)}, folder / "c", step=1)
    except checkpoint_errors() as error:
        return str(error)
    raise AssertionError("it was saved")


def checkpoint_errors() -> Any:
    from elastictrain_checkpoint import CheckpointError

    return CheckpointError


def test_ranks_that_disagree_are_told_so_at_once(tmp_path: Path) -> None:
    said = on_ranks(2, tmp_path, differ)
    assert len(set(said)) == 1
    assert said[0].startswith(
        "the state dict of rank 1 differs from that of rank 0: ('w', 'F32', (3,), None); ('w', 'F32'"
    )
    assert not (tmp_path / "c").exists()


def one_is_odd(mesh: Any, rank: int, folder: Path) -> list[str]:
    """A cycle, a mapping that raises, and a store that rank 0 cannot list: on one rank each."""
    import torch

    import elastictrain_checkpoint.torch as checkpoint
    from elastictrain_checkpoint import Store
    from elastictrain_checkpoint.store import _backend

    inner: Any = _backend(str(folder / "c"), {})

    class Raises(dict[str, Any]):
        def items(self) -> Any:
            raise KeyError("gone")

    class Unlisted:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def list(self, path: str = "") -> Any:
            raise OSError(5, "no listing")

    cycle: dict[str, Any] = {"w": torch.zeros(3)}
    cycle["again"] = cycle if rank == 1 else {}
    raises = Raises(w=1) if rank == 1 else {"w": 1}
    unlisted = Store(str(folder / "c"), backend=Unlisted()) if rank == 0 else Store(str(folder / "c"))
    said = []
    for state, store in ((cycle, folder / "c"), ({"m": raises}, folder / "c"), ({"w": torch.zeros(3)}, unlisted)):
        try:
            checkpoint.save(state, store)
        except (checkpoint_errors(), OSError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_a_rank_whose_state_cannot_be_taken_apart_keeps_nobody_waiting(tmp_path: Path) -> None:
    zero, one = on_ranks(2, tmp_path, one_is_odd)
    cycle = "state_dict" + "['again']" * 8 + "…: nested deeper than 98 levels (a cycle?)"
    raised = "the state dict cannot be taken apart: KeyError: 'gone'"
    assert one[:2] == [f"InvalidPiece: {cycle}", f"InvalidPiece: {raised}"]
    assert zero[:2] == [f"SaveFailed: rank 1 could not begin to save: {said}" for said in (cycle, raised)]
    assert zero[2] == "OSError: [Errno 5] no listing"
    assert one[2] == "SaveFailed: rank 0 could not begin to save: OSError: [Errno 5] no listing"


def one_fails(mesh: Any, rank: int, folder: Path) -> str:
    import elastictrain_checkpoint.torch as checkpoint
    from elastictrain_checkpoint import Store
    from elastictrain_checkpoint.store import _backend

    inner: Any = _backend(str(folder / "c"), {})

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def create(self, path: str, blocks: Any) -> int:
            raise OSError(28, "No space left on device")

    store = Store(str(folder / "c"), backend=Full()) if rank == 1 else Store(str(folder / "c"))
    saver = checkpoint.AsyncSaver(store, deadline_s=60)
    try:
        saver.save(placed(mesh), step=7).result()
    except checkpoint_errors() as error:
        return str(error)
    raise AssertionError("it was saved")


def test_a_rank_that_cannot_write_fails_all_and_nothing_is_committed(tmp_path: Path) -> None:
    from elastictrain_checkpoint import Store, list_steps

    zero, one, two = on_ranks(3, tmp_path, one_fails)
    assert one == f"step 7 was not saved to {tmp_path / 'c'}: OSError: [Errno 28] No space left on device"
    for said in (zero, two):
        assert said == (
            f"step 7 was not saved to {tmp_path / 'c'}: PeerDropped: rank 1 has not saved its share: "
            "[Errno 28] No space left on device"
        )
    assert list_steps(Store(tmp_path / "c")) == []
