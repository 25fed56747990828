"""Who is wrong: from sums that all workers hold alike to names. Pure; every worker comes to the same verdict.

A worker can be wrong in three ways that leave no trace but numbers: its memory changes between two steps (it sees that
itself), a copy differs from the copy that it was made with, or a lane's gradient comes out differently. What can be
concluded from which difference is written down case by case here; `docs/integrity.md` is the table for people.

The arbiter is always a computation that does not depend on the ones in dispute. A copy that was received from the one
in dispute is none: after a flip inside an owner's apply everybody but its mirror holds the owner's wrong value, and a
majority would name the only one that is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from elastictrain.layout import Layout, Shard

_MASK = 2**64 - 1


def mix(*numbers: int) -> int:
    """64 well-mixed bits of a few whole numbers (splitmix64 finaliser, Steele et al. 2014, after each)."""
    value = 0
    for number in numbers:
        value = (value ^ number) + 0x9E3779B97F4A7C15 & _MASK
        value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


# --- what travels in a vote ---


@dataclass(frozen=True, slots=True)
class Claims:
    """One worker's sums in a vote; 64 bits each.

    `sound`: nothing here has changed since the last apply. `published`: of everything that the forward reads. `state`,
    `reduced`: for each shard that it holds, by its first block, the sum of what it keeps for it, and of its reduced
    gradient (0 where there is none). `lane`: of the lane that is checked in this step, if it has computed it.
    """

    sound: bool
    published: int
    state: Mapping[int, int] = field(default_factory=dict)
    reduced: Mapping[int, int] = field(default_factory=dict)
    lane: int = 0


def differ(layout: Layout, claims: Mapping[int, Claims]) -> bool:
    """Whether a vote's sums say that anything is wrong."""
    if any(not claim.sound for claim in claims.values()):
        return True
    if len({claim.published for claim in claims.values()}) > 1:
        return True
    return any(a != b for shard in layout.shards for a, b in [_pair(claims, shard)])


def without_state(claims: Mapping[int, Claims]) -> dict[int, Claims]:
    """What can be compared between workers of different numerics: that each is sound, and gradients, which are sent."""
    return {w: Claims(claim.sound, 0, {}, claim.reduced, claim.lane) for w, claim in claims.items()}


def _pair(claims: Mapping[int, Claims], shard: Shard) -> tuple[object, object]:
    """What owner and mirror claim of a shard; equal nothings where there are no two to compare."""
    if shard.mirror is None or shard.owner not in claims or shard.mirror not in claims:
        return None, None
    owner, mirror = claims[shard.owner], claims[shard.mirror]
    return (
        (owner.state.get(shard.lo), owner.reduced.get(shard.lo)),
        (mirror.state.get(shard.lo), mirror.reduced.get(shard.lo)),
    )


# --- the inquest: sums block by block, asked for only when something differs ---


@dataclass(frozen=True, slots=True)
class Statement:
    """What one worker says of its state, block by block. `changed`: what it has found changed in its own memory, in
    words ("" if nothing). `held`: sums of what it keeps, by block. `published`: sums of every block as its forward
    reads it. `astray`: blocks that it holds and whose published copy does not follow from its own master. `counters`:
    of its integer buffers.
    """

    changed: str
    held: Mapping[int, int]
    published: Sequence[int]
    astray: frozenset[int] = frozenset()
    counters: int = 0


@dataclass(slots=True)
class Verdict:
    """`named`: workers that are wrong, each with the reason. `undecided`: of these at least one is, and nobody can know
    which; `claims`: what they say, block → worker → sum, for whoever computes it again. `stale`: workers whose
    published copy is not right through no fault of theirs. `recipe`: it is the recipe, and nobody's memory.
    """

    named: dict[int, str] = field(default_factory=dict)
    undecided: set[int] = field(default_factory=set)
    claims: dict[int, dict[int, int]] = field(default_factory=dict)
    stale: set[int] = field(default_factory=set)
    recipe: bool = False


def judge(
    layout: Layout, claims: Mapping[int, Claims], said: Mapping[int, Statement], *, copies: bool = True
) -> Verdict:
    """Name who is wrong after `differ`. Names nobody without evidence: what two computations that depend on each other
    cannot decide stays undecided. Without `copies` (workers of different numerics) state is not compared.
    """
    verdict = Verdict()
    for worker, statement in said.items():
        if statement.changed:
            verdict.named[worker] = f"its memory has changed between two steps: {statement.changed}"
    if len(verdict.named) == len(said) > 1:
        verdict.recipe = True  # no two machines have their bits flipped in the same step
        return verdict
    _judge_gradients(layout, claims, verdict)
    for shard in layout.shards if copies else ():
        for block in range(shard.lo, shard.hi):
            _judge_block(shard, block, said, verdict)
    if copies:
        _judge_counters(said, verdict)
    if copies and not verdict.named and not verdict.undecided:
        _judge_sums(layout, claims, verdict)
    verdict.undecided -= set(verdict.named)
    verdict.stale -= set(verdict.named)
    return verdict


def agreed(verdicts: Mapping[int, Verdict]) -> Verdict:
    """What follows from the verdicts that all members have come to, each by itself from the same sums: the one of more
    than half of them. One that has come to another cannot compute, and is named for that; so no worker is ended on the
    word of a single accuser where others have the same evidence. Without a majority (two against each other) nothing is
    decided: both sides are suspects.
    """
    keys = {worker: _key(verdict) for worker, verdict in verdicts.items()}
    most, count = Counter(keys.values()).most_common(1)[0]
    if 2 * count <= len(verdicts):
        return Verdict(undecided=set(verdicts))
    found = next(verdict for worker, verdict in sorted(verdicts.items()) if keys[worker] == most)
    astray = {w: "it comes to another verdict from the same sums than most others" for w in keys if keys[w] != most}
    rest = set(verdicts) - set(astray)
    return Verdict(astray | found.named, found.undecided & rest, found.claims, found.stale & rest, found.recipe)


def _key(verdict: Verdict) -> tuple[object, ...]:
    return frozenset(verdict.named), frozenset(verdict.undecided), frozenset(verdict.stale), verdict.recipe


def _judge_gradients(layout: Layout, claims: Mapping[int, Claims], verdict: Verdict) -> None:
    """An owner whose reduced gradient has changed has said so itself; what its mirror got then differs on the way."""
    for shard in layout.shards:
        owner, mirror = shard.owner, shard.mirror
        if mirror is None or owner in verdict.named or mirror in verdict.named or not {owner, mirror} <= set(claims):
            continue
        if claims[owner].reduced.get(shard.lo) != claims[mirror].reduced.get(shard.lo):
            verdict.named[mirror] = (
                f"the reduced gradient of blocks {shard.lo}..{shard.hi - 1} is not what worker {owner} has sent it"
            )


def _judge_block(shard: Shard, block: int, said: Mapping[int, Statement], verdict: Verdict) -> None:
    published = {w: t.published[block] for w, t in said.items() if not t.changed}
    holders = [w for w in shard.holders() if w in published]
    for worker in [w for w in holders if block in said[w].astray]:
        verdict.named[worker] = f"its published copy of block {block} does not follow from its own master"
        holders.remove(worker)
    others = {w: value for w, value in published.items() if w not in shard.holders()}
    if len(holders) == 2:
        _judge_pair(block, holders, published, others, said, verdict)
    elif len(holders) == 1:
        _judge_single(block, holders[0], published[holders[0]], others, verdict)


def _judge_pair(
    block: int,
    holders: Sequence[int],
    published: Mapping[int, int],
    others: Mapping[int, int],
    said: Mapping[int, Statement],
    verdict: Verdict,
) -> None:
    """Owner and mirror have computed the block apart from each other; everybody else has it from the owner."""
    owner, mirror = holders
    kept = {w: said[w].held.get(block) for w in holders}
    right = published[mirror]
    if published[owner] == right:
        for worker in [w for w, value in others.items() if value != right]:
            verdict.named[worker] = f"its published copy of block {block} differs from its owner's and its mirror's"
    elif right in others.values():  # so the owner had it, and sent it, before it changed
        verdict.named[owner] = f"block {block} differs from what it has sent, and that is what its mirror has computed"
        verdict.stale |= {w for w, value in others.items() if value != right}
        return
    if kept[owner] != kept[mirror]:
        verdict.undecided |= {owner, mirror}
        verdict.claims[block] = {w: value for w, value in kept.items() if value is not None}


def _judge_single(block: int, holder: int, own: int, others: Mapping[int, int], verdict: Verdict) -> None:
    """One holder is left: all copies are its own, so most of them are what it has sent."""
    values = Counter([own, *others.values()])
    most, count = values.most_common(1)[0]
    if len(values) == 1:
        return
    if 2 * count <= sum(values.values()):
        verdict.undecided |= {holder, *(w for w, value in others.items() if value != own)}
        return
    for worker, value in {holder: own, **others}.items():
        if value != most:
            verdict.named[worker] = f"its published copy of block {block} differs from most of the others'"


def _judge_counters(said: Mapping[int, Statement], verdict: Verdict) -> None:
    """Integer buffers are the same everywhere, computed by all: the majority is right."""
    values = {w: t.counters for w, t in said.items() if w not in verdict.named}
    counted = Counter(values.values())
    if len(counted) <= 1:
        return
    most, count = counted.most_common(1)[0]
    if 2 * count <= len(values):
        verdict.undecided |= set(values)
        return
    for worker, value in values.items():
        if value != most:
            verdict.named[worker] = "its integer buffers differ from most of the others'"


def _judge_sums(layout: Layout, claims: Mapping[int, Claims], verdict: Verdict) -> None:
    """Sums in the vote differ, but no block does: bits outside of any block, or a sum that came out wrong."""
    totals = Counter(claim.published for claim in claims.values())
    most, count = totals.most_common(1)[0]
    for worker, claim in claims.items():
        if len(totals) > 1 and 2 * count > len(claims):
            if claim.published != most:
                verdict.named[worker] = "the sum of its published parameters differs from most of the others'"
        elif len(totals) > 1:
            verdict.undecided.add(worker)
    for shard in layout.shards:
        owner, mirror = _pair(claims, shard)
        if owner != mirror:
            verdict.undecided |= set(shard.holders())


# --- the third computation, later ---


@dataclass(frozen=True, slots=True)
class Dispute:
    """Two holders had different sums of a block at commit `step`: (worker, sum) each. Whoever computes that step again
    is the third computation.
    """

    step: int
    block: int
    claims: tuple[tuple[int, int], ...]


def settle_disputes(disputes: Sequence[Dispute], step: int, truth: Mapping[int, Set[int]]) -> dict[int, str]:
    """Who was wrong, now that commit `step` has been computed again. `truth`: the sums of its holders, by block; where
    they differ, or agree with nobody, nothing follows.
    """
    named: dict[int, str] = {}
    for dispute in disputes:
        found = truth.get(dispute.block, frozenset())
        sums = dict(dispute.claims)
        if dispute.step != step or len(found) != 1 or not set(found) & set(sums.values()):
            continue
        (right,) = found
        for worker, value in sums.items():
            if value != right:
                named[worker] = f"its block {dispute.block} at step {step} was wrong: computed again, it is another"
    return named
