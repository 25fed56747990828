"""Setting up the order of the data for 10^9 samples, and finding any batch of it: time and memory.

A fresh process per case; memory is what the process has at its peak above what it had with its imports. Nothing is
read: order, mixture and packing are computations on numbers of rows and lengths.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

import common

CASES = {
    "1e9 samples in 1e5 blocks": (100_000, 10_000),
    "1e9 samples in 1e6 blocks": (1_000_000, 1_000),
    "1e6 samples in 100 blocks": (100, 10_000),
}
TARGET_S, TARGET_MIB = 0.2, 20.0


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(blocks: int, rows: int) -> dict[str, float]:
    """In a process of its own: set-up, first batch at the start and in the middle, peak memory."""
    import numpy as np

    from elastictrain.data.order import LaneOrder

    block_rows = np.full(blocks, rows)
    base, begun = peak_mib(), time.perf_counter()
    order = LaneOrder(block_rows, seed=17, lanes=64, lane_batch_size=8)
    order.samples_of(0, 0)
    set_up = time.perf_counter()
    order.samples_of(order.steps_per_epoch // 2, 31)
    middle = time.perf_counter()
    return {"set_up_s": set_up - begun, "middle_s": middle - set_up, "peak_mib": peak_mib() - base}


def mixture_us() -> float:
    """Finding a lane's batch of 64 samples of 8 sources after 10^12 of them, in microseconds."""
    from elastictrain.data.mixture import Schedule, Segment

    weights = {f"s{n}": n + 1 for n in range(8)}
    segments = [Segment(step, {**weights, "s0": step + 1}) for step in range(0, 50_000, 10_000)]
    schedule = Schedule(segments, lanes=64, lane_batch_size=64)
    schedule.runs(10**12, 63)
    begun = time.perf_counter()
    for step in range(200):
        schedule.runs(10**12 + step, step % 64)
    return (time.perf_counter() - begun) / 200 * 1e6


def best_fit_rate() -> dict[str, float]:
    """Documents a second through best fit, and how full the rows are; lengths are lognormal."""
    import numpy as np

    from elastictrain.data.best_fit import cut_documents, lay_out

    lengths = np.maximum(1, np.random.default_rng(1).lognormal(6, 1, 20_000)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    begun = time.perf_counter()
    layout = lay_out(cut_documents(starts, 2049), 2049, keep_tail=True)
    wall = time.perf_counter() - begun
    filled = int(layout.pieces.length.sum()) / (layout.rows * 2049)
    return {"documents_per_s": len(lengths) / wall, "tokens_per_s": int(starts[-1]) / wall, "filled": filled}


def child(case: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--case", case], capture_output=True, check=True, env=common.child_environment()
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    options = common.arguments(__doc__, lambda parser: parser.add_argument("--case", default=None))
    if options.case is not None:
        print(json.dumps(measure(*CASES[options.case])))
        return
    rounds = 2 if options.quick else 7
    results = common.Results("data-order", "Order of the data: set-up, any batch, mixtures, packing", options)
    for case in CASES:
        found = [child(case) for _ in range(rounds)]
        results.raw[case] = found
        results.row(case=case, rounds=rounds, **{name: median(one[name] for one in found) for name in found[0]})
    first = results.rows[0]
    for name, figure, target, unit in (
        ("order for 1e9 samples in 1e5 row groups", "set_up_s", TARGET_S, "s"),
        ("its memory", "peak_mib", TARGET_MIB, "MiB"),
    ):
        reached = common.verdict(first[figure], target, at_most=True)
        results.figure(f"{name} ({unit})", first[figure], f"at most {target}", reached)
    results.row(case="batch of 64 of a mixture of 8, 5 stages", batch_us=median(mixture_us() for _ in range(rounds)))
    packed = [best_fit_rate() for _ in range(rounds)]
    results.row(case="best fit", **{name: median(one[name] for one in packed) for name in packed[0]})
    results.notes.append("Memory and time of the order go with the number of row groups, never with that of samples.")
    results.write()


if __name__ == "__main__":
    main()
