"""Ranks that load a state dict together: every stored byte is read once, and nobody waits for who has failed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.support.gloo_ranks import on_ranks

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

SIDE = 2048
NAMES = [f"layers.{number}.weight" for number in range(4)]
"""64 MiB: at the border between two ranks' shares both read one block of 1 MiB."""


def whole_state() -> dict[str, Any]:
    import torch

    made = torch.Generator().manual_seed(5)
    model: dict[str, Any] = {
        name: torch.arange(SIDE * SIDE, dtype=torch.float32).add_(number).reshape(SIDE, SIDE)
        for number, name in enumerate(NAMES)
    }
    model |= {"uneven": torch.randn(35, 17, generator=made).to(torch.bfloat16), "plain": torch.arange(7)}
    model |= {"odd": torch.randn(9, 5, dtype=torch.complex128, generator=made), "none": torch.zeros(0, 4)}
    return {"model": model, "step": 3}


def columns_of(mesh: Any) -> dict[str, Any]:
    """The state as this rank wants it: columns of everything, but for a plain tensor."""
    import torch
    from torch.distributed.tensor import Shard, distribute_tensor

    state: dict[str, Any] = {"model": {}, "step": 0}
    for name, value in whole_state()["model"].items():
        empty = torch.zeros_like(value)
        state["model"][name] = empty if name == "plain" else distribute_tensor(empty, mesh, [Shard(1)])
    return state


def digest_of(state: dict[str, Any]) -> str:
    import torch

    found = hashlib.sha256(repr(state["step"]).encode())
    for name, value in sorted(state["model"].items()):
        local = value.to_local() if hasattr(value, "to_local") else value
        found.update(name.encode())
        found.update(local.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_bytes() -> int:
    """What read calls have given to this process."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def load_both_ways(mesh: Any, rank: int, folder: Path, how: str) -> tuple[str, str, int, Any]:
    """By itself, and with the others: digests, bytes that were read together, and what they were handed on through."""
    import os

    import elastictrain_checkpoint.torch as checkpoint
    from elastictrain_checkpoint.torch import company

    used: list[str] = []

    class Told(company.Together):
        def read(self, exchange: Any) -> None:
            used.append(type(exchange).__name__)
            super().read(exchange)

    def refused(*_: Any) -> int:
        raise OSError(12, "no memory to share")

    company.Together = Told  # type: ignore[misc]
    if how == "several hosts":
        company.share_a_host = lambda _: False
    if how == "no memory to share" and rank == 1:
        os.memfd_create = refused
    alone, first, state = columns_of(mesh), columns_of(mesh), columns_of(mesh)
    checkpoint.load(alone, folder / "c", group=None)
    checkpoint.load(first, folder / "c")  # imports what it needs
    before = read_bytes()
    report = checkpoint.load(state, folder / "c")
    read = read_bytes() - before
    assert digest_of(first) == digest_of(state)
    return digest_of(alone), digest_of(state), read, (used, report.step, report.missing, report.unexpected)


@pytest.mark.parametrize(
    ("how", "exchange"),
    [("one host", "HostExchange"), ("several hosts", "GroupExchange"), ("no memory to share", "GroupExchange")],
)
def test_every_stored_byte_is_read_once_whatever_each_wants(how: str, exchange: str, tmp_path: Path) -> None:
    import elastictrain_checkpoint.torch as checkpoint

    checkpoint.save(whole_state(), tmp_path / "c", step=4)
    stored = sum(path.stat().st_size for path in (tmp_path / "c").rglob("*") if path.is_file())
    found = on_ranks(2, tmp_path, load_both_ways, how)
    for alone, together, _, told in found:
        assert alone == together
        assert told == ([exchange, exchange], 4, [], [])
    assert found[0][0] != found[1][0], "each has its own columns"
    assert sum(read for _, _, read, _ in found) <= 1.02 * stored


def stages(mesh: Any, rank: int, folder: Path) -> tuple[Any, ...]:
    """Each rank has other layers, and one of them a key that nobody has stored."""
    import torch

    import elastictrain_checkpoint.torch as checkpoint
    from elastictrain_checkpoint.errors import StateMismatch

    def mine() -> dict[str, Any]:
        model = {name: torch.zeros(SIDE, SIDE) for name in NAMES[rank::2]}
        return {"model": model | ({"plain": torch.zeros(7, dtype=torch.int64)} if rank else {}), "step": 0}

    rest = {"model": {name: torch.zeros_like(whole_state()["model"][name]) for name in ("uneven", "odd", "none")}}
    first = mine()
    state = {**first, "model": first["model"] | (rest["model"] if rank == 0 else {})}
    checkpoint.load(state, folder / "c")
    for name, value in state["model"].items():
        assert torch.equal(value, whole_state()["model"][name]), name

    other = mine()
    other["model"]["more" if rank else "less"] = torch.zeros(2)
    other["model"][NAMES[rank]] = torch.zeros(3 + rank)
    try:
        checkpoint.load(other, folder / "c")
    except StateMismatch as error:
        said = str(error), error.missing, error.extra, error.different
    report = checkpoint.load(other, folder / "c", strict=False)
    if rank == 0:  # by itself, whatever the other does
        checkpoint.load(state, folder / "c", group=None, strict=False)
    return said, report, other["step"]


def load_over_a_save(mesh: Any, rank: int, folder: Path) -> tuple[str, str]:
    """Load into what is being saved, before the storage has any of it; digests: what was saved, what is stored."""
    import threading

    import elastictrain_checkpoint.torch as checkpoint
    from elastictrain_checkpoint import posix

    del rank
    loaded, create = threading.Event(), posix.PosixBackend.create

    def late(self: Any, path: str, blocks: Any) -> int:
        assert loaded.wait(60)
        return create(self, path, blocks)

    posix.PosixBackend.create = late  # type: ignore[method-assign]
    state = columns_of(mesh)
    wanted = digest_of(state)
    handle = checkpoint.async_save(state, folder / "d", step=1)
    checkpoint.load(state, folder / "c")
    assert digest_of(state) != wanted
    loaded.set()
    handle.result()
    checkpoint.load(state, folder / "d")
    return wanted, digest_of(state)


def test_what_is_being_saved_is_kept_from_a_load_into_it(tmp_path: Path) -> None:
    import elastictrain_checkpoint.torch as checkpoint

    checkpoint.save(whole_state(), tmp_path / "c", step=4)
    for wanted, stored in on_ranks(2, tmp_path, load_over_a_save):
        assert stored == wanted


def test_ranks_with_different_keys_load_strictly_what_they_have_between_them(tmp_path: Path) -> None:
    import elastictrain_checkpoint.torch as checkpoint

    checkpoint.save(whole_state(), tmp_path / "c", step=4)
    zero, one = on_ranks(2, tmp_path, stages)
    assert zero == one
    said, report, step = zero
    assert said[1] == ("model/less", "model/more")
    assert said[2] == ("model/uneven", "model/odd", "model/none")
    assert [sentence[:35] for sentence in said[3]] == [
        f"model/{NAMES[number]} is torch.float32"[:35] for number in range(2)
    ]
    assert "model/more is not in the checkpoint" in said[0]
    assert (report.missing, report.unexpected) == (list(said[1]), list(said[2]))
    assert step == 3


def mistakes(mesh: Any, rank: int, folder: Path) -> list[str]:
    """Of rank 1, in every phase of a load; rank 0 does what is right."""
    import torch

    import elastictrain_checkpoint.torch as checkpoint
    from elastictrain_checkpoint import CorruptData, Store
    from elastictrain_checkpoint.store import _backend

    inner: Any = _backend(str(folder / "c"), {})

    class Raises:
        def state_dict(self) -> Any:
            raise KeyError("gone")

        def load_state_dict(self, state: Any) -> None:
            raise KeyError("not mine")

    class TakesNothing(Raises):
        def state_dict(self) -> Any:
            return {"model": {"plain": torch.zeros(7, dtype=torch.int64)}}

    class Fails:
        def __getattr__(self, name: str) -> Any:
            if name.startswith("read_"):
                raise OSError(5, "the disk is gone")
            return getattr(inner, name)

    bad = Store(str(folder / "c"), backend=Fails()) if rank else folder / "c"
    meta = torch.zeros(2, device="meta")
    good = {"model": {name: torch.zeros(SIDE, SIDE) for name in NAMES}}
    calls: list[tuple[Any, dict[str, Any]]] = [
        (good, {"path": folder / "c", "step": 5, **({"checkpoint_id": "twice"} if rank else {})}),
        (good, {"path": folder / "c", "step": 5 + rank}),
        (good, {"path": folder / "nothing"}),
        (Raises() if rank else good, {"path": folder / "c", "step": 5}),
        ({"model": {NAMES[0]: meta}} if rank else good, {"path": folder / "c", "step": 5, "strict": False}),
        (good, {"path": bad, "step": 5, "strict": False}),
        (TakesNothing() if rank else good, {"path": folder / "c", "step": 5, "strict": False}),
        (good, {"path": folder / "c", "step": 6, "strict": False}),
    ]
    said = []
    for state, how in calls:
        try:
            checkpoint.load(state, **how)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
            said[-1] += f" in {error.file}" if isinstance(error, CorruptData) else ""
        else:
            said.append("loaded")
    return said


def test_a_mistake_of_one_rank_is_everybodys_error_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    import elastictrain_checkpoint.torch as checkpoint

    for step in (5, 6):
        checkpoint.save(whole_state(), tmp_path / "c", step=step)
    pack = next((tmp_path / "c").glob("step-*6/*/*.safetensors"))
    flipped = bytearray(pack.read_bytes())
    flipped[-100_000] ^= 1  # in what the last rank reads
    pack.write_bytes(flipped)
    zero, one = on_ranks(2, tmp_path, mistakes)
    place = tmp_path / "c"
    twice = f"path={place!r}, checkpoint_id='twice': give one of the two"
    assert (zero[0], one[0]) == (f"LoadFailed: rank 1: TypeError: {twice}", f"TypeError: {twice}")
    rest = "strict=True, only=None, renamed={}, 1 places"
    differ = f"rank 1 loads with step=6, {rest}, rank 0 with step=5, {rest}"
    assert zero[1] == one[1] == f"InvalidPiece: {differ}; expected the same everywhere"
    assert zero[2] == f"NoCheckpoint: {tmp_path / 'nothing'} has no checkpoint"
    assert one[2] == f"NoCheckpoint: rank 0: {tmp_path / 'nothing'} has no checkpoint"
    raised = "state_dict (Raises): state_dict() raised KeyError: 'gone'"
    assert (zero[3], one[3]) == (f"InvalidPiece: rank 1: {raised}", f"InvalidPiece: {raised}")
    assert zero[4] == one[4]
    assert zero[4].startswith("StateMismatch")
    assert f"model/{NAMES[0]} is on the meta device" in zero[4]
    assert "the disk is gone" in zero[5]
    assert {zero[5].partition(":")[0], one[5].partition(":")[0]} == {"OSError"}
    assert zero[6] == "LoadFailed: rank 1: KeyError: 'not mine'"
    assert one[6] == "KeyError: 'not mine'"
    for said in (zero[7], one[7]):
        assert said.startswith("CorruptData: ")
        offer = "the newest older step that is whole is 5 (pass step=5)"
        assert said.endswith(f"{offer} in {pack.relative_to(place)}")
