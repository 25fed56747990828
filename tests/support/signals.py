"""Steps of made-up workers, as their records would be: durations of a data-parallel step, put together exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FIELDS = (
    "flags", "lanes", "data_s", "compute_s", "arrive_s", "exchange_s", "vote_s", "gather_s", "step_s", "collected_s",
    "tokens", "squares",
)  # fmt: skip
LAYOUT = np.dtype(
    {
        "names": list(FIELDS),
        "formats": ["<u2", "<u2", *["<f4"] * 8, "<f8", "<f8"],
        "offsets": [0, 2, *range(4, 36, 4), 36, 44],
        "itemsize": 64,
    }
)  # fmt: skip


def records(
    compute_s: Sequence[float],
    *,
    lanes: Sequence[int] | None = None,
    data_s: float | Sequence[float] = 0.0,
    host_s: float | Sequence[float] = 0.01,
    transfer_s: float = 0.05,
    **more: Any,
) -> Any:
    """One step of all workers: who comes first to the exchange waits in it for the last one."""
    found = np.zeros(len(compute_s), dtype=LAYOUT)
    found["compute_s"], found["data_s"] = compute_s, data_s
    found["lanes"] = 4 if lanes is None else lanes
    before = np.asarray(compute_s) + np.asarray(data_s) + np.asarray(host_s)
    found["arrive_s"] = before
    found["exchange_s"] = before.max() - before + transfer_s
    found["vote_s"] = 0.005
    for name, value in more.items():
        found[name] = value
    return found
