"""Finding a place: the first batch after resuming in the middle against at the start, the order of 10^9 samples, and
how much state that needs.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokens_per_s import LANES, SIZE, spec_of, write_data

import common
from elastictrain.data import LaneReader, open_source
from elastictrain.data.stages import Skip, with_skips
from elastictrain.protocol import Stage

ORDER = """
import json, resource, sys, time
import numpy as np
from elastictrain.data.order import LaneOrder
rows = np.full({groups}, {rows})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
order = LaneOrder(rows, seed=1, lanes=64, lane_batch_size=8)
order.samples_of(order.steps_per_epoch // 2, 17)
print(json.dumps([time.perf_counter() - begun, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def first_batch(folder: Path, share: float) -> float:
    """Seconds from a source that is open to the batches of all lanes of one step."""
    source = open_source(spec_of(folder), seed=1, lanes=LANES, lane_batch_size=SIZE)
    step = int(share * source.steps_per_epoch)
    reader = LaneReader(source)
    begun_s = time.perf_counter()
    for lane in range(LANES):
        reader.batch(step, lane)
    seconds = time.perf_counter() - begun_s
    reader.close()
    return seconds


def order_set_up(samples: int, rows: int) -> tuple[float, float]:
    """Seconds and MiB, in a process of its own."""
    code = ORDER.format(groups=samples // rows, rows=rows)
    found = subprocess.run(
        [sys.executable, "-c", code], env=common.child_environment(), check=True, capture_output=True, text=True
    )
    seconds, mib = json.loads(found.stdout)
    return seconds, mib


def main() -> None:
    options = common.arguments(__doc__)
    common.prepare_data()
    results = common.Results("data_position", "Data: finding a place in the order", options)
    rounds, megabytes = (5, 48) if options.quick else (15, 256)
    with common.scratch("data") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        folder = write_data(place, megabytes)["text"]
        first_batch(folder, 0.0)
        shares = (0.0, 0.5, 0.37, 0.81)
        seconds: dict[float, list[float]] = {share: [] for share in shares}
        for _ in range(rounds):
            for share in shares:
                seconds[share].append(first_batch(folder, share))
        for share in shares:
            results.row(what=f"first step at {share:.0%} of the epoch", seconds=common.median(seconds[share]),
                        spread=common.spread(seconds[share]))  # fmt: skip
        middle = [sum(seconds[s][i] for s in shares[1:]) / 3 for i in range(rounds)]
        value = common.median([a / b for a, b in zip(middle, seconds[0.0], strict=True)])
        results.figure("first batch in the middle against at position 0", value, "<= 1.1",
                       common.verdict(value, 1.1, at_most=True))  # fmt: skip
    for rows in (1000, 8000, 64_000):
        runs = [order_set_up(10**9, rows) for _ in range(3 if options.quick else 7)]
        took, mib = common.median(s for s, _ in runs), common.median(m for _, m in runs)
        results.row(what=f"order of 10^9 samples in row groups of {rows}", seconds=took, mib=mib)
        if rows == 8000:
            results.figure(
                "setting up the order for 10^9 samples, s", took, "<= 0.2", common.verdict(took, 0.2, at_most=True)
            )
            results.figure("and its memory, MiB", mib, "<= 20", common.verdict(mib, 20, at_most=True))
    plain = Stage(0, 0, 64, 8)
    skipped = with_skips([plain], [Skip("", 118, 318, order=0)], 100)[-1]
    for words, stage in (("one stage", plain), ("a stage that skips steps", skipped)):
        results.row(what=f"state: {words}", bytes=len(json.dumps(asdict(stage))))
    size = float(len(json.dumps({"step": 10**9, "seed": 2**63, "stages": [asdict(plain)]})))
    results.figure("state, bytes", size, "<= 256", common.verdict(size, 256, at_most=True))
    results.notes.append(f"Peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB.")
    results.notes.append("Memory of the order is what the peak of a fresh process grows by; it has NumPy loaded.")
    results.write()


if __name__ == "__main__":
    main()
