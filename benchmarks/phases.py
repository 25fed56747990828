"""What benchmarks that compare the phases of a step share: their options, and a row per run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import common
from runs import Turns


def options_of(description: str | None) -> Any:
    """How many workers, lanes and rounds."""
    return common.arguments(
        description,
        lambda parser: (
            parser.add_argument("--workers", type=int, default=4),
            parser.add_argument("--lanes", type=int, default=4, help="per worker"),
            parser.add_argument("--rounds", type=int, default=None),
        ),
    )


def rounds_of(options: Any) -> int:
    return int(options.rounds or (5 if options.quick else 40))


def shares(turns: Turns, name: str) -> dict[str, float]:
    """Median share of every phase in a step, percent."""
    phases = sorted({phase for step in turns.steps[name] for phase in step.phases if phase != "step_s"})
    return {
        f"{phase.removesuffix('_s')} %": 100
        * common.median(step.phases.get(phase, 0.0) / step.seconds for step in turns.steps[name])
        for phase in phases
    }


def rows(results: common.Results, options: Any, turns: Turns, names: Iterable[str]) -> None:
    """A row per run: its step, its processor time, and the share of every phase. All rounds are kept beside it."""
    for name in names:
        results.row(
            **{
                "workers": options.workers,
                "lanes per worker": options.lanes,
                "run": name,
                "ms per step": 1000 * turns.step_s(name),
                "over rounds": turns.spread(name),
                "cpu ms per step": 1000 * turns.cpu_s(name),
                **shares(turns, name),
            }
        )
    results.raw = {name: turns.rounds[name] for name in names}
    results.notes.append("GPT of examples/gpt (2.8 million parameters), 2 sequences of 128 bytes per lane.")
