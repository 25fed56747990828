"""What members of a generation have in common where lanes are shared: when it is over, and when a step is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from elastictrain.engine.commons import Commons
from elastictrain.engine.stepping import Stepping
from elastictrain.engine.vote import Shares
from elastictrain.redundancy import Claim, say_lanes
from elastictrain.straggler_settings import Redundancy
from tests.unit.engine.test_shares import STEP, Rank0

NOTHING_NEW = Shares((0, 1), ((), ()), ((), ()), (0.0, 0.0), (0, 0))


def commons() -> Commons:
    return Commons(Redundancy(lanes="take_over"), HashStore(), 1, 2, lambda: None)


@pytest.mark.parametrize(("begun", "left"), [({0, 1, 5}, {2, 3}), ({0, 1, 2, 3}, None)])
def test_batches_that_nobody_will_ask_for_make_room(begun: set[int], left: set[int] | None) -> None:
    forgotten: list[tuple[int, set[int]]] = []
    session: Any = SimpleNamespace(batches=SimpleNamespace(forget=lambda *what: forgotten.append(what)))
    runner: Any = SimpleNamespace(
        lanes=(0, 1, 2, 3), shares=SimpleNamespace(doing=SimpleNamespace(step=7, begun=begun))
    )
    commons().end_step(session, runner, NOTHING_NEW)
    assert forgotten == ([] if left is None else [(7, left)])


def test_when_a_generation_is_over_nothing_of_its_store_is_cut_any_more() -> None:
    mine = commons()
    stepping = Stepping.__new__(Stepping)
    stepping.commons = mine
    assert mine.board is not None
    mine.board.claim("lane/0", Claim(1, 0))
    watching = mine.board._thread
    assert watching is not None
    stepping.close()
    assert not watching.is_alive()
    stepping.commons = Commons(Redundancy(replay={}), None, 1, 1, lambda: None)  # a run that is repeated asks nobody
    stepping.close()
    stepping.commons = None
    stepping.close()


def test_the_claims_of_the_next_step_cost_one_question_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """All know whose every lane was, so what is expected there is what is there, whoever had it."""
    one = Rank0("take_over", paced=False)
    taken = Claim(STEP, 1).encode()
    one.words.words |= {f"lane/{lane}": taken for lane in (2, 4, 5)}  # 2 is ours, and taken over
    assert one.run().counted == [0, 1]
    said = [say_lanes(STEP, lanes, 6) for lanes in ([0, 1], [2, 3, 4, 5])]
    monkeypatch.setattr(one.lanes._groups, "all_gather_equal", lambda _, deadline_s: said)
    assert one.lanes.agree() == (((0, 1), (2, 3, 4, 5)), frozenset())
    asked = one.words.asked
    assert one.run(step=STEP + 1).counted == [0, 1, 2]
    assert one.words.asked - asked == 2, "1 and 2, the lanes of ours that another one may take"
