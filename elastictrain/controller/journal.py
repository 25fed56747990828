"""The journal: every event as one line of JSON, appended before it is handled. Replaying it gives an equal machine.

Exact: floats survive (`repr`), bytes are base64, text with lone surrogates (a traceback of a broken file name) is
escaped. A last line that was cut off in the middle of a write is not an event that was ever handled, and is ignored;
a broken line anywhere else means that the file is not what was written, and is an error. So is a whole line of another
version, even the last one: replay is exact only with the machine that wrote the journal.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from elastictrain.controller.events import Event
from elastictrain.controller.facts import MachineSpec
from elastictrain.controller.machine import Machine
from elastictrain.errors import ClusterError

VERSION = 6
"""Of the journal: raised whenever an old event would lead the machine somewhere else than it did."""

EVENT_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Event)}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in EVENT_TYPES.items()}

_FIELDS = {name: frozenset(field.name for field in fields(kind)) for name, kind in EVENT_TYPES.items()}


class OtherVersion(ValueError):
    """A line that is whole, but was written by another version of the machine."""


def _bytes_out(value: object) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    raise TypeError(f"{type(value).__name__} has no place in the journal")


def _bytes_in(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["base64"], validate=True) if set(value) == {"base64"} else value


def dump_event(event: Event) -> str:
    """One line of JSON, without the newline."""
    name = type(event).__name__
    record = {"v": VERSION, "event": name, "data": _ADAPTERS[name].dump_python(event)}
    return json.dumps(record, default=_bytes_out, separators=(",", ":"))


def load_event(line: str) -> Event:
    """The event of a line. Raises ValueError when the line is not one that `dump_event` writes, OtherVersion when the
    `dump_event` of another version does.
    """
    try:
        record = json.loads(line, object_hook=_bytes_in if '"base64"' in line else None)
        _check_version(record)
        event: Event = _ADAPTERS[record["event"]].validate_python(record["data"])
    except (KeyError, TypeError, ValidationError, binascii.Error, json.JSONDecodeError) as error:
        raise ValueError(f"not an event: {error}") from None
    return event


def _check_version(record: Any) -> None:
    """Raises OtherVersion, KeyError or TypeError."""
    name, data = record["event"], record["data"]
    if not isinstance(name, str) or not isinstance(data, dict):
        raise TypeError(f"got {name!r} with {type(data).__name__}")
    version = record.get("v", 1)
    if version != VERSION:
        raise OtherVersion(f"it is of version {version}, this is version {VERSION}")
    unknown = [] if name in EVENT_TYPES else [name]
    unknown = unknown or sorted(set(data) - _FIELDS[name])
    if unknown:
        raise OtherVersion(f"it has {', '.join(unknown)}, which is not known here")


def read_events(lines: Iterable[str]) -> list[Event]:
    """All events of a journal. Raises ClusterError that names a line that is broken or of another version; a broken
    last one is ignored.
    """
    texts = [line.rstrip("\n") for line in lines]
    while texts and not texts[-1]:
        texts.pop()
    events: list[Event] = []
    for number, text in enumerate(texts, start=1):
        try:
            events.append(load_event(text))
        except OtherVersion as error:
            raise ClusterError(
                f"journal line {number} of {len(texts)} was written by another version of elastictrain: {error}. The "
                "controller can be brought back only by the version that started the run; use that one, or start the "
                "run again from its newest checkpoint with --resume"
            ) from None
        except ValueError as error:
            if number == len(texts):
                break
            raise ClusterError(
                f"journal line {number} of {len(texts)} is broken: {error}; expected one event per line as JSON. "
                "The controller cannot be brought back from it; start the run again from its newest checkpoint"
            ) from None
    return events


def replay(spec: MachineSpec, lines: Iterable[str]) -> Machine:
    """The machine that has handled all events of a journal. Its commands were given before, and are dropped."""
    machine = Machine(spec)
    for event in read_events(lines):
        machine.handle(event)
    return machine
