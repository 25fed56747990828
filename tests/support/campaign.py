"""The fault campaign on real processes: seeded scripts of faults over small runs, each of which must end with the bits
of the undisturbed run, with every step's row once.

python -m tests.support.campaign --faults 300 [--first-seed 0] [--json FILE]

A seed that fails is added to `tests/processes/campaign_seeds.txt`; `make test` runs a fixed slice and all of those.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastictrain.faults import PHASES, Fault, Phase, add, drain, fail, kill
from elastictrain.job import Job
from tests.support.process_cluster import Run, byte_job, run_job

STEPS = 100
LAST_FAULT = 80
FAULTS_PER_RUN = (3, 7)
REGRESSIONS = Path(__file__).parents[1] / "processes" / "campaign_seeds.txt"
KINDS = ("kill", "kill", "kill", "kill two", "kill in forming", "torn apply", "add", "drain")


@dataclass(frozen=True)
class Script:
    """`faults` on a job of `settings`. `together`: workers that die with each other."""

    seed: int
    settings: dict[str, Any]
    faults: tuple[Fault, ...]
    together: tuple[int, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """`planned`: kinds of the script; a fault whose worker is not there at its step does not happen: `recoveries`,
    `resizes` and `went_back` say what did.
    """

    seed: int
    planned: tuple[str, ...]
    recoveries: int
    resizes: int
    went_back: int
    deaths: int
    steps_redone_most: int
    seconds: float
    problem: str


def script(seed: int) -> Script:
    """Everything about a run follows from its seed."""
    choose = random.Random(seed)
    world = choose.randint(2, 4)
    settings: dict[str, Any] = {
        "steps": STEPS,
        "gradients": choose.choice(["sum", "hand_over"]),
        "workers": {"max": 4, "start": world, "min": 1, "replace": True, "spares": choose.choice([0, 0, 1])},
    }
    steps = sorted(choose.sample(range(2, LAST_FAULT), choose.randint(*FAULTS_PER_RUN)))
    kinds = tuple(choose.choice(KINDS) for _ in steps)
    faults: list[Fault] = []
    together: tuple[int, ...] = ()
    for kind, step in zip(kinds, steps, strict=True):
        worker = choose.randrange(world + 2)
        faults += _faults(choose, kind, worker, step)
        if kind == "kill two":
            together = (worker, (worker + 1) % world)
    return Script(seed, settings, tuple(faults), together, kinds)


def _faults(choose: random.Random, kind: str, worker: int, step: int) -> list[Fault]:
    phase: Phase = choose.choice(PHASES)
    if kind == "add":
        return [add(step)]
    if kind == "drain":
        return [drain(worker, step)]
    if kind == "torn apply":
        return [fail(worker, step, "apply")]
    if kind == "kill in forming":  # somebody dies, and another one while the next generation forms or seals
        forming: Phase = choose.choice(["form", "seal"])
        return [kill(worker, step, phase), *(kill(worker + 1, later, forming) for later in (step - 1, step, step + 1))]
    return [kill(worker, step, phase)]


def job_of(folder: Path, found: Script) -> Job:
    checkpoint = {"path": str(folder / f"checkpoints-{found.seed}"), "every_steps": 10}
    return byte_job(folder, checkpoint=checkpoint, **found.settings)


def play(folder: Path, seed: int, reference: Run) -> Result:
    """Run the script of a seed and compare with the undisturbed run."""
    found, begun = script(seed), time.monotonic()
    run = run_job(job_of(folder, found), found.faults, die_together=found.together)
    record = run.record
    recoveries = record.of("recovery")
    problem = ""
    if run.outcome.digest != reference.outcome.digest:
        problem = f"digest {run.outcome.digest} instead of {reference.outcome.digest}: {run.outcome.error}"
    elif run.losses != reference.losses:
        wrong = sorted(s for s in reference.losses if run.losses.get(s, "missing") != reference.losses[s])
        problem = f"rows of steps {wrong} are missing or differ"
    elif any(r["steps_redone"] > 1 for r in recoveries if not r["restored_from"]):
        problem = f"more than one step was computed twice: {recoveries}"
    return Result(
        seed, found.kinds, len(recoveries), len(record.of("resized")), len(record.of("went_back")),
        len(record.of("worker_lost")), max((r["steps_redone"] for r in recoveries), default=0),
        round(time.monotonic() - begun, 2), problem,
    )  # fmt: skip


def undisturbed(folder: Path) -> Run:
    """What every run of the campaign must end with: one worker, no faults."""
    return run_job(byte_job(folder, steps=STEPS, workers=1))


def regressions() -> list[int]:
    """Seeds that have failed once."""
    lines = REGRESSIONS.read_text(encoding="utf-8").splitlines() if REGRESSIONS.exists() else []
    return [int(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--faults", type=int, default=300, help="go on until so many were planned")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="et-campaign-") as name:
        folder = Path(name)
        reference = undisturbed(folder)
        seed = options.first_seed
        while sum(len(result.planned) for result in results) < options.faults:
            result = play(folder, seed, reference)
            results.append(result)
            print(f"seed {seed}: {', '.join(result.planned)}: {result.deaths} deaths, {result.recoveries} recoveries, "
                  f"{result.resizes} resizes, {result.went_back} went back, {result.seconds} s "
                  f"{'FAILED: ' + result.problem if result.problem else ''}", flush=True)  # fmt: skip
            seed += 1
    failed = [result.seed for result in results if result.problem]
    kinds = Counter(kind for result in results for kind in result.planned)
    print(f"{len(results)} runs, {sum(kinds.values())} faults {dict(kinds)}; failed seeds: {failed or 'none'}")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
