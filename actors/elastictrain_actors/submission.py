"""Hand a job to a Ray cluster through its dashboard, follow it, and bring back what it says.

What travels: our three packages, and the folder of `job.yaml` with all that the job names by relative path (recipe,
data, tokenizer, faults). The entrypoint is `python -m elastictrain.cli run job.yaml --json`: the console script is not
installed where workers have only Ray and torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastictrain.errors import ClusterError, ConfigError, ElasticTrainError, InternalError, UserError
from elastictrain.job import Job, load_job
from elastictrain_actors.dependencies import ASSUMED, ShipDependencies, beyond_ray_and_torch, check_choice
from elastictrain_actors.luggage import Luggage, luggage
from elastictrain_actors.parcel import CACHES, collect, pack
from elastictrain_actors.probe import probe_command, read_probe
from elastictrain_actors.runtime_env import env_vars, merge_user, package_folders
from elastictrain_actors.travel import recipe_modules

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 120.0
POLL_S = 0.25
TAIL_LINES = 30
SETTLED = ("SUCCEEDED", "FAILED", "STOPPED")
_RETRIES = 5
_EXITS: dict[int, type[ElasticTrainError]] = {2: UserError, 4: InternalError}  # the exit codes of the command line


@dataclass(frozen=True, slots=True)
class SubmissionResult:
    """`status`: Ray's (PENDING, RUNNING, SUCCEEDED, STOPPED). `result`: the run's summary, its last line of JSON."""

    submission_id: str
    address: str
    status: str
    result: dict[str, Any] | None = None


def submit_job(
    job_path: str | Path,
    address: str = "http://127.0.0.1:8265",
    *,
    wait: bool = True,
    runtime_env: Mapping[str, Any] | None = None,
    on_line: Callable[[str], object] = print,
    faults: str | Path | None = None,
    ship_dependencies: ShipDependencies = "auto",
    timeout_s: float | None = None,
) -> SubmissionResult:
    """Run `job.yaml` on the cluster whose dashboard is at `address`.

    `wait`: follow the log, a call of `on_line` per line, to the end or for `timeout_s`. `runtime_env`: the user's own,
    merged with ours; its `excludes` say what of the folder stays here. `ship_dependencies`: "auto" asks the cluster
    which of our requirements it lacks (a few seconds) and lets its nodes install exactly those with pip, "pip" does so
    for all that Ray and torch do not bring, "none" for nothing.

    Raises ConfigError (the job, a path that cannot travel, the address), ClusterError (no dashboard; the job failed,
    with the end of its log), UserError or InternalError when the run failed for such a reason, TimeoutError.
    """
    choice = check_choice(ship_dependencies)
    job, users = load_job(job_path), dict(runtime_env or {})
    packed = luggage(Path(job_path), job, faults=faults, working_dir=users.get("working_dir"))
    client = connect(address)
    if job.checkpoint is not None and "://" not in job.checkpoint.path and not Path(job.checkpoint.path).is_absolute():
        on_line(
            f"note: checkpoint.path={job.checkpoint.path!r} is relative: on the cluster it lies below ~/elastictrain "
            "of each node; with several nodes use storage that all of them reach"
        )
    pip = _dependencies(client, choice, on_line)
    submission_id = f"elastictrain-{re.sub(r'[^A-Za-z0-9_.-]', '-', job.name)}-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="elastictrain-submit-") as folder:
        environment = _environment(job, packed, users, pip, Path(folder))
        with _as_cluster_error(f"{address} refused the job"):
            client.submit_job(entrypoint=packed.entrypoint, submission_id=submission_id, runtime_env=environment)
    on_line(f"submitted {submission_id} to {address}")
    if not wait:
        return SubmissionResult(submission_id, address, str(client.get_job_status(submission_id).value))
    try:
        tail = follow(client, submission_id, on_line, timeout_s=timeout_s)
    except KeyboardInterrupt:
        on_line(f"{submission_id} goes on; to stop it: ray job stop --address {address} {submission_id}")
        raise
    return _concluded(client, submission_id, address, tail)


def _environment(job: Job, packed: Luggage, users: dict[str, Any], pip: list[str], folder: Path) -> dict[str, Any]:
    modules = recipe_modules(job.recipe, packed.base, package_folders())
    ours: dict[str, Any] = {"py_modules": [*map(str, package_folders()), *modules], "env_vars": env_vars(job)}
    if pip:
        ours["pip"] = pip
    if packed.base is not None:
        parcel = collect(packed.base, packed.roots, excludes=users.get("excludes") or (), setting="submit")
        ours["working_dir"] = str(pack(parcel, folder))
        users = {key: value for key, value in users.items() if key != "working_dir"}
    return merge_user(ours, users) | {"excludes": list(CACHES)}


def connect(address: str) -> Any:
    """A `JobSubmissionClient` for the dashboard at `address`. Raises ConfigError, ClusterError."""
    url = address if "://" in address else f"http://{address}"
    if not url.startswith(("http://", "https://")) or url in ("http://auto", "http://local"):
        raise ConfigError(
            f"address={address!r}: expected the dashboard of the cluster, as http://host:8265 "
            "(ray:// addresses are for `elastictrain run --address`)"
        )
    url = url.rstrip("/")
    tried = f"{url}/api/version"
    advice = (
        "Is the head running, with its dashboard (`ray start --head --dashboard-host 0.0.0.0`), and is "
        "`ray[default]` installed there (plain `ray` has no dashboard)? From outside, forward the port: "
        "`ray dashboard cluster.yaml`, or `kubectl port-forward svc/…-head-svc 8265`"
    )
    try:  # Ray's own client waits for an answer without a limit
        with urllib.request.urlopen(tried, timeout=CONNECT_TIMEOUT_S) as answer:
            version = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):  # a token may be needed: Ray's client knows where it is
            raise ClusterError(f"address={address!r}: {tried} answered {error.code}. {advice}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ClusterError(f"address={address!r}: no Ray dashboard at {tried} ({reason}). {advice}") from error
    else:
        if not isinstance(version, dict) or "ray_version" not in version:
            raise ClusterError(f"address={address!r}: {tried} is not a Ray dashboard. {advice}")
    from ray.job_submission import JobSubmissionClient

    with _without_ray_address(), _as_cluster_error(f"address={address!r}: the dashboard refused the connection"):
        return JobSubmissionClient(url)


@contextlib.contextmanager
def _without_ray_address() -> Iterator[None]:
    """Ray lets these variables win over the address that it is given; here, the argument wins."""
    hidden = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _as_cluster_error(what: str) -> Iterator[None]:
    """What Ray's client raises is a plain RuntimeError with the text of the answer."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise ClusterError(f"{what}: {error}") from error


def _dependencies(client: Any, choice: ShipDependencies, on_line: Callable[[str], object]) -> list[str]:
    if choice == "none":
        return []
    wanted = beyond_ray_and_torch()
    if choice == "auto":
        log = run_probe(client, [*ASSUMED, *wanted])
        wanted = read_probe(log, assumed=ASSUMED)
    if wanted:
        on_line(f"the nodes install with pip: {', '.join(wanted)}")
    return wanted


def run_probe(client: Any, requirements: list[str]) -> str:
    submission_id = f"elastictrain-probe-{uuid.uuid4().hex[:8]}"
    with _as_cluster_error("the cluster could not be asked what is installed (ship_dependencies: auto)"):
        client.submit_job(entrypoint=probe_command(requirements), submission_id=submission_id)
        deadline_s = time.monotonic() + PROBE_TIMEOUT_S
        while (status := str(client.get_job_status(submission_id).value)) not in SETTLED:
            if time.monotonic() > deadline_s:
                client.stop_job(submission_id)
                raise ClusterError(
                    f"the cluster did not say within {PROBE_TIMEOUT_S:.0f} s what is installed on its nodes (job "
                    f"{submission_id} is {status}); set ship_dependencies to none or pip to go on without asking"
                )
            time.sleep(POLL_S)
        return str(client.get_job_logs(submission_id))


def follow(
    client: Any, submission_id: str, on_line: Callable[[str], object], *, timeout_s: float | None = None
) -> list[str]:
    """Hand on every line of the job's log until it has ended; the last ones are returned.

    A lost connection is taken up again where it broke (five times in a row at most, then ClusterError).
    Raises TimeoutError after `timeout_s`; the job goes on.
    """
    import aiohttp  # comes with ray[default], as the client itself

    lines = _Lines(on_line)

    async def tail() -> None:
        failures = 0
        while str(client.get_job_status(submission_id).value) not in SETTLED or failures:
            seen = lines.restart()
            try:
                async for chunk in client.tail_job_logs(submission_id):
                    lines.take(chunk)
                failures = 0
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                failures = 1 if lines.passed > seen else failures + 1
                if failures > _RETRIES:
                    raise ClusterError(f"{submission_id}: the log cannot be followed any more: {error}") from error
            await asyncio.sleep(POLL_S)

    async def limited() -> None:
        await asyncio.wait_for(tail(), timeout_s)

    try:
        _run(limited)
    except TimeoutError:
        raise TimeoutError(f"{submission_id} has not ended within timeout_s={timeout_s}; it goes on") from None
    lines.restart()
    lines.take(str(client.get_job_logs(submission_id)))  # what came after the last chunk
    lines.flush()
    return list(lines.last)


def _run(work: Callable[[], Any]) -> None:
    """`asyncio.run`, also inside a notebook, whose thread has a loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work())
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(work())).result()


class _Lines:
    """Cuts chunks into lines; after a restart (the log comes again from its start) skips what was passed on."""

    def __init__(self, on_line: Callable[[str], object]) -> None:
        self.last: deque[str] = deque(maxlen=TAIL_LINES)
        self.passed = 0
        self._on_line, self._skip, self._rest = on_line, 0, ""

    def restart(self) -> int:
        self._skip, self._rest = self.passed, ""
        return self.passed

    def take(self, chunk: str) -> None:
        *whole, self._rest = (self._rest + chunk).split("\n")
        for line in whole:
            if self._skip:
                self._skip -= 1
                continue
            self._pass(line)

    def flush(self) -> None:
        if self._rest and not self._skip:
            self._pass(self._rest)
        self._rest = ""

    def _pass(self, line: str) -> None:
        self.passed += 1
        self.last.append(line)
        self._on_line(line)


def last_json(lines: list[str]) -> dict[str, Any] | None:
    """The last line that is a JSON object: Ray mixes standard output and error into one log."""
    for line in reversed(lines):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    return found
    return None


def _concluded(client: Any, submission_id: str, address: str, tail: list[str]) -> SubmissionResult:
    details = client.get_job_info(submission_id)
    status = str(details.status.value)
    if status == "FAILED":
        code = details.driver_exit_code
        kind = _EXITS.get(code, ClusterError) if code is not None else ClusterError
        said = "\n".join(tail) if tail else str(details.message)
        ending = f"exit code {code}" if code is not None else str(details.message).splitlines()[0]
        raise kind(f"{submission_id} on {address} failed ({ending}). The end of its log:\n{said}")
    return SubmissionResult(submission_id, address, status, last_json(tail))
