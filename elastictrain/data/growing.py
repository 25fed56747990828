"""Orders that grow while training runs: what a `LiveFeeder` waits for, and a mixture of sources of which some grow."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from elastictrain.data.mixture import Schedule
from elastictrain.errors import DataError, StoreFailed


class Growing(Protocol):
    """An order of steps, the first `decided` of which are known and never change."""

    @property
    def decided(self) -> int:
        """How many steps of the order are decided."""
        ...

    @property
    def ended(self) -> str | None:
        """Why there is no step beyond `decided`; None while there may be."""
        ...

    @property
    def waiting_for(self) -> str:
        """What the last `advance` that found nothing to do waits for, in words."""
        ...

    @property
    def place(self) -> str:
        """Where it comes from, in words."""
        ...

    @property
    def poll_s(self) -> float:
        """How often to look for segments."""
        ...

    @property
    def deadline(self) -> tuple[str, float]:
        """How long to wait for what comes next: the setting that says it, and the seconds."""
        ...

    def advance(self, *, needed: bool) -> bool:
        """Decide more steps, if what is there allows for it; False when it does not. Raises DataError."""
        ...

    def prepare(self, step: int) -> None:
        """Open what a decided step is made of, so that reading ahead comes to it; may take long, and raises nothing."""
        ...

    def mark_of(self, step: int) -> dict[str, Any]:
        """What names the order up to a step, which somebody has decided; JSON."""
        ...

    def check(self, mark: Mapping[str, Any]) -> None:
        """Raise DataError when the order is not that of `mark`."""
        ...


class MixedGrowth:
    """Of a mixture with live sources. Its proportions are exact, so a step is decided when every live source has
    decided as many of its own steps, which have one sample for each lane, as the lane that needs most of it uses.
    """

    def __init__(self, schedule: Schedule, sources: Mapping[str, Growing]) -> None:
        """`sources`: the live ones by name."""
        self._schedule = schedule
        self._sources = {name: one for name, one in sources.items() if name in schedule.names}
        self._lock = threading.Lock()
        self._limits: dict[str, int] = {}
        self._decided = 0

    @property
    def decided(self) -> int:
        with self._lock:
            limits = {name: one.decided for name, one in self._sources.items()}  # none of them ever shrinks
            if limits != self._limits:
                self._decided = self._schedule.steps_within(limits, self._decided)
                self._limits = limits
            return self._decided

    @property
    def ended(self) -> str | None:
        """One source that has ended ends the mixture, where it has a share in the next step."""
        return next((f"source {n!r}: {why}" for n, one in self._behind() if (why := one.ended) is not None), None)

    @property
    def waiting_for(self) -> str:
        return "; ".join(f"source {name!r}: {one.waiting_for}" for name, one in self._behind() if one.waiting_for)

    @property
    def place(self) -> str:
        return ", ".join(f"{one.place} (source {name!r})" for name, one in self._sources.items())

    @property
    def poll_s(self) -> float:
        return min(one.poll_s for one in self._sources.values())

    @property
    def deadline(self) -> tuple[str, float]:
        """That of the most patient of the sources that are waited for."""
        waited = self._behind() or list(self._sources.items())
        name, one = max(waited, key=lambda item: item[1].deadline[1])
        return f"data.sources.{name}.live.deadline_s", one.deadline[1]

    def advance(self, *, needed: bool) -> bool:
        grown = False
        for name, one in self._behind():
            with naming(name):
                grown = one.advance(needed=needed) or grown
        return grown

    def prepare(self, step: int) -> None:
        for place in {step, step + 1}:
            reach = dict(zip(self._schedule.names, self._schedule.reach(place), strict=True))
            for name, one in self._sources.items():
                if 0 < reach[name] <= one.decided:
                    one.prepare(reach[name] - 1)

    def mark_of(self, step: int) -> dict[str, Any]:
        """By source, of those that have been used by then."""
        reach = dict(zip(self._schedule.names, self._schedule.reach(step + 1), strict=True))
        return {name: one.mark_of(reach[name] - 1) for name, one in self._sources.items() if reach[name]}

    def check(self, mark: Mapping[str, Any]) -> None:
        """A source that the mixture does not have any more is not asked for."""
        for name in [name for name in mark if name in self._sources]:
            with naming(name):
                self._sources[name].check(mark[name])

    def _behind(self) -> list[tuple[str, Growing]]:
        """The sources that keep the next step from being decided."""
        reach = dict(zip(self._schedule.names, self._schedule.reach(self.decided + 1), strict=True))
        return [(name, one) for name, one in self._sources.items() if one.decided < reach[name]]


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of one source of a mixture name it."""
    try:
        yield
    except DataError as error:
        kind = StoreFailed if isinstance(error, StoreFailed) else DataError
        raise kind(f"data.sources.{name}: {error}") from error
