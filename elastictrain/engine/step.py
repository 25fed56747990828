"""One step for one worker under one layout: compute, exchange, mirror, vote, gather. (`apply` is the session's: it is
the commit and is taken under the session's lock.)

All traffic is one ragged exchange primitive; both sides derive the list of pieces from the layout alone, so nobody asks
anybody what will come. What is sent where depends on the layout; what is added to what does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from elastictrain.data.ids import step_hash
from elastictrain.engine.collective import GroupSet, Peer
from elastictrain.engine.flat import FlatModel, published_pieces
from elastictrain.engine.guard import Guard
from elastictrain.engine.held import HeldState
from elastictrain.engine.integrity import LaneSum
from elastictrain.engine.lane_checks import LaneCheck, lane_check
from elastictrain.engine.lanes import LaneTree, SpareBuffers
from elastictrain.engine.one_lane import Batches, LaneResult, OneLane
from elastictrain.engine.pending import Pending
from elastictrain.engine.replaying import ReplayedLanes
from elastictrain.engine.shares import SharedLanes
from elastictrain.engine.signals import StepClock, Timer
from elastictrain.engine.verdict import Claims
from elastictrain.engine.vote import Ballot, VoteFormat, root_sums
from elastictrain.job import Job
from elastictrain.layout import Layout, Shard
from elastictrain.signs import Activity
from elastictrain.tree import Node, finish, most_sums, path_up, roots, whole

SLICES = 4
"""In how many slices an owner takes lanes that are handed over."""


class StepRunner:
    """The phases of a step under one layout. `probe(phase)` is called in the middle of each phase (fault injection);
    `check` raises when the session has parked; `enter` says what this worker is doing (its sign of life). With `guard`
    the vote carries sums of the state. `kinds`: of numerics, by worker. `spoils(step)`: the next lane is to be wrong;
    `drags(step, what, took_s)`: seconds that computation, data or link take longer. `clock`: measures for the watch.
    `shares`: where more than one worker may compute a lane.
    """

    def __init__(
        self,
        job: Job,
        recipe: Any,
        worker: int,
        layout: Layout,
        groups: GroupSet,
        flat: FlatModel,
        held: HeldState,
        tree: LaneTree,
        batches: Batches,
        probe: Callable[[str], None],
        check: Callable[[], None],
        enter: Callable[[Activity], None] = lambda _: None,
        *,
        guard: Guard | None = None,
        kinds: Mapping[int, str] | None = None,
        spoils: Callable[[int], bool] = lambda _: False,
        drags: Callable[[int, str, float], float] = lambda *_: 0.0,
        clock: StepClock | None = None,
        shares: SharedLanes | ReplayedLanes | None = None,
    ) -> None:
        self.job, self.recipe, self.worker = job, recipe, worker
        self.layout, self.groups, self.flat, self.held, self.tree = layout, groups, flat, held, tree
        self.probe, self.enter, self.guard, self.kinds = probe, enter, guard, kinds
        self.lane = OneLane(job, recipe, flat, tree, batches, check, enter, spoils, drags)
        self.clock, self.shares = clock or StepClock(), shares
        self.rank = layout.rank(worker)
        checks = guard is not None or job.integrity.recompute_every is not None
        self.vote_format = VoteFormat(
            layout, flat.space.active_blocks, flat.largest_size, claims=checks,
            signals=job.watches_workers, shared=None if shares is None else shares.sharing.most,
            drops=shares is not None and shares.drops,
        )  # fmt: skip
        self.seconds: dict[str, float] = {}
        self.data_wait: dict[str, float] = {}  # of the step's seconds: waited for batches, by stage of feeding
        self._spare = SpareBuffers(flat.device)
        self._owned = [s for s in layout.owned(worker) if self._span(s)[0] < self._span(s)[1]]
        self._mirrored = [s for s in layout.mirrored(worker) if self._span(s)[0] < self._span(s)[1]]

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lanes whose batches this worker may need in a step, in the order in which it computes them."""
        return tuple(self.layout.lanes[self.rank]) if self.shares is None else self.shares.ahead

    def _span(self, shard: Shard) -> tuple[int, int]:
        return self.flat.space.active_span(shard.lo, shard.hi)

    # --- compute + exchange ---

    def run(self, step: int) -> Pending:
        """Compute this worker's lanes, exchange, mirror. Afterwards the host knows that all data is here (R2)."""
        self.seconds, self.data_wait = {}, {}
        self.clock.begin()
        self.tree.reset()
        pending = Pending(step, self.layout.generation)
        check = self.lane_check(step)
        if check is not None and check.checker == self.worker:
            with Timer(self.seconds, "recompute_s"):
                pending.lane_sum = self.lane.sum(step, check.lane)
        if self.job.gradients == "sum":
            self._sum_locally(step, pending)
        else:
            self._hand_over(step, pending)
        return pending

    def _sum_locally(self, step: int, pending: Pending) -> None:
        dealt, dropped = self.layout.lanes, frozenset[int]()
        lanes = dealt[self.rank]
        if self.shares is not None:
            self._share(self.shares, step, pending)
        else:
            self.tree.keep(most_sums(lanes, self.layout.lane_count, apart=self.job.micro_batches > 1))
            with self._timed("compute"):
                for turn, lane in enumerate(lanes):
                    self.run_lane(step, lane, pending, first=turn == 0, merge=True)
        self.clock.arrive()
        with self._timed("exchange"):
            if self.shares is not None:
                dealt, dropped = self.shares.agree()
            nodes = [roots(lanes, self.layout.lane_count) for lanes in dealt]
            # All lanes are done: what comes may lie in the tree's spare buffers.
            received = self._exchange(nodes, self.tree.scratch)
            for shard in self._owned:
                a, b = self._span(shard)
                parts = received[shard] | {node: self.tree.nodes[node][a:b] for node in nodes[self.rank]}
                pending.reduced[shard] = finish(parts, torch.Tensor.add_, whole(self.layout.lane_count), dropped)
        base = next(iter(self.tree.nodes.values())) if self.tree.nodes else self.tree.borrow()
        self._mirror(pending, base)

    def _share(self, shares: SharedLanes | ReplayedLanes, step: int, pending: Pending) -> None:
        """Compute lanes that others may compute too. What is computed is told apart from what is only waited for."""
        self.tree.keep(shares.sums + (self.job.micro_batches > 1))
        check = self.lane_check(step)
        begun = time.perf_counter()
        self.enter(Activity.COMPUTE)
        done = shares.compute(
            step, _Work(self, step, pending), closed=frozenset() if check is None else frozenset({check.lane}),
            stays=check is not None and check.worker == self.worker,
        )  # fmt: skip
        self.seconds["compute_s"] = done.lanes_s
        self.seconds["share_s"] = time.perf_counter() - begun - done.lanes_s

    def _hand_over(self, step: int, pending: Pending) -> None:
        """Lane by lane: after every round of lanes each owner combines what has come as far as the tree allows. It does
        so in slices of its range, so that what has come and waits is one slice of each peer's and not its whole.
        """
        partial: list[dict[Shard, dict[Node, torch.Tensor]]] = [{s: {} for s in self._owned} for _ in range(SLICES)]
        for turn in range(max(len(lanes) for lanes in self.layout.lanes)):
            nodes: list[tuple[Node, ...]] = [
                (Node(lanes[turn], lanes[turn] + 1),) if turn < len(lanes) else () for lanes in self.layout.lanes
            ]
            mine = nodes[self.rank]
            with self._timed("compute"):
                if mine:
                    self.run_lane(step, mine[0].lo, pending, first=turn == 0, merge=False)
            with self._timed("exchange"):
                for part, parts in enumerate(partial):
                    received = self._exchange(nodes, self._spare.take, part, SLICES)
                    for shard in self._owned:
                        for node, tensor in received[shard].items():
                            self._push(parts[shard], node, tensor)
                        a, b = self._slice(shard, part, SLICES)
                        for node in mine if a < b else ():
                            self._push(parts[shard], node, self.tree.nodes[node][a:b], borrowed=True)
                for node in mine:
                    self.tree.release(node)
        root, base = whole(self.layout.lane_count), self.tree.borrow()
        for shard in self._owned:
            a, b = self._span(shard)
            sums = [parts[shard].pop(root) for parts in partial if parts[shard]]  # slices of few elements are empty
            pending.reduced[shard] = torch.cat(sums, out=base[a:b])
            self._spare.give_back(sums)
        self._mirror(pending, base)

    def _push(
        self, parts: dict[Node, torch.Tensor], node: Node, tensor: torch.Tensor, *, borrowed: bool = False
    ) -> None:
        """Add a leaf's sum to an owner's tree. `borrowed`: the lane's buffer takes the next lane, so this may not stay.

        A sum of two does not depend on their order, so it may always lie where the sibling lay.
        """
        for sibling, parent in path_up(node.lo, self.layout.lane_count):
            if sibling not in parts:
                break
            total = parts.pop(sibling).add_(tensor)
            if not borrowed:
                self._spare.give_back([tensor])
            tensor, borrowed, node = total, False, parent
        parts[node] = self._spare.take(tensor.numel()).copy_(tensor) if borrowed else tensor

    def _exchange(
        self, nodes: list[tuple[Node, ...]], place: Callable[[int], torch.Tensor], part: int = 0, parts: int = 1
    ) -> dict[Shard, dict[Node, torch.Tensor]]:
        """Send every owner the given nodes' sums for its shards; returns what came for ours, each in `place(size)`.
        `part` of `parts`: only that slice of every shard.
        """
        sends: list[Peer] = []
        for shard in self.layout.shards:
            a, b = self._slice(shard, part, parts)
            if shard.owner != self.worker and a < b:
                owner = self.layout.rank(shard.owner)
                sends += [(owner, self.tree.nodes[node][a:b]) for node in nodes[self.rank]]
        recvs: list[Peer] = []
        received: dict[Shard, dict[Node, torch.Tensor]] = {}
        for shard in self._owned:
            a, b = self._slice(shard, part, parts)
            received[shard] = {}
            for rank in range(self.layout.world_size):
                for node in nodes[rank] if rank != self.rank and a < b else ():
                    buffer = place(b - a)
                    received[shard][node] = buffer
                    recvs.append((rank, buffer))
        self.groups.exchange(sends, recvs, between=lambda: self.probe("exchange"))
        return received

    def _slice(self, shard: Shard, part: int, parts: int) -> tuple[int, int]:
        a, b = self._span(shard)
        return a + (b - a) * part // parts, a + (b - a) * (part + 1) // parts

    def _mirror(self, pending: Pending, base: torch.Tensor) -> None:
        """The owner sends its reduced gradient, not its state, to its mirror: the redo-log entry's second copy. What
        comes lies in `base`, at its own place: what lay there has been sent to the owner and is needed no more.
        """
        self.lane.link(pending.step, self.seconds)
        if self.guard is not None:
            with Timer(self.seconds, "sums_s"):
                self.guard.reduced({shard: pending.reduced[shard] for shard in self._owned})
        with self._timed("mirror"):
            sends = [
                (self.layout.rank(shard.mirror), pending.reduced[shard])
                for shard in self._owned
                if shard.mirror is not None
            ]
            recvs: list[Peer] = []
            for shard in self._mirrored:
                a, b = self._span(shard)
                pending.reduced[shard] = base[a:b]
                recvs.append((self.layout.rank(shard.owner), base[a:b]))
            self.groups.exchange(sends, recvs, between=lambda: self.probe("mirror"))

    # --- one lane ---

    def run_lane(self, step: int, lane: int, pending: Pending, *, first: bool, merge: bool) -> None:
        """Forward and backward of one lane; its gradient ends in the lane tree, its loss in `pending`."""
        self.count(pending, lane, self.compute_lane(step, lane, pending, first=first, merge=merge))

    def count(self, pending: Pending, lane: int, result: LaneResult) -> None:
        """What a lane has given counts in this step."""
        pending.lanes.append((result.total, result.weight))
        pending.numbers.append(lane)
        pending.tokens += result.tokens
        pending.samples_hash = step_hash((pending.samples_hash, result.samples_hash))

    def compute_lane(self, step: int, lane: int, pending: Pending, *, first: bool, merge: bool) -> LaneResult:
        """As `run_lane`, whether or not its result will count."""
        check = self.lane_check(step)
        is_checked = check is not None and (check.lane, check.worker) == (lane, self.worker)
        shown = LaneSum() if is_checked else None
        result = self.lane.run(step, lane, first=first, merge=merge, shown=shown)
        pending.computed += 1
        pending.computed_tokens += result.tokens
        pending.squares += result.squares
        for stage, seconds in result.waited.items():
            self.data_wait[stage] = self.data_wait.get(stage, 0.0) + seconds
        if shown is not None:
            pending.lane_sum = shown.total(result.total, result.weight)
        if first:
            self.probe("compute")
        return result

    def lane_check(self, step: int) -> LaneCheck | None:
        """The lane that two workers compute in `step`."""
        every = self.job.integrity.recompute_every
        check = lane_check(self.layout, step, seed=self.job.seed, every=every, kinds=self.kinds)
        is_there = check is None or self.shares is None or self.shares.counts(step, check.lane)
        return check if is_there else None

    # --- vote, gather ---

    def vote(self, pending: Pending, *, flags: int, plan: int, stores: bool = False, evaluates: bool = False) -> bytes:
        """Send this worker's ballot and return the whole vote, byte for byte. After it the step may be applied, if the
        sums in it (`VoteFormat.claims`) agree. `stores`, `evaluates`: beside or just before this step.
        """
        claims = Claims(True, 0, lane=pending.lane_sum)
        if self.guard is not None:
            with Timer(self.seconds, "sums_s"):
                claims = self.guard.claims(pending.reduced, pending.lane_sum)
        with self._timed("vote"):
            nodes = self.vote_format.roots[self.rank]
            ballot = Ballot(
                generation=self.layout.generation,
                step=pending.step,
                flags=flags,
                plan=plan,
                counter_hash=self.flat.counter_hash(),
                tokens=pending.tokens,
                lanes=tuple(pending.lanes),
                norms=root_sums(nodes, self._squares(pending)),
                largest=self.flat.largest_counters(),
                claims=claims,
                samples_hash=pending.samples_hash,
                signal=self._signal(pending, stores, evaluates),
                **self._shared(pending),
            )
            self.probe("vote")
            result = b"".join(self.groups.all_gather_equal(self.vote_format.encode(ballot)))
        self.clock.voted()
        return result

    def _signal(self, pending: Pending, stores: bool, evaluates: bool) -> bytes:
        if not self.job.watches_workers:
            return b""
        return self.clock.signal(
            pending.computed, self.seconds, self.data_wait, pending.computed_tokens, pending.squares, stores=stores,
            evaluates=evaluates, more=pending.computed - len(self.layout.lanes[self.rank]),
        ).encode()  # fmt: skip

    def _shared(self, pending: Pending) -> dict[str, Any]:
        """What a ballot says besides where lanes are shared."""
        doing = None if self.shares is None else self.shares.doing
        if doing is None:
            return {}
        return {"numbers": tuple(pending.numbers), "lane_s": doing.lane_s, "in_vain": doing.in_vain,
                "dropped": tuple(doing.dropped)}  # fmt: skip

    def _squares(self, pending: Pending) -> dict[int, float]:
        """Sum of squares of every owned active block of the reduced gradient, in fp64; 0 for buffers."""
        numbers, views = [], []
        for shard in self._owned:
            for number, view in self._block_views(shard, pending.reduced[shard]):
                numbers.append(number)
                views.append(view)
        if not views:
            return {}
        norms = torch.stack(list(torch._foreach_norm(views, 2, dtype=torch.float64)))
        squares = (norms * norms).tolist()
        blocks = self.flat.space.blocks
        return {n: value if blocks[n].entry.kind == "param" else 0.0 for n, value in zip(numbers, squares, strict=True)}

    def _block_views(self, shard: Shard, reduced: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        a, _ = self._span(shard)
        blocks = self.flat.space.blocks
        return [
            (n, reduced[blocks[n].start - a : blocks[n].stop - a])
            for n in range(shard.lo, min(shard.hi, self.flat.space.active_blocks))
        ]

    def gradients(self, pending: Pending) -> dict[int, torch.Tensor]:
        """The reduced gradient of every held active block."""
        return {n: view for shard, reduced in pending.reduced.items() for n, view in self._block_views(shard, reduced)}

    def gather(self) -> None:
        """Owners publish what apply has changed; a worker that mirrors a range has it already."""
        with self._timed("gather"):
            for number in range(self.flat.space.active_blocks):
                if number in self.held.masters:
                    self.flat.publish(number, self.held.masters[number])
            sends: list[Peer] = []
            recvs: list[Peer] = []
            for shard in self.layout.shards:
                pieces = published_pieces(self.flat, *self._span(shard))
                owner = self.layout.rank(shard.owner)
                if shard.owner == self.worker:
                    others = [r for r, w in enumerate(self.layout.workers) if w not in shard.holders()]
                    sends += [(rank, piece) for rank in others for piece in pieces]
                elif shard.mirror != self.worker:
                    recvs += [(owner, piece) for piece in pieces]
            self.groups.exchange(sends, recvs, between=lambda: self.probe("gather"))

    def _timed(self, phase: str) -> Timer:
        self.enter(Activity[phase.upper()])
        return Timer(self.seconds, f"{phase}_s")


@dataclass(frozen=True, slots=True)
class _Work:
    """The computation of one step, for whoever deals its lanes out (`shares.Work`)."""

    runner: StepRunner
    step: int
    pending: Pending

    def compute(self, lane: int, *, first: bool, merge: bool) -> LaneResult:
        self.runner.flat.mark_lane()
        return self.runner.compute_lane(self.step, lane, self.pending, first=first, merge=merge)

    def count(self, lane: int, result: LaneResult) -> None:
        self.runner.count(self.pending, lane, result)

    def forget(self) -> None:
        self.runner.flat.forget_lane()
