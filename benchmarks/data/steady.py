"""A long run of feeding: memory over 20 epochs, and the time that a step waits for data when it is 20 % slower than the
reader.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokens_per_s import LANES, SIZE, spec_of, write_data

import common
from elastictrain.data import LaneReader, open_source
from elastictrain.data.feeder import Feeder

EPOCHS = 20


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def epochs_of(folder: Path, *, warm: bool) -> list[float]:
    """Peak of the resident memory in every epoch, MiB; run in a process of its own."""
    reader = LaneReader(open_source(spec_of(folder, warm=warm), seed=1, lanes=LANES, lane_batch_size=SIZE))
    steps, peaks = reader.source.steps_per_epoch, []
    with Feeder(reader) as feeder:
        for epoch in range(EPOCHS):
            peak = 0.0
            for step in range(epoch * steps, (epoch + 1) * steps):
                if step % 64 == 0:
                    feeder.expect([(t, lane) for t in range(step, step + 128) for lane in range(LANES)])
                for lane in range(LANES):
                    feeder.batch(step, lane)
                if step % 16 == 0:
                    peak = max(peak, resident_mib())
            gc.collect()
            peaks.append(peak)
    reader.close()
    return peaks


def in_a_process(folder: Path, warm: bool) -> list[float]:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; import json; "
        f"import steady; print(json.dumps(steady.epochs_of(Path({str(folder)!r}), warm={warm})))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env=common.child_environment(), check=True, capture_output=True, text=True
    )
    peaks: list[float] = json.loads(found.stdout.splitlines()[-1])
    return peaks


def read_alone(folder: Path) -> float:
    """Seconds of a step's batches over an epoch, with nothing beside it."""
    reader = LaneReader(open_source(spec_of(folder), seed=1, lanes=LANES, lane_batch_size=SIZE))
    steps = reader.source.steps_per_epoch
    begun_s = time.perf_counter()
    for step in range(steps):
        for lane in range(LANES):
            reader.batch(step, lane)
    reader.close()
    return (time.perf_counter() - begun_s) / steps


def waited(folder: Path, step_s: float) -> tuple[float, dict[str, float]]:
    """Share of the steps' time that is waited for data, and the seconds by cause. A step computes for `step_s` without
    holding the interpreter's lock, as one on an accelerator does.
    """
    reader = LaneReader(open_source(spec_of(folder), seed=1, lanes=LANES, lane_batch_size=SIZE))
    steps, total = reader.source.steps_per_epoch, 0.0
    causes: dict[str, float] = {}
    with Feeder(reader) as feeder:
        begun_s = time.perf_counter()
        for step in range(steps):
            if step % 64 == 0:
                feeder.expect([(t, lane) for t in range(step, min(step + 128, steps)) for lane in range(LANES)])
            for lane in range(LANES):
                for cause, seconds in feeder.batch(step, lane).waited.items():
                    causes[cause] = causes.get(cause, 0.0) + seconds
                time.sleep(step_s / LANES)
        total = time.perf_counter() - begun_s
    reader.close()
    return sum(causes.values()) / total, causes


def main() -> None:
    options = common.arguments(__doc__)
    common.prepare_data()
    results = common.Results("data_steady", "Data: memory over 20 epochs, and waiting for data", options)
    with common.scratch("data") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        folder = write_data(place, 48 if options.quick else 128)["text"]
        for warm in (False, True):
            peaks = in_a_process(folder, warm)
            growth = max(peaks[-5:]) / max(peaks[1:6]) - 1  # the first epoch fills the caches
            name = "from the warm cache" if warm else "from Parquet"
            results.row(what=f"memory, {name}", epoch_2_mib=peaks[1], epoch_20_mib=peaks[-1], growth=growth)
            results.figure(f"memory over 20 epochs grows, {name}", growth, "<= 0.02",
                           common.verdict(growth, 0.02, at_most=True))  # fmt: skip
        shares = []
        for _ in range(3 if options.quick else 7):
            alone_s = read_alone(folder)
            share, causes = waited(folder, 1.2 * alone_s)
            shares.append(share)
            results.row(what="step 20 % slower than the reader", step_ms=1.2e3 * alone_s, waited=share,
                        **causes)  # fmt: skip
        value = common.median(shares)
        results.figure(
            "waiting for data, share of the step", value, "<= 0.01", common.verdict(value, 0.01, at_most=True)
        )
    results.write()


if __name__ == "__main__":
    main()
