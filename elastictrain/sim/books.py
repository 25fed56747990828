"""The simulator's own account of steps and blocks, kept from what the virtual workers do and never from the machine.

Of every `Form` it asks: does it go on from exactly the step that the survivors have reached, from the layout that was
sealed last, and only while every block of that has a live holder? Of every seal: does each member really hold the
blocks that the layout says, from a live holder, at the step of the seal? At the end: was every step committed exactly
once?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from elastictrain.errors import InternalError
from elastictrain.layout import Layout, Shard
from elastictrain.protocol import FormPlan
from elastictrain.sim.process import Process, Stage, vote_bytes

Run = tuple[int, int]


class Violation(InternalError):
    """The machine has led the virtual cluster astray; the message says where."""


def require(holds: bool, what: object) -> None:
    if not holds:
        raise Violation(str(what))


@dataclass(slots=True)
class Books:
    """`plans`: by generation. `voided`: generations whose state was given up when the job went back. `heard_seals`: the
    seals that the controller knows of. `commits`: the steps (from, to] that each generation has committed, `marks`: how
    far its members had come when it was interrupted, the dead ones too. `stored`: the checkpoints that the controller
    knows to be whole. `undone`: committed steps that were given up by going back.
    """

    plans: dict[int, FormPlan] = field(default_factory=dict)
    voided: set[int] = field(default_factory=set)
    heard_seals: set[int] = field(default_factory=lambda: {0})
    commits: dict[int, Run] = field(default_factory=dict)
    marks: dict[int, int] = field(default_factory=dict)
    stored: dict[int, str] = field(default_factory=dict)
    undone: int = 0
    holders: dict[int, dict[int, list[Shard]]] = field(default_factory=dict)

    def true_layout(self, believed: Mapping[int, Process]) -> Layout | None:
        """The layout sealed last, as far as a survivor or the controller can know; None: the state is in storage.

        `believed`: the processes that the controller must take for alive.
        """
        newest = max(({p.sealed for p in believed.values()} | self.heard_seals) - self.voided)
        return None if newest == 0 else self.plans[newest].layout

    def is_lost(self, truth: Layout, believed: Mapping[int, Process]) -> bool:
        """Whether a block of `truth` has no live holder."""
        return any(not any(worker in believed for worker in shard.holders()) for shard in truth.shards)

    def form(self, plan: FormPlan, believed: Mapping[int, Process]) -> None:
        """The controller has decided on `plan`."""
        for process in believed.values():
            busy = process.stage in (Stage.FORMING, Stage.STEPPING)
            require(not busy, f"generation {plan.generation} forms while worker {process.number} is not parked")
        truth = self.true_layout(believed)
        self.plans[plan.generation] = plan
        if truth is None:
            newest = max(self.stored, default=0)
            require(plan.restore is not None, f"nothing is sealed, but generation {plan.generation} restores nothing")
            require(plan.step == newest, f"restores step {plan.step}, but the newest checkpoint is of step {newest}")
            self._undo(plan.step)  # older than when the job went back, if that checkpoint was found corrupt since
            return
        require(plan.restore is None, f"{plan.restore} is restored although every block may have a live holder")
        require(not self.is_lost(truth, believed), f"generation {plan.generation} goes on without some blocks")
        require(plan.previous == truth, f"generation {plan.generation} starts from another layout than the true one")
        reached = self.reached(truth, believed)
        require(
            plan.step == reached,
            f"steps are {'lost' if plan.step < reached else 'made up'}: survivors have applied step {reached}, "
            f"generation {plan.generation} goes on from {plan.step}",
        )

    def reached(self, truth: Layout, believed: Mapping[int, Process]) -> int:
        """The last step that a holder has applied; what the true generation committed is written down."""
        reached = max(believed[worker].applied for worker in truth.workers if worker in believed)
        self.commits[truth.generation] = (self.plans[truth.generation].step, reached)
        return reached

    def enter(self, plan: FormPlan, processes: Mapping[int, Process]) -> None:
        """All members have sent their vote for the seal: roll forward, receive, and look whether all is there."""
        if plan.restore is None:
            self._check_state(plan, processes)
        for worker in plan.layout.workers:
            process = processes[worker]
            process.applied, process.gathered = plan.step, True

    def _check_state(self, plan: FormPlan, processes: Mapping[int, Process]) -> None:
        before = plan.previous
        assert before is not None
        holders = set(before.workers)
        for worker in plan.layout.workers:
            process = processes[worker]
            if worker in holders and process.applied == plan.step - 1:
                require(plan.roll_forward == vote_bytes(plan.step), f"worker {worker} lacks the vote of {plan.step}")
                process.gathered = False
            elif worker in holders:
                require(process.applied == plan.step, f"worker {worker} has applied {process.applied}, not {plan.step}")
            require(process.gathered or worker in plan.gather_to, f"worker {worker} would compute with old parameters")
        had, received = self._holders(before), dict[int, list[Run]]()
        for move in plan.moves:
            have = had.get(move.source, []) if move.source in processes else []
            wanted = [(move.lo, move.hi)]
            require(_covers(_runs(have), wanted), f"worker {move.source} cannot give blocks {wanted}: {move}")
            require(move.source in plan.layout.workers, f"{move.source} sends, but takes no part: {move}")
            received.setdefault(move.target, []).append((move.lo, move.hi))
        for worker, shards in self._holders(plan.layout).items():
            mine = had.get(worker, [])
            if mine != shards:
                have_runs = [*_runs(mine), *received.get(worker, [])]
                require(
                    _covers(have_runs, _runs(shards)), f"worker {worker} enters {plan.generation} without its blocks"
                )

    def _holders(self, layout: Layout) -> dict[int, list[Shard]]:
        """What each member holds; the next plan will ask for the same layout again."""
        if layout.generation not in self.holders:
            self.holders = {g: found for g, found in self.holders.items() if g >= layout.generation - 2}
            self.holders[layout.generation] = layout.by_holder()
        return self.holders[layout.generation]

    def went_back(self, step: int, believed: Mapping[int, Process]) -> None:
        """The whole job goes back to a checkpoint of `step`."""
        truth = self.true_layout(believed)
        lost = truth is not None and self.is_lost(truth, believed)
        require(lost, f"the job goes back to step {step} although every block has a live holder")
        newest = max(self.stored, default=0)
        require(step == newest, f"the job goes back to step {step}, but the newest checkpoint is of step {newest}")
        assert truth is not None
        begun = self.plans[truth.generation].step
        self.commits[truth.generation] = (begun, self.marks.get(truth.generation, begun))
        self.voided |= set(self.plans)
        self._undo(step)

    def _undo(self, step: int) -> None:
        """What was committed after `step` is committed again from now on."""
        self.undone += max(0, max((last for _, last in self.commits.values()), default=step) - step)
        self.commits = {g: (first, min(last, step)) for g, (first, last) in self.commits.items() if first < step}

    def end(self, step: int, believed: Mapping[int, Process]) -> None:
        """The run ended at `step`, with these workers."""
        truth = self.true_layout(believed)
        if truth is not None and any(worker in believed for worker in truth.workers):
            reached = self.reached(truth, believed)
            require(step <= reached, f"the run is said to have ended at step {step}, but nobody got beyond {reached}")

    def audit(self) -> tuple[int, int, int]:
        """Steps committed, and of these the lost (skipped by all generations) and the doubled ones."""
        at = lost = twice = 0
        for _, (first, last) in sorted(self.commits.items()):
            lost += max(0, first - at)
            twice += max(0, at - first)
            at = last
        return at, lost, twice


def _runs(shards: Iterable[Shard]) -> list[Run]:
    return [(shard.lo, shard.hi) for shard in shards]


def _covers(have: Iterable[Run], want: Iterable[Run]) -> bool:
    """Whether every run of `want` lies within the union of `have`."""
    joined: list[Run] = []
    for lo, hi in sorted(have):
        if joined and lo <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(hi, joined[-1][1]))
        else:
            joined.append((lo, hi))
    return all(any(lo <= first and last <= hi for lo, hi in joined) for first, last in want)
