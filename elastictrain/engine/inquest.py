"""When sums differ: everybody says what it has, all come to the same verdict, and each acts on its own part of it.

Whoever is named ends (`WorkerFailed`, kind "corrupt"); every member says so of it, because a machine that is wrong is
not to be relied on for saying it. Where only a step back helps, the members report the doubt when they park: the
controller then goes back to what was stored before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from elastictrain.controller import events as ev
from elastictrain.engine.integrity import block_sums, statement
from elastictrain.engine.lane_checks import Health, LaneCheck, judge_lane
from elastictrain.engine.verdict import (
    Claims,
    Dispute,
    Statement,
    Verdict,
    agreed,
    differ,
    judge,
    settle_disputes,
    without_state,
)
from elastictrain.errors import ClusterError, CorruptWorker, PeerLost, RecipeError
from elastictrain.protocol import Doubt

if TYPE_CHECKING:
    from elastictrain.engine.collective import GroupSet
    from elastictrain.engine.session import Session
    from elastictrain.engine.step import StepRunner
    from elastictrain.layout import Layout

INQUEST_DEADLINE_S = 600.0
"""A lane is computed while peers wait."""
LANE_ROUNDS = 5
"""How often a disputed lane is computed again, until somebody contradicts itself or is outvoted."""


class Knowledge:
    """What all members of a generation know alike beside the state; shared at every seal."""

    def __init__(self) -> None:
        self.health = Health()
        self.disputes: list[Dispute] = []
        self.kinds: dict[int, str] = {}

    @property
    def is_uniform(self) -> bool:
        """Whether all members compute the same bits."""
        return len(set(self.kinds.values())) <= 1

    def to_json(self) -> dict[str, Any]:
        return {"health": asdict(self.health), "disputes": [asdict(dispute) for dispute in self.disputes]}

    def learn(self, said: Mapping[int, Mapping[str, Any]], kinds: Mapping[int, str], step: int) -> None:
        """Merge what the members say at the seal at `step`: afterwards all know the same. `said`: by worker."""
        found = {_dispute(raw) for one in said.values() for raw in one["disputes"]}
        self.disputes = sorted((d for d in found if d.step > step), key=lambda d: (d.step, d.block))
        for one in said.values():
            numbers = {key: {int(w): at for w, at in one["health"][key].items()} for key in ("since", "passed")}
            self.health.merge(Health(**numbers))
        self.health.joined([w for w in said if w not in self.health.since], step)
        self.kinds = dict(kinds)


def _dispute(raw: Mapping[str, Any]) -> Dispute:
    return Dispute(raw["step"], raw["block"], tuple((worker, value) for worker, value in raw["claims"]))


def check_claims(
    session: Session, layout: Layout, groups: GroupSet, claims: Mapping[int, Claims], *, commit: int
) -> None:
    """Compare the sums of the state at `commit` in a complete vote. Returns if nothing is wrong.

    Raises CorruptWorker on whoever is named, PeerLost on the others (the step is redone without it), RecipeError on all
    when the recipe itself writes parameters.
    """
    copies = session.knowledge.is_uniform
    claims = claims if copies else without_state(claims)
    if not claims or not differ(layout, claims):
        return
    said = _hear(session, layout, groups)
    verdict = _confer(layout, groups, judge(layout, claims, said, copies=copies))
    if verdict.recipe:
        raise RecipeError(
            f"step {commit + 1}: on all {len(said)} workers alike {said[session.worker].changed} have changed outside "
            "of apply; a recipe must not write parameters, masters or optimizer state (in forward, loss or evaluate): "
            "only its optimizer does. To train without this check set integrity.state: false"
        )
    if session.worker in verdict.stale:
        with session.apply_lock:
            session.committed.gathered_step = -1  # what it has published here is fetched again
    doubt = None
    if verdict.undecided:
        who = sorted(verdict.undecided)
        reason = (
            f"workers {who} have different copies of the state of step {commit} (blocks {sorted(verdict.claims)[:8]}), "
            "neither is known to have changed since it was computed, and there is no third computation"
        )
        doubt = Doubt(max(0, commit - 1), reason, tuple(who))
        session.knowledge.disputes += [
            Dispute(commit, block, tuple(sorted(values.items()))) for block, values in sorted(verdict.claims.items())
        ]
    convict(session, verdict.named, doubt)


def gather_claims(session: Session, layout: Layout, groups: GroupSet) -> dict[int, Claims]:
    """Everybody's sums of the state as it is now, outside of a vote."""
    mine = session.guard.claims({})
    said = groups.all_gather_sized(json.dumps(claims_to_json(mine)).encode())
    return {w: claims_from_json(json.loads(raw)) for w, raw in zip(layout.workers, said, strict=True)}


def claims_to_json(claims: Claims) -> list[Any]:
    return [claims.sound, claims.published, sorted(claims.state.items())]


def claims_from_json(raw: list[Any]) -> Claims:
    return Claims(raw[0], raw[1], dict(raw[2]))


def _hear(session: Session, layout: Layout, groups: GroupSet) -> dict[int, Statement]:
    """Everybody's sums block by block."""
    groups.deadline_s = groups.gather_deadline_s = INQUEST_DEADLINE_S
    mine = statement(session.model.flat, session.model.held, session.guard.changed)
    raw = json.dumps({**asdict(mine), "astray": sorted(mine.astray)}).encode()
    found = {}
    for worker, said in zip(layout.workers, map(json.loads, groups.all_gather_sized(raw)), strict=True):
        held = {int(block): value for block, value in said["held"].items()}
        found[worker] = Statement(
            said["changed"], held, said["published"], frozenset(said["astray"]), said["counters"]
        )  # fmt: skip
    return found


def _confer(layout: Layout, groups: GroupSet, mine: Verdict) -> Verdict:
    """The verdict of the majority: nobody is ended on the word of one whose own memory or arithmetic may be wrong."""
    raw = {**asdict(mine), "undecided": sorted(mine.undecided), "stale": sorted(mine.stale)}
    found = {}
    for worker, said in zip(
        layout.workers, map(json.loads, groups.all_gather_sized(json.dumps(raw).encode())), strict=True
    ):
        named = {int(w): reason for w, reason in said["named"].items()}
        sums = {int(block): {int(w): v for w, v in one.items()} for block, one in said["claims"].items()}
        found[worker] = Verdict(named, set(said["undecided"]), sums, set(said["stale"]), said["recipe"])
    return agreed(found)


def check_lane(
    session: Session, runner: StepRunner, groups: GroupSet, claims: Mapping[int, Claims], check: LaneCheck, step: int
) -> None:
    """Compare the two sums of the lane that was computed twice in `step`; before the step is applied.

    Raises CorruptWorker on who has computed it wrongly and PeerLost on the others (the run goes back to what was stored
    before that worker can have spoilt it), ClusterError on all when nobody can know who it was, RecipeError on all when
    the recipe is not deterministic.
    """
    health = session.knowledge.health
    first = {worker: claims[worker].lane for worker in (check.worker, check.checker)}
    if len(set(first.values())) == 1:
        health.took(check, step)
        return
    groups.deadline_s = groups.gather_deadline_s = INQUEST_DEADLINE_S
    kinds = session.knowledge.kinds
    for _ in range(LANE_ROUNDS):
        mine = runner.lane.sum(step, check.lane).to_bytes(8, "little")
        heard = dict(zip(runner.layout.workers, groups.all_gather_equal(mine), strict=True))
        alike = [w for w in heard if kinds.get(w) == kinds.get(check.worker)]
        verdict = judge_lane(first, {w: int.from_bytes(heard[w], "little") for w in alike})
        if not verdict.undecided:
            break
    if verdict.recipe:
        raise RecipeError(
            f"the gradient of lane {check.lane} at step {step} comes out differently whenever it is computed, so the "
            "recipe is not deterministic: set numerics.deterministic: true, leave randomness to torch's, Python's and "
            "NumPy's global generators, or set integrity.recompute_every: null to train without this check"
        )
    if verdict.undecided:
        raise ClusterError(
            f"workers {sorted(verdict.undecided)} compute different gradients of lane {check.lane} at step {step}, "
            "each the same again and again, and no others can outvote them: one of these machines is wrong. Test them, "
            "and start the run again with --resume on others, or set integrity.recompute_every: null"
        )
    who = sorted(verdict.named)
    reason = (
        f"computed lane {check.lane} of step {step} wrongly: computed again, most workers agree on another gradient"
    )
    good = health.good_step(verdict.named, session.job.integrity.distrust)
    doubt = Doubt(good, f"workers {who} have {reason}; what they did after step {good} is not to be trusted", ())
    convict(session, dict.fromkeys(who, f"it has {reason}"), doubt)


def settle(session: Session, layout: Layout, groups: GroupSet, step: int) -> None:
    """Commit `step` has been computed again after copies of it differed: now there is a third computation.

    Raises CorruptWorker on whoever was wrong, PeerLost on the others; nothing is to be redone, the state is right.
    """
    due = [dispute for dispute in session.knowledge.disputes if dispute.step == step]
    if not due:
        return
    held = session.model.held
    mine = block_sums(session.model.flat, held, [d.block for d in due if d.block in held.masters])
    truth: dict[int, set[int]] = {}
    for raw in groups.all_gather_sized(json.dumps(mine).encode()):
        for block, value in json.loads(raw).items():
            truth.setdefault(int(block), set()).add(value)
    named = settle_disputes(due, step, truth)
    session.knowledge.disputes = [dispute for dispute in session.knowledge.disputes if dispute.step > step]
    here = {worker: reason for worker, reason in named.items() if worker in layout.workers}
    if here:
        convict(session, here, None)


def convict(session: Session, named: Mapping[int, str], doubt: Doubt | None) -> None:
    """Say who is wrong, and stop. Said before the groups are dropped: nobody can be told to park before it is known."""
    with session.apply_lock:
        session.check()
        session.doubt = doubt
        # Said before it is so: who is corrupt and asked to park then is ended, with all that it has not said.
        for worker, reason in sorted(named.items()):
            session.emit(ev.WorkerFailed(0.0, session.generation, worker, "corrupt", f"CorruptWorker: {reason}", doubt))
        session.corrupt = named.get(session.worker, "")
    if session.worker in named:
        raise CorruptWorker(named[session.worker])
    said = "; ".join(f"worker {worker}: {reason}" for worker, reason in sorted(named.items()))
    raise PeerLost(said or (doubt.reason if doubt is not None else "sums differ"))
