"""Sentences about the further places that checkpoints are copied to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastictrain.observe.events import Data


def _waiting(data: Data) -> str:
    waiting = list(data.get("waiting") or [])
    newest = ", ".join(map(str, waiting[-5:]))
    shown = f"{len(waiting)} steps, the newest {newest}" if len(waiting) > 5 else newest
    return f"; still to be copied: {shown}" if shown else ""


def _copied(data: Data) -> str:
    return f"checkpoint of step {data['step']} copied to {data['path']}{_waiting(data)}"


def _failed(data: Data) -> str:
    why = f"checkpoints cannot be copied to {data['path']}: {data['error']}"
    return f"{why}; the run goes on, and it is tried again{_waiting(data)}"


def _works(data: Data) -> str:
    return f"checkpoints can be copied to {data['path']} again{_waiting(data)}"


def _silent(data: Data) -> str:
    return f"{data['path']} does not answer: {data['error']}; the run goes on without what lies there"


COPIES = {"checkpoint_copied": _copied, "copy_failed": _failed, "copy_works": _works, "place_silent": _silent}
"""By kind of event."""


def healed_words(data: Data) -> str:
    """Of a checkpoint that was restored: how much of it came from a further place."""
    blocks = data.get("healed_blocks") or 0
    return f"; {blocks} damaged block{'s' if blocks > 1 else ''} read from another place" if blocks else ""


def copies_words(copies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the further places are, a line each."""
    lines = []
    for path, found in copies.items():
        newest = f"step {found['step']}" if found.get("step") else "nothing yet"
        error = f"; {found['error']}" if found.get("error") else ""
        lines.append(f"{newest} in {path}{_waiting(found)}{error}")
    return lines
