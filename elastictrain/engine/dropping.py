"""Dropping the lanes of a step that are late (`redundancy.drop_at_most`), on the board of claims.

Whoever is done with its own lanes looks which are not done. When those that are not may be dropped, and are to be
(`redundancy.drop_from_s`), one worker does it: the one that claims this step's cut. It claims their words for nobody. A
lane whose worker is done with it before counts; its worker sees a word that is nobody's as that of one that was
quicker, and breaks off. If whoever cuts dies in the middle, the step is computed again, and nothing has been dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from elastictrain.engine.claims import ClaimBoard
from elastictrain.redundancy import Claim, Pace, Sharing, drop_from_s

CUT = "cut"
AGAIN_S = 1.0
"""While nothing can be dropped yet; whoever waits looks more often."""


def lane_key(lane: int) -> str:
    """The word of a lane on the board of claims."""
    return f"lane/{lane}"


def nobody_of(sharing: Sharing) -> int:
    """The rank of nobody."""
    return len(sharing.lanes)


class Dropper:
    """Of one worker under one split of the lanes."""

    def __init__(self, sharing: Sharing, rank: int, at_most: int, board: ClaimBoard, pace: Pace) -> None:
        self._sharing, self._rank, self._at_most, self._board, self._pace = sharing, rank, at_most, board, pace
        self._others = sorted(sharing.shown.difference(sharing.lanes[rank]))
        self._step, self._since_s = 0, 0.0
        self._undone: list[int] = []

    def look(self, step: int, now_s: float, probe: Callable[[str], None]) -> float:
        """Look once, and drop what is to be dropped. Returns the seconds until it may be worth looking again; 0: there
        is nothing more to wait for. `now_s`: since the step has begun. `probe("drop")` is called in the middle.
        """
        usual_s = self._pace.usual_s()
        if not all(seconds > 0 for seconds in usual_s):
            return 0.0
        if step != self._step:
            self._step, self._undone, self._since_s = step, list(self._others), -1.0
        if not self._look_at_all(step) or not self._undone:
            return 0.0
        if len(self._undone) > self._at_most:
            return AGAIN_S
        if self._since_s < 0:
            self._since_s = now_s
        if not self._sharing.droppable.issuperset(self._undone):
            return AGAIN_S
        left_s = drop_from_s(self._sharing, self._undone, self._since_s, usual_s) - now_s
        if left_s > 0:
            return left_s
        self._cut(step, probe)
        return 0.0

    def _look_at_all(self, step: int) -> bool:
        """Strike out what is done, until more lanes are seen that are not than may be dropped. False: somebody has
        dropped some already.
        """
        seen = 0
        for lane in tuple(self._undone):
            found = self._board.read(lane_key(lane), step)
            if found is None or not found.done:
                seen += 1
                if seen > self._at_most:
                    break
            elif found.rank == nobody_of(self._sharing):
                return False
            else:
                self._undone.remove(lane)
        return True

    def _cut(self, step: int, probe: Callable[[str], None]) -> None:
        if self._board.claim(CUT, Claim(step, self._rank)).rank != self._rank:
            return  # so not more are dropped than may be
        gone = Claim(step, nobody_of(self._sharing), True)
        for lane in self._undone:
            found = self._board.claim(lane_key(lane), gone)
            if not found.done:
                self._board.finish(lane_key(lane), found, gone)
            probe("drop")
