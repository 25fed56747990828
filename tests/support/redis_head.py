"""A Ray cluster whose head keeps its tables in Redis: the head is killed while a run steps, a worker dies while nobody
can start another, and the head is started again. A script run by a test in a process of its own, because that process
connects to a cluster of its own.

Three nodes on this machine, told apart by their addresses: the head, which carries nothing of the run; one with whoever
started the run; and another one. Both have room for two workers.

python -m tests.support.redis_head FOLDER -> one line of JSON
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

import elastictrain as et
from elastictrain.observe import Blind, Event, RunDirectory
from tests.support.process_cluster import byte_job
from tests.support.raylets import descendants, ends_within

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 90.0
RUN_TIMEOUT_S = 300.0
HEAD, OURS, OTHER = ray.util.get_node_ip_address(), "127.0.0.2", "127.0.0.3"
WORKERS, STEPS = 3, 700
KILL_AT, LOSE_AFTER, START_AFTER = 20, 30, 30
"""Rows: until the head dies; from then on until a worker does; and once the others are through with that, until the
head is started again.
"""
OWN_PREFIXES = ("RAY_", "PYTHON", "ELASTICTRAIN_", "OMP_")


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HEAD, 0))
        port: int = one.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HEAD, port), timeout=2.0):
        return True
    return False


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s, pause = time.monotonic() + START_TIMEOUT_S, threading.Event()
    while not listens(port):
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"nothing listens at port {port}:\n{log.read_text()[-3000:]}")
        pause.wait(0.1)


class Processes:
    """Started here, each with its own log, and all ended in the end with whatever they have started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[subprocess.Popen[bytes]] = []
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(OWN_PREFIXES)} | {
            # As a cluster for elastictrain should have it (docs/faults.md): who is left waits so long for the head.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
            "RAY_AUTH_MODE": "disabled",  # whether this user has a token is no matter of the test
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_prestart_worker_first_driver": "0",
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "actors", "checkpoint")),
        }

    def start(self, name: str, command: Sequence[str], **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=self.folder,
                env=self.environment | environment, start_new_session=True,
            )  # fmt: skip
        self.all.append(process)
        return process, log

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to it and to all that it has started, as when a machine goes."""
        family = [process.pid, *descendants(process.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(20.0)
        for pid in family:
            ends_within(pid, 20.0)

    def close(self) -> None:
        for process in self.all:
            if process.poll() is None:
                self.kill(process)


def ray_start(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    ports = ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
    return [*command, "--num-gpus=0", "--object-store-memory=80000000", *ports, *arguments]


class Cluster:
    """Redis, a head that keeps its tables there, and nodes beside it. `ours`: the one through which we connect."""

    ours: subprocess.Popen[bytes]

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.redis_port, self.port = free_port(), free_port()
        redis, data = shutil.which("redis-server"), processes.folder / "redis"
        assert redis is not None, "the test asks before"
        data.mkdir()
        options = ["--bind", HEAD, "--port", str(self.redis_port), "--dir", str(data), "--appendonly", "yes"]
        wait_for(self.redis_port, *processes.start("redis", [redis, *options]))
        self.start_head()

    def start_node(self, name: str, address: str) -> subprocess.Popen[bytes]:
        """One at a time: on one machine they share a folder, in which each looks for names that are free."""
        node = ray_start(f"--address={HEAD}:{self.port}", f"--node-ip-address={address}", "--num-cpus=2")
        return self.processes.start(name, node)[0]

    def start_head(self) -> None:
        # Ray refuses to start where this file says that its cluster runs, and takes our other nodes for a proof of it:
        # on machines of their own the head would see none of them.
        (self.processes.folder / "ray_current_cluster").unlink(missing_ok=True)
        command = ray_start(
            "--head", f"--node-ip-address={HEAD}", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={self.processes.folder}",
        )  # fmt: skip
        tables = {"RAY_REDIS_ADDRESS": f"{HEAD}:{self.redis_port}", "RAY_external_storage_namespace": "et-ha"}
        self.head, log = self.processes.start("head", command, **tables)
        wait_for(self.port, self.head, log)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="et-ha-"))  # short: Ray's sockets lie in it, their paths may have 107 bytes
    processes = Processes(folder)
    try:
        yield Cluster(processes)
    finally:
        processes.close()
        shutil.rmtree(folder, ignore_errors=True)


def connect(found: Cluster) -> None:
    """Through our node, and then wait for the other one."""
    os.environ |= {name: value for name, value in found.processes.environment.items() if name.startswith("RAY_")}
    deadline_s, pause = time.monotonic() + START_TIMEOUT_S, threading.Event()
    found.ours = found.start_node("ours", OURS)
    while True:
        try:
            ray.init(address=f"{HEAD}:{found.port}", _node_ip_address=OURS, log_to_driver=False)
            break
        except (ConnectionError, ValueError, RuntimeError, TimeoutError):
            if time.monotonic() > deadline_s:
                raise
            pause.wait(0.5)
    found.start_node("other", OTHER)
    while len(ray.nodes()) < 3:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"expected three nodes within {START_TIMEOUT_S} s, got {ray.nodes()}")
        pause.wait(0.2)


class Story(Blind):
    """What happens when. `facts`: what was seen on the way."""

    def __init__(self, found: Cluster, run_dir: Path, hurry: Path) -> None:
        self.found, self.run_dir, self.hurry = found, run_dir, hurry
        self.facts: dict[str, Any] = {}
        self.pids: dict[int, int] = {}
        self.rows = 0
        self._due: dict[int, Callable[[], None]] = {KILL_AT: self.kill_head}
        self._killed_s = 0.0

    def row(self, metrics: Mapping[str, Any]) -> None:
        del metrics
        self.rows += 1
        if act := self._due.pop(self.rows, None):
            act()

    def event(self, event: Event) -> None:
        if event.kind == "worker_prepared":
            self.pids[event.data["worker"]] = event.data["pid"]
        if event.kind == "running" and event.data["world"] == WORKERS - 1:
            self._due[self.rows + START_AFTER] = self.start_head
        if event.kind == "running" and "away_s" in self.facts and event.data["world"] == WORKERS:
            self.hurry.touch()

    def kill_head(self) -> None:
        controller = json.loads((self.run_dir / "lock").read_text())["pid"]
        self.facts["controller_beside_us"] = controller in descendants(self.found.ours.pid)
        self.found.processes.kill(self.found.head)
        self._killed_s = time.monotonic()
        self.facts["killed_at"] = self.last_step()
        self._due[self.rows + LOSE_AFTER] = self.lose_worker

    def lose_worker(self) -> None:
        self.facts["lost_at"] = self.last_step()
        os.kill(self.pids[1], signal.SIGKILL)

    def start_head(self) -> None:
        self.facts["listened"] = listens(self.found.port)
        self.facts["started_at"] = self.last_step()
        self.facts["away_s"] = time.monotonic() - self._killed_s
        self.found.start_head()

    def last_step(self) -> int:
        return RunDirectory.open(self.run_dir).metrics()[-1].step


def main(folder: Path) -> dict[str, Any]:
    with cluster() as found:
        connect(found)
        run_dir, hurry = folder / "ha", folder / "hurry"
        story = Story(found, run_dir, hurry)
        planned = unhurried_job(folder, hurry, run_dir=str(run_dir), workers={"max": WORKERS, "replace": True})
        try:
            run = et.run(planned, observer=story)
        except BaseException:
            print(story.facts, (run_dir / "events.jsonl").read_text()[-3000:], file=sys.stderr)
            raise
        record = RunDirectory.open(run_dir)
        answer = {
            "digest": run.digest,
            "worlds": run.world_sizes,
            "rows": [row.step for row in record.metrics()],
            "redone": [recovery.steps_redone for recovery in run.recoveries],
            "kinds": [event.kind for event in record.events()],
            "members": sorted(story.pids),
        }
        ray.shutdown()
        return answer | story.facts


def unhurried_job(folder: Path, hurry: Path, **settings: Any) -> et.Job:
    recipe = f"{Path(__file__).parent / 'recipes.py'}:Unhurried"
    return byte_job(folder, steps=STEPS, recipe=recipe, recipe_args={"until": str(hurry)}, **settings)


def give_up(number: int, frame: object) -> None:
    raise TimeoutError(f"the run has not ended within {RUN_TIMEOUT_S} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, give_up)  # here, so that the cluster is ended and not left behind
    signal.alarm(int(RUN_TIMEOUT_S))
    try:
        print(json.dumps(main(Path(sys.argv[1]))))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # Ray would wait for its head before it lets go of this process
