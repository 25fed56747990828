"""What the checks for silent corruption cost: sums of the state on against off, lanes computed twice, kinds of sums."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import phases
from runs import Running, Turns, gpt_job, side_by_side

EVERY = 50
"""The default of integrity.recompute_every."""
RUNS: dict[str, dict[str, Any]] = {
    "off": {"state": False, "recompute_every": None},
    "sums": {"state": True, "recompute_every": None},
    "a lane in every step": {"state": False, "recompute_every": 1},
}


def kinds_of_sums(elements: int) -> dict[str, float]:
    """Milliseconds of processor time for one sum over so many fp32 elements in one run of memory; median of 50."""
    import torch

    from elastictrain.engine.integrity import device_sum, sums

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    values = torch.randn(elements)
    numbers = values.view(torch.int64)
    blocks = list(torch.split(values, 16384))
    ways: dict[str, Callable[[], object]] = {
        "XXH3, 64 bits": lambda: sums([[values]], cpu),
        "XXH3, block by block": lambda: sums([[block] for block in blocks], cpu),
        "int64 sum (sees no order)": lambda: int(numbers.sum()),
        "torch.hash_tensor (sees no order)": lambda: int(torch.hash_tensor(values).view(torch.int64)),
        "weighted sum of the bits (on a device)": lambda: int(device_sum(values)),
        "a copy, for comparison": lambda: values.clone(),
    }
    found = {}
    for name, take in ways.items():
        taken = []
        for _ in range(50):
            begun = time.process_time()
            take()
            taken.append(1000 * (time.process_time() - begun))
        found[name] = common.median(taken)
    return found


def measure(options: Any) -> Turns:
    with common.scratch("integrity") as folder:

        def start(name: str, settings: dict[str, Any]) -> Running:
            where, lanes = folder / name.replace(" ", "-"), options.workers * options.lanes
            job = gpt_job(where, workers=options.workers, lanes=lanes, integrity=settings)
            return Running.elastictrain(where, job)

        runs = {name: partial(start, name, settings) for name, settings in RUNS.items()}
        return side_by_side(runs, rounds=phases.rounds_of(options), turn_s=1.0)


def main() -> None:
    options = phases.options_of(__doc__)
    common.prepare_data()
    results = common.Results("integrity", "What the checks for silent corruption cost", options)
    turns = measure(options)
    phases.rows(results, options, turns, RUNS)
    wall = 100 * (1 / turns.speed("sums", "off") - 1)
    busy = 100 * (turns.cpu_s("sums") / turns.cpu_s("off") - 1)
    inside = phases.shares(turns, "sums")["sums %"]
    lanes = 100 * (1 / turns.speed("a lane in every step", "off") - 1) / EVERY
    results.figure("cost of the sums, % of a step", wall, "none", "beside it: noise of the machine included")
    results.figure("cost of the sums, % of processor time", busy, "none", "beside it")
    results.figure("time in the sums, % of a step", inside, "none", "measured inside the step")
    results.figure(f"cost of one lane in {EVERY} steps, % of a step", lanes, "none", "beside it")
    total = inside + lanes
    results.figure("cost of all checks, % of a step", total, "2 or less", common.verdict(total, 2, at_most=True))
    for name, taken in kinds_of_sums(2_800_000).items():
        results.row(**{"sum over 2.8 million fp32 elements": name, "ms of processor time": taken})
    results.notes.append("The total takes the time inside the sums, which other load on the machine moves least.")
    results.write()


if __name__ == "__main__":
    main()
