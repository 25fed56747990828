"""Sums change with every bit, do not depend on the layout, and a guard sees what changes between two applies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.engine.guard import Guard
from elastictrain.engine.integrity import (
    LaneSum,
    block_sums,
    device_sum,
    device_sums,
    held_sums,
    published_sum,
    statement,
    sums,
)
from elastictrain.engine.pending import Pending
from elastictrain.engine.probes import Probes, flip_bit
from elastictrain.engine.worker_model import WorkerModel
from elastictrain.faults import miscompute
from elastictrain.job import Job
from elastictrain.layout import Layout, Shard
from tests.unit.engine.worlds import CPU, Net, NetRecipe, alone, make_job, run_world, same_bits

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def host_sum(tensor: torch.Tensor) -> int:
    return sums([[tensor]], CPU)[0]


def on_device(tensor: torch.Tensor) -> int:
    """The device's sum is plain torch, so that it can be tried here."""
    return int(device_sum(tensor))


def put_together(tensor: torch.Tensor) -> int:
    """The other one: many tensors, few kernels, one copy."""
    return device_sums([[b"5", torch.ones(3), tensor, torch.ones(2)]], CPU)[0]


SUMS: list[Callable[[torch.Tensor], int]] = [host_sum, on_device, put_together]


@pytest.mark.parametrize("take", SUMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_any_flipped_bit_changes_the_sum(take: Any, dtype: torch.dtype, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 300))
    memory = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8)
    tensor = memory.clone().view(dtype)
    before = take(tensor)
    assert take(tensor.clone()) == before
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 8 * dtype.itemsize - 1))
    flip_bit(tensor[place:], bit)
    assert (tensor.view(torch.uint8) != memory).sum() == 1
    assert take(tensor) != before
    flip_bit(tensor[place:], bit)
    assert take(tensor) == before


@pytest.mark.parametrize("take", SUMS)
def test_what_lies_elsewhere_or_otherwise(take: Any) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert take(matrix.t()) == take(matrix.t().contiguous())
    assert take(matrix.t()) != take(matrix)
    assert take(matrix.flip(0)) != take(matrix)
    assert take(torch.tensor([-0.0])) != take(torch.tensor([0.0]))
    assert take(torch.tensor(3.0)) == take(torch.tensor([3.0]))


def test_long_tensors_are_summed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from elastictrain.engine import integrity

    monkeypatch.setattr(integrity, "_CHUNK", 64)
    monkeypatch.setattr(integrity, "_weights", {})
    tensor = torch.randn(1000)
    swapped = torch.cat([tensor[64:128], tensor[:64], tensor[128:]])
    assert on_device(tensor) != on_device(swapped)
    assert on_device(tensor) == on_device(tensor.clone())
    flipped = tensor.clone()
    flip_bit(flipped[999:], 0)
    assert on_device(tensor) != on_device(flipped)


def test_many_tensors_on_a_device_are_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from elastictrain.engine import integrity

    monkeypatch.setattr(integrity, "_CHUNK", 1000)
    monkeypatch.setattr(integrity, "_weights", {})
    parts = [torch.randn(90) for _ in range(40)] + [torch.randn(2500), torch.tensor(3.0)]
    calls: list[int] = []
    weighted = integrity._weighted

    def counted(bits: torch.Tensor) -> torch.Tensor:
        calls.append(bits.numel())
        return weighted(bits)

    monkeypatch.setattr(integrity, "_weighted", counted)
    whole = device_sums([parts, parts[:1]], CPU)
    assert len(calls) == 8
    assert max(calls) <= 1000
    assert sum(calls) == 40 * 90 + 2500 + 1 + 90
    assert device_sums([[parts[1], parts[0], *parts[2:]]], CPU)[0] != whole[0]
    for place in (0, 17, 39, 40, 41):
        flip_bit(parts[place], 7)
        assert device_sums([parts], CPU)[0] != whole[0], place
        flip_bit(parts[place], 7)
    assert device_sums([parts, parts[:1]], CPU) == whole
    mixed = [torch.ones(3), torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.int64)]
    assert device_sums([mixed], CPU) != device_sums([mixed[::-1]], CPU)


def test_a_lanes_sum_does_not_depend_on_the_order_in_which_gradients_come() -> None:
    parts = [(0, 0, torch.randn(5)), (128, 0, torch.randn(7)), (0, 1, torch.randn(5)), (256, 0, torch.randn(2))]

    def total(order: list[Any], *numbers: float) -> int:
        lane = LaneSum()
        for place, micro, values in order:
            lane.add(place, micro, values)
        return lane.total(*numbers)

    assert total(parts, 1.0, 2.0) == total(parts[::-1], 1.0, 2.0)
    assert total(parts, 1.0, 2.0) != total(parts, 1.5, 2.0)
    swapped = [(0, 1, parts[0][2]), *parts[1:2], (0, 0, parts[2][2]), *parts[3:]]
    assert total(swapped, 1.0) != total(parts, 1.0)
    assert total(parts[:3], 1.0) != total(parts, 1.0)
    twice = [*parts, parts[0], parts[0]]
    assert total(twice, 1.0) != total(parts, 1.0)


# --- a worker's state ---


class Momentum(torch.optim.SGD):
    """SGD that keeps a plain number beside its tensors."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1
        return result


def stepped(**settings: Any) -> WorkerModel:
    """All blocks, one step taken, so that there is optimizer state; EMA on."""

    class Averaged(NetRecipe):
        ema_decay = 0.9

    worker = alone(make_job(Averaged(), **settings))
    worker.step(1)
    return worker.model


KINDS = [{}, {"numerics": {"compute_dtype": "bf16"}}, {"ownership": "whole"}]


def guarded(model: WorkerModel) -> tuple[Guard, Shard]:
    blocks = len(model.space.blocks)
    shard = Shard(0, blocks, 0, None)
    guard = Guard(model.flat, model.held)
    guard.begin(Layout(1, (0,), (tuple(range(5)),), (shard,), 5), 0)
    return guard, shard


def every_tensor(model: WorkerModel) -> list[tuple[str, torch.Tensor]]:
    """Everything that apply or the forward reads, each once, with a name."""
    found = [
        (f"block {n} {key}", value)
        for n in sorted(model.held.masters)
        for key, value in model.held.tensors(n)
        if isinstance(value, torch.Tensor)
    ]
    found += [(f"published {b.number}", model.flat.published(b)) for b in model.space.blocks]
    return [*found, *((f"counter {name}", value) for name, value in model.flat.counters.items())]


@pytest.mark.parametrize("settings", KINDS, ids=["f32", "bf16", "whole"])
def test_a_guard_sees_a_flip_anywhere(settings: dict[str, Any]) -> None:
    model = stepped(**settings)
    guard, _ = guarded(model)
    assert guard.verify() == ""
    assert guard.claims({}).sound
    tensors = every_tensor(model)
    assert {name.split()[-1].split("/")[-1] for name, _ in tensors} >= {"master", "ema", "exp_avg", "step", "seen"}
    for name, tensor in tensors:
        guard.begin(Layout(1, (0,), (tuple(range(5)),), (Shard(0, len(model.space.blocks), 0, None),), 5), 0)
        flip_bit(tensor, 3)
        assert guard.verify(), name
        flip_bit(tensor, 3)
        guard.begin(Layout(1, (0,), (tuple(range(5)),), (Shard(0, len(model.space.blocks), 0, None),), 5), 0)
        flip_bit(tensor, 3)
        claims = guard.claims({})
        assert not claims.sound, name
        assert guard.changed, name
        flip_bit(tensor, 3)


def test_a_number_that_an_optimizer_keeps_counts_too() -> None:
    def momentum(params: Any) -> torch.optim.Optimizer:
        return Momentum(params, lr=0.1, momentum=0.9)

    worker = alone(make_job(NetRecipe(momentum)))
    worker.step(1)
    guard, _ = guarded(worker.model)
    master = worker.model.held.masters[0]
    worker.model.held.optimizer.state[master]["count"] = 5
    assert guard.verify() == f"masters, optimizer state or averages of blocks 0..{len(worker.model.space.blocks) - 1}"


def test_what_is_not_known_is_not_checked() -> None:
    model = stepped()
    guard, _ = guarded(model)
    guard.forget()
    flip_bit(model.held.masters[0], 1)
    assert guard.verify() == ""
    guard.gathered()
    flip_bit(model.held.masters[0], 1)
    assert guard.verify() == "parameters or buffers that the forward reads"


def test_a_tensor_that_is_given_other_memory_is_read_there() -> None:
    """An optimizer may replace what it keeps, or the memory below it: a kept view of the old one would see nothing."""
    model = stepped()
    guard, _ = guarded(model)
    state = model.held.optimizer.state[model.held.masters[0]]
    state["exp_avg"].data = state["exp_avg"].clone()
    assert guard.verify() == "", "the same numbers elsewhere"
    flip_bit(state["exp_avg"], 3)
    assert guard.verify()
    guard.begin(Layout(1, (0,), (tuple(range(5)),), (Shard(0, len(model.space.blocks), 0, None),), 5), 0)
    state["exp_avg"] = state["exp_avg"].clone()
    flip_bit(state["exp_avg"], 3)
    assert guard.verify()


def test_what_a_vote_that_was_never_completed_has_found_is_not_forgotten() -> None:
    """The claims take the sums anew: compared with those alone, nothing has changed."""
    model = stepped()
    guard, _ = guarded(model)
    flip_bit(model.held.masters[0], 1)
    assert not guard.claims({}).sound
    assert guard.verify() == guard.changed != ""
    guard.forget()
    assert guard.verify() == ""


def test_a_reduced_gradient_that_changes_before_the_vote_is_seen() -> None:
    model = stepped()
    guard, shard = guarded(model)
    reduced = {shard: torch.randn(100)}
    guard.reduced(reduced)
    assert guard.claims(reduced).sound
    flip_bit(reduced[shard][50:], 20)
    assert not guard.claims(reduced).sound
    assert guard.changed == f"the reduced gradient of blocks 0..{shard.hi - 1}"
    guard.forget()  # applied: what comes is another gradient
    guard.begin(Layout(1, (0,), (tuple(range(5)),), (shard,), 5), 0)
    assert guard.claims({shard: torch.randn(100)}).sound


@pytest.mark.parametrize("settings", KINDS, ids=["f32", "bf16", "whole"])
def test_sums_do_not_depend_on_who_holds_what(settings: dict[str, Any]) -> None:
    """After two steps: the published sum is the same on all workers of all layouts, and an owner's is its mirror's."""
    job = make_job(NetRecipe(model=lambda: Net()), **settings)
    blocks = len(alone(job).model.space.blocks)
    published: set[int] = set()
    by_block: dict[int, int] = {}
    for borders in ((0, blocks), (0, 1, blocks), (0, blocks // 2, blocks - 1, blocks)):
        world = max(2, len(borders) - 1)
        cuts = pairwise(borders)
        shards = tuple(Shard(lo, hi, i, (i + 1) % world) for i, (lo, hi) in enumerate(cuts))
        layout = Layout(1, tuple(range(world)), tuple(tuple(range(i, 5, world)) for i in range(world)), shards, 5)
        for worker in run_world(job, layout, 2):
            flat, held = worker.model.flat, worker.model.held
            published.add(published_sum(flat))
            mine = block_sums(flat, held, sorted(held.masters))
            assert all(by_block.setdefault(n, value) == value for n, value in mine.items())
            shares = layout.by_holder().get(worker.runner.worker, [])
            assert len(set(held_sums(flat, held, shares))) == len(shares)
            said = statement(flat, held, "")
            assert (said.held, said.astray) == (mine, frozenset())
    assert len(published) == 1
    assert len(set(by_block.values())) == blocks


def test_a_published_copy_that_left_its_master_is_astray_in_bf16() -> None:
    model = stepped(numerics={"compute_dtype": "bf16"})
    assert statement(model.flat, model.held, "").astray == frozenset()
    flip_bit(model.flat.published(model.space.blocks[2]), 9)
    assert statement(model.flat, model.held, "").astray == {2}


# --- lanes that are computed to be compared ---


@pytest.mark.parametrize(
    "settings", [{}, {"micro_batches": 3}, {"numerics": {"compute_dtype": "bf16"}}], ids=["plain", "micro", "bf16"]
)
def test_a_lane_computed_for_its_sum_is_the_lane_and_leaves_no_trace(settings: dict[str, Any]) -> None:
    job = make_job(NetRecipe(), **settings)
    worker, other = alone(job), alone(job)
    expected = {lane: other.runner.lane.sum(1, lane) for lane in range(5)}
    assert len(set(expected.values())) == 5
    pending = Pending(1, 1)
    for lane in range(5):
        shown = LaneSum()
        result = worker.runner.lane.run(1, lane, first=lane == 0, merge=True, shown=shown)
        pending.lanes.append((result.total, result.weight))
        assert shown.total(result.total, result.weight) == expected[lane]
    nodes = {node: tensor.clone() for node, tensor in worker.tree.nodes.items()}
    counters = worker.model.flat.counter_hash()
    assert worker.runner.lane.sum(1, 3) == expected[3]
    assert worker.runner.lane.sum(2, 3) != expected[3]
    assert worker.model.flat.counter_hash() == counters
    assert nodes.keys() == worker.tree.nodes.keys()
    assert all(same_bits(tensor, worker.tree.nodes[node]) for node, tensor in nodes.items())


class Counting(Net):
    """Counts differently in every lane; the largest count stays."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen += int(x.abs().sum() * 1000)
        return super().forward(x)


def test_a_lane_computed_for_its_sum_leaves_the_counters_of_the_step() -> None:
    class Recipe(NetRecipe):
        def buffer_rule(self, name: str) -> Literal["max"]:
            return "max"

    worker = alone(make_job(Recipe(model=Counting)))
    found = []
    for lane in (3, 4):
        worker.runner.lane.run(1, lane, first=True, merge=False)
        found.append(worker.model.flat.largest_counters())
        worker.tree.reset()
    worker.runner.lane.sum(1, 3)
    assert worker.model.flat.largest_counters() == found[1] != found[0]


def test_a_step_with_a_check_is_the_step_without_it() -> None:
    """Two workers, one of them computes a lane of the other: the state is that of one worker that checks nothing."""
    job = make_job(NetRecipe(), integrity={"recompute_every": 1})
    plain = make_job(NetRecipe(), integrity={"state": False, "recompute_every": None})
    reference = alone(plain)
    reference.step(1), reference.step(2)
    blocks = len(reference.model.space.blocks)
    layout = Layout(1, (0, 1), ((0, 1, 2), (3, 4)), (Shard(0, 2, 0, 1), Shard(2, blocks, 1, 0)), 5)
    for worker in run_world(job, layout, 2):
        assert published_sum(worker.model.flat) == published_sum(reference.model.flat)
        assert [t.loss for t in worker.tallies] == [t.loss for t in reference.tallies]


class SpoiltJob:
    def __init__(self, one_in: int) -> None:
        self.job: Job = make_job(NetRecipe())
        self.worker = alone(self.job)
        self.worker.runner.lane._spoils = Probes(0, [miscompute(0, 2, one_in=one_in)]).spoils_lane


def test_a_miscomputed_lane_has_another_sum() -> None:
    right, wrong = SpoiltJob(10**9), SpoiltJob(1)
    assert right.worker.runner.lane.sum(1, 0) == wrong.worker.runner.lane.sum(1, 0), "it begins at step 2"
    assert right.worker.runner.lane.sum(2, 0) != wrong.worker.runner.lane.sum(2, 0)


def test_one_in_ten_is_one_in_ten_and_says_the_same_every_time() -> None:
    first, second = (Probes(3, [miscompute(3, 5, one_in=10, seed=7)]) for _ in range(2))
    found = [first.spoils_lane(step) for step in range(5, 4005)]
    assert found == [second.spoils_lane(step) for step in range(5, 4005)]
    assert 300 < sum(found) < 500
    assert not any(Probes(2, [miscompute(3, 5)]).spoils_lane(step) for step in range(100))
    assert not any(Probes(3, [miscompute(3, 5, one_in=1)]).spoils_lane(step) for step in range(1, 5))
