"""The lane tree gives the bits of the one fixed sum, whoever computes which lanes."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from elastictrain.engine.lanes import LaneTree
from elastictrain.engine.space import Entry, Space
from elastictrain.errors import RecipeError
from elastictrain.tree import Node, finish, most_sums, roots, whole
from tests.unit.engine.worlds import CPU, same_bits


class Leaves(nn.Module):
    """The gradient of every parameter is what the batch says; a weight under two names gets two parts."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(130, dtype=dtype))
        self.b = nn.Parameter(torch.ones(3, 5, dtype=dtype))
        self.c = nn.Parameter(torch.ones((), dtype=dtype))
        self.tied = nn.Module()
        self.tied.a = self.a
        self.register_buffer("mean", torch.zeros(9))


class Work:
    """The gradients of all lanes, wide in range so that any other order of summing shows."""

    def __init__(self, seed: int, lanes: int, micros: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dtype, self.micros = dtype, micros
        self.gradients: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self.changes = [torch.randn(9, generator=generator) for _ in range(lanes)]
        for key in [(lane, micro) for lane in range(lanes) for micro in range(micros)]:
            given: dict[str, torch.Tensor] = {}
            for name, shape in (("a", (130,)), ("a2", (130,)), ("b", (3, 5)), ("c", ())):
                if torch.rand((), generator=generator) < 0.75:
                    size = 10.0 ** torch.randint(-6, 7, shape, generator=generator)
                    values = torch.randn(shape, generator=generator) * size
                    given[name] = torch.where(torch.rand(shape, generator=generator) < 0.2, -0.0, values).to(dtype)
            self.gradients[key] = given

    def backward(self, model: Leaves, lane: int, micro: int) -> None:
        parts = {"a": model.a, "a2": model.tied.get_parameter("a"), "b": model.b, "c": model.c}
        terms = [(parts[n] * g).sum() for n, g in self.gradients[lane, micro].items()]
        if terms:
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]

    def run(self, tree: LaneTree, model: Leaves, lane: int, *, merge: bool) -> None:
        tree.begin(lane, merge=merge)
        for micro in range(self.micros):
            tree.begin_micro_batch(micro)
            self.backward(model, lane, micro)
            tree.end_micro_batch()
        tree.end({"mean": self.changes[lane]})

    def one(self, entry: Entry, lane: int, micro: int) -> torch.Tensor:
        model = Leaves(self.dtype)
        self.backward(model, lane, micro)
        grad = model.get_parameter(entry.name).grad
        return torch.zeros(entry.elements) if grad is None else grad.float().reshape(-1)

    def expected(self, space: Space, lanes: int) -> dict[str, torch.Tensor]:
        """Every lane's own gradient by plain autograd, summed by the plain tree."""
        found = {}
        for entry in space.entries:
            leaves: dict[Node, torch.Tensor] = {}
            for lane in range(lanes):
                parts = [self.changes[lane]]
                if entry.kind == "param":
                    parts = [self.one(entry, lane, micro) for micro in range(self.micros)]
                leaves[Node(lane, lane + 1)] = functools.reduce(torch.add, parts)
            found[entry.name] = finish(leaves, torch.add, whole(lanes))
        return found


@st.composite
def deals(draw: st.DrawFn) -> list[list[int]]:
    """Lanes dealt out to workers, contiguous or anyhow."""
    count = draw(st.integers(1, 40))
    workers = draw(st.integers(1, 5))
    owner = draw(st.lists(st.integers(0, workers - 1), min_size=count, max_size=count))
    if draw(st.booleans()):
        owner.sort()
    return [[lane for lane in range(count) if owner[lane] == w] for w in range(workers)]


@settings(max_examples=60, deadline=None)
@given(
    deals(), st.sampled_from([1, 3]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.integers(0, 9)
)
def test_any_deal_of_lanes_gives_the_bits_of_the_plain_tree_over_all_of_them(
    deal: list[list[int]], micros: int, dtype: torch.dtype, merge: bool, seed: int
) -> None:
    count = sum(map(len, deal))
    work = Work(seed, count, micros, dtype)
    space = Space(Leaves(dtype), block_elements=None, whole_parameters=False)
    parts: dict[Node, torch.Tensor] = {}
    for lanes in deal:
        model = Leaves(dtype)
        tree = LaneTree(space, count, CPU, micros)
        tree.watch(model)
        for _ in range(2):  # the second time in used memory
            tree.reset()
            for lane in lanes:
                work.run(tree, model, lane, merge=merge)
                assert all(p.grad is None for p in model.parameters())
        assert set(tree.nodes) == set(roots(lanes, count) if merge else [Node(x, x + 1) for x in lanes])
        parts |= tree.nodes
    got = finish(parts, torch.add, whole(count))
    for name, expected in work.expected(space, count).items():
        entry = space.by_name[name]
        assert same_bits(got[entry.start : entry.stop], expected), name


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 7, 8, 16, 31, 32, 64])
def test_a_run_of_k_lanes_needs_about_log2_k_buffers(lanes: int, micros: int) -> None:
    work = Work(0, lanes, micros, torch.float32)
    model = Leaves()
    tree = LaneTree(Space(model, block_elements=None, whole_parameters=False), lanes, CPU, micros)
    tree.watch(model)
    made: set[int] = set()
    for _ in range(3):
        tree.reset()
        for lane in range(lanes):
            work.run(tree, model, lane, merge=True)
            made |= {t.data_ptr() for t in [*tree.nodes.values(), *tree._pool]}
    assert len(made) == len(tree.nodes) + len(tree._pool), "a buffer was lost"
    assert len(made) <= lanes.bit_length() + (micros > 1)


@settings(max_examples=60, deadline=None)
@given(deals(), st.sampled_from([1, 3]))
def test_the_buffers_of_a_worker_are_those_that_are_counted(deal: list[list[int]], micros: int) -> None:
    """What the memory check goes by, for one worker that gets one set of lanes after another."""
    count = sum(map(len, deal))
    work = Work(0, count, micros, torch.float32)
    model = Leaves()
    tree = LaneTree(Space(model, block_elements=None, whole_parameters=False), count, CPU, micros)
    tree.watch(model)
    for lanes in map(tuple, deal):
        counted = most_sums(lanes, count, apart=micros > 1)
        tree.reset()
        tree.keep(counted)
        for lane in lanes:
            work.run(tree, model, lane, merge=True)
        assert len(tree.nodes) + len(tree._pool) == counted
        kept = {id(buffer) for buffer in (*tree.nodes.values(), *tree._pool)}
        assert {id(buffer) for buffer, _ in tree._views.values()} == kept, "nothing else is held on to"


def test_released_and_abandoned_buffers_are_used_again() -> None:
    work = Work(0, 8, 1, torch.float32)
    model = Leaves()
    tree = LaneTree(Space(model, block_elements=None, whole_parameters=False), 8, CPU, 1)
    tree.watch(model)
    for lane in range(8):
        work.run(tree, model, lane, merge=False)
        tree.release(Node(lane, lane + 1))
    assert not tree.nodes
    assert len(tree._pool) == 1
    tree.begin(0, merge=False)
    tree.abandon()
    assert len(tree._pool) == 1


def test_a_lane_that_was_interrupted_leaves_nothing_for_the_next_one() -> None:
    """A generation may end in the middle of backward(): no gradient may stay behind in `.grad`."""
    work = Work(3, 2, 1, torch.float32)
    model = Leaves()
    space = Space(model, block_elements=None, whole_parameters=False)
    tree = LaneTree(space, 2, CPU, 1)
    tree.watch(model)

    def stop() -> None:
        raise InterruptedError

    tree.interrupted = stop
    tree.begin(0, merge=True)
    tree.begin_micro_batch(0)
    with pytest.raises(InterruptedError):
        work.backward(model, 0, 0)
    assert all(p.grad is None for p in model.parameters())
    tree.interrupted = lambda: None
    tree.reset()
    for lane in range(2):
        work.run(tree, model, lane, merge=True)
    got = tree.nodes[whole(2)]
    for name, expected in work.expected(space, 2).items():
        assert same_bits(got[space.by_name[name].start : space.by_name[name].stop], expected)


def test_a_gradient_that_comes_in_two_parts_is_refused_not_half_lost() -> None:
    model = Leaves()
    tree = LaneTree(Space(model, block_elements=None, whole_parameters=False), 1, CPU, 1)
    tree.watch(model)
    tree.begin(0, merge=True)
    tree.begin_micro_batch(0)
    (2.0 * model.b).sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RecipeError, match=r"^parameter 'b' gets its gradient in several parts.*use_reentrant=False"):
        (3.0 * model.b).sum().backward()  # type: ignore[no-untyped-call]


def test_sparse_gradients_enter_as_dense_ones() -> None:
    model = nn.Embedding(4, 3, sparse=True)
    tree = LaneTree(Space(model, block_elements=None, whole_parameters=False), 1, CPU, 1)
    tree.watch(model)
    tree.begin(0, merge=True)
    tree.begin_micro_batch(0)
    model(torch.tensor([1, 1, 3])).sum().backward()
    tree.end_micro_batch()
    tree.end({})
    expected = torch.tensor([[0.0] * 3, [2.0] * 3, [0.0] * 3, [1.0] * 3])
    assert torch.equal(tree.nodes[whole(1)][:12].view(4, 3), expected)


@settings(max_examples=60, deadline=None)
@given(deals(), st.sampled_from([1, 3]), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_lanes_in_any_order_some_apart_and_some_given_up_give_the_same_bits(
    deal: list[list[int]], micros: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """As where lanes are shared: joined when they count, released when they do not, given up in the middle."""
    count = sum(map(len, deal))
    work = Work(1, count, micros, dtype)
    space = Space(Leaves(dtype), block_elements=None, whole_parameters=False)
    parts: dict[Node, torch.Tensor] = {}
    for lanes in deal:
        model = Leaves(dtype)
        tree = LaneTree(space, count, CPU, micros)
        tree.watch(model)
        for lane in data.draw(st.permutations(lanes)):
            apart, vain = data.draw(st.booleans()), data.draw(st.integers(0, 2))
            if vain == 1:  # broken off
                tree.begin(lane, merge=False)
                tree.begin_micro_batch(0)
                work.backward(model, lane, 0)
                tree.give_up()
            elif vain == 2:  # computed in vain
                work.run(tree, model, lane, merge=False)
                tree.release(Node(lane, lane + 1))
            work.run(tree, model, lane, merge=not apart)
            if apart:
                tree.join(lane)
        assert set(tree.nodes) == set(roots(lanes, count))
        parts |= tree.nodes
    got = finish(parts, torch.add, whole(count))
    for name, expected in work.expected(space, count).items():
        entry = space.by_name[name]
        assert same_bits(got[entry.start : entry.stop], expected), name
