"""Held state: the same bits for every split of the blocks to holders, and as plain torch computes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from elastictrain.engine import parcels
from elastictrain.engine.parcels import Arrival, wrap
from elastictrain.engine.space import Space
from elastictrain.engine.worker_model import WorkerModel, build_initial
from elastictrain.errors import InternalError
from elastictrain.job import Job
from elastictrain.recipe import Recipe
from tests.unit.engine.optimizer_table import ELEMENT_WISE, MakeOptimizer, with_groups
from tests.unit.engine.worlds import Net, NetRecipe, adamw, differing, make_job, same_bits, started, state_of


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Averaged(NetRecipe):
    ema_decay = 0.9


def gradients_of(step: int, model: WorkerModel, blocks: Any) -> dict[int, torch.Tensor]:
    """The reduced gradient of every block: the same whoever asks."""
    found = {}
    for number in blocks:
        block = model.space.blocks[number]
        if block.entry.kind != "frozen":
            generator = torch.Generator().manual_seed(100 * step + number)
            found[number] = torch.randn(block.elements, generator=generator) * 10.0 ** (number % 5 - 2)
    return found


def advance(model: WorkerModel, steps: int, first: int = 1) -> None:
    for step in range(first, first + steps):
        gradients = gradients_of(step, model, model.held.masters)
        model.held.apply(gradients, scale=0.3, lanes=3, lr_factor=1.0 / step)


def check_splits(job: Job, holders: list[list[int]]) -> None:
    together = started(job)
    initial = state_of(together)
    advance(together, 3)
    expected = state_of(together)
    frozen = {key for key in expected if together.space.blocks[key[0]].entry.kind == "frozen"}
    moved = set(differing(initial, expected))
    assert {key for key in expected if key[1] in ("master", "ema")} - moved == frozen
    for blocks in holders:
        apart = started(job, blocks)
        advance(apart, 3)
        want = {key: value for key, value in expected.items() if key[0] in blocks}
        assert differing(want, state_of(apart)) == [], blocks


@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_any_split_of_blocks_to_holders_gives_the_same_bits(name: str) -> None:
    job = make_job(Averaged(ELEMENT_WISE[name]))
    count = len(Space(Net(), block_elements=None, whole_parameters=False).blocks)
    everything = list(range(count))
    check_splits(job, [everything[: count // 2], everything[::3], everything[3:7], [], [1], [7], [8]])


@pytest.mark.parametrize("name", ["adam", "adamw-foreach", "adamw-fused", "sgd-fused", "rmsprop"])
def test_blocks_that_threads_share_are_the_same_bits_in_every_split(name: str, threads: int) -> None:
    class Wide(Averaged):
        def model(self) -> torch.nn.Module:
            return torch.nn.Linear(300, 301)  # 90,300 elements: more than torch gives to one thread

    job = make_job(Wide(ELEMENT_WISE[name]), block_elements=65536, numerics={"threads": threads})
    check_splits(job, [[0], [1, 2]])


@pytest.mark.parametrize("loose_bytes", [0, parcels.LOOSE_BYTES, 1 << 30])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_blocks_that_moved_go_on_elsewhere_with_the_same_bits(
    name: str, whole: bool, dtype: str, loose_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parcels, "LOOSE_BYTES", loose_bytes)
    ownership = "whole" if whole else "sliced"
    job = make_job(Averaged(ELEMENT_WISE[name]), ownership=ownership, numerics={"compute_dtype": dtype})
    source = started(job)
    advance(source, 2)
    lo, hi = 1, len(source.space.blocks) - 2
    sent = wrap(source.held, lo, hi)
    assert bool(sent.pieces) == (loose_bytes < 1 << 30)
    target = started(job, range(hi, hi + 1))
    advance(target, 2)
    target.held.hold(range(lo, hi))
    arrival = Arrival(target.held, lo, hi, sent.header, sent.loose.numel())
    for here, there in zip(arrival.parcel.tensors, sent.tensors, strict=True):
        assert here.dtype == there.dtype == torch.uint8
        assert here.shape == there.shape
        here.copy_(there)
    assert arrival.parcel.digest() == sent.digest()
    arrival.unwrap()
    arrival.parcel.loose.zero_()  # nothing may still point into what came together
    everything = state_of(source)
    want = {key: value for key, value in everything.items() if lo <= key[0] <= hi}
    assert differing(want, state_of(target)) == []
    advance(source, 2, first=3)
    advance(target, 2, first=3)
    everything = state_of(source)
    want = {key: value for key, value in everything.items() if lo <= key[0] <= hi}
    assert differing(want, state_of(target)) == []


def test_packing_nothing_is_nothing() -> None:
    model = started(make_job(NetRecipe()))
    sent = wrap(model.held, 3, 3)
    assert sent.tensors == ()
    Arrival(model.held, 3, 3, sent.header, 0).unwrap()


def test_what_is_large_is_sent_from_where_it_lies_and_received_where_it_shall_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parcels, "LOOSE_BYTES", 0)
    model = started(make_job(Averaged()))
    advance(model, 1)
    sent = wrap(model.held, 0, 1)
    kept = dict(model.held.tensors(0))
    step = kept.pop("optim/step")
    assert [piece.data_ptr() for piece in sent.pieces] == [tensor.data_ptr() for tensor in kept.values()]
    assert sent.loose.numel() == step.numel() * step.element_size()
    filled = Arrival(model.held, 0, 1, sent.header, sent.loose.numel()).parcel.pieces
    there = [model.held.masters[0].data_ptr(), model.held.ema[0].data_ptr()]
    assert [piece.data_ptr() for piece in filled[:2]] == there


def test_a_block_of_another_shape_is_refused() -> None:
    model = started(make_job(NetRecipe()))
    header = json.dumps([{"master": {"dtype": "float32", "shape": [7, 7], "piece": 0}}]).encode()
    with pytest.raises(InternalError, match=r"block 0: master comes as .*\[7, 7\]"):
        Arrival(model.held, 0, 1, header, 0)


@pytest.mark.parametrize("name", [n for n in ELEMENT_WISE if n not in ("lion",)])
def test_blocks_step_as_the_same_optimizer_over_whole_parameters_does(name: str) -> None:
    """Against plain torch: groups, learning rates and schedule included."""
    model = started(make_job(NetRecipe(ELEMENT_WISE[name])))
    plain = Net()
    entries = {e.name: e for e in model.space.entries}
    params = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(model.flat.values[entries[n].start : entries[n].stop].view(p.shape))
    optimizer = ELEMENT_WISE[name](list(params.items()))
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(1, 4):
        gradients = gradients_of(step, model, model.held.masters)
        for n, p in params.items():
            blocks = [b.number for b in model.space.blocks if b.entry.name == n]
            p.grad = torch.cat([gradients[b] for b in blocks]).view(p.shape) * 0.3
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr / step
        optimizer.step()
        model.held.apply(gradients, scale=0.3, lanes=3, lr_factor=1.0 / step)
    for n, p in params.items():
        got = model.flat.values[entries[n].start : entries[n].stop].view(p.shape)
        torch.testing.assert_close(got, p.detach(), rtol=1e-6, atol=1e-6)


def test_buffers_take_the_mean_of_the_lanes_and_averages_follow_the_masters() -> None:
    model = started(make_job(Averaged(adamw)))
    before = state_of(model)
    gradients = gradients_of(1, model, model.held.masters)
    given = {n: g.clone() for n, g in gradients.items()}
    model.held.apply(gradients, scale=0.5, lanes=3, lr_factor=1.0)
    for number, master in model.held.masters.items():
        block = model.space.blocks[number]
        old = before[number, "master"]
        if block.entry.kind == "frozen":
            assert same_bits(master, old)
        elif block.entry.kind == "buffer":
            assert same_bits(master, old + given[number] * (1.0 / 3))
            assert number not in model.held.ema
        else:
            expected = torch.lerp(before[number, "ema"], master, 1.0 - 0.9)
            assert same_bits(model.held.ema[number], expected)
            assert master.grad is None


def test_apply_without_a_gradient_of_a_held_block_is_our_bug() -> None:
    model = started(make_job(NetRecipe()))
    before = state_of(model)
    gradients = gradients_of(1, model, model.held.masters)
    del gradients[2]
    with pytest.raises(InternalError, match=r"^apply without the reduced gradient of held blocks \[2\]$"):
        model.held.apply(gradients, scale=1.0, lanes=1, lr_factor=1.0)
    assert differing(before, state_of(model)) == []


def test_in_fp32_masters_are_the_parameters_and_in_bf16_they_are_published() -> None:
    for dtype in ("f32", "bf16"):
        model = started(make_job(NetRecipe(), numerics={"compute_dtype": dtype}))
        advance(model, 1)
        weight = model.flat.model.get_parameter("mid.weight")
        blocks = [b.number for b in model.space.blocks if b.entry.name == "mid.weight"]
        masters = torch.cat([model.held.masters[n] for n in blocks]).view(weight.shape)
        assert masters.dtype == torch.float32
        assert torch.equal(weight.float(), masters) == (dtype == "f32")
        for number in blocks:
            model.flat.publish(number, model.held.masters[number])
        assert same_bits(weight.detach(), masters.to(weight.dtype))


def test_what_is_let_go_leaves_no_state_behind() -> None:
    model = started(make_job(Averaged(adamw)))
    advance(model, 1)
    want = {key: value for key, value in state_of(model).items() if key[0] in (2, 5)}
    model.held.keep_only([2, 5])
    assert differing(want, state_of(model)) == []
    assert len(model.held.optimizer.state) == 2
    assert set(model.held.ema) == {2, 5}
    assert sum(len(g["params"]) for g in model.held.optimizer.param_groups) == 2


def test_starting_again_forgets_optimizer_state_and_takes_the_initial_values() -> None:
    job = make_job(Averaged(ELEMENT_WISE["adagrad"]))
    model = started(job)
    fresh = state_of(model)
    assert any(key[1] == "optim/sum" for key in fresh), "what the constructor makes belongs to the state"
    assert all(bool((v == 0.1).all()) for key, v in fresh.items() if key[1] == "optim/sum")
    advance(model, 2)
    initial = build_initial(model.recipe, job.seed)
    model.flat.read_initial(initial)
    model.held.start_from(initial)
    assert differing(fresh, state_of(model)) == []


def test_an_average_that_starts_from_a_state_without_one_starts_from_the_weights() -> None:
    source = started(make_job(NetRecipe()))
    advance(source, 1)
    target = started(make_job(Averaged(adamw)), [])
    target.held.hold([6])
    target.held.load(6, dict(source.held.tensors(6)))
    assert same_bits(target.held.ema[6], source.held.masters[6])


@pytest.mark.parametrize("make", [with_groups(torch.optim.Muon, lr=0.01), with_groups(torch.optim.Adafactor, lr=0.01)])
def test_whole_ownership_gives_optimizers_of_matrices_their_matrices(make: MakeOptimizer) -> None:
    class Matrices(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid = torch.nn.Linear(64, 80, bias=False)
            self.end = torch.nn.Linear(9, 7, bias=False)

    class MatrixRecipe(Recipe):
        def model(self) -> torch.nn.Module:
            return Matrices()

        def optimizer(self, params: Any) -> torch.optim.Optimizer:
            return make(params)

        def loss(self, model: Any, batch: Any) -> Any:
            raise NotImplementedError

    job = make_job(MatrixRecipe(), ownership="whole")
    together, apart = started(job), [started(job, [n]) for n in range(2)]
    plain = Matrices()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(together.flat.model.get_parameter(name))
    optimizer = make(list(plain.named_parameters()))
    for step in range(1, 4):
        gradients = gradients_of(step, together, range(2))
        for number, p in enumerate(plain.parameters()):
            p.grad = gradients[number].view(p.shape).clone() * 0.5
        optimizer.step()
        for model in apart:
            model.held.apply(gradients_of(step, model, model.held.masters), scale=0.5, lanes=1, lr_factor=1.0)
        together.held.apply(gradients, scale=0.5, lanes=1, lr_factor=1.0)
    expected = state_of(together)
    assert {k for m in apart for k in state_of(m)} == set(expected)
    for model in apart:
        assert differing({k: v for k, v in expected.items() if k[0] in model.held.masters}, state_of(model)) == []
    for name, p in plain.named_parameters():
        assert same_bits(together.flat.model.get_parameter(name).detach(), p.detach())
