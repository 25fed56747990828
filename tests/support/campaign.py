"""The fault campaign: seeded scripts of faults over small runs, each of which must end with the bits of the undisturbed
run, with every step's row once.

python -m tests.support.campaign --faults 300 [--ray | --nodes] [--first-seed 0] [--json FILE]

On processes, or (`--ray`) on real actors with the faults that only they have: freezes, SIGTERM, a killed controller; or
(`--nodes`) on several raylets, of which whole nodes fall silent or die. A seed that fails on processes is added to
`tests/processes/campaign_seeds.txt`; `make test` runs a fixed slice and all of those.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import elastictrain as et
from elastictrain.faults import (
    PHASES,
    Add,
    Fault,
    OwnFault,
    Phase,
    add,
    drain,
    fail,
    flip,
    freeze,
    kill,
    kill_controller,
    lose_node,
    terminate,
)
from elastictrain.job import Job
from elastictrain.observe import RunDirectory
from tests.support.process_cluster import Run, byte_job, run_job

FAULTS_PER_RUN = (3, 7)
REGRESSIONS = Path(__file__).parents[1] / "processes" / "campaign_seeds.txt"


@dataclass(frozen=True)
class Arena:
    """Where the campaign plays. `steps`: of a run; on Ray a new worker needs seconds, in which the others step on."""

    kinds: tuple[str, ...]
    steps: int


PROCESSES = Arena(("kill", "kill", "kill", "kill two", "kill in forming", "torn apply", "flip", "add", "drain"), 100)
RAY = Arena(
    ("kill", "kill in forming", "torn apply", "flip", "freeze", "terminate", "kill controller", "add", "drain"), 300
)
NODES = Arena(("lose node", "lose node", "kill", "freeze", "kill controller", "drain"), 400)
NODE_COUNT, NODE_CPUS = 4, 2
SILENT_S = 10.0
"""Longer than it takes to notice."""


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


def script(seed: int, arena: Arena) -> Script:
    """Everything about a run follows from its seed."""
    choose = random.Random(seed)
    world = choose.randint(2, 4)
    settings: dict[str, Any] = {
        "steps": arena.steps,
        "gradients": choose.choice(["sum", "hand_over"]),
        "workers": {"max": 4, "start": world, "min": 1, "replace": True, "spares": choose.choice([0, 0, 1])},
    }
    steps = sorted(choose.sample(range(2, arena.steps * 4 // 5), choose.randint(*FAULTS_PER_RUN)))
    kinds = tuple(choose.choice(arena.kinds) for _ in steps)
    faults: list[Fault] = []
    together: tuple[int, ...] = ()
    spares = settings["workers"]["spares"]
    alive, following = list(range(world)), world + spares  # as far as can be known: whoever is lost gets a successor
    for kind, step in zip(kinds, steps, strict=True):
        worker = choose.choice(alive)
        faults += _faults(choose, kind, worker, step)
        if kind == "kill two":
            together = (worker, choose.choice([other for other in alive if other != worker]))
        if kind not in ("drain", "kill controller"):
            alive = [*(w for w in alive if w != worker or kind == "add"), following]
            following += 1
    return Script(seed, settings, tuple(_existing(faults, world + spares)), together, kinds)


def _existing(faults: list[Fault], workers: int) -> list[Fault]:
    """A run refuses faults of workers that it cannot have."""
    numbers = workers + sum(isinstance(fault, Add | OwnFault) for fault in faults)
    return [fault for fault in faults if getattr(fault, "worker", 0) < numbers]


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
    if kind == "flip":
        return [flip(worker, step, choose.choice(["master", "optimizer", "parameter", "gradient"]))]
    if kind == "kill controller":
        return [kill_controller(step)]
    if kind == "lose node":
        return [lose_node(worker, step, phase, how=choose.choice(["stop", "kill"]), silent_s=SILENT_S)]
    at = {"freeze": freeze, "terminate": terminate}.get(kind, kill)
    return [at(worker, step, phase)]


def job_of(folder: Path, found: Script) -> Job:
    checkpoint = {"path": str(folder / f"checkpoints-{found.seed}"), "every_steps": 10}
    return byte_job(folder, checkpoint=checkpoint, **found.settings)


def play(folder: Path, seed: int, reference: Run) -> Result:
    """Run the script of a seed on processes and compare with the undisturbed run."""
    found, begun = script(seed, PROCESSES), time.monotonic()
    run = run_job(job_of(folder, found), found.faults, die_together=found.together)
    events = [(kind, data) for kind, data, _ in run.record.events]
    return _judge(found, reference, run.outcome.digest, run.losses, events, run.outcome.error, begun)


def play_on_ray(folder: Path, seed: int, reference: Run, arena: Arena = RAY) -> Result:
    """The same on Ray's actors."""
    found, begun = script(seed, arena), time.monotonic()
    job = job_of(folder, found).model_copy(update={"run_dir": str(folder / f"run-{seed}")})
    try:
        digest, error = et.run(job, faults=found.faults).digest, None
    except et.ElasticTrainError as failure:
        digest, error = None, f"{type(failure).__name__}: {failure}"
    run = RunDirectory.open(folder / f"run-{seed}")
    losses = {row.step: row.loss for row in run.metrics()}
    return _judge(found, reference, digest, losses, [(e.kind, e.data) for e in run.events()], error, begun)


def _judge(
    found: Script,
    reference: Run,
    digest: str | None,
    losses: Mapping[int, float | None],
    events: Sequence[tuple[str, Mapping[str, Any]]],
    error: str | None,
    begun: float,
) -> Result:
    def of(kind: str) -> list[Mapping[str, Any]]:
        return [data for k, data in events if k == kind]

    recoveries, problem = of("recovery"), ""
    if digest != reference.outcome.digest:
        problem = f"digest {digest} instead of {reference.outcome.digest}: {error}"
    elif losses != reference.losses:
        wrong = sorted(s for s in reference.losses if losses.get(s, "missing") != reference.losses[s])
        problem = f"rows of steps {wrong} are missing or differ"
    elif any(r["steps_redone"] > 1 for r in recoveries if not r["restored_from"]):
        problem = f"more than one step was computed twice: {recoveries}"
    return Result(
        found.seed, found.kinds, len(recoveries), len(of("resized")), len(of("went_back")),
        len(of("worker_lost")), max((r["steps_redone"] for r in recoveries), default=0),
        round(time.monotonic() - begun, 2), problem,
    )  # fmt: skip


def undisturbed(folder: Path, arena: Arena = PROCESSES) -> Run:
    """What every run of the campaign must end with: one worker, no faults."""
    return run_job(byte_job(folder, steps=arena.steps, workers=1))


def regressions() -> list[int]:
    """Seeds that have failed once."""
    lines = REGRESSIONS.read_text(encoding="utf-8").splitlines() if REGRESSIONS.exists() else []
    return [int(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def start_ray(arena: Arena) -> None:
    """One for all runs; for NODES, of a head and several raylets."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    import elastictrain_actors  # noqa: F401  (before Ray: it sets what Ray reads when it is imported)

    if arena is RAY:
        ray.init(address="local", num_cpus=12, include_dashboard=False, log_to_driver=False)
        return
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(NODE_COUNT):
        cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=80_000_000)
    ray.init(address=cluster.address, log_to_driver=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--faults", type=int, default=300, help="go on until so many were planned")
    parser.add_argument("--first-seed", type=int, default=0)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ray", action="store_true", help="on Ray's actors instead of plain processes")
    where.add_argument("--nodes", action="store_true", help=f"on Ray, with {NODE_COUNT} raylets that may be lost")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="et-campaign-") as name:
        folder = Path(name)
        arena = RAY if options.ray else NODES if options.nodes else PROCESSES
        reference = undisturbed(folder, arena)
        if arena is not PROCESSES:
            start_ray(arena)
        seed = options.first_seed
        while sum(len(result.planned) for result in results) < options.faults:
            on_ray = arena is not PROCESSES
            result = play_on_ray(folder, seed, reference, arena) if on_ray else play(folder, seed, reference)
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
