"""Layouts over random jobs, worlds and losses."""

from __future__ import annotations

from collections import Counter

from hypothesis import assume, given
from hypothesis import strategies as st

from elastictrain.layout import (
    Candidates,
    Layout,
    balanced,
    choose_mirror,
    cut,
    deal_blocks,
    deal_lanes,
    lost_blocks,
    moves_between,
    promoted,
)

SHARES = st.floats(0.1, 8.0)
BLOCKS = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@st.composite
def layouts(draw: st.DrawFn, mirrors: bool | None = None) -> tuple[Layout, list[int], dict[int, str]]:
    workers = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True))
    elements = draw(BLOCKS)
    domains = {worker: draw(st.sampled_from("abc")) for worker in workers}
    layout = balanced(
        draw(st.integers(1, 5)),
        workers,
        draw(st.integers(len(workers), 12)),
        elements,
        domains=domains,
        lane_shares={worker: draw(SHARES) for worker in workers},
        block_shares={worker: draw(SHARES) for worker in workers},
        lane_order=draw(st.sampled_from(["contiguous", "round_major"])),
        mirrors=draw(st.booleans()) if mirrors is None else mirrors,
    )
    return layout, elements, domains


@given(layouts(mirrors=True))
def test_a_balanced_layout_covers_all_and_mirrors_all(made: tuple[Layout, list[int], dict[int, str]]) -> None:
    layout, elements, domains = made
    assert layout.blocks == len(elements)
    assert all(layout.lanes_of(worker) for worker in layout.workers)
    assert layout.held_once == (0 if layout.world_size > 1 else layout.blocks)
    for shard in layout.shards:
        if shard.mirror is not None and len({domains[w] for w in layout.workers}) > 1:
            others = {domains[w] for w in layout.workers} - {domains[shard.owner]}
            assert domains[shard.mirror] in others


@given(layouts(), st.data())
def test_after_any_loss_that_leaves_a_holder_all_is_there(
    made: tuple[Layout, list[int], dict[int, str]], data: st.DataObject
) -> None:
    layout, elements, domains = made
    gone = data.draw(st.sets(st.sampled_from(layout.workers)))
    survivors = [worker for worker in layout.workers if worker not in gone]
    joiners = data.draw(st.lists(st.integers(40, 45), max_size=2, unique=True))
    assume(survivors and not lost_blocks(layout, gone) and len(survivors) + len(joiners) <= layout.lane_count)
    after = promoted(layout, 9, [*survivors, *joiners], elements, domains=domains)
    assert [(s.lo, s.hi) for s in after.shards] == [(s.lo, s.hi) for s in layout.shards]  # the old borders
    for old, new in zip(layout.shards, after.shards, strict=True):
        assert new.owner in old.holders()
        assert set(old.holders()) - gone <= set(new.holders())  # R4: nobody who holds it stops holding it
    assert after.held_once == (0 if after.world_size > 1 else after.blocks)
    _check_moves(layout, after, survivors)


@given(layouts(), layouts(mirrors=True), st.data())
def test_moves_bring_every_holder_its_blocks_once(
    made: tuple[Layout, list[int], dict[int, str]],
    other: tuple[Layout, list[int], dict[int, str]],
    data: st.DataObject,
) -> None:
    before, elements, _ = made
    workers = other[0].workers
    after = balanced(before.generation + 1, workers, 12, elements)
    alive = data.draw(st.sets(st.sampled_from(before.workers)))
    assume(not lost_blocks(before, set(before.workers) - alive))
    _check_moves(before, after, sorted(alive))


def _check_moves(before: Layout, after: Layout, alive: list[int]) -> None:
    moves = moves_between(before, after, alive)
    got = Counter((move.target, block) for move in moves for block in range(move.lo, move.hi))
    held = {w: before.held(w) if w in before.workers else frozenset() for w in {*before.workers, *after.workers}}
    assert got == Counter((w, block) for w in after.workers for block in after.held(w) - held[w])
    for move in moves:
        assert move.source in alive
        assert set(range(move.lo, move.hi)) <= held[move.source]


@given(st.integers(0, 200), st.lists(st.floats(0, 9), min_size=1, max_size=8))
def test_cut_adds_up_and_is_within_one_of_the_exact_share(total: int, shares: list[float]) -> None:
    assume(sum(shares) > 0)
    parts = cut(total, shares)
    assert sum(parts) == total
    for part, share in zip(parts, shares, strict=True):
        assert abs(part - total * share / sum(shares)) < 1 + 1e-6


@given(st.lists(SHARES, min_size=1, max_size=6), st.integers(0, 20), st.booleans())
def test_every_rank_gets_lanes_in_ascending_order(shares: list[float], extra: int, rounds: bool) -> None:
    count = len(shares) + extra
    lanes = deal_lanes(count, shares, "round_major" if rounds else "contiguous")
    assert sorted(lane for mine in lanes for lane in mine) == list(range(count))
    assert all(mine and list(mine) == sorted(mine) for mine in lanes)
    exact = [count * share / sum(shares) for share in shares]
    if min(exact) >= 1:
        assert all(abs(len(mine) - wanted) < 1 + 1e-6 for mine, wanted in zip(lanes, exact, strict=True))
    if not rounds:
        assert all(mine[-1] - mine[0] == len(mine) - 1 for mine in lanes)


@given(BLOCKS, st.lists(SHARES, min_size=1, max_size=6))
def test_block_borders_are_the_nearest_to_the_exact_place(elements: list[int], shares: list[float]) -> None:
    borders = deal_blocks(elements, shares)
    assert borders[0] == 0
    assert borders[-1] == len(elements)
    assert borders == sorted(borders)
    for rank in range(1, len(shares)):
        exact = sum(elements) * sum(shares[:rank]) / sum(shares)
        off = abs(sum(elements[: borders[rank]]) - exact)
        assert off <= min(abs(sum(elements[:at]) - exact) for at in range(len(elements) + 1)) + 1e-6


@given(st.data())
def test_the_mirror_is_the_best_of_all_the_others(data: st.DataObject) -> None:
    """Against the definition, over all workers one by one: domain, then load, then the next rank."""
    workers = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=9, unique=True))
    domains = {worker: data.draw(st.sampled_from("abc")) for worker in workers}
    domains = {worker: name for worker, name in domains.items() if data.draw(st.booleans())}
    load = {worker: data.draw(st.integers(0, 3)) for worker in workers}
    candidates = Candidates(workers, domains, load)
    for owner in data.draw(st.lists(st.sampled_from(workers), max_size=12)):
        start, own = workers.index(owner), domains.get(owner, str(owner))
        best = min(
            (worker for worker in workers if worker != owner),
            key=lambda w: (
                domains.get(w, str(w)) == own,
                load[w],
                (workers.index(w) - start) % len(workers),
            ),
            default=None,
        )
        assert choose_mirror(owner, candidates) == best
        if best is not None:
            more = data.draw(st.integers(0, 3))
            load[best] += more
            candidates.add(best, more)
