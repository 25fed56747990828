"""One step: against plain torch, over worlds in one process, its random numbers and its bad losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastictrain.engine.one_lane import cut_batch, lane_seed, seed_everything
from elastictrain.errors import RecipeError
from elastictrain.layout import Layout, Shard
from tests.unit.engine.worlds import (
    Net,
    NetRecipe,
    Numbers,
    Worker,
    adamw,
    alone,
    differing,
    make_job,
    run_world,
    same_bits,
    state_of,
)


def plain_sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("make", [adamw, plain_sgd])
def test_one_lane_is_an_ordinary_training_loop(make: Any) -> None:
    """Weight 1 and no clipping: nothing is rounded that a plain loop does not round."""

    class Mean(NetRecipe):
        def loss(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return (model(batch["x"]) - batch["y"]).square().mean()  # type: ignore[no-any-return]

    worker = alone(make_job(Mean(make), lanes=1))
    torch.manual_seed(0)
    model = Net()
    initial = model.mid.weight.detach().clone()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for step in range(1, 6):
        batch = Numbers().batch(step, 0)
        optimizer.zero_grad()
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        loss.backward()
        model.unused.grad = torch.zeros_like(model.unused)
        optimizer.step()
        assert worker.step(step).loss == float(loss.detach())
    assert not torch.equal(model.mid.weight, initial)
    plain = dict(model.named_parameters()) | dict(model.named_buffers())
    ours = dict(worker.model.flat.model.named_parameters())
    for name, value in ours.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-7)
    exact = [name for name, value in ours.items() if same_bits(value.detach(), plain[name].detach())]
    assert exact == list(ours)
    for name in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(worker.model.flat.committed_buffer(name), plain[name], rtol=1e-6, atol=1e-7)


def test_clipping_is_that_of_torch() -> None:
    worker = alone(make_job(NetRecipe(plain_sgd), lanes=3, clip_grad_norm=0.01))
    torch.manual_seed(0)
    model = Net()
    optimizer = plain_sgd([p for p in model.parameters() if p.requires_grad])
    batches = [Numbers().batch(1, lane) for lane in range(3)]
    total = sum(NetRecipe().loss(model, b)[0] for b in batches) / 18
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    tally = worker.step(1)
    assert tally.norm / tally.weight == pytest.approx(float(norm), rel=1e-5)
    assert tally.loss == pytest.approx(float(total.detach()), rel=1e-6)
    for name, value in worker.model.flat.model.named_parameters():
        torch.testing.assert_close(value, dict(model.named_parameters())[name], rtol=1e-5, atol=1e-7)


def test_micro_batches_of_a_mean_are_the_mean_of_their_means() -> None:
    class Mean(NetRecipe):
        def model(self) -> torch.nn.Module:
            return torch.nn.Linear(6, 1)

        def loss(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return (model(batch["x"]) - batch["y"]).square().mean()  # type: ignore[no-any-return]

    one, three = (alone(make_job(Mean(), lanes=2, micro_batches=m)) for m in (1, 3))
    a, b = one.step(1), three.step(1)
    assert a.weights == b.weights == (1.0, 1.0)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert a.norm == pytest.approx(b.norm, rel=1e-5)
    torch.testing.assert_close(one.model.flat.values, three.model.flat.values, rtol=1e-5, atol=1e-6)


# --- worlds ---

BLOCKS = 13
LAYOUTS = {
    "two, uneven": Layout(1, (0, 1), ((0,), (1, 2, 3, 4)), (Shard(0, 8, 1, 0), Shard(8, BLOCKS, 0, 1)), 5),
    "three, lanes in rounds": Layout(
        1, (4, 2, 9), ((0, 3), (1, 4), (2,)), (Shard(0, 2, 9, 4), Shard(2, 7, 4, 2), Shard(7, BLOCKS, 2, 9)), 5
    ),
    "several shards, and one who owns nothing": Layout(
        1, (0, 1, 2), ((2, 3), (0, 1), (4,)), (Shard(0, 3, 0, 1), Shard(3, 9, 1, 2), Shard(9, BLOCKS, 0, None)), 5
    ),
    "a shard for every block, also for one of a single number, which no slices can share": Layout(
        1, (0, 1, 2), ((2,), (0, 3), (1, 4)), tuple(Shard(n, n + 1, n % 3, (n + 1) % 3) for n in range(BLOCKS)), 5
    ),
}


def everything(workers: list[Worker]) -> dict[Any, Any]:
    """All state of a world, asserting that owner and mirror agree and that all see the same parameters."""
    found: dict[Any, Any] = {}
    for worker in workers:
        for key, value in state_of(worker.model).items():
            assert key not in found or same_bits(found[key], value), key
            found[key] = value
        found[worker.runner.worker, "values"] = worker.model.flat.values.clone()
        assert same_bits(worker.model.flat.values, workers[0].model.flat.values)
        assert same_bits(worker.model.flat.buffers, workers[0].model.flat.buffers)
        assert [t.norm for t in worker.tallies] == [t.norm for t in workers[0].tallies]
    return {key: value for key, value in found.items() if key[1] != "values"}


class Averaged(NetRecipe):
    ema_decay = 0.99


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_world_and_both_memory_choices_give_the_same_bits(dtype: str) -> None:
    job = make_job(Averaged(), micro_batches=3, clip_grad_norm=0.5, numerics={"compute_dtype": dtype})
    reference = alone(job)
    for step in (1, 2, 3):
        reference.step(step)
    assert len(reference.model.space.blocks) == BLOCKS
    expected = everything([reference])
    for name, layout in LAYOUTS.items():
        for choice in ("sum", "hand_over"):
            world = run_world(job.model_copy(update={"gradients": choice}), layout, 3)
            assert differing(expected, everything(world)) == [], (name, choice)
            assert [t.norm for t in world[0].tallies] == [t.norm for t in reference.tallies]
            assert [t.losses for t in world[0].tallies] == [t.losses for t in reference.tallies]
            assert same_bits(world[0].model.flat.values, reference.model.flat.values)


# --- random numbers ---


def test_lane_seeds_are_what_they_always_were() -> None:
    assert [lane_seed(*key) for key in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (-7, 10**6, 4095))] == GOLDEN
    seeds = {lane_seed(seed, step, lane) for seed in range(5) for step in range(50) for lane in range(20)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)


GOLDEN: list[int] = [0, 8754807190040728371, 1451402981258380768, 8147104208329303767, 6633012727756721597]


def test_dropout_differs_by_lane_and_step_and_repeats() -> None:
    class Masks(NetRecipe):
        def __init__(self) -> None:
            super().__init__(model=lambda: Net(dropout=0.5))
            self.seen: list[torch.Tensor] = []

        def loss(self, model: Any, batch: Any) -> Any:
            self.seen.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
            return super().loss(model, batch)

    def masks(steps: list[int], seed: int = 0) -> list[torch.Tensor]:
        recipe = Masks()
        worker = alone(make_job(recipe, lanes=3, seed=seed))
        for step in steps:
            worker.compute(step)
        return recipe.seen

    first = masks([1, 2])
    assert len({tuple(m.tolist()) for m in first}) == 6
    assert [m.tolist() for m in masks([2])] == [m.tolist() for m in first[3:]]
    assert [m.tolist() for m in masks([1], seed=1)] != [m.tolist() for m in first[:3]]


# --- losses ---


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, r"got NoneType$"),
        (1.5, r"got float$"),
        (torch.zeros(3), r"got Tensor\(3,\)$"),
        ((torch.zeros(()), 1.0, 2.0), r"got tuple$"),
        ((torch.zeros(2, 1), 1.0), r"got Tensor\(2, 1\)$"),
    ],
)
def test_a_loss_that_is_none_is_refused(value: Any, got: str, micros: int) -> None:
    class Wrong(NetRecipe):
        def loss(self, model: Any, batch: Any) -> Any:
            return value

    with pytest.raises(RecipeError, match=rf"^recipe\.loss must return a scalar tensor \(a mean\) or a pair.*{got}"):
        alone(make_job(Wrong(), micro_batches=micros)).step(1)


def test_a_lane_without_a_finite_loss_is_named_and_weights_may_be_tensors() -> None:
    class Bad(NetRecipe):
        calls = 0

        def loss(self, model: Any, batch: Any) -> Any:
            self.calls += 1
            loss, weight = super().loss(model, batch)
            return loss * (math.nan if self.calls == 3 else 1.0), torch.tensor(weight)

    _, tally = alone(make_job(Bad())).compute(1)
    assert tally.bad_lanes == (2,)
    assert tally.weights == (6.0,) * 5


def test_micro_batches_are_equal_runs_of_samples() -> None:
    batch = {"x": torch.arange(12).view(6, 2), "y": torch.arange(6)}
    assert cut_batch(batch, 0, 1) is batch
    parts = [cut_batch(batch, i, 3) for i in range(3)]
    assert [p["y"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([p["x"] for p in parts]), batch["x"])


def test_seeding_is_that_of_torch_without_its_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    asked: list[Any] = []
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda.random, "_lazy_call", lambda *call, **_: asked.append(call))
        torch.manual_seed(6)
        assert asked, "torch does what this is about"
        asked.clear()
    seed_everything(5)
    assert torch.equal(torch.rand(3), expected)
    assert asked == []


@pytest.mark.parametrize(
    ("waited", "asking_s", "lost"),
    [
        ({}, 0.5, {"call": 0.5}),
        ({"decode": 0.25}, 0.5, {"decode": 0.25, "call": 0.25}),
        ({"decode": 0.5}, 0.5, {"decode": 0.5}),
        ({"decode": 0.25, "other": 0.5}, 0.5, {"decode": 0.25, "other": 0.5}),
    ],
)
def test_a_lane_loses_all_the_time_of_the_call_to_its_data(
    monkeypatch: pytest.MonkeyPatch, waited: dict[str, float], asking_s: float, lost: dict[str, float]
) -> None:
    """Also that of a batch which lies ready, for which nobody waited."""
    now_s = 0.0

    class Slow(Numbers):
        def batch(self, step: int, lane: int) -> Mapping[str, torch.Tensor]:
            nonlocal now_s
            now_s += asking_s
            batch = Told(super().batch(step, lane))
            batch.waited = waited
            return batch

    class Told(dict[str, torch.Tensor]):
        waited: dict[str, float]

    monkeypatch.setattr("elastictrain.engine.one_lane.time", SimpleNamespace(perf_counter=lambda: now_s))
    worker = alone(make_job(NetRecipe(), lanes=1), Slow())
    worker.compute(1)
    assert worker.runner.data_wait == lost
