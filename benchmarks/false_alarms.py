"""Ten thousand steps on Ray while the machine is busy with other things: how many workers are blamed that did nothing?

Four workers train a small model. Beside them twice as many processes as the machine has cores turn it on and off in
bursts, seeded: arithmetic, large copies through memory, and writing with fsync. A generation that ends, a worker that
is named, or a node that is given up is a false alarm: nothing is wrong.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
from runs import BenchmarkError, Running, gpt_job

SMALL = {"vocabulary_size": 320, "sequence_length": 16, "layers": 2, "heads": 2, "width": 64, "dropout": 0.1}
WORLD, LANES = 4, 4
BURST_S, CALM_S = (0.2, 6.0), (0.1, 2.0)
DEADLINE_S = 3600.0
ALARMS = ("frozen", "hung", "node_lost", "worker_lost", "storage_stalled")


def disturb(seed: int, folder: str) -> None:
    """One noisy neighbour, until it is killed."""
    choice = random.Random(seed)
    block = bytearray(64 << 20)
    while True:
        until_s = time.monotonic() + choice.uniform(*BURST_S)
        kind = choice.choice(("count", "count", "copy", "write"))
        while time.monotonic() < until_s:
            if kind == "count":
                sum(range(100_000))
            elif kind == "copy":
                bytes(block)
            else:
                with (Path(folder) / f"noise-{seed}").open("wb") as file:
                    file.write(memoryview(block)[: 8 << 20])
                    os.fsync(file.fileno())
        time.sleep(choice.uniform(*CALM_S))


@contextmanager
def noise(folder: Path, neighbours: int, seed: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    found = [context.Process(target=disturb, args=(seed + n, str(folder)), daemon=True) for n in range(neighbours)]
    for process in found:
        process.start()
    try:
        yield
    finally:
        for process in found:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()


def main() -> None:
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--steps", type=int, default=None),
            parser.add_argument("--seed", type=int, default=0),
        ),
    )
    common.prepare_data()
    steps = options.steps or (500 if options.quick else 10_000)
    neighbours = 2 * (os.cpu_count() or 1)
    results = common.Results("false_alarms", "Steps on a busy machine, and who was blamed for it", options)
    with common.scratch("false-alarms") as folder:
        where = folder / "run"
        job = gpt_job(where, workers=WORLD, lanes=LANES, batch=1, model=SMALL, steps=steps)
        job["recipe_args"] |= {"total_steps": steps}
        job["workers"] = {"min": 1, "max": WORLD, "start": WORLD, "replace": True}
        with Running.elastictrain(where, job, ray=True) as running:
            running.warm_up(1)
            begun = time.monotonic()
            loads: list[float] = []
            with noise(folder, neighbours, options.seed):
                while running.leaders[0].poll() is None:
                    if time.monotonic() > begun + DEADLINE_S:
                        raise BenchmarkError(f"{steps} steps took longer than {DEADLINE_S:.0f} s")
                    loads.append(os.getloadavg()[0])
                    time.sleep(1.0)
            took_s = time.monotonic() - begun
            last = json.loads((running.leaders[0].communicate()[0]).decode().strip().splitlines()[-1])
            lines = running.lines()
        kinds = Counter(event["kind"] for event in events(where / "run"))
    if last.get("outcome") != "finished":
        raise BenchmarkError(f"the run ended as {last}")
    generations = {x["generation"] for x in lines if x["k"] == "start"}
    each = [x["phases"]["step_s"] for x in lines if x["k"] == "end" and x["rank"] == 0]
    alarms = sum(kinds[kind] for kind in ALARMS)
    results.row(**{
        "steps": last["steps"], "seconds": took_s, "step p50 s": common.median(each),
        "step p99 s": common.quantile(each, 0.99), "longest step s": max(each), "load p50": common.median(loads),
        "load max": max(loads), "generations": len(generations), "events": dict(kinds),
    })  # fmt: skip
    results.figure(
        f"false alarms in {steps} steps on a busy machine", alarms, "0", "reached" if not alarms else "missed"
    )
    results.notes.append(f"{WORLD} workers, {neighbours} noisy neighbours, seed {options.seed}, on Ray.")
    results.write()


def events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
