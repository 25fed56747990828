"""The lines of events.jsonl: what happened to a run, typed and in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from elastictrain.errors import InternalError

Data = Mapping[str, Any]

_NODE_ID = re.compile(r"^([0-9a-f]{8})[0-9a-f]{24,}$")


def iso(time: datetime) -> str:
    """UTC to the millisecond: 2026-11-22T10:00:00.123Z."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Event(BaseModel):
    """`kind` says which `data` there is; see `describe`. `generation` None: not about a generation."""

    model_config = ConfigDict(frozen=True)

    time: Annotated[AwareDatetime, PlainSerializer(iso)]
    kind: str
    generation: int | None = None
    data: dict[str, Any] = Field(default_factory=dict)


def make_event(kind: str, data: Data | None = None, *, generation: int | None = None, time: datetime) -> Event:
    """An event as the run writes it; the generation is taken from `data` when it is not given."""
    facts = dict(data or {})
    if not kind:
        raise InternalError(f"an event needs a kind, got {kind!r} with {facts}")
    if generation is None and isinstance(facts.get("generation"), int):
        generation = facts["generation"]
    return Event(time=time, kind=kind, generation=generation, data=facts)


def parse_events(records: Iterable[Mapping[str, Any]]) -> list[Event]:
    """The events among `records`; what is none (torn in the middle and closed later) is passed over."""
    events = []
    for record in records:
        try:
            events.append(Event.model_validate(record))
        except ValidationError:
            continue
    return events


def describe(event: Event) -> str:
    """One sentence for people. Never raises: facts that are missing are left out, unknown kinds print as they are."""
    sentence = SENTENCES.get(event.kind)
    try:
        return _generic(event) if sentence is None else sentence({"generation": event.generation, **event.data})
    except Exception:  # another version wrote other facts under this kind; what happened must still be readable
        return _generic(event)


def recovery_seconds(data: Data) -> float | None:
    """From the detection of a loss to the seal of the next generation; None when it is not known."""
    seconds = data.get("seconds", data.get("sealed_s"))
    return float(seconds) if isinstance(seconds, int | float) else None


def step_back(event: Event) -> int | None:
    """The step that the run goes on from, where an event says that later steps have not happened; else None."""
    key = {"went_back": "to_step", "checkpoint_dropped": "next_step", "run_resumed": "step"}.get(event.kind)
    step = event.data.get(key) if key else None
    return step if isinstance(step, int) else None


def _generic(event: Event) -> str:
    facts = ", ".join(f"{key}={value}" for key, value in event.data.items())
    return event.kind.replace("_", " ") + (f": {facts}" if facts else "")


def _join(*parts: str) -> str:
    return "".join(part for part in parts if part)


def _fact(data: Data, key: str, form: str) -> str:
    """`form` with the fact in place of {}; nothing when it is not there."""
    value = data.get(key)
    return "" if value is None or value in ("", [], {}) else form.format(value)


def _people(workers: Any) -> str:
    """Worker numbers in words: worker 3; workers 0, 1 and 4."""
    if workers is None or workers in ([], (), {}):
        return ""
    numbers = [str(w) for w in workers] if isinstance(workers, list | tuple | Mapping) else [str(workers)]
    if len(numbers) == 1:
        return f"worker {numbers[0]}"
    return f"workers {', '.join(numbers[:-1])} and {numbers[-1]}"


def _who(data: Data) -> str:
    return _people(data["worker"] if data.get("worker") is not None else data.get("workers")) or "a worker"


def _why(data: Data) -> str:
    return next((f": {data[key]}" for key in ("cause", "reason", "error", "message") if data.get(key)), "")


def count(number: Any, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _world(data: Data) -> str:
    workers = data.get("workers")
    world = data.get("world", len(workers) if isinstance(workers, list | tuple | Mapping) else workers)
    return "" if world is None else f" with {count(world, 'worker')}"


def _started(data: Data) -> str:
    return _join("run started", _fact(data, "name", " ({})"), _world(data), _fact(data, "steps", ", {} steps"))


def _stage(data: Data) -> str:
    changes = [
        f"{name} {data[key + '_before']} → {data[key]}"
        for key, name in (("lanes", "lanes"), ("lane_batch_size", "samples per lane"))
        if key in data and data.get(key + "_before") != data[key]
    ]
    return _join("a new stage of the data order", _fact(data, "step", " after step {}"), _why(data)) + (
        f": {', '.join(changes)}" if changes else ""
    )


def _node(data: Data) -> str:
    """The failure domain; Ray's node ids have 56 digits, the first eight tell them apart."""
    domain = data.get("domain")
    return _fact({"domain": _NODE_ID.sub(r"node \1", str(domain)) if domain else None}, "domain", " on {}")


def _prepared(data: Data) -> str:
    seconds = data.get("prepared_s")
    return f" after {sum(seconds.values()):.1f} s" if isinstance(seconds, Mapping) and seconds else ""


def _slow_start(data: Data) -> str:
    asked, free = (
        ", ".join(f"{number:g} {name.upper().removesuffix('S')}" for name, number in data[key].items() if number)
        for key in ("asked", "free")
    )
    return f"{_who(data)} has not started yet: it needs {asked or 'nothing'}, free are {free or 'none'}"


def _forming(data: Data) -> str:
    moved = data.get("blocks_moved")
    return _join(
        f"generation {data['generation']} is forming",
        _world(data),
        _fact(data, "step", " at step {}"),
        f"; {count(moved, 'block')} to copy" if moved else "",
    )


def _running(data: Data) -> str:
    once = data.get("held_once")
    return _join(
        f"generation {data['generation']} sealed",
        _world(data),
        _fact(data, "step", " at step {}"),
        f"; {count(once, 'block')} held once" if once else "",
    )


def _cost(data: Data) -> str:
    seconds, redone = recovery_seconds(data), data.get("steps_redone")
    before, after = data.get("world_before"), data.get("world_after")
    return _join(
        f"; {seconds:.2f} s" if seconds is not None else "",
        "" if redone is None else f", {count(redone, 'step')} redone",
        "" if before is None or after is None else f", world {before} → {after}",
        _fact(data, "restored_from", ", restored from {}"),
    )


def _recovery(data: Data) -> str:
    lost = _people(data.get("workers"))
    return _join("recovered", f" from the loss of {lost}" if lost else "", _why(data), _cost(data))


def _resized(data: Data) -> str:
    joined, left = _people(data.get("joined")), _people(data.get("left"))
    who = " and ".join(part for part in (joined and f"{joined} joined", left and f"{left} left") if part)
    return (who or f"paused{_why(data)}") + _cost(data)


def _went_back(data: Data) -> str:
    return _join(
        f"went back to step {data['to_step']}",
        _fact(data, "from_step", " from step {}"),
        _fact(data, "restored_from", ", restored from {}"),
    ) + _why(data)


def _dropped(data: Data) -> str:
    return _join(
        "checkpoint refused",
        _fact(data, "step", ", step {}"),
        _fact(data, "path", " at {}"),
        _fact(data, "next_step", ", taking step {} instead"),
    ) + _why(data)


def _checkpoint(data: Data) -> str:
    return _join(f"checkpoint of step {data['step']} committed", _fact(data, "path", " at {}"))


def _skipped(data: Data) -> str:
    lanes = data.get("lanes", data.get("lane"))
    lanes = lanes if isinstance(lanes, list | tuple) else [] if lanes is None else [lanes]
    place = f" in lane{'s' if len(lanes) > 1 else ''} {', '.join(map(str, lanes))}" if lanes else ""
    worker = f" ({_who(data)})" if place and data.get("worker") is not None else ""
    return f"step {data['step']} skipped on all workers alike: not finite{place}{worker}"


def _finished(data: Data) -> str:
    return _join("finished", _fact(data, "step", " at step {}"), _fact(data, "digest", ", digest {}"))


def _ended(word: str) -> Callable[[Data], str]:
    return lambda data: _join(word, _fact(data, "step", " at step {}"), _why(data))


def _worker(words: str) -> Callable[[Data], str]:
    return lambda data: f"{_who(data)} {words}{_why(data)}"


SENTENCES: dict[str, Callable[[Data], str]] = {
    "run_started": _started,
    "run_resumed": lambda data: _join("run resumed", _fact(data, "step", " at step {}"), _world(data)),
    "stage": _stage,
    "worker_started": _worker("is starting"),
    "worker_ready": lambda data: _join(f"{_who(data)} is ready", _node(data)),
    "worker_prepared": lambda data: _join(f"{_who(data)} is prepared", _node(data), _prepared(data)),
    "slow_start": _slow_start,
    "start_failed": _worker("could not start"),
    "start_paused": lambda data: (
        _join("no new workers for now", _fact(data, "after_s", ", next try in {} s")) + _why(data)
    ),
    "worker_lost": _worker("is lost"),
    "worker_retired": _worker("left"),
    "unresponsive": _worker("does not answer"),
    "parking": lambda data: f"generation {data['generation']} parks{_why(data)}",
    "gathering": lambda data: _join("waiting", _fact(data, "parked", ", parked: {}")) + _why(data),
    "forming": _forming,
    "running": _running,
    "recovery": _recovery,
    "resized": _resized,
    "went_back": _went_back,
    "drain": lambda data: _join(f"{_who(data)} hands over and leaves", _fact(data, "step", " at step {}")) + _why(data),
    "join": lambda data: _join(f"{_who(data)} joined", _fact(data, "step", " at step {}")),
    "add": lambda data: _join("one more worker asked for", _fact(data, "step", " at step {}")),
    "resize": lambda data: f"asked to run with {count(data['target'], 'worker')}",
    "fault": lambda data: _join(
        f"fault on purpose: {data['do']}",
        f" {_who(data)}" if data.get("worker") is not None else "",
        _fact(data, "step", " at step {}"),
        _fact(data, "phase", ", in {}"),
    ),
    "checkpoint": _checkpoint,
    "checkpoint_dropped": _dropped,
    "given_up": lambda data: (
        f"checkpoints of steps {', '.join(map(str, data['steps']))} are of a history that is given up by going on from "
        f"step {data['step']}; they go with the first new checkpoint"
    ),
    "refused": lambda data: _join("refused", _fact(data, "request", " to {}")) + _why(data),
    "skipped": _skipped,
    "numerics_differ": lambda data: f"numerics differ: {'; '.join(data['differences'])}",
    "finished": _finished,
    "failed": _ended("failed"),
    "stopped": _ended("stopped"),
}
"""Kind → sentence. Most are the controller's announcements; `finished`, `failed` and `stopped` end a run. The summary
and the plot read `running`, `recovery`, `resized` and the endings.
"""
