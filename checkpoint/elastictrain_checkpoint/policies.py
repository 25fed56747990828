"""Which checkpoints to keep: small policies that are joined with ``|``. Pure.

```python
Newest(3) | EverySteps(10_000) | Spaced(timedelta(hours=6)) | Best("loss", 2, mode="min")
```

keeps what any of them keeps. Pinned steps, those that kept ones need, and the last one that is known to be whole are
kept whatever a policy says (see `elastictrain_checkpoint.retain`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from elastictrain_checkpoint.errors import InvalidPiece


@dataclass(frozen=True)
class Point:
    """What a policy sees of a checkpoint: its step, when it was committed (seconds since 1970), and its info."""

    step: int
    time_s: float
    info: Mapping[str, Any] = field(default_factory=dict)


class Policy(ABC):
    """Decides from all points, steps ascending, which steps to keep."""

    @abstractmethod
    def keep(self, points: Sequence[Point], now_s: float, /) -> set[int]:
        """Steps that this policy wants, out of those of ``points``."""

    def __or__(self, other: Policy) -> Policy:
        return AnyOf((self, other))


@dataclass(frozen=True)
class AnyOf(Policy):
    """What any of these keeps."""

    policies: tuple[Policy, ...]

    def keep(self, points: Sequence[Point], now_s: float, /) -> set[int]:
        return {step for policy in self.policies for step in policy.keep(points, now_s)}


@dataclass(frozen=True)
class Newest(Policy):
    """The ``n`` newest."""

    n: int

    def __post_init__(self) -> None:
        _at_least_one(self, "n", self.n)

    def keep(self, points: Sequence[Point], _now_s: float, /) -> set[int]:
        return {point.step for point in points[-self.n :]}


@dataclass(frozen=True)
class EverySteps(Policy):
    """Every step that is a multiple of ``k``."""

    k: int

    def __post_init__(self) -> None:
        _at_least_one(self, "k", self.k)

    def keep(self, points: Sequence[Point], _now_s: float, /) -> set[int]:
        return {point.step for point in points if point.step % self.k == 0}


@dataclass(frozen=True)
class Younger(Policy):
    """Everything that was committed less than ``age`` ago."""

    age: timedelta

    def __post_init__(self) -> None:
        _positive(self, "age", self.age)

    def keep(self, points: Sequence[Point], now_s: float, /) -> set[int]:
        return {point.step for point in points if now_s - point.time_s < self.age.total_seconds()}


@dataclass(frozen=True)
class Spaced(Policy):
    """One for each ``gap`` of time: the first, then always the first that is at least so much later.

    What is kept once stays kept, since later points do not change the choice among earlier ones.
    """

    gap: timedelta

    def __post_init__(self) -> None:
        _positive(self, "gap", self.gap)

    def keep(self, points: Sequence[Point], _now_s: float, /) -> set[int]:
        kept: set[int] = set()
        last_s = -math.inf
        for point in sorted(points, key=lambda point: (point.time_s, point.step)):
            if point.time_s - last_s >= self.gap.total_seconds():
                kept.add(point.step)
                last_s = point.time_s
        return kept


@dataclass(frozen=True)
class Best(Policy):
    """The ``n`` with the least (``mode="min"``) or greatest value of a metric; of equal ones the newer.

    ``metric`` is a key of the manifest's info, or keys joined by dots ("evaluation.loss"). A checkpoint without the
    metric, or with one that is not a finite number, is never among the best.
    """

    metric: str
    n: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        _at_least_one(self, "n", self.n)
        if self.mode not in ("min", "max"):
            raise InvalidPiece(f"Best(mode={self.mode!r}): expected 'min' or 'max'")

    def keep(self, points: Sequence[Point], _now_s: float, /) -> set[int]:
        sign = 1 if self.mode == "min" else -1
        ranked = [(sign * value, -p.step) for p in points if (value := metric_of(p.info, self.metric)) is not None]
        return {-minus_step for _, minus_step in sorted(ranked)[: self.n]}


def metric_of(info: Mapping[str, Any], metric: str) -> float | None:
    """A finite number in a manifest's info, by its key or by keys joined with dots; None if there is none."""
    value: Any = info.get(metric)
    if value is None:
        value = info
        for key in metric.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _at_least_one(policy: Policy, what: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise InvalidPiece(f"{type(policy).__name__}({what}={value!r}): expected a whole number from 1 on")


def _positive(policy: Policy, what: str, value: timedelta) -> None:
    if not isinstance(value, timedelta) or value <= timedelta(0):
        raise InvalidPiece(f"{type(policy).__name__}({what}={value!r}): expected a timedelta above 0")
