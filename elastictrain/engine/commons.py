"""What the members of a generation have in common where lanes are shared: the board of claims, and everybody's pace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from elastictrain.engine.claims import ClaimBoard
from elastictrain.engine.collective import GroupSet
from elastictrain.engine.replaying import ReplayedLanes
from elastictrain.engine.shares import SharedLanes
from elastictrain.engine.vote import Shares
from elastictrain.layout import Layout
from elastictrain.redundancy import Pace
from elastictrain.straggler_settings import Redundancy

if TYPE_CHECKING:
    from elastictrain.engine.session import Session
    from elastictrain.engine.step import StepRunner

AnyLanes = SharedLanes | ReplayedLanes


class Commons:
    """Of one generation, seen from one worker. `store`: of the generation, None where nobody claims anything (a run
    that is repeated); `hang_up`: ends the connection to it.
    """

    def __init__(
        self, settings: Redundancy, store: Any, generation: int, world: int, hang_up: Callable[[], None]
    ) -> None:
        self.settings = settings
        prefix = f"generation-{generation}/lanes"
        self.board = None if store is None else ClaimBoard(PrefixStore(prefix, store), hang_up)
        self.pace = Pace(world)

    def shares(self, session: Session, layout: Layout, groups: GroupSet, probe: Callable[[str], None]) -> AnyLanes:
        """Under a split of the lanes. What was claimed and learned under the one before it holds on."""
        counters = bool(session.model.space.counters)
        if self.board is None:
            dropped = self.settings.replayed or {}
            return ReplayedLanes(dropped, layout, layout.rank(session.worker), counters=counters)
        kinds = session.knowledge.kinds
        ready = getattr(session.batches, "ready", lambda _step, _lane: True)
        return SharedLanes(
            self.settings,
            layout,
            layout.rank(session.worker),
            kinds=[kinds.get(worker, "") for worker in layout.workers],
            counters=counters,
            board=self.board,
            pace=self.pace,
            tree=session.tree,
            groups=groups,
            ready=ready,
            probe=probe,
            check=session.check,
            enter=session.pulse.enter,
        )

    def end_step(self, session: Session, runner: StepRunner, said: Shares) -> None:
        """The step has been applied; `said`: who has computed what. Batches that nobody will ask for make room."""
        self.pace.learn(said.lane_s)
        doing = None if runner.shares is None else runner.shares.doing
        forget = getattr(session.batches, "forget", None)
        if doing is not None and forget is not None and (left := set(runner.lanes) - doing.begun):
            forget(doing.step, left)

    def close(self) -> None:
        """The generation is over; may be called twice."""
        if self.board is not None:
            self.board.close()
