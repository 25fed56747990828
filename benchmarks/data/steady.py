"""A long run of feeding: memory over 20 epochs; and the shortest of steps, below a millisecond, 20 % slower than the
reader: what they wait for data and what asking for them takes. (A real run's steps: waiting.py.)
"""

from __future__ import annotations

import ctypes
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
from elastictrain.data import LaneReader, Source, open_source
from elastictrain.data.feeder import Feeder

EPOCHS = 20
WAIT_EPOCHS, WAIT_SIZE = 5, 32
"""Larger batches than elsewhere: a step of some milliseconds, as short as they get on accelerators."""


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def epochs_of(folder: Path, *, warm: bool) -> list[float]:
    """Peak of the resident memory in every epoch, MiB; run in a process of its own."""
    source = open_source(spec_of(folder, warm=warm), seed=1, lanes=LANES, lane_batch_size=SIZE)
    steps, peaks = source.steps_per_epoch, []
    with Feeder.of(source) as feeder:
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
    source.close()
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


def open_at(folder: Path) -> Source:
    return open_source(spec_of(folder), seed=1, lanes=LANES, lane_batch_size=WAIT_SIZE)


def read_alone(folder: Path) -> float:
    """Seconds of a step's batches over two epochs, by one thread, with nothing beside it."""
    reader = LaneReader(open_at(folder))
    steps = 2 * reader.source.steps_per_epoch
    begun_s = time.perf_counter()
    for step in range(steps):
        for lane in range(LANES):
            reader.batch(step, lane)
    reader.close()
    return (time.perf_counter() - begun_s) / steps


def sleep_exactly() -> None:
    """Let this thread's sleeps end when they should; the kernel may make them 50 microseconds longer otherwise."""
    ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK, nanoseconds


def waited(folder: Path, step_s: float) -> dict[str, float]:
    """Shares of the steps' time from the second epoch on: that told as waited for data, all that is spent in asking for
    batches, and the longest wait in steps; and the seconds by cause. A step computes for `step_s` without holding the
    interpreter's lock, as one on an accelerator does. In the first epoch nothing can have been read before.
    """
    source = open_at(folder)
    steps, asking_s, longest_s = source.steps_per_epoch, 0.0, 0.0
    causes: dict[str, float] = {}
    with Feeder.of(source) as feeder:
        due_s = time.perf_counter()
        for step in range(WAIT_EPOCHS * steps):
            if step == steps:
                begun_s, asking_s, longest_s, causes = time.perf_counter(), 0.0, 0.0, {}
            if step % 64 == 0:
                feeder.expect([(t, lane) for t in range(step, step + 128) for lane in range(LANES)])
            for lane in range(LANES):
                asked_s = time.perf_counter()
                batch = feeder.batch(step, lane)
                asking_s += time.perf_counter() - asked_s
                longest_s = max(longest_s, sum(batch.waited.values()))
                for cause, seconds in batch.waited.items():
                    causes[cause] = causes.get(cause, 0.0) + seconds
                # A sleep that ends late shortens the next one, so that the pace is kept; a wait for data does not.
                due_s += step_s / LANES + sum(batch.waited.values())
                time.sleep(max(0.0, due_s - time.perf_counter()))
        total_s = time.perf_counter() - begun_s
    source.close()
    return {"waited": sum(causes.values()) / total_s, "asking": asking_s / total_s, "longest_steps": longest_s / step_s,
            "real_step_ms": 1e3 * total_s / steps / (WAIT_EPOCHS - 1), **causes}  # fmt: skip


def main() -> None:
    options = common.arguments(__doc__)
    common.prepare_data()
    results = common.Results("data_steady", "Data: memory over 20 epochs, and waiting for data", options)
    with common.scratch("data") as place:
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        folder = write_data(place, "text", 48 if options.quick else 128)
        for warm in (False, True):
            peaks = in_a_process(folder, warm)
            growth = max(peaks[-5:]) / max(peaks[1:6]) - 1  # the first epoch fills the caches
            name = "from the warm cache" if warm else "from Parquet"
            results.row(what=f"memory, {name}", epoch_2_mib=peaks[1], epoch_20_mib=peaks[-1], growth=growth)
            results.figure(f"memory over 20 epochs grows, {name}", growth, "<= 0.02",
                           common.verdict(growth, 0.02, at_most=True))  # fmt: skip
        shares: list[float] = []
        asking: list[float] = []
        sleep_exactly()
        for _ in range(3 if options.quick else 7):
            alone_s = read_alone(folder)
            found = waited(folder, 1.2 * alone_s)
            shares.append(found["waited"])
            asking.append(found["asking"])
            results.row(what="step 20 % slower than the reader", step_ms=1.2e3 * alone_s, **found)
        for name, parts in (("waiting for data", shares), ("asking for data", asking)):
            results.figure(f"{name}, share of a step below a millisecond", common.median(parts), "none", "beside it")
    results.notes.append(
        "Waiting is measured from the second epoch on: in the first nothing can have been read before."
    )
    results.write()


if __name__ == "__main__":
    main()
