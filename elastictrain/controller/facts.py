"""What the controller knows for longer than a phase: the fixed spec of the run, and the ledger of facts."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from elastictrain.controller.budgets import FailureBudget, Loss, Round
from elastictrain.controller.incidents import Incident
from elastictrain.controller.nodes import Nodes
from elastictrain.errors import ConfigError
from elastictrain.layout import LaneOrder, Layout
from elastictrain.planner.pace import Pace
from elastictrain.protocol import Doubt, FormPlan, ParkReport, Restore
from elastictrain.redundancy import Way


@dataclass(frozen=True, slots=True)
class StragglerSpec:
    """What is done about slow workers. `moves`: lanes are dealt out again; `evicts`: workers may be replaced or left
    out; `min_gain`: the least share of a step that is worth a move.
    """

    moves: bool = False
    evicts: bool = False
    min_gain: float = 0.03


@dataclass(frozen=True, slots=True)
class GradientSpec:
    """What sums of gradients need: the first `blocks` blocks have some, 4 bytes for each element. `apart`: every lane
    has several micro-batches, so that its own sum needs room before it meets its sibling's. `way`, `depth`, `group`:
    whether lanes are shared (`redundancy`): workers then may have lanes of others in a step.
    """

    blocks: int
    apart: bool = False
    way: Way = "none"
    depth: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """All that the controller must know about a job; it never changes during a run.

    `block_elements`: elements of every block of the state. `lane_shares`, `block_shares`: by worker number, default 1.
    `fixed_bytes` and `bytes_per_held_element`: a worker needs `fixed_bytes + bytes_per_held_element x elements it
    holds` (owned and mirrored); 0 and 0 switch the memory check off. `gradients`: what it needs besides, where its
    lanes leave more than two sums of gradients at once; None: nothing. `plans`: every layout made afresh
    gives each worker as many blocks as suit its memory. `pace`: what a step takes with how many workers, for a job that
    plans; None: as many take part as may. `checkpoint`: the job stores checkpoints.
    `start_attempts`: failed starts in a row before the controller stops trying for `start_retry_s`. `deadline_s`: how
    long forming or parking may take, or 20 x the longest seen if that is more.
    `base_generation`: the newest generation of an earlier controller of this run; ours are above it. `domain_label`:
    the label of a node whose value is its failure domain (rack, zone); None: the node is. `last_holder_grace_s`: what
    a frozen worker gets to answer when it alone holds some blocks. `stragglers`: what is done about slow workers; None:
    nobody looks. `budget`: how much failure the run puts up with.
    """

    lane_count: int
    steps: int
    block_elements: tuple[int, ...]
    min_workers: int = 1
    max_workers: int = 1
    initial_workers: int = 1
    spares: int = 0
    replace: bool = True
    mirrors: bool = True
    lane_order: LaneOrder = "contiguous"
    lane_shares: Mapping[int, float] = field(default_factory=dict)
    block_shares: Mapping[int, float] = field(default_factory=dict)
    fixed_bytes: int = 0
    bytes_per_held_element: float = 0.0
    gradients: GradientSpec | None = None
    plans: bool = False
    pace: Pace | None = None
    checkpoint: bool = False
    checkpoints_kept: int | None = None
    start_attempts: int = 3
    start_retry_s: float = 60.0
    rebalance_after_steps: int = 20
    deadline_s: float = 60.0
    base_generation: int = 0
    domain_label: str | None = None
    last_holder_grace_s: float = 2.0
    stragglers: StragglerSpec | None = None
    budget: FailureBudget = field(default_factory=FailureBudget)

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.initial_workers <= self.max_workers:
            raise ConfigError(
                f"workers.min={self.min_workers}, workers.start={self.initial_workers}, "
                f"workers.max={self.max_workers}: expected 1 <= min <= start <= max"
            )
        if self.max_workers > self.lane_count:
            raise ConfigError(
                f"lanes={self.lane_count} < workers.max={self.max_workers}: every worker needs a lane; "
                "raise lanes or lower workers.max"
            )
        if not self.block_elements or min(self.block_elements) < 1:
            raise ConfigError(f"the state needs at least one block, none of them empty; got {self.block_elements}")


class Role(Enum):
    """What a live worker is. LEAVING: parked and left out of the layout, but its copies count until the seal (R4)."""

    STARTING = "starting"
    READY = "ready"
    MEMBER = "member"
    LEAVING = "leaving"

    __hash__ = object.__hash__  # members are single: hashing their names would be felt at every event


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker that is not known to be dead. Frozen: a change is a new record in the roster, which keeps count.

    `domain`: where mirrors must not be. `node`: the machine. `doomed`: told to die; nothing that it says counts any
    more. `why`: why it is doomed or suspected. `avoid`: the nodes where it was not to start. `ready_s`: since when it
    could join. `suspected_until_s`: named as frozen, but the last holder of some blocks: until then it may answer.
    """

    role: Role = Role.STARTING
    domain: str = ""
    memory_bytes: int | None = None
    doomed: bool = False
    node: str = ""
    why: str = ""
    avoid: tuple[str, ...] = ()
    ready_s: float | None = None
    suspected_until_s: float | None = None


@dataclass(frozen=True, slots=True)
class Hang:
    """All members of the present generation waited for each other: `reason`, and whom the watch suspects."""

    reason: str
    suspect: int | None
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """A member's machine goes at `deadline_s`. It leaves when a stand-in waits, at `leave_by_s` in any case; then it is
    `released` (asked to leave). `due`: it leaves even if too few are left.
    """

    deadline_s: float
    leave_by_s: float
    reason: str = ""
    released: bool = False
    due: bool = False


class Roster(MutableMapping[int, WorkerFacts]):
    """Every live worker by number, and the numbers of each role and of the doomed, so that no event has to count ten
    thousand workers.
    """

    __slots__ = ("_by_role", "_facts", "doomed", "suspected")

    def __init__(self) -> None:
        self._facts: dict[int, WorkerFacts] = {}
        self._by_role: dict[Role, set[int]] = {role: set() for role in Role}
        self.doomed: set[int] = set()
        self.suspected: set[int] = set()

    def __getitem__(self, worker: int) -> WorkerFacts:
        return self._facts[worker]

    def __setitem__(self, worker: int, facts: WorkerFacts) -> None:
        before = self._facts.get(worker)
        if before is not None:
            self._by_role[before.role].discard(worker)
            self.doomed.discard(worker)
            self.suspected.discard(worker)
        self._facts[worker] = facts
        if facts.suspected_until_s is not None:
            self.suspected.add(worker)
        if facts.doomed:
            self.doomed.add(worker)
        if not facts.doomed or facts.role in (Role.MEMBER, Role.LEAVING):  # a doomed one that waits can no more join
            self._by_role[facts.role].add(worker)

    def __delitem__(self, worker: int) -> None:
        self._by_role[self._facts.pop(worker).role].discard(worker)
        self.doomed.discard(worker)
        self.suspected.discard(worker)

    def __contains__(self, worker: object) -> bool:
        return worker in self._facts

    def __iter__(self) -> Iterator[int]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __repr__(self) -> str:
        return repr(self._facts)

    # As inherited, only faster: every event would feel it.
    def get(self, worker: int, default: Any = None) -> Any:
        return self._facts.get(worker, default)

    def items(self) -> ItemsView[int, WorkerFacts]:
        return self._facts.items()

    def update_facts(self, worker: int, **changes: Any) -> None:
        """Give `worker` new values of the fields named."""
        facts = self._facts[worker]
        if any(getattr(facts, name) != value for name, value in changes.items()):
            self[worker] = replace(facts, **changes)

    def of(self, role: Role) -> set[int]:
        """The numbers in `role`; not to be changed."""
        return self._by_role[role]


@dataclass(frozen=True, slots=True)
class Vain:
    """A generation that ended without a commit although nobody was lost. `accused`: whom the trouble came from."""

    generation: int
    members: tuple[int, ...]
    accused: tuple[int, ...]
    reason: str


@dataclass(slots=True)
class Ledger:
    """Facts that outlive a phase.

    `workers`: every live worker by number. `target`: the world size wanted; `complement`: worker processes wanted,
    spares included. `plan`: of the newest generation. `sealed`: the newest generation known to be sealed, 0 when the
    state comes from `restore`. `layouts`: of `sealed` and of the generation that is forming. `leaving`: reports of
    workers in role LEAVING. `draining`: asked to leave, in order of request. `checkpoints`: path by step.
    `given_up`: what was announced of a checkpoint that came to nothing, until the next one is committed;
    `heard_given_up`: the generation and the step of the newest of all that were. `copies`: by path, how the further
    places of checkpoints are.
    `published_step`: the last step that can be redone no more (R5). `shown_step`: the last one whose metrics have
    arrived; the rows after it are published again by whoever publishes next. `fenced`: workers of lost nodes that are
    not known to be dead, with the reason. `notices`: members whose machine is about to go. `reprieved`: workers that
    were taken for frozen since the last commit and let off, with the generation. `incident`: open until the seal;
    `settling`: until the first commit after it. `losses`, `hung`: of this generation; `rounds`: generations that ended
    with some since the job came to step `reached`. `hangs`: in a row without a commit. `failures`: their times within
    the last hour, by cause.
    `capacity`: what the cluster has, in words. `doubt`: of what members have said against their state, or against what
    a corrupt worker may have spoilt, what trusts least; until the job has gone back. `accused`: who was the first to be
    troubled in this generation. `vain`: generations in a row that ended without a commit although nobody was lost;
    `counted_in_vain`: the newest that is counted there, or that has a limit of its own; `vain_replaced`: workers, with
    reasons, replaced for it since the job came to step `reached`. `closing`: generations that a run which is stopped
    has formed only to store its state. `lane_offers`: lane counts by rank of every split that was offered in this
    generation, `lanes_refused` those of the last one that does not fit into memory; `speeds`: by worker, as learned
    with the last of them that holds, `speeds_before` with the one before it: a move that is taken back has shown that
    what was learned with it is wrong.
    """

    target: int
    complement: int
    base_generation: int = 0
    begun: bool = False
    workers: Roster = field(default_factory=Roster)
    next_worker: int = 0
    plan: FormPlan | None = None
    sealed: int = 0
    layouts: dict[int, Layout] = field(default_factory=dict)
    restore: Restore = field(default_factory=lambda: Restore(0, None))
    checkpoints: dict[int, str] = field(default_factory=dict)
    given_up: dict[str, Any] | None = None
    heard_given_up: tuple[int, int] = (0, 0)
    copies: dict[str, dict[str, Any]] = field(default_factory=dict)
    published_step: int = 0
    shown_step: int = 0
    leaving: dict[int, ParkReport] = field(default_factory=dict)
    draining: list[int] = field(default_factory=list)
    stop: str | None = None
    closing: int = 0
    start_failures: int = 0
    start_error: str = ""
    start_retry_at_s: float | None = None
    incident: Incident | None = None
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    fenced: dict[int, str] = field(default_factory=dict)
    notices: dict[int, Notice] = field(default_factory=dict)
    reprieved: dict[int, int] = field(default_factory=dict)
    settling: Incident | None = None
    incidents: list[dict[str, Any]] = field(default_factory=list)
    incident_count: int = 0
    losses: list[Loss] = field(default_factory=list)
    hung: Hang | None = None
    rounds: list[Round] = field(default_factory=list)
    reached: int = 0
    hangs: int = 0
    failures: dict[str, list[float]] = field(default_factory=dict)
    nodes: Nodes = field(default_factory=dict)
    capacity: str = ""
    doubt: Doubt | None = None
    accused: tuple[int, ...] = ()
    vain: list[Vain] = field(default_factory=list)
    counted_in_vain: int = 0
    vain_replaced: list[tuple[int, str]] = field(default_factory=list)
    longest_forming_s: float = 0.0
    longest_parking_s: float = 0.0
    patience: int = 1
    lane_offers: tuple[tuple[int, ...], ...] = ()
    lanes_refused: tuple[int, ...] = ()
    speeds: dict[int, float] = field(default_factory=dict)
    speeds_before: dict[int, float] = field(default_factory=dict)

    @property
    def generation(self) -> int:
        """The newest generation that was formed; `base_generation` before the first."""
        return self.base_generation if self.plan is None else self.plan.generation

    @property
    def truth(self) -> Layout | None:
        """The layout whose holders count; None when the state comes from `restore`."""
        return self.layouts.get(self.sealed)

    def with_role(self, *roles: Role) -> list[int]:
        """Live workers in one of `roles`, ascending."""
        return sorted(worker for role in roles for worker in self.workers.of(role))

    def members(self) -> list[int]:
        """The live members of the newest generation, in rank order."""
        if self.plan is None:
            return []
        of_role = self.workers.of(Role.MEMBER)
        return [worker for worker in self.plan.layout.workers if worker in of_role]

    def is_member(self, worker: int) -> bool:
        return worker in self.workers.of(Role.MEMBER)

    def domains(self) -> dict[int, str]:
        """The failure domain of every live worker that has said so. When a label puts all of them into one domain,
        their nodes are the domains: a mirror on another machine of the same rack is better than one beside its owner.
        """
        domains = {worker: facts.domain for worker, facts in self.workers.items() if facts.domain}
        if len(set(domains.values())) == 1:
            return {worker: self.workers[worker].node or domain for worker, domain in domains.items()}
        return domains

    def memory(self) -> dict[int, int]:
        return {w: facts.memory_bytes for w, facts in self.workers.items() if facts.memory_bytes is not None}

    def processes(self) -> int:
        """Worker processes that count towards `complement`: those that are neither about to leave nor to die."""
        workers = self.workers
        if not (self.draining or self.notices or workers.doomed):
            return len(workers) - len(workers.of(Role.LEAVING))
        going = workers.doomed | workers.of(Role.LEAVING)
        going.update(worker for worker in (*self.draining, *self.notices) if worker in self.workers)
        return len(self.workers) - len(going)

    def newest_restore(self) -> Restore:
        """The newest checkpoint known to be whole, or the recipe's initial state."""
        if not self.checkpoints:
            return Restore(0, None)
        step = max(self.checkpoints)
        return Restore(step, self.checkpoints[step])

    def distrust(self, good_step: int) -> None:
        """Take every checkpoint after `good_step` off the list: what it holds may be wrong."""
        self.checkpoints = {step: path for step, path in self.checkpoints.items() if step <= good_step}
