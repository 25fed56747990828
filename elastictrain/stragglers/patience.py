"""Who was slow lately is not trusted at once: so nothing swings. The same for lanes and for stages. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MOST_DOUBLINGS = 12


class Patience:
    """Who has become fast again counts as slow for `hold_steps` more, and for twice as many each time that it was slow
    within the last `memory_steps`. Workers are named by number.
    """

    def __init__(self, hold_steps: int, memory_steps: int) -> None:
        self._hold_steps, self._memory_steps = hold_steps, memory_steps
        self._slow_at: dict[int, list[int]] = {}
        self._slow_unit: dict[int, tuple[float, int]] = {}
        self._known_slow: set[int] = set()

    def note(self, step: int, slow: Mapping[int, int], units: Sequence[float]) -> None:
        """Who has become slow, and who has become fast again. `slow`: with the step of its onset; `units`: how long
        each worker takes, in any unit.
        """
        for worker in set(slow) - self._known_slow:
            times = [at for at in self._slow_at.get(worker, []) if at > step - self._memory_steps]
            self._slow_at[worker] = [*times, step]
            self._slow_unit.pop(worker, None)
        for worker in self._known_slow & set(slow):
            self._slow_unit[worker] = (units[worker], step)
        for worker in self._known_slow - set(slow):
            unit, _ = self._slow_unit.get(worker, (units[worker], step))
            doublings = min(_MOST_DOUBLINGS, len(self._slow_at.get(worker, [])) - 1)
            self._slow_unit[worker] = (unit, step + self._hold_steps * 2**doublings)
        self._known_slow = set(slow)

    def trusted(
        self, step: int, slow: Mapping[int, int], units: Sequence[float], *, patient: bool = True
    ) -> list[float]:
        """How long each takes, for dealing out work: who was slow lately counts as slow until it has stayed fast; if
        not `patient`, only who was slow more than once.
        """
        found = list(units)
        for worker, (unit, until) in self._slow_unit.items():
            again = patient or len(self._slow_at.get(worker, [])) > 1
            if again and worker not in slow and step < until:
                found[worker] = max(found[worker], unit)
        return found
