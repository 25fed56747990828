"""Setting up the order of the data for 10^9 samples, and finding any batch of it: time and memory; and the same of
mosaicml-streaming, for as many samples as memory allows.

A fresh process per case; memory is what the process has at its peak above what it had with its imports. Nothing is
read: order, mixture and packing are computations on numbers of rows and lengths.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import common

sys.path.insert(0, str(common.HERE / "data"))
import mosaic

CASES = {
    "1e9 samples in 1e5 blocks": (100_000, 10_000),
    "1e9 samples in 1e6 blocks": (1_000_000, 1_000),
    "1e8 samples in 1e4 blocks": (10_000, 10_000),
    "1e7 samples in 1e3 blocks": (1_000, 10_000),
    "1e6 samples in 100 blocks": (100, 10_000),
}
TARGET_S, TARGET_MIB, TARGET_FASTER = 0.2, 20.0, 500.0
PEER_ROWS, PEER_SIZES = 10_000, (10**6, 10**7, 10**8)
PEER_BYTES = 80
"""Of memory for every sample, with room to spare: it is not measured where there is less."""


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


def beside_mosaic(results: common.Results, ours: dict[int, float], *, quick: bool) -> None:
    """Rows and ratios against mosaicml-streaming; `ours`: seconds by power of ten. It needs memory for every sample, so
    what 10^9 would take is worked out from the most that was measured, as if its time went with the number of samples.
    """
    for algorithm in ("py1e", "naive"):
        took_s: dict[int, float] = {}
        for samples in PEER_SIZES[:2] if quick else PEER_SIZES:
            if samples * PEER_BYTES > _available_bytes():
                results.notes.append(f"No memory for {samples:.0e} samples of mosaicml-streaming.")
                break
            command = [sys.executable, mosaic.__file__, str(samples), str(PEER_ROWS), algorithm]
            runs = [
                json.loads(
                    subprocess.run(command, capture_output=True, check=True, env=common.child_environment()).stdout
                )
                for _ in range(3 if samples < 10**7 else 1)
            ]
            took_s[samples] = median(run["set_up_s"] for run in runs)
            results.row(case=f"mosaicml-streaming, {algorithm}: {samples:.0e} samples in {samples // PEER_ROWS} shards",
                        rounds=len(runs), set_up_s=took_s[samples],
                        peak_mib=median(run["peak_mib"] for run in runs))  # fmt: skip
        most = max(took_s)
        power, name = len(str(most)) - 1, f"against mosaicml-streaming ({algorithm})"
        for figure, ratio in (
            (f"setting up the order for 10^{power} samples {name}, both measured", took_s[most] / ours[power]),
            (f"setting up the order for 10^9 samples {name}, its time extrapolated from 10^{power}",
             took_s[most] * 10 ** (9 - power) / ours[9]),
        ):  # fmt: skip
            results.judge(figure, ratio, TARGET_FASTER, at_most=False)


def _available_bytes() -> int:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


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
    results = common.Results("data_order", "Order of the data: set-up, any batch, mixtures, packing", options)
    for case in CASES:
        found = [child(case) for _ in range(rounds)]
        results.raw[case] = found
        results.row(case=case, rounds=rounds, **{name: median(one[name] for one in found) for name in found[0]})
    first = results.rows[0]
    results.judge("setting up the order for 10^9 samples, s", first["set_up_s"], TARGET_S, at_most=True)
    results.judge("and its memory, MiB", first["peak_mib"], TARGET_MIB, at_most=True)
    if mosaic.is_there():
        ours = {int(case[2]): row["set_up_s"] for case, row in zip(CASES, results.rows, strict=True)
                if CASES[case][1] == PEER_ROWS}  # fmt: skip
        beside_mosaic(results, ours, quick=options.quick)
    results.row(case="batch of 64 of a mixture of 8, 5 stages", batch_us=median(mixture_us() for _ in range(rounds)))
    packed = [best_fit_rate() for _ in range(rounds)]
    results.row(case="best fit", **{name: median(one[name] for one in packed) for name in packed[0]})
    results.notes.append(
        "mosaicml-streaming: all that a StreamingDataset does at the start of an epoch before it reads, on one worker."
    )
    results.notes.append("Memory and time of the order go with the number of row groups, never with that of samples.")
    results.write()


if __name__ == "__main__":
    main()
