"""Restoring together: every member reads a share, all get what they hold, and all learn what one has found."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastictrain.engine.restoring import Company, Slots, _pack_found, open_together, restore, unreadable
from elastictrain.engine.saving import open_stores
from elastictrain.engine.worker_model import WorkerModel
from elastictrain.errors import CheckpointMismatch, ClusterError, CorruptCheckpoint
from elastictrain.job import Checkpoint, Copy
from elastictrain_checkpoint import Found, Store, copy_step, load, sidecar
from elastictrain_checkpoint.documents import pack_documents
from elastictrain_checkpoint.store import Store as AnyStore
from tests.unit.checkpoint.build import flip, make_state
from tests.unit.checkpoint.build import save as save_state
from tests.unit.engine.optimizer_table import ELEMENT_WISE, with_groups
from tests.unit.engine.test_saving import Averaged, save, trained
from tests.unit.engine.worlds import Mail, NetRecipe, adamw, differing, make_job, started, state_of

BLOCKS = 13
SPLITS = {
    "owners only": [range(5), range(5, 9), range(9, 13)],
    "with mirrors": [{*range(5), *range(9, 13)}, set(range(9)), set(range(5, 13))],
    "one holds nothing": [range(13), range(0), range(3, 6)],
    "two hold everything": [range(13), range(13)],
}


def together(split: list[Any], work: Callable[[Company], Any]) -> list[Any]:
    """What `work` gives or raises on every member of a company; each is a thread."""
    world = len(split)
    boxes: list[list[queue.SimpleQueue[Any]]] = [[queue.SimpleQueue() for _ in range(world)] for _ in range(world)]
    found: list[Any] = [None] * world

    def member(rank: int) -> None:
        company = Company(Mail(rank, boxes), range(world), split, lambda: None, lambda _: None)  # type: ignore[arg-type]
        try:
            found[rank] = work(company)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.fixture(autouse=True)
def small_hash_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these small packs have many."""
    for name in ("hashing", "commit"):
        monkeypatch.setattr(sys.modules[f"elastictrain_checkpoint.{name}"], "SUM_BLOCK_BYTES", 4096)


def restored(settings: Checkpoint, job: Any, split: list[Any]) -> list[tuple[WorkerModel, int]]:
    def work(company: Company) -> tuple[WorkerModel, int]:
        model = started(job, split[company.rank])
        for master in model.held.masters.values():
            master.zero_()
        reader = open_together(settings, 2, company)
        restore(model.flat, model.held, reader, company)
        return model, reader.read_bytes

    found = together(split, work)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


@pytest.mark.parametrize("name", SPLITS)
def test_everybody_has_what_it_holds_and_storage_is_read_once(name: str, tmp_path: Path) -> None:
    job = make_job(Averaged(), lanes=2, block_elements=4096)
    model = trained(job)
    assert len(model.space.blocks) == BLOCKS
    settings = save(model, tmp_path, [[(0, 4)], [(4, 13)]])
    split = SPLITS[name]
    found = restored(settings, job, split)
    expected = state_of(model)
    for (other, _), blocks in zip(found, split, strict=True):
        want = {key: value for key, value in expected.items() if key[0] in blocks}
        assert differing(want, state_of(other)) == []
        assert differing(model.flat.counters, other.flat.counters) == []
    manifest = load(Store(settings.path), 2)
    assert manifest.block_bytes == 4096
    read = sum(size for _, size in found)
    assert read <= manifest.size_bytes + (len(split) - 1) * manifest.block_bytes
    assert read >= 0.9 * manifest.size_bytes


@pytest.mark.parametrize("cls", ["Muon", "Adafactor"])
def test_state_of_whole_matrices_comes_to_all_that_hold_them(cls: str, tmp_path: Path) -> None:
    import torch
    from torch import nn

    class Matrix(NetRecipe):
        def model(self) -> nn.Module:
            return nn.Linear(6, 70, bias=False)

        def loss(self, model: nn.Module, batch: Any) -> Any:
            return model(batch["x"]).square().mean(-1).sum(), batch["x"].shape[0]

    job = make_job(Matrix(with_groups(getattr(torch.optim, cls), lr=0.01)), lanes=2, ownership="whole")
    model = trained(job)
    found = restored(save(model, tmp_path), job, [range(1), range(1)])
    for other, _ in found:
        assert differing(state_of(model), state_of(other)) == []


def test_numbers_of_the_optimizer_come_with_the_manifest(tmp_path: Path) -> None:
    job = make_job(NetRecipe(ELEMENT_WISE["lion"]), lanes=2)
    model = trained(job)
    for other, _ in restored(save(model, tmp_path), job, [range(13), range(13)]):
        assert differing(state_of(model), state_of(other)) == []


def test_an_average_that_nobody_keeps_is_not_read(tmp_path: Path) -> None:
    settings = stored(tmp_path)
    tensors = open_together(settings, 2, None).tensors
    names = {}
    for recipe in (Averaged(), NetRecipe()):
        model = started(make_job(recipe, lanes=2, block_elements=4096))
        names[type(recipe)] = {slot.name for slot in Slots(model.flat, model.held, tensors).of(range(BLOCKS))}
    assert names[Averaged] == set(tensors) - {"model/out.weight"}
    assert names[NetRecipe] == {name for name in names[Averaged] if not name.startswith("ema/")}


def test_what_does_not_fit_is_said_by_everybody(tmp_path: Path) -> None:
    settings = save(trained(make_job(NetRecipe(ELEMENT_WISE["sgd-momentum"]), lanes=2)), tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"optimizer AdamW needs exp_avg"):
        restored(settings, make_job(NetRecipe(adamw), lanes=2), [range(13), range(13)])


def outcome(settings: Checkpoint) -> list[Any]:
    job = make_job(Averaged(), lanes=2, block_elements=4096)

    def work(company: Company) -> None:
        model = started(job, range(13))
        try:
            restore(model.flat, model.held, open_together(settings, 2, company), company)
        except OSError as error:
            raise unreadable(settings, 2, error) from error

    return together([range(13)] * 3, work)


def stored(tmp_path: Path) -> Checkpoint:
    return save(trained(make_job(Averaged(), lanes=2, block_elements=4096)), tmp_path)


def test_a_flipped_byte_is_met_by_one_and_known_to_all(tmp_path: Path) -> None:
    settings = stored(tmp_path)
    pack = max(Path(settings.path).rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    raw = bytearray(pack.read_bytes())
    raw[-5] ^= 1
    pack.write_bytes(raw)
    errors = outcome(settings)
    assert [type(error) for error in errors] == [CorruptCheckpoint] * 3
    assert all(pack.name in str(error) for error in errors)
    assert sum("could not read its share" in str(error) for error in errors) == 2, "one has read it"


def test_a_manifest_that_cannot_be_believed_is_known_to_all(tmp_path: Path) -> None:
    settings = stored(tmp_path)
    path = Path(settings.path) / "step-00000002" / "MANIFEST.json"
    path.write_bytes(path.read_bytes().replace(b'"step":2', b'"step":3', 1))
    errors = outcome(settings)
    assert [type(error) for error in errors] == [CorruptCheckpoint] * 3
    assert len({str(error) for error in errors}) == 1
    assert str(errors[0]).startswith("checkpoint step 2 in ")


def test_the_manifest_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stored(tmp_path)
    asked = []
    read_all = AnyStore.read_all

    def counting(self: AnyStore, path: str) -> bytes:
        asked.append(path)
        return read_all(self, path)

    monkeypatch.setattr(AnyStore, "read_all", counting)
    assert outcome(settings) == [None] * 3
    assert asked == ["step-00000002/MANIFEST.json"]


@pytest.mark.parametrize("call", ["read_all", "read_parts"])
def test_storage_that_fails_is_no_damage(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a hiccup of the network would send a run back further than it has to go."""
    settings = stored(tmp_path)

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError("the network is down")

    once = threading.Lock()
    real = getattr(AnyStore, call)

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        return failing() if once.acquire(blocking=False) else real(*args, **kwargs)

    monkeypatch.setattr(AnyStore, call, fails_once)
    errors = outcome(settings)
    assert [type(error) for error in errors] == [ClusterError] * 3
    assert all("cannot be read from checkpoint.path=" in str(error) for error in errors)
    assert all("the network is down" in str(error) for error in errors)


def test_the_documents_come_from_the_first_place_that_has_them_whole(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sidecar, "TABLE_CHUNKS", 1)
    settings = Checkpoint(path=str(tmp_path / "near"), copy_to=[Copy(path=str(tmp_path / "far"))])
    near, far = open_stores(settings)
    manifest = save_state(near, make_state(), step=2)
    assert manifest.chunks is not None
    copy_step(near, far, 2)
    flip(near, f"step-00000002/{manifest.chunks.path}", 100)
    found = Found(manifest, (near, far))
    assert _pack_found(settings, found) == bytes([2, 0, 1]) + pack_documents(far, manifest)
