"""No byte of a save is read after its memory may have changed, whatever the order of taking, writing and changing."""

from __future__ import annotations

import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastictrain_checkpoint.ledger import Ledger, UnitState


class Saving(RuleBasedStateMachine):
    """A model of memory: every unit has a version, a change spoils all of live memory at once."""

    @initialize(live=st.lists(st.sampled_from([True, True, False]), max_size=6))
    def begin(self, live: list[bool]) -> None:
        self.live = live
        self.ledger = Ledger(live)
        self.memory = ["saved"] * len(live)
        self.slots: dict[int, str] = {}
        self.hands: dict[int, int | None] = {}
        self.stored: dict[int, str] = {}
        self.made = 0

    def lend(self, count: int) -> list[int]:
        free = [slot for slot in range(self.made) if slot not in self.slots][:count]
        more = list(range(self.made, self.made + count - len(free)))
        self.made += len(more)
        return free + more

    @rule()
    def change(self) -> None:
        """What `before_mutation` does, and then the update."""
        for unit, slot in self.ledger.freeze(self.lend(self.ledger.live)):
            assert slot not in self.slots, "a slot that is in use was lent again"
            self.slots[slot] = self.memory[unit]
        event(f"copied: {bool(self.slots)}")
        self.memory = ["changed" if live else "saved" for live in self.live]

    @rule(slots=st.integers(0, 6))
    def announce(self, slots: int) -> None:
        """What `before_mutation` does where the pool has too few slots: the last units are copied, and the update comes
        when the writer has taken the others.
        """
        lent = self.lend(min(slots, self.ledger.live))
        before = [unit for unit in range(len(self.memory)) if self.ledger.state(unit) is UnitState.LIVE]
        moved = self.ledger.freeze(lent, partly=True)
        assert [unit for unit, _ in moved] == before[len(before) - len(lent) :]
        assert self.ledger.live == len(before) - len(lent)
        for unit, slot in moved:
            assert slot not in self.slots, "a slot that is in use was lent again"
            self.slots[slot] = self.memory[unit]
        event(f"announced, left to be written: {self.ledger.live > 0}")

    @precondition(lambda self: not self.ledger.live)
    @rule()
    def change_when_nothing_is_left(self) -> None:
        self.memory = ["changed" if live else "saved" for live in self.live]

    @rule()
    def take(self) -> None:
        taken = self.ledger.take()
        if taken is None:
            assert sorted(self.stored) == list(range(len(self.memory)))
            return
        unit, slot = taken
        assert unit not in self.hands
        assert unit not in self.stored
        self.stored[unit] = self.memory[unit] if slot is None else self.slots[slot]
        self.hands[unit] = slot

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from(sorted(self.hands)))
        freed = self.ledger.wrote(unit)
        assert freed == self.hands.pop(unit)
        if freed is not None:
            del self.slots[freed]
        with pytest.raises(ValueError, match=f"^unit {unit} is done, not taken$"):
            self.ledger.wrote(unit)

    @rule(more=st.sampled_from([-1, 1]))
    def the_wrong_number_of_slots_changes_nothing(self, more: int) -> None:
        count = max(0, self.ledger.live + more)
        if count == self.ledger.live:
            return
        before = [self.ledger.state(unit) for unit in range(len(self.memory))]
        with pytest.raises(ValueError, match=r"^\d+ units to copy, lent were slots \["):
            self.ledger.freeze([100 + n for n in range(count)], partly=more > 0)
        assert [self.ledger.state(unit) for unit in range(len(self.memory))] == before

    @invariant()
    def what_is_stored_is_what_was_saved(self) -> None:
        if hasattr(self, "stored"):
            assert set(self.stored.values()) <= {"saved"}
            assert self.ledger.slots == sorted(self.slots)
            taken = [self.ledger.state(u) in (UnitState.TAKEN, UnitState.DONE) for u in range(len(self.memory))]
            assert taken == [u in self.stored for u in range(len(self.memory))]


TestSaving = Saving.TestCase


def test_a_slot_that_is_in_use_is_refused() -> None:
    ledger = Ledger([True, True])
    assert ledger.freeze([4, 7]) == [(0, 4), (1, 7)]
    assert ledger.freeze([]) == []
    assert ledger.take() == (0, 4)
    assert ledger.slots == [4, 7], "what is taken may still be in its slot"
    assert ledger.wrote(0) == 4
    assert ledger.slots == [7]
    with pytest.raises(ValueError, match=r"^unit 1 is copied, not taken$"):
        ledger.wrote(1)


def test_one_slot_for_two_units_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^2 units to copy, lent were slots \[3, 3\] beside \[\]$"):
        Ledger([True, True]).freeze([3, 3])


def test_what_is_the_saves_own_is_never_copied() -> None:
    ledger = Ledger([False, True, False])
    assert ledger.live == 1
    assert ledger.freeze([9]) == [(1, 9)]
    assert [ledger.take() for _ in range(4)] == [(0, None), (1, 9), (2, None), None]


def test_where_slots_are_few_the_last_units_are_copied() -> None:
    ledger = Ledger([True, True, False, True, True])
    assert ledger.freeze([7, 8], partly=True) == [(3, 7), (4, 8)]
    assert ledger.live == 2
    assert [ledger.take() for _ in range(2)] == [(0, None), (1, None)]
    assert ledger.live == 0, "from here on the state may change"
    assert [ledger.take() for _ in range(3)] == [(2, None), (3, 7), (4, 8)]
