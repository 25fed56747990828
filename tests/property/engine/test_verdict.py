"""Who is named, for every single fault on every worker of any layout: the one that is wrong, and nobody else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elastictrain.engine.verdict import (
    Claims,
    Dispute,
    Statement,
    Verdict,
    agreed,
    differ,
    judge,
    mix,
    settle_disputes,
    without_state,
)
from elastictrain.engine.vote import Ballot, VoteFormat
from elastictrain.layout import Layout, Shard, balanced

BLOCKS = 6


@st.composite
def layouts(draw: st.DrawFn, least: int = 1, mirrors: bool | None = None) -> Layout:
    world = draw(st.integers(least, 5))
    workers = draw(st.permutations(range(3, 3 + world)))
    mirrored = draw(st.booleans()) if mirrors is None else mirrors
    shares = {w: draw(st.sampled_from([0.0, 1.0, 3.0])) for w in workers[1:]}
    return balanced(1, workers, 5, [10] * BLOCKS, block_shares=shares, mirrors=mirrored)


@dataclass
class World:
    """Every copy of every block as a number: what is kept for it, and what is published."""

    layout: Layout
    kept: dict[tuple[int, int], int]
    published: dict[tuple[int, int], int]
    reduced: dict[tuple[int, int], int]
    changed: dict[int, str]
    astray: dict[int, set[int]]
    counters: dict[int, int]

    def claims(self) -> dict[int, Claims]:
        held = self.layout.by_holder()
        return {
            w: Claims(
                sound=not self.changed.get(w),
                published=mix(self.counters[w], *(self.published[w, b] for b in range(BLOCKS))),
                state={s.lo: mix(*(self.kept[w, b] for b in range(s.lo, s.hi))) for s in held.get(w, ())},
                reduced={s.lo: mix(*(self.reduced[w, b] for b in range(s.lo, s.hi))) for s in held.get(w, ())},
            )
            for w in self.layout.workers
        }

    def said(self) -> dict[int, Statement]:
        return {
            w: Statement(
                self.changed.get(w, ""),
                {b: self.kept[w, b] for b in sorted(self.layout.held(w))},
                [self.published[w, b] for b in range(BLOCKS)],
                frozenset(self.astray.get(w, ())),
                self.counters[w],
            )
            for w in self.layout.workers
        }

    def verdict(self) -> Verdict:
        claims = self.claims()
        return judge(self.layout, claims, self.said()) if differ(self.layout, claims) else Verdict()


def sound(layout: Layout) -> World:
    copies = [(w, b) for w in layout.workers for b in range(BLOCKS)]
    held = {(w, b) for w in layout.workers for b in layout.held(w)}
    return World(
        layout,
        {key: 100 + key[1] for key in copies if key in held},
        {key: 200 + key[1] for key in copies},
        {key: 300 + key[1] for key in copies if key in held},
        {},
        {},
        dict.fromkeys(layout.workers, 7),
    )


def shard_of(layout: Layout, block: int) -> Shard:
    return next(shard for shard in layout.shards if shard.lo <= block < shard.hi)


@given(layouts())
def test_nothing_is_found_where_nothing_is_wrong(layout: Layout) -> None:
    assert not differ(layout, sound(layout).claims())


@given(layouts(), st.data())
def test_who_sees_its_own_memory_change_is_named_alone(layout: Layout, data: st.DataObject) -> None:
    world, worker = sound(layout), data.draw(st.sampled_from(layout.workers))
    block = data.draw(st.integers(0, BLOCKS - 1))
    world.changed[worker] = "masters of block 3"
    world.published[worker, block] += data.draw(st.integers(0, 1))
    if (worker, block) in world.kept:
        world.kept[worker, block] += data.draw(st.integers(0, 1))
    verdict = world.verdict()
    assert set(verdict.named) == {worker}
    assert "masters of block 3" in verdict.named[worker]
    assert not verdict.undecided
    assert not verdict.recipe


@given(layouts(least=2))
def test_when_all_change_alike_it_is_the_recipe(layout: Layout) -> None:
    world = sound(layout)
    world.changed = dict.fromkeys(layout.workers, "parameters")
    assert world.verdict() == Verdict(named=world.verdict().named, recipe=True)


@given(layouts(least=2, mirrors=True), st.data())
def test_a_gradient_that_arrives_otherwise_names_the_mirror(layout: Layout, data: st.DataObject) -> None:
    world, shard = sound(layout), data.draw(st.sampled_from(layout.shards))
    assert shard.mirror is not None
    world.reduced[shard.mirror, shard.lo] += 1
    assert set(world.verdict().named) == {shard.mirror}
    claims = without_state(world.claims())
    assert differ(layout, claims)
    assert set(judge(layout, claims, world.said(), copies=False).named) == {shard.mirror}


@given(layouts(least=2), st.data())
def test_a_copy_that_came_wrong_names_who_has_it(layout: Layout, data: st.DataObject) -> None:
    """A published copy of a third worker: with its owner and its mirror against it, or with most of the others."""
    world, block = sound(layout), data.draw(st.integers(0, BLOCKS - 1))
    shard = shard_of(layout, block)
    others = [w for w in layout.workers if w not in shard.holders()]
    assume(others)
    third = data.draw(st.sampled_from(others))
    world.published[third, block] += 1
    verdict = world.verdict()
    if shard.mirror is None and layout.world_size == 2:
        assert (set(verdict.named), verdict.undecided) == (set(), {shard.owner, third})
    else:
        assert (set(verdict.named), verdict.undecided) == ({third}, set())


@given(layouts(least=2, mirrors=True), st.data())
def test_a_wrong_apply_is_never_decided_by_copies_of_the_one_that_was_wrong(
    layout: Layout, data: st.DataObject
) -> None:
    """After a wrong apply of the owner all others but the mirror have the owner's value: the majority is wrong."""
    world, block = sound(layout), data.draw(st.integers(0, BLOCKS - 1))
    shard = shard_of(layout, block)
    assert shard.mirror is not None
    if data.draw(st.booleans()):  # the owner's, which it has then published
        world.kept[shard.owner, block] += 1
        for worker in layout.workers:
            world.published[worker, block] += worker != shard.mirror
    else:
        world.kept[shard.mirror, block] += 1
        world.published[shard.mirror, block] += 1
    verdict = world.verdict()
    assert (verdict.named, verdict.undecided) == ({}, {shard.owner, shard.mirror})
    assert verdict.claims == {block: {w: world.kept[w, block] for w in shard.holders()}}


@given(layouts(least=2, mirrors=True), st.data())
def test_optimizer_state_that_differs_is_undecided(layout: Layout, data: st.DataObject) -> None:
    world, block = sound(layout), data.draw(st.integers(0, BLOCKS - 1))
    shard = shard_of(layout, block)
    world.kept[data.draw(st.sampled_from(shard.holders())), block] += 1
    verdict = world.verdict()
    assert (verdict.named, verdict.undecided) == ({}, set(shard.holders()))


@given(layouts(least=3, mirrors=True), st.data())
def test_an_owner_that_changed_after_it_had_sent_is_named_by_what_it_sent(layout: Layout, data: st.DataObject) -> None:
    world, block = sound(layout), data.draw(st.integers(0, BLOCKS - 1))
    shard = shard_of(layout, block)
    world.kept[shard.owner, block] += 1
    world.published[shard.owner, block] += 1
    others = [w for w in layout.workers if w not in shard.holders()]
    later = set(data.draw(st.lists(st.sampled_from(others), max_size=len(others) - 1)))
    for worker in later:  # they were sent it when it had changed
        world.published[worker, block] += 1
    assume(len(later) < len(others))
    verdict = world.verdict()
    assert set(verdict.named) == {shard.owner}
    assert verdict.stale == later
    assert not verdict.undecided


@given(layouts(least=2), st.data())
def test_a_copy_that_does_not_follow_from_its_master_names_its_holder(layout: Layout, data: st.DataObject) -> None:
    world, block = sound(layout), data.draw(st.integers(0, BLOCKS - 1))
    shard = shard_of(layout, block)
    worker = data.draw(st.sampled_from(shard.holders()))
    world.published[worker, block] += 1
    world.astray[worker] = {block}
    assert set(world.verdict().named) == {worker}


@given(layouts(least=3), st.data())
def test_integer_buffers_go_by_the_majority(layout: Layout, data: st.DataObject) -> None:
    world, worker = sound(layout), data.draw(st.sampled_from(layout.workers))
    world.counters[worker] += 1
    assert set(world.verdict().named) == {worker}


def test_two_workers_with_different_counters_are_undecided() -> None:
    world = sound(balanced(1, [0, 1], 5, [10] * BLOCKS))
    world.counters[1] += 1
    assert (world.verdict().named, world.verdict().undecided) == ({}, {0, 1})


def test_a_sum_that_differs_although_no_block_does() -> None:
    """Bits between blocks, or a processor that adds up wrongly."""
    layout = balanced(1, [0, 1, 2], 5, [10] * BLOCKS)
    world = sound(layout)
    claims = world.claims()
    claims[1] = replace(claims[1], published=5)
    assert set(judge(layout, claims, world.said()).named) == {1}
    claims = world.claims()
    shard = layout.shards[0]
    claims[shard.owner] = replace(claims[shard.owner], state={**claims[shard.owner].state, shard.lo: 5})
    verdict = judge(layout, claims, world.said())
    assert (verdict.named, verdict.undecided) == ({}, set(shard.holders()))


@settings(max_examples=200)
@given(layouts(), st.data())
def test_a_single_fault_never_names_a_worker_that_is_right(layout: Layout, data: st.DataObject) -> None:
    """Any copy of any kind changed on one worker, self-seen or not: that worker is named, or it is among the undecided,
    or (outside of what is kept and sent) nothing is found; nobody else is named.
    """
    world, worker = sound(layout), data.draw(st.sampled_from(layout.workers))
    what = data.draw(st.sampled_from(["kept", "published", "reduced"]))
    copies: dict[tuple[int, int], int] = getattr(world, what)
    keys = [key for key in copies if key[0] == worker]
    assume(keys)
    copies[data.draw(st.sampled_from(keys))] += 1
    if data.draw(st.booleans()):
        world.changed[worker] = "something"
    verdict = world.verdict()
    if what == "reduced" and not world.changed:
        return  # the owner's claim is from before it sent: whoever differs from it has received something else
    assert set(verdict.named) <= {worker}
    assert verdict.named or worker in verdict.undecided or not differ(layout, world.claims())


# --- the third computation, later ---


@pytest.mark.parametrize(
    ("truth", "named"),
    [({4: {11}}, {2}), ({4: {12}}, {1}), ({4: {11, 12}}, set()), ({4: {99}}, set()), ({}, set()), ({5: {11}}, set())],
)
def test_computed_again_it_is_known_who_was_wrong(truth: dict[int, set[int]], named: set[int]) -> None:
    disputes = [Dispute(7, 4, ((1, 11), (2, 12)))]
    assert set(settle_disputes(disputes, 7, truth)) == named
    assert settle_disputes(disputes, 8, truth) == {}


# --- in the vote ---

sums64 = st.integers(0, 2**64 - 1)


@given(layouts(), st.data())
def test_claims_travel_in_the_vote(layout: Layout, data: st.DataObject) -> None:
    form = VoteFormat(layout, BLOCKS, 1, claims=True)
    sent: dict[int, Claims] = {}
    for worker in layout.workers:
        los = [shard.lo for shard in layout.by_holder().get(worker, [])]
        state, reduced = ({lo: data.draw(sums64) for lo in los} for _ in range(2))
        sent[worker] = Claims(data.draw(st.booleans()), data.draw(sums64), state, reduced, data.draw(sums64))
    payloads = [
        form.encode(
            Ballot(1, 2, 0, 0, 3, 4, tuple((1.5, 2.0) for _ in lanes), (0.5,) * len(nodes), (9,), claims=sent[worker])
        )
        for worker, lanes, nodes in zip(layout.workers, layout.lanes, form.roots, strict=True)
    ]
    assert {len(raw) for raw in payloads} == {form.size}
    result = b"".join(payloads)
    assert form.claims(result) == sent
    assert form.tally(result).largest == (9,)
    assert form.tally(result).losses == (1.5,) * 5
    assert VoteFormat(layout, BLOCKS, 1).claims(result) == {}


# --- conferring ---


@st.composite
def verdicts(draw: st.DrawFn) -> Verdict:
    some = st.sets(st.integers(0, 5), max_size=3)
    named = {w: f"reason of {w}" for w in draw(some)}
    return Verdict(named, draw(some) - set(named), {}, draw(some) - set(named), draw(st.booleans()))


@given(right=verdicts(), wrong=st.lists(verdicts(), max_size=2), members=st.permutations(range(6)))
def test_a_minority_that_judges_otherwise_ends_itself_and_nobody_else(
    right: Verdict, wrong: list[Verdict], members: list[int]
) -> None:
    wrong = [verdict for verdict in wrong if _differs(verdict, right)]
    said = dict(zip(members, [*wrong, *[right] * (6 - len(wrong))], strict=True))
    found = agreed(said)
    astray = set(members[: len(wrong)])
    assert set(found.named) == set(right.named) | astray
    assert {**found.named, **right.named} == found.named
    assert found.undecided == right.undecided - astray
    assert found.stale == right.stale - astray
    assert found.recipe == right.recipe


@given(one=verdicts(), other=verdicts(), half=st.integers(1, 3))
def test_two_halves_that_judge_otherwise_end_nobody(one: Verdict, other: Verdict, half: int) -> None:
    assume(_differs(one, other))
    said = {w: one if w < half else other for w in range(2 * half)}
    assert agreed(said) == Verdict(undecided=set(said))


def test_three_that_judge_in_three_ways_end_nobody() -> None:
    said = {w: Verdict({w: "x"}) for w in range(3)}
    assert agreed(said) == Verdict(undecided={0, 1, 2})


def test_the_words_of_a_reason_are_no_difference() -> None:
    said = {0: Verdict({2: "a"}), 1: Verdict({2: "b"}), 2: Verdict({2: "c"})}
    assert set(agreed(said).named) == {2}


def _differs(one: Verdict, other: Verdict) -> bool:
    return (set(one.named), one.undecided, one.stale, one.recipe) != (
        set(other.named),
        other.undecided,
        other.stale,
        other.recipe,
    )
