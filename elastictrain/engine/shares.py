"""The computation of a step whose lanes more than one worker may compute: claim, compute, help, agree.

What to do is decided in `redundancy`, which is pure; here it is done. Whoever begins a lane that has a second holder
claims it (`claims`). Whatever becomes of a worker meanwhile, nothing has happened yet: those who are left redo the
step, as when somebody dies while it computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import inf

from elastictrain.engine.claims import ClaimBoard
from elastictrain.engine.collective import GroupSet
from elastictrain.engine.doing import Doing, Work
from elastictrain.engine.dropping import Dropper, lane_key, nobody_of
from elastictrain.engine.lanes import LaneTree
from elastictrain.engine.one_lane import LaneResult
from elastictrain.errors import InternalError
from elastictrain.layout import Layout
from elastictrain.redundancy import (
    SLACK,
    Claim,
    Lanes,
    Pace,
    agreed,
    group_of,
    is_late,
    most_of_rank,
    next_take_s,
    say_lanes,
    sharing_of,
    to_take,
)
from elastictrain.signs import Activity
from elastictrain.straggler_settings import Redundancy
from elastictrain.tree import Node

LOOK_S, LOOKS, RARELY_S = 0.002, 16, 0.1
"""Whoever may be overtaken looks so many times in a lane whether it was; no more often than the first says, and no less
often than the last."""
WATCH_S, WATCHES, SOON_S = 0.001, 64, 0.01
"""The same of one that has nothing to do but to wait whether a lane becomes late: the step waits for it too."""
MEASURED_EACH = 8
"""Whoever is overtaken in the first lane that it begins, in each of so many steps but one, is not overtaken in the last
of them: of a worker that never computes a lane to the end nobody would know how slow it is, the watch neither."""
EACH_S = 1e-4
"""For every worker, at least so long passes between two looks of one: all ask the same store."""


class Overtaken(Exception):
    """Somebody else was done first with what is being computed here."""


class SharedLanes:
    """Of one worker under one split of the lanes. `kinds`: of numerics, by rank. `counters`: the model has integer
    buffers. `ready(step, lane)`: whether that batch lies ready; `probe`, `check`, `enter`: as in `StepRunner`.
    """

    def __init__(
        self,
        settings: Redundancy,
        layout: Layout,
        rank: int,
        *,
        kinds: Sequence[str],
        counters: bool,
        board: ClaimBoard,
        pace: Pace,
        tree: LaneTree,
        groups: GroupSet,
        ready: Callable[[int, int], bool],
        probe: Callable[[str], None],
        check: Callable[[], None],
        enter: Callable[[Activity], None],
    ) -> None:
        self.settings, self.rank, self.lane_count = settings, rank, layout.lane_count
        self.sharing = sharing_of(
            settings.lanes, layout.lanes, depth=settings.reach, group=settings.group, kinds=kinds, counters=counters
        )
        self.group = group_of(rank, layout.world_size, settings.group, kinds)
        self.coded, self.copies = settings.lanes == "coded", settings.lanes == "first_result"
        self.drops = settings.lanes == "drop_slowest"
        self._groups_of_all = [group_of(r, layout.world_size, settings.group, kinds) for r in range(layout.world_size)]
        self._shared, self._counters = self.sharing.shared, counters
        self._board, self._pace, self._tree, self._groups = board, pace, tree, groups
        self._ready, self._probe, self._check, self._enter = ready, probe, check, enter
        self._crowd_s = EACH_S * layout.world_size
        self.sums, _ = most_of_rank(self.sharing, rank, settings.lanes, layout.lane_count)  # of gradients, at once
        self._dropper = Dropper(self.sharing, rank, settings.drop_at_most, board, pace)
        self._unmeasured = 0  # steps in a row in which it has computed no lane to the end
        self.doing: Doing | None = None

    @property
    def own(self) -> tuple[int, ...]:
        return self.sharing.lanes[self.rank]

    @property
    def second(self) -> tuple[int, ...]:
        """The lanes of others that this worker may compute too."""
        return self.sharing.second[self.rank]

    @property
    def ahead(self) -> tuple[int, ...]:
        """All that it may compute, in that order: its own first; in a group those of all, ascending."""
        both = self.own + self.second
        return tuple(sorted(both)) if self.coded else both

    # --- compute ---

    def compute(self, step: int, work: Work, *, closed: frozenset[int], stays: bool) -> Doing:
        """Compute what there is to do for this worker. `closed`: lanes that are not shared in this step. `stays`: it
        must not break off.
        """
        if self.drops and closed:
            closed = self._shared  # a lane that is checked must count: in such a step all do
        self.doing = Doing(step, work, closed, stays, measures=self._unmeasured + 1 >= MEASURED_EACH)
        if self.coded:
            self._whole_group(self.doing)
        else:
            for lane in self.own:
                if not self._is_shared(lane):
                    self._run(lane, None)
                elif self._begins(claim := self._claim(lane), self.doing):
                    self._run(lane, claim)
            self._help(self.doing)
            if self.copies:
                self._watch(self.doing)
            elif self.drops and not closed:
                self._drop(self.doing)
        self._unmeasured = 0 if self.doing.computed else self._unmeasured + 1
        return self.doing

    def _begins(self, claim: Claim, doing: Doing) -> bool:
        """Whether to compute a lane of ours that is claimed like this: where we must be measured, a copy too."""
        return claim.rank == self.rank or (self.copies and doing.measures and not doing.begun and not claim.done)

    def _is_shared(self, lane: int) -> bool:
        assert self.doing is not None
        return lane in self._shared and lane not in self.doing.closed

    def _claim(self, lane: int) -> Claim:
        """Whose `lane` is in this step."""
        assert self.doing is not None
        self._check()
        self._enter(Activity.EXCHANGE)
        found = self._board.claim(lane_key(lane), Claim(self.doing.step, self.rank))
        if found.rank == self.rank:
            self._probe("claim")
        return found

    def _run(self, lane: int, begun: Claim | None) -> None:
        """Compute a lane. `begun`: whose claim it is, ours or, if this is a copy, that of another; None: nobody else
        may have it.
        """
        doing = self.doing
        assert doing is not None
        apart = (self.copies or self.drops) and begun is not None
        doing.begun.add(lane)
        begun_at = time.perf_counter()
        stops = apart and self._may_stop(doing)
        try:
            with self._looking(lane_key(lane), self._from_s(lane, begun)) if stops else nullcontext():
                result = doing.work.compute(lane, first=not doing.computed, merge=not apart)
        except Overtaken:
            self._throw_away(lane)
            return
        doing.computed += 1
        doing.lanes_s += time.perf_counter() - begun_at
        if apart and begun is not None:
            self._enter(Activity.EXCHANGE)
            if self._board.finish(lane_key(lane), begun, Claim(doing.step, self.rank, True)).rank != self.rank:
                self._throw_away(lane)
                return
            self._tree.join(lane)
        doing.mine.append(lane)
        doing.work.count(lane, result)

    def _may_stop(self, doing: Doing) -> bool:
        return not doing.stays and (doing.computed > 0 or not (self._counters or doing.measures))

    def _throw_away(self, lane: int) -> None:
        assert self.doing is not None
        self.doing.in_vain += 1
        self.doing.work.forget()
        self._tree.give_up()
        leaf = Node(lane, lane + 1)
        if leaf in self._tree.nodes:
            self._tree.release(leaf)

    def _from_s(self, lane: int, begun: Claim | None) -> float:
        """From when on it is worth looking whether a lane was overtaken: whoever copies always, others once late."""
        owner, place = self.sharing.owner(lane)
        if begun is None or begun.rank != self.rank or owner != self.rank:
            return 0.0
        usual_s = self._pace.usual_s()[self.rank]
        return (place + 1 + SLACK) * usual_s if usual_s > 0 else float("inf")

    @contextmanager
    def _looking(self, key: str, from_s: float) -> Iterator[None]:
        """While a lane is computed in here, look again and again whether somebody else is done (raises Overtaken)."""
        doing, before = self.doing, self._tree.interrupted
        assert doing is not None
        each_s = max(LOOK_S, self._crowd_s, min(RARELY_S, self._pace.usual_s()[self.rank] / LOOKS))
        next_s = max(from_s, doing.now_s + each_s)

        def look() -> None:
            nonlocal next_s
            before()
            if doing.now_s < next_s:
                return
            self._enter(Activity.EXCHANGE)
            found = self._board.read(key, doing.step)
            self._enter(Activity.COMPUTE)
            next_s = doing.now_s + each_s
            if found is not None and found.done and found.rank != self.rank:
                raise Overtaken

        self._tree.interrupted = look
        try:
            yield
        finally:
            self._tree.interrupted = before

    # --- help others ---

    def _help(self, doing: Doing) -> None:
        """Take over lanes that have not been begun, as long as that is worth it and their batches lie ready; wait for
        those that become late later. (Whoever also computes copies looks for both at once: `_watch`.)
        """
        self._take(doing)
        while not self.copies and (wait_s := self._until_late_s(doing)) > 0:
            self._check()
            self._enter(Activity.EXCHANGE)
            time.sleep(max(WATCH_S, self._crowd_s, min(SOON_S, wait_s)))
            left = [lane for lane in self.second if lane not in doing.tried]
            doing.tried.update(lane for lane in left if self._board.read(lane_key(lane), doing.step) is not None)
            self._take(doing)

    def _until_late_s(self, doing: Doing) -> float:
        """Seconds until there may be something to take over; 0: there will be nothing in this step."""
        now_s, usual_s = doing.now_s, self._pace.usual_s()
        waits_s = next_take_s(self.sharing, self.rank, doing.tried, now_s, usual_s) - now_s
        return waits_s if waits_s < inf else 0.0

    def _take(self, doing: Doing) -> None:
        """Compute what is to be taken over now."""
        while True:
            wanted = to_take(self.sharing, self.rank, doing.tried, doing.now_s, self._pace.usual_s())
            lane = next((lane for lane in wanted if self._ready(doing.step, lane)), None)
            if lane is None:
                return
            doing.tried.add(lane)
            claim = self._claim(lane)
            if claim.rank == self.rank:
                self._run(lane, claim)

    def _watch(self, doing: Doing) -> None:
        """Wait until the lanes that this worker is second holder of are done; of one that becomes late compute a copy.
        Not for longer than peers are waited for: then the agreement says who is missing.
        """
        waits = [lane for lane in self.second if lane not in doing.closed and lane not in doing.mine]
        usual_s = self._pace.usual_s()
        copy_s = usual_s[self.rank]
        self._enter(Activity.EXCHANGE)
        while waits and copy_s > 0 and doing.now_s < self._groups.deadline_s:
            self._check()
            self._take(doing)
            for lane in tuple(waits):
                found = self._board.read(lane_key(lane), doing.step)
                if found is not None and (found.done or found.rank == self.rank):
                    waits.remove(lane)
                elif is_late(self.sharing, lane, doing.now_s, usual_s, copy_s) and self._ready(doing.step, lane):
                    waits.remove(lane)
                    found = found or self._claim(lane)
                    if not found.done:  # or it was, between the look and the claim
                        self._run(lane, found)
                    self._enter(Activity.EXCHANGE)
            if waits:
                time.sleep(max(WATCH_S, self._crowd_s, min(SOON_S, copy_s / WATCHES)))

    def _drop(self, doing: Doing) -> None:
        """Wait until all others are done, or those lanes that are not are to be dropped. For no longer than peers are
        waited for.
        """
        self._enter(Activity.EXCHANGE)
        lost = set(self.own) - set(doing.mine)
        while not lost and doing.now_s < self._groups.deadline_s:
            self._check()
            wait_s = self._dropper.look(doing.step, doing.now_s, self._probe)
            if wait_s <= 0:
                return
            time.sleep(max(WATCH_S, self._crowd_s, min(SOON_S, wait_s, self._pace.usual_s()[self.rank] / WATCHES)))

    # --- groups with the same lanes ---

    def _whole_group(self, doing: Doing) -> None:
        """All lanes of the group; who is done first gives all of them, and the others break off."""
        results: list[tuple[int, LaneResult]] = []
        key, alone = _group_key(self.group), len(self.group) == 1
        try:
            for lane in self.ahead:
                begun_at = time.perf_counter()
                with nullcontext() if alone or not self._may_stop(doing) else self._looking(key, 0.0):
                    if results and not alone and self._may_stop(doing):
                        self._look_once(key, doing)
                    doing.begun.add(lane)
                    results.append((lane, doing.work.compute(lane, first=not doing.computed, merge=True)))
                doing.computed += 1
                doing.lanes_s += time.perf_counter() - begun_at
            if not alone:
                self._probe("claim")
                self._enter(Activity.EXCHANGE)
                if self._board.claim(key, Claim(doing.step, self.rank, True)).rank != self.rank:
                    raise Overtaken
        except Overtaken:
            doing.in_vain = len(doing.begun)
            self._tree.abandon()
            return
        for lane, result in results:
            doing.mine.append(lane)
            doing.work.count(lane, result)

    def _look_once(self, key: str, doing: Doing) -> None:
        self._enter(Activity.EXCHANGE)
        if self._board.read(key, doing.step) is not None:
            raise Overtaken

    # --- agree ---

    def counts(self, step: int, lane: int) -> bool:
        """A lane that is checked is never dropped."""
        del step, lane
        return True

    def agree(self) -> tuple[Lanes, frozenset[int]]:
        """Who has which lane in this step, and which were dropped; known to all alike from here on."""
        doing = self.doing
        assert doing is not None
        self._probe("agree")
        doing.dropped = [lane for lane in self.own if lane not in doing.mine] if self.drops else []
        mine = say_lanes(doing.step, doing.mine, self.lane_count, doing.dropped)
        said = self._groups.all_gather_equal(mine, deadline_s=self._groups.deadline_s)
        try:
            at_most = self.settings.drop_at_most if self.drops else 0
            found, dropped = agreed(said, doing.step, self.lane_count, at_most=at_most)
        except ValueError as error:
            raise InternalError(f"the claims of lanes do not fit together: {error}") from error
        has = {lane: rank for rank, own in enumerate(found) for lane in own}
        if self.coded:
            groups = [group for group in dict.fromkeys(self._groups_of_all) if len(group) > 1]
            winners = [has[self.sharing.lanes[group[0]][0]] for group in groups]
            self._board.settle(map(_group_key, groups), [Claim(doing.step, rank, True) for rank in winners])
        else:
            lanes = [lane for lane in self._shared if lane not in doing.closed]
            done, nobody = self.copies or self.drops, nobody_of(self.sharing)
            claims = [Claim(doing.step, has.get(lane, nobody), done) for lane in lanes]
            self._board.settle(map(lane_key, lanes), claims)
        return found, dropped


def _group_key(group: Sequence[int]) -> str:
    return f"group/{group[0]}"
