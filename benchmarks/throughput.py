"""Optimizer steps per second against plain torch DDP under gloo: same model, batch, optimizer, clipping, one thread.

DDP runs in two forms: "naive" (an all-reduce in every micro-batch's backward) and "best" (no_sync for all but the last,
gradients as bucket views, fused AdamW). All runs of a case live at the same time and take turns of a few seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import common
from runs import Running, gpt_job, side_by_side

RUNS = ("DDP naive", "DDP best", "elastictrain", "elastictrain hand_over", "elastictrain on Ray")


def case(
    results: common.Results, folder: Path, workers: int, lanes: int, rounds: int, turn_s: float, names: Sequence[str]
) -> None:
    def elastic(name: str, on_ray: bool, **settings: object) -> Running:
        where = folder / f"{name}-{workers}-{lanes}"
        return Running.elastictrain(
            where, gpt_job(where, workers=workers, lanes=workers * lanes, **settings), ray=on_ray
        )

    def ddp(form: str) -> Running:
        return Running.ddp(folder / f"ddp-{form}-{workers}-{lanes}", workers=workers, lanes=lanes, form=form)

    runs = {
        "DDP naive": partial(ddp, "naive"),
        "DDP best": partial(ddp, "best"),
        "elastictrain": partial(elastic, "processes", False),
        "elastictrain hand_over": partial(elastic, "handed", False, gradients="hand_over"),
    }
    # Waiting for their turn, workers are stopped: only in a job that is being debugged does nobody mind.
    runs["elastictrain on Ray"] = partial(elastic, "ray", True, debug=True)
    runs = {name: runs[name] for name in RUNS if name in names}
    turns = side_by_side(runs, rounds=rounds, turn_s=turn_s)
    for name in runs:
        results.row(
            **{
                "workers": workers,
                "lanes per worker": lanes,
                "run": name,
                "steps/s": 1 / turns.step_s(name),
                **{f"of {other}": turns.speed(name, other) for other in RUNS[:2] if other in runs},
                "ms per step over rounds": turns.spread(name),
                "cpu ms per step": 1000 * turns.cpu_s(name),
            }
        )
    label = f"{workers} workers, {lanes} lanes each"
    results.raw[label] = turns.rounds
    for name in ("elastictrain", "elastictrain on Ray"):
        for other in RUNS[:2]:
            if name in runs and other in runs:
                value = turns.speed(name, other)
                reached = common.verdict(value, 0.95, at_most=False)
                results.figure(f"steps/s of {name} / {other}, {label}", value, "0.95 or more", reached)


def main() -> None:
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--ray", action="store_true", help="the same on Ray too"),
            parser.add_argument("--only", nargs="+", choices=RUNS, default=None, help="these runs, side by side"),
            parser.add_argument("--workers", type=int, nargs="+", default=None),
            parser.add_argument("--lanes", type=int, nargs="+", default=None, help="per worker"),
            parser.add_argument("--rounds", type=int, default=None),
            parser.add_argument("--name", default="throughput", help="of the results"),
        ),
    )
    common.prepare_data()
    results = common.Results(options.name, "Steps per second against DDP", options)
    workers = options.workers or ([2] if options.quick else [2, 4])
    lanes = options.lanes or ([4] if options.quick else [2, 4])
    names = options.only or (RUNS if options.ray else RUNS[:-1])
    rounds = 4 if options.quick else options.rounds or 15
    with common.scratch("throughput") as folder:
        for world in workers:
            for per_worker in lanes:
                case(results, folder, world, per_worker, rounds, 1.0, names)
    results.notes += [
        "GPT of examples/gpt (2.8 million parameters), 2 sequences of 128 bytes per lane, AdamW (fused), clipping on.",
        "Ratios are medians over rounds of neighbours in time: above 1 means faster than DDP.",
        (
            "DDP's samples lie ready in memory; elastictrain reads and tokenises Parquet in the same time, computes "
            "with deterministic algorithms and keeps mirrors."
        ),
    ]
    results.write()


if __name__ == "__main__":
    main()
