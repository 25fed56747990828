"""The same model and the same kills on elastictrain, torchrun, Ray Train and torchft, each against its undisturbed run.

Peers that are not installed are left out and named (`pip install torchft 'ray[train]'`). Runs come one after the other:
a system under faults cannot take turns with another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import yaml
from training import ORDER, Order

import common
import stamps
from runs import EXAMPLE, gpt_job

HERE = Path(__file__).resolve().parent
MODEL = EXAMPLE | {"dropout": 0.0}
DEADLINE_S = 900.0
SCRIPTS = Path(sys.executable).parent
Command = Callable[[Order, ExitStack], list[list[str]]]


# --- the systems ---


def elastictrain(order: Order, _: ExitStack, *, spares: int = 0) -> list[list[str]]:
    """Kills by address; every lost worker is replaced by the next number."""
    folder = Path(order.folder)
    lanes = 2 * order.world
    job = gpt_job(folder, workers=order.world, lanes=lanes, batch=order.sequences // 2, model=MODEL)
    job["recipe_args"]["total_steps"] = job["steps"] = order.steps
    job["clip_grad_norm"] = None
    job["workers"] = {"min": 1, "max": order.world, "replace": True, "spares": spares}
    job["checkpoint"] = {"path": str(folder / "checkpoints"), "every_steps": order.checkpoint_every}
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    numbers, faults = list(range(order.world)), []
    for following, (rank, step) in enumerate(order.kills, start=order.world):
        faults.append({"do": "kill", "worker": numbers[rank], "step": step, "phase": "compute"})
        numbers[rank] = following
    (folder / "faults.yaml").write_text(yaml.safe_dump(faults), encoding="utf-8")
    command = [sys.executable, "-m", "elastictrain.cli", "run", str(folder / "job.yaml"), "--quiet", "--json"]
    return [[*command, "--faults", str(folder / "faults.yaml")]]


def torchrun(order: Order, _: ExitStack) -> list[list[str]]:
    return [_torchrun(order.world, len(order.kills), "torchrun_worker.py")]


def ray_train(_: Order, __: ExitStack) -> list[list[str]]:
    return [[sys.executable, str(HERE / "ray_train.py")]]


def torchft(order: Order, around: ExitStack) -> list[list[str]]:
    """One torchrun per replica group, as its documentation says; a lighthouse that notices after a second."""
    around.enter_context(_lighthouse())
    return [_torchrun(1, len(order.kills), "torchft_worker.py") for _ in range(order.world)]


SYSTEMS: dict[str, tuple[Command, str]] = {
    "elastictrain": (elastictrain, "ray"),
    "elastictrain, 1 spare": (partial(elastictrain, spares=1), "ray"),
    "torchrun": (torchrun, "torch"),
    "Ray Train": (ray_train, "pandas"),
    "torchft": (torchft, "torchft"),
}
"""How each is started, and a module without which it cannot be."""
LIGHTHOUSE_PORT = 29511


def _torchrun(world: int, restarts: int, script: str) -> list[str]:
    return [
        str(SCRIPTS / "torchrun"), "--nnodes=1", f"--nproc-per-node={world}", f"--max-restarts={restarts}",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(HERE / script),
    ]  # fmt: skip


@contextmanager
def _lighthouse() -> Iterator[None]:
    process = subprocess.Popen(
        [str(SCRIPTS / "torchft_lighthouse"), "--min_replicas", "1", "--heartbeat_timeout_ms", "1000",
         "--join_timeout_ms", "1000", "--bind", f"[::]:{LIGHTHOUSE_PORT}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait()


# --- one run ---


def run(system: str, order: Order) -> list[dict[str, Any]]:
    """Its stamps. A run that does not end in time is killed: what it has stamped until then is all there is."""
    Path(order.folder).mkdir(parents=True)
    environment = common.child_environment() | {
        ORDER: str(order.write()),
        "TORCHFT_LIGHTHOUSE": f"http://localhost:{LIGHTHOUSE_PORT}",
    }
    if system == "torchrun":  # otherwise a restart hangs in the rendezvous every now and then
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torchft needs the agent's store: without, it waits
    with ExitStack() as around:
        processes = []
        for number, command in enumerate(SYSTEMS[system][0](order, around)):
            output = around.enter_context((Path(order.folder) / f"output-{number}.txt").open("wb"))
            own = environment | {"REPLICA_GROUP_ID": str(number)}
            processes.append(subprocess.Popen(command, env=own, stdout=output, stderr=output, start_new_session=True))
            around.callback(_end, processes[-1])
        until_s = time.monotonic() + DEADLINE_S
        with suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(timeout=max(0.0, until_s - time.monotonic()))
    return stamps.read(Path(order.folder))


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def digest(order: Order) -> str:
    """Of the final weights; "" when the run did not reach its end. Ranks that differ are said."""
    own = Path(order.folder) / "run" / "summary.json"
    if own.exists():
        return str(json.loads(own.read_text(encoding="utf-8")).get("digest") or "")
    found = {path.read_text(encoding="ascii") for path in Path(order.folder).glob("digest-*")}
    return found.pop() if len(found) == 1 else "the ranks differ" if found else ""


# --- figures ---


def committed(lines: Sequence[dict[str, Any]]) -> dict[int, float]:
    """When each step was committed first, by step."""
    found: dict[int, float] = {}
    for line in lines:
        if line["k"] == "end":
            found.setdefault(line["step"], line["t"])
    return found


def redone(lines: Sequence[dict[str, Any]]) -> int:
    """Steps that were begun again: by another generation (ours), or after another kill (peers)."""
    attempts = {(x["step"], x.get("generation", x.get("attempt"))) for x in lines if x["k"] == "start"}
    return len(attempts) - len({step for step, _ in attempts})


def left_out(lines: Sequence[dict[str, Any]], order: Order) -> int:
    """Sequences that no committed step has seen: of ranks that took no part. Ours: every step has all its lanes."""
    parts = {(x["step"], x["rank"]) for x in lines if x["k"] == "end" and x.get("took_part", True)}
    if any("generation" in x for x in lines):
        return 0
    return sum(order.world - sum(p[0] == step for p in parts) for step in committed(lines)) * order.sequences


def after_kill(lines: Sequence[dict[str, Any]], death: dict[str, Any]) -> dict[str, float]:
    """Seconds from a kill: to the start of a step that is then committed by whoever began it, to that commit, and to
    the first commit of a step that had not been committed before.
    """
    later = [x for x in lines if x["t"] > death["t"]]
    known = max((x["step"] for x in lines if x["k"] == "end" and x["t"] <= death["t"]), default=0)
    pending: dict[int, dict[str, Any]] = {}
    first = None
    for line in later:
        if line["k"] == "start":
            pending[line["pid"]] = line
        elif line["k"] == "end" and pending.get(line["pid"], {}).get("step") == line["step"]:
            first = first or (pending[line["pid"]]["t"], line["t"])
    new = next((x["t"] for x in later if x["k"] == "end" and x["step"] > known), None)
    found = {} if first is None else {"start": first[0] - death["t"], "commit": first[1] - death["t"]}
    return found | ({} if new is None else {"new": new - death["t"]})


def _folder(system: str) -> str:
    return system.replace(",", "").replace(" ", "-")


def measure(system: str, order: Order, results: common.Results) -> None:
    calm = replace(order, folder=f"{order.folder}/{_folder(system)}-calm", kills=())
    rough = replace(order, folder=f"{order.folder}/{_folder(system)}-rough")
    quiet, lines = run(system, calm), run(system, rough)
    ends, rough_ends = committed(quiet), committed(lines)
    gaps = [ends[step + 1] - ends[step] for step in sorted(ends) if step + 1 in ends]
    found = [after_kill(lines, x) for x in lines if x["k"] == "kill"]
    took_s = max(rough_ends.values(), default=0.0) - min((x["t"] for x in lines if x["k"] == "start"), default=0.0)
    ended = len(ends) == len(rough_ends) == order.steps
    first, second = digest(calm), digest(rough)
    results.row(**{
        "system": system,
        "kills": len(found),
        "to next step p50 s": common.median(x.get("start", float("nan")) for x in found),
        "longest s": max((x.get("start", float("inf")) for x in found), default=float("nan")),
        "to its commit p50 s": common.median(x.get("commit", float("nan")) for x in found),
        "to new progress p50 s": common.median(x.get("new", float("nan")) for x in found),
        "steps begun again": redone(lines),
        "sequences left out": left_out(lines, order),
        "goodput": len(rough_ends) * common.median(gaps) / took_s if took_s else 0.0,
        "step s": common.median(gaps),
        "same weights": ("yes" if first == second != "" else "no") if ended else f"ended at {len(rough_ends)}",
    })  # fmt: skip
    results.raw[system] = {"after kills": found, "digests": [first, second], "took_s": took_s}


def main() -> None:
    options = common.arguments(
        __doc__,
        lambda parser: (
            parser.add_argument("--workers", type=int, default=2),
            parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS)),
        ),
    )
    common.prepare_data()
    steps, kills = (60, ((1, 25),)) if options.quick else (110, ((1, 33), (0, 73)))
    results = common.Results(
        "faults", f"The same faults on elastictrain and its peers, {options.workers} workers", options
    )
    with common.scratch("faults") as folder:
        order = Order(str(folder), options.workers, steps, 8, 20, MODEL, kills)
        for system in options.only:
            needed = SYSTEMS[system][1]
            if importlib.util.find_spec(needed) is None:
                results.row(system=system, **{"same weights": f"not run: no module {needed}"})
            else:
                measure(system, order, results)
    results.notes += [
        (
            f"GPT of examples/gpt without dropout, {order.sequences} sequences per worker and step, one thread each; "
            f"SIGKILL in the middle of the computation of {', '.join(f'rank {r} at step {s}' for r, s in kills)}; a "
            f"checkpoint every {order.checkpoint_every} steps. No spare workers but where one is named."
        ),
        (
            "Steps begun again include the one that was under way. Goodput: committed steps times the undisturbed step "
            "time, over the time from the first step's start to the last commit."
        ),
        (
            "torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; torchft with gradients averaged by hand and a "
            "lighthouse heartbeat timeout of 1 s (5 s is its default)."
        ),
    ]
    results.write()


if __name__ == "__main__":
    main()
