"""What a load has done, and what did not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from elastictrain_checkpoint.errors import StateMismatch
from elastictrain_checkpoint.healing import Healed
from elastictrain_checkpoint.torch.fitting import Said, all_of

SHOWN = 20


@dataclass(slots=True)
class LoadReport:
    """What was loaded from which step, and, without `strict`, what did not match. Keys are joined by "/". Of ranks that
    load together all get the same report.

    Attributes:
        step: which one.
        missing: keys that the checkpoint does not have; what stands there was left as it was.
        unexpected: keys that only the checkpoint has; of several ranks: that none of them asks for.
        different: key → sentence, for what is of another kind, shape or type there; left as it was.
        passed_over: newer step → why it is none: cut short, or its manifest damaged.
        healed: blocks that were damaged, and came from one of `others`.

    """

    step: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    passed_over: dict[int, str] = field(default_factory=dict)
    healed: list[Healed] = field(default_factory=list)


def said_by_all(said: Sequence[Said]) -> Said:
    """What does not fit between several ranks that hold different parts of a state. Pure.

    What one misses is missing; what the checkpoint has beyond is unexpected only where no rank asks for it.
    """
    first = said[0]
    for one in said[1:]:
        both = set(first.unexpected) & set(one.unexpected)
        first = Said(
            missing=list(dict.fromkeys([*first.missing, *one.missing])),
            unexpected=[key for key in first.unexpected if key in both],
            different=first.different | {k: v for k, v in one.different.items() if k not in first.different},
            problems=list(dict.fromkeys([*first.problems, *one.problems])),
        )
    return first


def check(said: Said, what: str, *, strict: bool) -> None:
    """Refuse what does not fit; `strict`: all of it, else only what can never be filled.

    Raises:
        StateMismatch: with all of it.

    """
    count = len(said.problems) + (len(said.different) + len(said.missing) + len(said.unexpected) if strict else 0)
    if count:
        problems = islice(chain(said.problems, all_of(said) if strict else ()), SHOWN)
        told = "\n  ".join(problems) + (f"\n  and {count - SHOWN} more" if count > SHOWN else "")
        raise StateMismatch(
            f"{what} does not fit:\n  {told}\n(strict={strict})",
            missing=tuple(said.missing),
            extra=tuple(said.unexpected),
            different=tuple(said.different.values()),
        )
