"""Silent corruption, injected: how many flipped bits are found at the next vote, and how long a worker that computes
wrongly one time in ten goes on.

On plain processes, four workers; every run must end with the digest of one that nothing disturbed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import common

WORKERS, STEPS, LONG = 4, 8, 160
WHERE = [
    *[("master", of, "compute") for of in ("owned", "mirrored")],
    *[("optimizer", of, "compute") for of in ("owned", "mirrored")],
    *[("gradient", of, "reduced") for of in ("owned", "mirrored")],
    *[("parameter", of, when) for of in ("owned", "mirrored", "other") for when in ("compute", "gathered")],
]
"""What is flipped, in a block that the worker owns, mirrors or has neither of, and when in a step."""


def run(folder: Path, faults: list[Any], **settings: Any) -> Any:
    from tests.support.process_cluster import byte_job, run_job

    return run_job(byte_job(folder, workers=WORKERS, **settings), faults)


def named(found: Any) -> list[int]:
    """Who was ended as corrupt, in order."""
    return [e["worker"] for e in found.record.of("doomed") if e["reason"].startswith("corrupt")]


def one_flip(folder: Path, choice: random.Random, number: int, digest: str) -> dict[str, Any]:
    from elastictrain.faults import flip

    what, of, when = WHERE[number % len(WHERE)]
    worker, step, bit = choice.randrange(WORKERS), choice.randint(2, STEPS - 1), choice.randrange(23)
    found = run(folder, [flip(worker, step, what, of=of, when=when, bit=bit)], integrity={"witness": True})
    good = step if when == "gathered" else step - 1  # the last commit before the flip
    back = found.record.of("went_back")
    at = [e["from_step"] for e in back][:1] or [e["step"] for e in found.record.of("recovery")][:1]
    return {
        "flipped": f"{what}, {of}, {when}", "worker": worker, "step": step, "bit": bit,
        "at the next vote": at == [good], "without going back": not back,
        "named": named(found) == [worker], "same digest": found.outcome.digest == digest,
    }  # fmt: skip


def one_miscomputing(folder: Path, seed: int, digest: str) -> dict[str, Any]:
    from elastictrain.engine.lane_checks import expected_delay_steps
    from elastictrain.faults import miscompute

    began, worker = 3, seed % WORKERS
    store = {"path": str(folder / f"stored-{seed}"), "every_steps": 10, "keep": 100}
    settings = {"integrity": {"recompute_every": 1, "distrust": "since_it_joined"}, "checkpoint": store}
    found = run(folder, [miscompute(worker, began, one_in=10, seed=seed)], steps=LONG, **settings)
    (back, *_) = found.record.of("went_back") or [{"from_step": LONG}]
    lanes = found.machine.spec.lane_count
    return {
        "worker": worker, "seed": seed, "found after steps": back["from_step"] + 1 - began,
        "expected": expected_delay_steps(0.1, 1 / WORKERS, WORKERS, 1), "lanes": lanes,
        "named": named(found) == [worker], "same digest": found.outcome.digest == digest,
    }  # fmt: skip


def main() -> None:
    options = common.arguments(__doc__, lambda parser: parser.add_argument("--seed", type=int, default=0))
    results = common.Results("corruption", "Injected silent corruption, and when it is found", options)
    choice, flips, wrong = random.Random(options.seed), 4 if options.quick else 36, 2 if options.quick else 12
    with common.scratch("corruption") as folder:
        digest = run(folder, []).outcome.digest
        flipped = []
        for number in range(flips):
            flipped.append(one_flip(folder, choice, number, digest))
            results.row(**flipped[-1])
        digest = run(folder, [], steps=LONG).outcome.digest
        computed = []
        for seed in range(options.seed, options.seed + wrong):
            computed.append(one_miscomputing(folder, seed, digest))
            results.row(**computed[-1])
    for what in ("at the next vote", "named", "same digest"):
        share = sum(one[what] for one in flipped)
        results.figure(f"flipped bits: {what}", f"{share} of {flips}", "all", "reached" if share == flips else "missed")
    share = sum(one["without going back"] for one in flipped)
    results.figure("flipped bits: mended without going back", f"{share} of {flips}", "none", "beside it")
    late = common.median(one["found after steps"] / one["expected"] for one in computed)
    mean = sum(one["found after steps"] for one in computed) / sum(one["expected"] for one in computed)
    results.figure("wrong one time in ten: mean delay over the expected one", mean, "2",
                   common.verdict(mean, 2.0, at_most=True))  # fmt: skip
    results.figure("wrong one time in ten: median delay over the expected one", late, "none", "beside it")
    for what in ("named", "same digest"):
        share = sum(one[what] for one in computed)
        reached = "reached" if share == wrong else "missed"
        results.figure(f"wrong one time in ten: {what}", f"{share} of {wrong}", "all", reached)
    results.notes.append(
        "A delay is a number of steps, distributed like the tosses until a first success: one run in seven takes more "
        "than twice the expected one, so the mean of the runs is compared."
    )
    results.write()


if __name__ == "__main__":
    main()
