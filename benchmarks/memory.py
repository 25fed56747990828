"""Peak memory of a worker against DDP with bucket views: resident memory above that of a process with its imports.

The model is large and the batch small, so that state dominates. Peaks come from the kernel (VmHWM, forgotten at the
base, before the first step and before the third); live tensors are counted in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from runs import Running, gpt_job

LARGE = {"vocabulary_size": 320, "sequence_length": 32, "layers": 8, "heads": 8, "width": 512}
PARAMETERS = 25_465_344
STEPS = 6
Start = Callable[[Path], Running]


def peaks(start: Start, folder: Path) -> dict[str, float]:
    """MiB, of the worker that needs most."""
    with start(folder) as run:
        run.warm_up(STEPS)
        lines = run.lines()
    steady = [x for x in lines if x["k"] == "memory" and x["nth"] >= 3]
    found = {
        "building": max(x["peak"] for x in lines if x["k"] in ("built",)),
        "first steps": max(x["peak"] for x in lines if x["k"] == "memory" and x["nth"] < 3),
        "steps": max(x["peak"] for x in steady),
        "live tensors": max(x["live"] for x in steady),
    }
    found["peak"] = max(found["building"], found["first steps"], found["steps"])
    return {name: value / 2**20 for name, value in found.items()}


def elastic(workers: int, lanes: int, **settings: Any) -> Start:
    def start(folder: Path) -> Running:
        job = gpt_job(folder, workers=workers, lanes=workers * lanes, batch=1, model=LARGE, memory=True, **settings)
        return Running.elastictrain(folder, job)

    return start


def ddp(workers: int, lanes: int) -> Start:
    return lambda folder: Running.ddp(
        folder, workers=workers, lanes=lanes, form="best", batch=1, model=LARGE, memory=True
    )


def main() -> None:
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--lanes", type=int, default=4, help="per worker"),
            parser.add_argument("--workers", type=int, nargs="+", default=None),
        ),
    )
    common.prepare_data()
    results = common.Results("memory", "Peak memory of a worker against DDP", options)
    with common.scratch("memory") as folder:
        for workers in options.workers or ([2] if options.quick else [1, 2, 4]):
            runs = {
                "DDP, bucket views": ddp(workers, options.lanes),
                "elastictrain, sum": elastic(workers, options.lanes),
                "elastictrain, hand_over": elastic(workers, options.lanes, gradients="hand_over"),
            }
            if workers > 1 and not options.quick:
                runs["elastictrain, sum, no mirrors"] = elastic(workers, options.lanes, mirrors=False)
            found = {}
            for number, (name, start) in enumerate(runs.items()):
                found[name] = peaks(start, folder / f"{workers}-{number}")
                ratios = {
                    f"{key} / DDP": found[name][key] / found["DDP, bucket views"][key] for key in ("peak", "steps")
                }
                results.row(
                    **{"workers": workers, "run": name, **ratios, **{f"{k} MiB": v for k, v in found[name].items()}}
                )
            target = 1.3 if workers == 2 else 1.0
            for name in ("sum", "hand_over"):
                value = found[f"elastictrain, {name}"]["peak"] / found["DDP, bucket views"]["peak"]
                if workers > 1:
                    reached = common.verdict(value, target, at_most=True)
                    results.figure(f"peak memory / DDP, {workers} workers, {name}", value, f"{target} or less", reached)
    results.notes += [
        (
            f"{PARAMETERS / 1e6:.1f} million parameters ({PARAMETERS * 4 / 2**20:.0f} MiB in fp32), {options.lanes} "
            "lanes of one sequence of 32 bytes per worker, AdamW; mirrors on unless it says otherwise."
        ),
        (
            "'building' is the peak until the first step begins, 'first steps' that of steps 1 and 2 (optimizer state "
            "comes into being), 'steps' that of later ones, 'peak' the largest of the three."
        ),
    ]
    results.write()


if __name__ == "__main__":
    main()
