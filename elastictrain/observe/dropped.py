"""Which lanes of a run did not count (`redundancy.lanes: drop_slowest`): its rows of metrics.jsonl are the record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from elastictrain.errors import ConfigError
from elastictrain.observe.lines import read_lines
from elastictrain.observe.metrics import MetricsRow, history, parse_rows
from elastictrain.observe.rundir import RunDirectory


def drops_of(rows: Iterable[MetricsRow]) -> dict[int, tuple[int, ...]]:
    """By step, the lanes that did not count, where there are some."""
    return {row.step: tuple(row.lanes_dropped) for row in rows if row.lanes_dropped}


def recorded_drops(where: str) -> dict[int, tuple[int, ...]]:
    """As `drops_of`, of a run directory or a metrics.jsonl.

    Raises ConfigError where there is no record, or steps are missing in it: what they were without nobody knows.
    """
    path = Path(where)
    if not path.exists():
        raise ConfigError(f"redundancy.replay={where!r}: no such run directory or metrics.jsonl")
    rows = RunDirectory.open(path).metrics() if path.is_dir() else history(parse_rows(read_lines(path)))
    missing = sorted(set(range(1, rows[-1].step + 1 if rows else 2)).difference(row.step for row in rows))
    if missing:
        raise ConfigError(
            f"redundancy.replay={where!r}: there is no row of step {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, so what it was without is not known"
        )
    return drops_of(rows)
