"""The model in compute form: what a lane may change, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from elastictrain.engine.flat import FlatModel
from elastictrain.engine.space import Space
from elastictrain.errors import RecipeError
from tests.unit.engine.worlds import CPU, NetRecipe, Numbers, alone, make_job, same_bits, started


def flat_of(model: nn.Module, *, dtype: torch.dtype = torch.float32, rule: str = "same") -> FlatModel:
    space = Space(model, block_elements=None, whole_parameters=False)
    return FlatModel(model, space, {}, dtype=dtype, device=CPU, buffer_rule=lambda name: rule)


def test_parameters_are_views_of_one_tensor_and_keep_ties_and_values() -> None:
    torch.manual_seed(0)
    model = NetRecipe().model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = flat_of(model)
    for name, value in before.items():
        entry = flat.space.by_name[name]
        assert same_bits(flat.values[entry.start : entry.stop].view(entry.shape), value)
        assert flat.model.get_parameter(name).data_ptr() == flat.values[entry.start :].data_ptr()
    assert flat.model.get_parameter("out.weight") is flat.model.get_parameter("mid.weight")


def test_batch_norm_takes_the_mean_of_the_lanes_changes() -> None:
    worker = alone(make_job(NetRecipe(), lanes=3))
    flat = worker.model.flat
    committed = {n: flat.committed_buffer(n).clone() for n in ("norm.running_mean", "norm.running_var")}
    weight, bias = (flat.model.get_parameter(f"inp.{n}").detach().clone() for n in ("weight", "bias"))
    changes: dict[str, list[torch.Tensor]] = {name: [] for name in committed}
    for lane in range(3):
        h = (Numbers().batch(1, lane)["x"] @ weight.T + bias) * 0.5
        norm = nn.BatchNorm1d(70)
        norm(h)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        changes["norm.running_mean"].append(norm.running_mean - committed["norm.running_mean"])
        changes["norm.running_var"].append(norm.running_var - committed["norm.running_var"])
    worker.step(1)
    for name, old in committed.items():
        expected = old + torch.stack(changes[name]).mean(0)
        torch.testing.assert_close(flat.committed_buffer(name), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(flat.committed_buffer(name), old)
    assert int(flat.counters["norm.num_batches_tracked"]) == 1, "one step is one batch, however many lanes"
    assert int(flat.counters["seen"]) == 1
    worker.step(2)
    assert int(flat.counters["seen"]) == 2


class Odd(nn.Module):
    """A linear layer whose forward does something to its buffers."""

    mean: torch.Tensor
    count: torch.Tensor
    table: torch.Tensor

    def __init__(self, act: Callable[[Odd, torch.Tensor], None], count: torch.Tensor | None = None) -> None:
        super().__init__()
        self.act = act
        self.linear = nn.Linear(6, 4)
        self.register_buffer("mean", torch.full((3,), 0.3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64) if count is None else count)
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.act(self, x)
        return self.linear(x.to(self.linear.weight.dtype))  # type: ignore[no-any-return]


class OddRecipe(NetRecipe):
    def __init__(self, act: Callable[[Odd, torch.Tensor], None], rule: str, count: torch.Tensor | None = None) -> None:
        super().__init__(model=lambda: Odd(act, count))
        self.rule = rule

    def buffer_rule(self, name: str) -> str:  # type: ignore[override]
        return self.rule if name == "count" else "same"


def count_positive(model: Odd, x: torch.Tensor) -> None:
    model.count += int((x > 0).sum())


def test_a_counter_that_differs_by_lane_is_refused_by_name() -> None:
    worker = alone(make_job(OddRecipe(count_positive, "same")))
    with pytest.raises(RecipeError, match=r"^the integer buffer 'count' comes out differently.*return \"max\" for it"):
        worker.step(1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_the_largest_value_of_all_lanes_is_taken_where_the_recipe_says_so(dtype: torch.dtype) -> None:
    worker = alone(make_job(OddRecipe(count_positive, "max", torch.tensor([[1, 2]], dtype=dtype))))
    tally = worker.step(1)
    largest = max(int((Numbers().batch(1, lane)["x"] > 0).sum()) for lane in range(5))
    assert tally.largest == (1 + largest, 2 + largest)
    assert same_bits(worker.model.flat.counters["count"], torch.tensor([[1 + largest, 2 + largest]], dtype=dtype))


def write_table(model: Odd, x: torch.Tensor) -> None:
    model.table.add_(1)


def replace_table(model: Odd, x: torch.Tensor) -> None:
    model.table = torch.ones(2)


@pytest.mark.parametrize("act", [write_table, replace_table])
def test_a_forward_that_writes_what_is_no_state_is_refused(act: Callable[[Odd, torch.Tensor], None]) -> None:
    worker = alone(make_job(OddRecipe(act, "same")))
    with pytest.raises(
        RecipeError, match=r"^the forward writes the non-persistent buffer 'table'; register it with pe"
    ):
        worker.step(1)


def test_buffers_that_the_forward_replaces_count_like_those_it_writes() -> None:
    """`self.mean = …` is how many write a running mean; each lane starts from the committed value all the same."""

    def in_place(model: Odd, x: torch.Tensor) -> None:
        model.count += 1
        model.mean.mul_(0.5).add_(x.mean())

    def replace(model: Odd, x: torch.Tensor) -> None:
        model.count = model.count + 1
        model.mean = model.mean * 0.5 + x.mean()

    a, b = (alone(make_job(OddRecipe(act, "same"))) for act in (in_place, replace))
    for worker in (a, b):
        worker.step(1)
        worker.step(2)
    assert same_bits(a.model.flat.buffers, b.model.flat.buffers)
    assert int(b.model.flat.counters["count"]) == 2
    means = [[float(Numbers().batch(t, lane)["x"].mean()) for lane in range(5)] for t in (1, 2)]
    expected = (0.3 * 0.5 + sum(means[0]) / 5) * 0.5 + sum(means[1]) / 5
    assert b.model.flat.committed_buffer("mean").tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_a_buffer_that_changes_its_shape_is_refused() -> None:
    def grow(model: Odd, x: torch.Tensor) -> None:
        model.mean = torch.zeros(5)

    with pytest.raises(
        RecipeError, match=r"^the forward leaves the buffer 'mean' as \(5,\); expected shape \(3,\): a bu"
    ):
        alone(make_job(OddRecipe(grow, "same"))).step(1)


def test_a_buffer_that_nobody_writes_does_not_move_in_bf16() -> None:
    worker = alone(make_job(OddRecipe(lambda model, x: None, "same"), numerics={"compute_dtype": "bf16"}))
    worker.step(1)
    assert same_bits(worker.model.flat.committed_buffer("mean"), torch.full((3,), 0.3))


def test_lower_precision_leaves_complex_and_integer_tensors_alone() -> None:
    model = Odd(lambda model, x: None)
    turns = torch.polar(torch.ones(4), torch.arange(4.0))
    model.register_buffer("turns", turns.clone(), persistent=False)
    flat = flat_of(model, dtype=torch.bfloat16)
    live = dict(flat.model.named_buffers())
    assert same_bits(live["turns"], turns)
    assert live["count"].dtype == torch.int64
    assert live["mean"].dtype == torch.bfloat16
    assert flat.model.get_parameter("linear.weight").dtype == torch.bfloat16
    assert flat.buffers.dtype == torch.float32


def test_a_lane_that_is_thrown_away_leaves_no_trace() -> None:
    worker = alone(make_job(NetRecipe()))
    flat = worker.model.flat
    before = (flat.values.clone(), flat.buffers.clone(), {n: c.clone() for n, c in flat.counters.items()})
    first, _ = worker.compute(1)
    kept = {n: g.clone() for n, g in worker.runner.gradients(first).items()}
    again, _ = worker.compute(1)
    assert same_bits(flat.values, before[0])
    assert same_bits(flat.buffers, before[1])
    assert all(same_bits(flat.counters[n], c) for n, c in before[2].items())
    assert all(same_bits(g, kept[n]) for n, g in worker.runner.gradients(again).items())


def test_counters_have_one_hash_that_sees_their_values() -> None:
    flat = flat_of(NetRecipe().model())
    flat.before_lane()
    flat.after_lane(True)
    first = flat.counter_hash()
    assert 0 <= first < 2**63
    flat.before_lane()
    flat.model(torch.randn(3, 6))
    flat.after_lane(True)
    assert flat.counter_hash() != first


def test_a_lane_given_up_half_way_leaves_no_buffer_behind() -> None:
    """The forward has put another tensor in a buffer's place, and nobody has collected it: the redo starts clean."""
    model = started(make_job(NetRecipe(), lanes=2))
    module = model.flat.model
    name = next(entry.name for entry in model.space.entries if entry.kind == "buffer")
    buffer = dict(module.named_buffers())[name]
    owner, _, key = name.rpartition(".")
    model.flat.before_lane()
    module.get_submodule(owner)._buffers[key] = torch.full_like(buffer, 7.0)
    model.flat.before_lane()
    found = dict(module.named_buffers())[name]
    assert found is buffer
    assert torch.equal(found.reshape(-1), model.flat.committed_buffer(name))
