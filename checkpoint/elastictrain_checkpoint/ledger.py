"""Which bytes of a running save are still read from live memory, and which lie safe in a copy. Pure: no threads.

A save is cut into units of at most 1 MiB. While the state does not change, the writer takes units straight from live
memory. Just before it changes (`freeze`), every unit that is not taken yet gets a slot of the pool, to be copied there;
where the pool has not so many, the last ones do, and the change waits until the writer has taken the rest.
DataStates-LLM overlaps a save with forward and backward in the same way, for devices; here it also holds for state that
lives in host memory.

```
LIVE ──take──────────────▶ TAKEN ──wrote──▶ DONE
  └────freeze──▶ COPIED ──take──▲      (what lies in memory of the save's own is COPIED from the start)
```
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum


class UnitState(Enum):
    """Where the bytes of a unit are. TAKEN: in the hands of the writer, in memory of its own or in a slot."""

    LIVE = "live"
    COPIED = "copied"
    TAKEN = "taken"
    DONE = "done"


class Ledger:
    """The units of one save, taken in their order; slots of the pool are numbers that the caller lends and gets back.

    Args:
        live: for each unit whether a change of the state would spoil it; the others lie in memory of the save's own.

    """

    def __init__(self, live: Sequence[bool]) -> None:
        self._states = [UnitState.LIVE if one else UnitState.COPIED for one in live]
        self._slots: dict[int, int] = {}
        self._next = 0
        self._live = sum(live)

    @property
    def live(self) -> int:
        """Units that a change of the state would spoil."""
        return self._live

    @property
    def slots(self) -> list[int]:
        """The slots that hold units which are not written yet."""
        return sorted(self._slots.values())

    def state(self, unit: int) -> UnitState:
        """Where the unit's bytes are."""
        return self._states[unit]

    def freeze(self, slots: Sequence[int], *, partly: bool = False) -> list[tuple[int, int]]:
        """The state is about to change: (unit, slot) of everything that must be copied first. From here on those units
        are read from their slots. A second call has nothing to copy.

        Args:
            slots: exactly `live` of them, in nobody's use.
            partly: fewer will do. They are for those units that the writer comes to last; it goes on with the others
                meanwhile, and the state may change when none of them is left: when `live` is 0.

        Raises:
            ValueError: more or fewer; nothing was changed.

        """
        fit = len(slots) <= self.live if partly else len(slots) == self.live
        if not fit or len(set(slots) - set(self._slots.values())) != len(slots):
            raise ValueError(f"{self.live} units to copy, lent were slots {sorted(slots)} beside {self.slots}")
        spoilt = [unit for unit, state in enumerate(self._states) if state is UnitState.LIVE]
        moved = list(zip(spoilt[len(spoilt) - len(slots) :], slots, strict=True))
        for unit, slot in moved:
            self._slots[unit] = slot
            self._states[unit] = UnitState.COPIED
        self._live -= len(moved)
        return moved

    def take(self) -> tuple[int, int | None] | None:
        """The writer's next unit and the slot that holds it; no slot: read it from where it lies, before anything may
        change. None when all are taken.
        """
        if self._next == len(self._states):
            return None
        unit = self._next
        self._next += 1
        self._live -= self._states[unit] is UnitState.LIVE
        self._states[unit] = UnitState.TAKEN
        return unit, self._slots.get(unit)

    def wrote(self, unit: int) -> int | None:
        """The storage has the unit's bytes; gives the slot that this has set free.

        Raises:
            ValueError: the unit was not taken, or is done already.

        """
        if self._states[unit] is not UnitState.TAKEN:
            raise ValueError(f"unit {unit} is {self._states[unit].value}, not taken")
        self._states[unit] = UnitState.DONE
        return self._slots.pop(unit, None)
