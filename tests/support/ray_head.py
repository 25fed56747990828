"""A real Ray head with its dashboard, on free ports, in a folder of its own, whose processes end with the test.

`ray stop` is never called: it would end every Ray on the machine.
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
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
OWN_PREFIXES = ("RAY_", "PYTHON", "ELASTICTRAIN_", "OMP_")


@dataclass(frozen=True)
class RayHead:
    """`dashboard`: http://127.0.0.1:port. `home`: $HOME of everything that runs there. `environment`: of the head."""

    dashboard: str
    home: Path
    environment: Mapping[str, str]


@contextlib.contextmanager
def ray_head(*, num_cpus: int = 4) -> Iterator[RayHead]:
    """Start a head as a cluster would have it: Ray and torch are there, nothing of ours is on its Python path."""
    folder = Path(tempfile.mkdtemp(prefix="et-ray-"))  # short: Ray's sockets lie in it, their paths may have 107 bytes
    home = folder / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN_PREFIXES)}
    environment |= {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # entrypoints say `python`
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    dashboard_port, client_port, agent_port = _free_ports(3)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--port=0", f"--num-cpus={num_cpus}", "--num-gpus=0"),
        *("--object-store-memory=100000000", f"--temp-dir={folder}", "--include-dashboard=true"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        *(f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}"),
        *("--min-worker-port=0", "--max-worker-port=0"),
    ]
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    try:
        _wait_for_jobs_api(head, dashboard, log)
        yield RayHead(dashboard, home, environment)
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_jobs_api(head: subprocess.Popen[bytes], dashboard: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    pause = threading.Event()
    while True:
        with (
            contextlib.suppress(OSError, ValueError),
            urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=5) as got,
        ):
            json.loads(got.read())
            return
        if head.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"the Ray head did not start within {START_TIMEOUT_S} s:\n{log.read_text()[-4000:]}")
        pause.wait(0.1)


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head and everything that it, and what it started, has started."""
    import psutil
    import ray  # noqa: F401  (puts its own psutil on the path)

    family: list[Any] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(head.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(STOP_TIMEOUT_S)
    for process in [*family, *([psutil.Process(head.pid)] if head.poll() is None else [])]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    if head.poll() is None:
        head.wait(STOP_TIMEOUT_S)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
