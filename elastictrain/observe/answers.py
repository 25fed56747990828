"""What has become of a request to a run, told by the events that came after it and by the controller's view. Pure.

A request is put into a queue; nobody answers it. It was refused when an event says so, and done when what it asked for
is so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from elastictrain.observe.events import Event, recovery_seconds
from elastictrain.observe.sentences import count, describe, people
from elastictrain.observe.summary import ENDINGS

View = Mapping[str, Any]
"""`controller.view.view`: phase, world, workers, spares, starting, draining, target, ..."""
Kind = Literal["add", "drain", "resize", "stop"]
TELLING = frozenset({
    "worker_ready", "slow_start", "start_failed", "start_paused", "gathering", "worker_lost", "controller_back",
    "went_back",    "frozen", "node_lost", "hung",
})  # fmt: skip
"""Kinds of events that tell somebody who waits why it takes so long."""


@dataclass(frozen=True, slots=True)
class Request:
    """`argument`: the worker to drain, the size to come to, the reason to stop."""

    kind: Kind
    argument: int | str | None = None

    @property
    def arguments(self) -> tuple[int | str, ...]:
        return () if self.argument is None else (self.argument,)

    def __str__(self) -> str:
        return {
            "add": "add a worker",
            "drain": f"drain worker {self.argument}",
            "resize": f"resize to {self.argument} workers",
            "stop": "stop the run",
        }[self.kind]


@dataclass(frozen=True, slots=True)
class Answer:
    """`outcome`: done; refused (`words` say why); over (the run ended first); failed (and so did the run)."""

    outcome: Literal["done", "refused", "over", "failed"]
    words: str


def answer(request: Request, before: View, since: Sequence[Event], now: View | None) -> Answer | None:
    """The answer to `request`, or None while there is none.

    `before`: the view before the request was made; `since`: all events after that; `now`: the newest view, if any.
    """
    for event in since:
        if event.kind == "refused" and event.data.get("request") == request.kind:
            return Answer("refused", str(event.data.get("reason")))
        if event.kind in ENDINGS:
            return _ended(request, event, since)
        found = _changed(request, event)
        if found is not None:
            return found
    return None if now is None else _seen(request, before, now)


def progress(since: Sequence[Event]) -> str:
    """Why it is not done yet: the last event that tells, in words; empty when nothing does."""
    telling = [event for event in since if event.kind in TELLING]
    return describe(telling[-1]).splitlines()[0] if telling else ""


def _ended(request: Request, event: Event, since: Sequence[Event]) -> Answer:
    said = describe(event)
    if event.kind == "failed":
        return Answer("failed", f"the run failed first: {said}")
    if event.kind == "finished":
        return Answer("done" if request.kind == "stop" else "over", f"the run came to its end first: {said}")
    if request.kind != "stop":
        return Answer("over", f"the run was stopped first: {said}")
    step = event.data.get("step")
    stored = [e.data.get("path") for e in since if e.kind == "checkpoint" and e.data.get("step") == step]
    kept = f"; its state is in the checkpoint {stored[-1]}" if stored else "; no checkpoint of this step was stored"
    return Answer("done", f"the run has stopped after step {step}{kept}")


def _changed(request: Request, event: Event) -> Answer | None:
    """Whether `event` is what was asked for."""
    data = event.data
    if request.kind == "drain" and event.kind == "worker_lost" and data.get("worker") == request.argument:
        return Answer("done", f"{describe(event)}, before it had handed over")
    if event.kind not in ("resized", "recovery"):
        return None
    joined, left, after = data.get("joined") or [], data.get("left") or [], data.get("world_after")
    if request.kind == "drain" and request.argument in left:
        return Answer("done", f"worker {request.argument} has handed over and left; {_cost(event)}")
    if request.kind == "add" and joined:
        return Answer("done", f"{people(joined)} joined; {_cost(event)}")
    if request.kind == "resize" and after == request.argument:
        who = " and ".join(f"{people(them)} {word}" for them, word in ((joined, "joined"), (left, "left")) if them)
        who = who or f"the run has {count(after, 'worker')}"
        return Answer("done", f"{who}; {_cost(event)}")
    return None


def _cost(event: Event) -> str:
    data, seconds = event.data, recovery_seconds(event.data)
    redone = data.get("steps_redone")
    return ", ".join(
        part
        for part in (
            f"world {data.get('world_before')} → {data.get('world_after')}",
            "" if seconds is None else f"a pause of {seconds:.2f} s",
            "no step redone" if redone == 0 else f"{count(redone, 'step')} redone",
        )
        if part
    )


def _seen(request: Request, before: View, now: View) -> Answer | None:
    """What no event tells: what was so already, and workers that held nothing."""
    if request.kind == "resize" and now["target"] == now["world"] == request.argument and not now["draining"]:
        return Answer("done", f"the run has {count(now['world'], 'worker')}") if now["phase"] == "running" else None
    if request.kind == "drain":
        worker = request.argument
        held_nothing = worker in before["spares"] or worker in before["starting"]
        members = [shard["worker"] for shard in now["workers"]]
        if held_nothing and worker not in [*now["spares"], *now["starting"], *now["draining"], *members]:
            return Answer("done", f"worker {worker} has left; it held nothing, so nobody paused")
    return None
