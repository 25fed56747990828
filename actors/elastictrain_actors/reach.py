"""Reaching a run that is under way from another process: where its cluster is, its controller by name, and requests to
it with their answers.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.observe import Event, RunDirectory, summarise
from elastictrain.observe.address import Address
from elastictrain.observe.answers import Answer, Request, answer, progress
from elastictrain.observe.events import parse_events
from elastictrain.observe.follow import Tail
from elastictrain.observe.standing import is_gone
from elastictrain_actors.controller_actor import CONTROLLER
from elastictrain_actors.head import join_cluster

CALL_S = 10.0
POLL_S = 0.25
GO_ON = "go on from the newest checkpoint with --resume"
TIMEOUT_S = 300.0
"""How long a request is waited for: a new worker may need a machine first."""


def write_address(folder: Path, namespace: str) -> None:
    """Say in the run directory where the run can be reached."""
    address = ray.get_runtime_context().gcs_address
    Address(address=address, namespace=namespace, auth_mode=os.environ.get("RAY_AUTH_MODE")).write(folder)


@contextmanager
def controller_of(folder: Path) -> Iterator[Any]:
    """The controller's handle. Raises ConfigError when the run is over or was never started on a cluster, ClusterError
    when its cluster cannot be reached from here.
    """
    where = Address.read(folder)
    here_before = ray.is_initialized()
    if not here_before:
        try:
            join_cluster(where.address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"RUN {str(folder)!r}: no Ray at {where.address}, where it was started ({str(error).splitlines()[0]}); "
                f"from another machine, ask on the head instead; if its cluster is gone, {GO_ON}"
            ) from error
    try:
        try:
            handle = ray.get_actor(CONTROLLER, where.namespace)
        except ValueError:
            raise ConfigError(f"RUN {str(folder)!r}: it is over, nothing runs any more") from None
        yield handle
    finally:
        if not here_before:
            ray.shutdown()


def ask(
    run: RunDirectory,
    request: Request,
    *,
    wait: bool = True,
    timeout_s: float = TIMEOUT_S,
    say: Callable[[str], object] = len,
) -> Answer | None:
    """Make a request to a run and wait for its answer; None without `wait`.

    `say`: is told several times a second why it is not done yet, in words, perhaps empty.

    Raises ConfigError when the run is over, ClusterError when it cannot be reached, or when there is no answer within
    `timeout_s`; the request then stands.
    """
    outcome = summarise(run).outcome
    if outcome != "running":
        raise ConfigError(f"RUN {str(run.path)!r}: it is over ({outcome}), nothing runs any more")
    deadline_s = time.monotonic() + timeout_s
    events = Tail(run.path / "events.jsonl")
    events.more()
    with controller_of(run.path) as handle:
        before = _view(handle, deadline_s)
        _hand_in(handle, request, deadline_s)
        return _answer(run, handle, request, before, events, deadline_s, say) if wait else None


def _answer(
    run: RunDirectory,
    handle: Any,
    request: Request,
    before: Any,
    events: Tail,
    deadline_s: float,
    say: Callable[[str], object],
) -> Answer:
    since: list[Event] = []
    while True:
        seen = _glance(handle)  # first: what led to it has been written by then, so that its event tells more
        new = parse_events(events.more())
        since += new
        found = answer(request, before, since, seen)
        if found is not None:
            return found
        if request.kind != "add" and any(event.kind == "controller_back" for event in new):
            _hand_in(handle, request, deadline_s)  # what had only been said to the one that died is lost
        words = progress(since)
        say(words)
        if is_gone(run):
            raise ClusterError(f"RUN {str(run.path)!r}: its controller has gone, and its cluster with it; {GO_ON}")
        if time.monotonic() > deadline_s:
            raise ClusterError(
                f"asked to {request}; it stands, but has not been done yet" + (f" ({words})" if words else "")
                + "; see `elastictrain attach`"
            )  # fmt: skip
        time.sleep(POLL_S)


def _hand_in(handle: Any, request: Request, deadline_s: float) -> None:
    """The controller may just be coming back from its death. What can be asked twice is asked until it is heard."""
    while True:
        try:
            ray.get(handle.request.remote(request.kind, *request.arguments), timeout=CALL_S)
            return
        except (ActorUnavailableError, TimeoutError) as error:
            if request.kind == "add":
                raise ClusterError(
                    "the controller died at this moment, so it is not known whether it has heard; ask again if no "
                    "worker comes (see `elastictrain attach`)"
                ) from error
            if time.monotonic() > deadline_s:
                raise ClusterError(f"the controller does not answer: {error}; see `elastictrain status`") from error
        except RayActorError as error:
            raise ConfigError(f"the run has just ended: {str(error).splitlines()[0]}") from error
        time.sleep(POLL_S)


def _view(handle: Any, deadline_s: float) -> Any:
    while (seen := _glance(handle)) is None:
        if time.monotonic() > deadline_s:
            raise ClusterError("the controller does not answer; see `elastictrain status`")
        time.sleep(POLL_S)
    return seen


def _glance(handle: Any) -> Any:
    """The controller's view, or None when it has none to give just now: events say what matters."""
    try:
        return ray.get(handle.status.remote(), timeout=CALL_S)
    except (RayError, TimeoutError):
        return None
