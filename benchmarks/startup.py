"""`elastictrain run`: from the command to the first committed step on a warm machine, and where the time goes.

The command runs as a user would run it, with a wrapper that notes times around the same calls.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

import common
import stamps
from runs import gpt_job

STEPS = 2


def wrapped(job_file: str) -> None:
    """What `elastictrain run` does, in a process of its own, with stamps of this process beside it."""
    folder = Path(job_file).parent
    stamp = stamps.Stamps(folder / "driver")
    stamp("python")
    import ray

    from elastictrain import cli

    stamp("imported")

    def noted(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.monotonic()
            result = call(*args, **kwargs)
            stamp(name, begun=begun)
            return result

        setattr(owner, name, timed)

    run = importlib.import_module("elastictrain.run")  # the package's attribute of that name is the function

    noted(ray, "init")
    noted(run, "inspect")
    noted(run, "start_controller")
    sys.argv = ["elastictrain", "run", job_file, "--quiet", "--json"]
    cli.main()


def measure(folder: Path, workers: int) -> dict[str, float]:
    """Seconds of every part. Parts overlap where the programme lets them (Ray starts while the job is checked)."""
    folder.mkdir()
    (folder / "driver").mkdir()
    job = gpt_job(folder, workers=workers, lanes=4 * workers) | {"steps": STEPS}
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--wrapped", str(folder / "job.yaml")],
        env=common.child_environment(), capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the run failed:\n{done.stderr}")
    driver = {x["k"]: x for x in stamps.read(folder / "driver")}
    lines = stamps.read(folder)
    first = [x for x in lines if x["step"] == 1]
    started, applied = (max(x["t"] for x in first if x["k"] == kind) for kind in ("start", "applied"))
    journal = [json.loads(line) for line in (folder / "run" / "journal.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    prepared = [event["data"]["prepared_s"] for event in events if "prepared_s" in event["data"]]
    asked, ready = moments(journal, "Begun")[0], moments(journal, "WorkerReady")
    parts = {name: common.median(p[name] for p in prepared) for name in ("model_s", "data_s", "trial_lane_s")}
    return {
        "python": driver["python"]["t"] - begun,
        "imports": driver["imported"]["t"] - driver["python"]["t"],
        "ray.init": driver["init"]["t"] - driver["init"]["begun"],
        "checking the job (beside it)": driver["inspect"]["t"] - driver["inspect"]["begun"],
        "controller actor": asked - driver["start_controller"]["begun"],
        "worker actors with torch": max(ready) - asked - sum(parts.values()),
        "model": parts["model_s"],
        "data": parts["data_s"],
        "trial lane": parts["trial_lane_s"],
        "forming": started - max(ready),
        "first step": applied - started,
        "total": applied - begun,
    }


def moments(journal: list[dict[str, Any]], kind: str) -> list[float]:
    return [line["data"]["now_s"] for line in journal if line["event"] == kind]


def alone(code: str) -> float:
    """Seconds of a Python process that does only this: what no programme of ours can avoid."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, env=common.child_environment())
    return time.monotonic() - begun


def main() -> None:
    if "--wrapped" in sys.argv:
        wrapped(sys.argv[-1])
        return
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--workers", type=int, default=3),
            parser.add_argument("--rounds", type=int, default=None),
        ),
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    common.prepare_data()
    results = common.Results("startup", f"From the command to the first commit, {options.workers} workers", options)
    rounds = options.rounds or (1 if options.quick else 5)
    with common.scratch("startup") as folder:
        measure(folder / "warm", options.workers)
        found = [measure(folder / str(number), options.workers) for number in range(rounds)]
    total = common.median(one["total"] for one in found)
    for name in found[0]:
        value = common.median(one[name] for one in found)
        results.row(**{"part": name, "seconds": value, "% of total": 100 * value / total})
    bare = {
        "a process that imports torch": alone("import torch"),
        "a process that imports ray": alone("import ray"),
    }
    for name, value in bare.items():
        results.row(part=f"for comparison: {name}", seconds=value)
    results.figure("command to first commit, s", total, "15 or less", common.verdict(total, 15, at_most=True))
    results.raw = {"rounds": found}
    results.notes.append(f"Median of {rounds} runs after one that warms the caches. Each worker imports torch itself.")
    results.write()


if __name__ == "__main__":
    main()
