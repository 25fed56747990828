"""From live blocks to a checkpoint and back, through any split, with one digest."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastictrain.engine import saving
from elastictrain.engine.restoring import restore
from elastictrain.engine.saver import Saver
from elastictrain.engine.saving import combine_shares, digest_share, open_checkpoint, owned_state
from elastictrain.engine.worker_model import WorkerModel, build
from elastictrain.errors import CheckpointMismatch, CorruptCheckpoint
from elastictrain.job import Checkpoint, Job
from elastictrain.layout import Shard
from elastictrain_checkpoint import ITEM_BYTES, Store, digest, load, verify
from tests.unit.engine.optimizer_table import ELEMENT_WISE, with_groups
from tests.unit.engine.worlds import (
    CPU,
    Net,
    NetRecipe,
    adamw,
    alone,
    committed,
    differing,
    make_job,
    started,
    state_of,
)


class Averaged(NetRecipe):
    ema_decay = 0.9


def trained(job: Job) -> WorkerModel:
    worker = alone(job)
    for step in (1, 2):
        worker.step(step)
    return worker.model


def pieces_of(model: WorkerModel, shards: list[list[tuple[int, int]]]) -> list[saving.Owned]:
    """What each of several workers would contribute; the first one has the counters."""
    return [
        owned_state(model.flat, model.held, [Shard(lo, hi, 0, None) for lo, hi in mine], with_counters=rank == 0)
        for rank, mine in enumerate(shards)
    ]


def store_of(path: Path) -> Checkpoint:
    return Checkpoint(path=str(path / "ckpt"))


def save(
    model: WorkerModel,
    path: Path,
    shards: list[list[tuple[int, int]]] | None = None,
    step: int = 2,
    generation: int = 1,
) -> Checkpoint:
    settings = store_of(path)
    saver = Saver(settings)
    owned = pieces_of(model, shards or [[(0, len(model.space.blocks))]])
    shares = [saver.begin(o, step=step, generation=generation, worker=w).share() for w, o in enumerate(owned)]
    where = committed(
        saver,
        shares,
        step=step,
        generation=generation,
        tree={"step": step},
        aliases=model.space.aliases,
        info={"world": len(shares)},
    )
    assert where.endswith(f"step-{step:08d}")
    return settings


SPLITS: list[list[list[tuple[int, int]]]] = [
    [[(0, 13)]],
    [[(0, 8)], [(8, 13)]],
    [[(7, 8), (12, 13)], [(0, 7)], [], [(8, 12)]],
]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adagrad", "asgd"])
def test_any_split_writes_and_any_split_reads_the_same_bits(name: str, dtype: str, tmp_path: Path) -> None:
    job = make_job(Averaged(ELEMENT_WISE[name]), numerics={"compute_dtype": dtype}, lanes=2)
    model = trained(job)
    expected = state_of(model)
    for number, shards in enumerate(SPLITS):
        reader = open_checkpoint(save(model, tmp_path / str(number), shards), 2)
        for blocks in (range(13), range(5, 9), [12]):
            other = started(job, blocks)
            restore(other.flat, other.held, reader)
            want = {key: value for key, value in expected.items() if key[0] in blocks}
            assert differing(want, state_of(other)) == []
            assert differing(model.flat.counters, other.flat.counters) == []
            for block in (b for b in other.space.blocks if b.number in blocks and b.entry.kind != "buffer"):
                assert torch.equal(
                    other.flat.values[block.start : block.stop], model.flat.values[block.start : block.stop]
                )


def test_one_digest_for_every_split_live_and_stored(tmp_path: Path) -> None:
    model = trained(make_job(Averaged(), lanes=2))
    found = set()
    for number, shards in enumerate(SPLITS):
        owned = pieces_of(model, shards)
        found.add(combine_shares([digest_share(o) for o in owned], model.space.aliases))
        settings = save(model, tmp_path / str(number), shards)
        store = Store(settings.path)
        manifest = load(store, 2)
        found |= {manifest.digest, digest(store, manifest)}
    assert len(found) == 1
    with torch.no_grad():
        model.held.masters[8][-1] += 1e-3
    owned = pieces_of(model, SPLITS[0])
    assert combine_shares([digest_share(o) for o in owned], model.space.aliases) not in found


def test_training_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    job = make_job(Averaged(ELEMENT_WISE["lion"]), lanes=2)
    straight, other = alone(job), alone(job)
    for step in (1, 2):
        straight.step(step)
    reader = open_checkpoint(save(straight.model, tmp_path), 2)
    restore(other.model.flat, other.model.held, reader)
    for step in (3, 4):
        straight.step(step)
        other.step(step)
    assert differing(state_of(straight.model), state_of(other.model)) == []
    assert differing(straight.model.flat.counters, other.model.flat.counters) == []


@pytest.mark.parametrize("cls", [torch.optim.Muon, torch.optim.Adafactor])
def test_state_of_whole_matrices_is_stored_in_its_own_shape(cls: Any, tmp_path: Path) -> None:
    make = with_groups(cls, lr=0.01)

    class Matrix(NetRecipe):
        def model(self) -> nn.Module:
            return nn.Linear(6, 9, bias=False)

    job = make_job(Matrix(make), ownership="whole", lanes=2)
    model = trained(job)
    reader = open_checkpoint(save(model, tmp_path), 2)
    other = started(job)
    restore(other.flat, other.held, reader)
    assert differing(state_of(model), state_of(other)) == []


def test_names_say_what_is_stored_and_numbers_travel_in_the_tree(tmp_path: Path) -> None:
    model = trained(make_job(Averaged(ELEMENT_WISE["lion"]), lanes=2))
    reader = open_checkpoint(save(model, tmp_path), 2)
    assert reader.tensors["model/gain"] == ("F32", ())
    assert reader.tensors["model/frozen"] == ("F32", (3,))
    assert reader.tensors["buffer/norm.running_var"] == ("F32", (70,))
    assert reader.tensors["counter/seen"] == ("I64", ())
    assert reader.tensors["ema/mid.weight"] == ("F32", (70, 70))
    assert reader.tensors["optim/mid.weight/moment"] == ("F32", (70, 70))
    assert reader.tree["numbers"]["optim/mid.weight/count"] == 2
    assert reader.tree["numbers"]["optim/gain/rate"] == 0.1 / 3 / 3


# --- what does not fit ---


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 71)
        self.extra = nn.Parameter(torch.zeros(2))
        del self.unused


def test_a_model_that_differs_is_told_by_name_and_shape(tmp_path: Path) -> None:
    reader = open_checkpoint(save(trained(make_job(NetRecipe(), lanes=2)), tmp_path), 2)
    other = started(make_job(NetRecipe(model=Wider), lanes=2))
    before = state_of(other)
    with pytest.raises(CheckpointMismatch) as error:
        restore(other.flat, other.held, reader)
    lines = str(error.value).splitlines()
    assert lines[0] == "the checkpoint does not belong to this job:"
    assert lines[1:-1] == [
        "  model/extra [2] is in the model but not in the checkpoint",
        "  model/unused [5] is in the checkpoint but not in the model",
        "  model/inp.weight has shape [71, 6] in the model and [70, 6] in the checkpoint",
        "  model/inp.bias has shape [71] in the model and [70] in the checkpoint",
    ]
    assert "checkpoint.path" in lines[-1]
    assert differing(before, state_of(other)) == [], "nothing was touched"


def test_many_differences_are_counted(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.list = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(30))

    reader = open_checkpoint(save(trained(make_job(NetRecipe(), lanes=2)), tmp_path), 2)
    other = started(make_job(NetRecipe(model=Many), lanes=2))
    with pytest.raises(CheckpointMismatch, match=r"\n  and \d\d more\n"):
        restore(other.flat, other.held, reader)


def test_another_optimizer_is_told_before_the_first_step(tmp_path: Path) -> None:
    reader = open_checkpoint(save(trained(make_job(NetRecipe(ELEMENT_WISE["sgd-momentum"]), lanes=2)), tmp_path), 2)
    other = started(make_job(NetRecipe(adamw), lanes=2))
    with pytest.raises(
        CheckpointMismatch,
        match=r"optimizer AdamW needs exp_avg, exp_avg_sq, step for gain, the checkpoint has momentum_buffer\n",
    ):
        restore(other.flat, other.held, reader)


def test_weights_alone_are_a_fresh_start(tmp_path: Path) -> None:
    model = trained(make_job(NetRecipe(ELEMENT_WISE["sgd"]), lanes=2))
    reader = open_checkpoint(save(model, tmp_path), 2)
    assert not any(name.startswith(("optim/", "ema/")) for name in reader.tensors)
    other = started(make_job(Averaged(adamw), lanes=2))
    restore(other.flat, other.held, reader)
    for number, master in other.held.masters.items():
        assert torch.equal(master, model.held.masters[number])
        assert number not in other.held.ema or torch.equal(other.held.ema[number], master)
    assert not other.held.optimizer.state


def test_a_flipped_byte_is_named_with_tensor_and_file(tmp_path: Path) -> None:
    model = trained(make_job(NetRecipe(), lanes=2))
    settings = save(model, tmp_path)
    pack = max((p for p in Path(settings.path).rglob("*.safetensors")), key=lambda p: p.stat().st_size)
    raw = bytearray(pack.read_bytes())
    raw[-5] ^= 1
    pack.write_bytes(raw)
    other = started(make_job(NetRecipe(), lanes=2))
    with pytest.raises(CorruptCheckpoint) as error:
        restore(other.flat, other.held, open_checkpoint(settings, 2))
    assert pack.name in str(error.value)
    assert any(name in str(error.value) for name in open_checkpoint(settings, 2).tensors)


def test_a_step_that_is_not_there_is_an_error_with_step_and_path(tmp_path: Path) -> None:
    settings = save(trained(make_job(NetRecipe(), lanes=2)), tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"^checkpoint step 9 in .*ckpt: "):
        open_checkpoint(settings, 9)


def test_the_same_step_again_after_going_back_replaces_it(tmp_path: Path) -> None:
    job = make_job(NetRecipe(), lanes=2)
    model = trained(job)
    save(model, tmp_path)
    with torch.no_grad():
        model.held.masters[2].add_(1.0)
    settings = save(model, tmp_path)
    other = started(job)
    restore(other.flat, other.held, open_checkpoint(settings, 2))
    assert differing(state_of(model), state_of(other)) == []


def test_a_later_generation_takes_the_place_of_a_step_and_of_its_packs(tmp_path: Path) -> None:
    model = trained(make_job(NetRecipe(), lanes=2))
    settings = save(model, tmp_path, SPLITS[1])
    before = {path.name for path in Path(settings.path).rglob("*.safetensors")}
    with torch.no_grad():
        model.held.masters[2].add_(1.0)
    save(model, tmp_path, SPLITS[2], generation=2)
    step = Path(settings.path) / "step-00000002"
    assert sorted(path.name for path in step.iterdir()) == ["MANIFEST.json", "g000002"]
    assert not before & {path.name for path in step.rglob("*.safetensors")}
    store = Store(settings.path)
    manifest = load(store, 2)
    assert manifest.generation == 2
    assert verify(store, manifest) == []


# --- few files ---


class Wide(nn.Module):
    """Tensors of many blocks, in 1, 2 and 3 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(500, 300))
        self.line = nn.Parameter(torch.randn(50_000))
        self.cube = nn.Parameter(torch.randn(20, 60, 70))
        self.last = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.rows.mean() + self.line.mean() + self.cube.mean()
        return self.last(x) * weights  # type: ignore[no-any-return]


def per_block(owned: list[saving.Owned]) -> list[saving.Owned]:
    """The same state with a piece for every buffer."""
    found = []
    for one in owned:
        split = saving.Owned(numbers=one.numbers)
        for piece in one.pieces:
            at = piece.start
            for buffer in piece.data:
                split.pieces.append(replace(piece, start=at, data=buffer))
                at += len(buffer) // ITEM_BYTES[piece.dtype]
        found.append(split)
    return found


def test_a_worker_writes_a_handful_of_packs_however_many_blocks_it_owns(tmp_path: Path) -> None:
    job = make_job(Averaged(model=Wide), lanes=2)
    model = trained(job)
    last = len(model.space.blocks)
    assert last > 60
    # One worker owns it all; three own runs that end inside tensors; one owns two shards that touch, in either order.
    splits: list[list[list[tuple[int, int]]]] = [
        [[(0, last)]],
        [[(0, 17)], [(17, 55)], [(55, last)]],
        [[(30, 60), (5, 30)], [(0, 5), (60, last)]],
    ]
    digests = set()
    for number, shards in enumerate(splits):
        owned = pieces_of(model, shards)
        for mine in owned:
            names = [piece.name for piece in mine.pieces]
            assert len(names) == len(set(names)), "one piece for each tensor"
        digests |= {
            combine_shares([digest_share(o) for o in kind], model.space.aliases) for kind in (owned, per_block(owned))
        }
        settings = save(model, tmp_path / str(number), shards)
        store = Store(settings.path)
        manifest = load(store, 2)
        packs = Counter(Path(path).name.split("-")[0] for path in manifest.paths)
        assert max(packs.values()) <= 4
        assert sum(packs.values()) == len(list(Path(settings.path).rglob("*.safetensors")))
        digests |= {manifest.digest, digest(store, manifest)}
        other = started(job)
        restore(other.flat, other.held, open_checkpoint(settings, 2))
        assert differing(state_of(model), state_of(other)) == []
    assert len(digests) == 1
    assert len(load(Store(str(tmp_path / "0" / "ckpt")), 2).paths) == 1


def test_blocks_of_one_tensor_with_others_between_them_are_pieces_apart(tmp_path: Path) -> None:
    job = make_job(NetRecipe(model=Wide), lanes=2)
    model = trained(job)
    last = len(model.space.blocks)
    shards = [[(0, 5), (10, 20)], [(5, 10), (20, last)]]
    starts = [[p.start // 4096 for p in o.pieces if p.name == "model/rows"] for o in pieces_of(model, shards)]
    assert starts == [[0, 10], [5, 20]]
    other = started(job)
    restore(other.flat, other.held, open_checkpoint(save(model, tmp_path, shards), 2))
    assert differing(state_of(model), state_of(other)) == []


def test_pieces_point_at_live_memory() -> None:
    model = trained(make_job(Averaged(model=Wide), lanes=2))
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    [rows] = [piece for piece in owned.pieces if piece.name == "model/rows"]
    blocks = [b.number for b in model.space.blocks if b.entry.name == "rows"]
    assert len(rows.data) == len(blocks)
    with torch.no_grad():
        for number in blocks:
            model.held.masters[number].fill_(number + 0.5)
    for number, buffer in zip(blocks, rows.data, strict=True):
        assert bytes(buffer) == saving.as_buffer(model.held.masters[number]).tobytes()


def test_a_model_without_blocks_held_stores_and_restores_nothing(tmp_path: Path) -> None:
    job = make_job(NetRecipe(), lanes=2)
    empty = build(job, CPU)
    owned = owned_state(empty.flat, empty.held, [], with_counters=False)
    assert owned.pieces == []
    assert owned.numbers == {}
    restore(empty.flat, empty.held, open_checkpoint(save(trained(job), tmp_path), 2))
    assert int(empty.flat.counters["seen"]) == 2
