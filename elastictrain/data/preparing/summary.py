"""The index of what was prepared, and what to tell a user of it. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from elastictrain.data.preparing.inputs import InputIndex
from elastictrain.data.preparing.plan import Plan
from elastictrain.data.tokenizers import Tokenizer
from elastictrain.prepare_settings import Preparation

_OF_A_FILE = ("name", "bytes", "rows", "row_groups", "decoded_bytes", "tokens", "xxh3")


def index_of(
    plan: Plan,
    index: InputIndex,
    parts: Sequence[Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Return what `_index.json` holds: the same bytes however the work was done. `digest`: of all files' content."""
    holes = [[hole.file, hole.block, hole.why] for hole in index.holes] + [h for part in parts for h in part["holes"]]
    listed = [{name: file[name] for name in _OF_A_FILE} for file in files if file["rows"]]
    near = (
        {"near_duplicates": sum(file["near_duplicates"] for file in files)} if plan.settings["near_duplicates"] else {}
    )
    content = json.dumps([[file["name"], file["bytes"], file["xxh3"]] for file in listed], separators=(",", ":"))
    return {
        "v": 1,
        "digest": hashlib.sha256(content.encode()).hexdigest(),
        "counts": {
            "read": sum(part["read"] for part in parts),
            "filtered": sum(part["filtered"] for part in parts),
            "duplicates": sum(one["duplicates"] for one in [*parts, *files]),
            **near,
            "rows": sum(file["rows"] for file in files),
            "tokens": sum(file["tokens"] for file in files) if tokenizer else None,
            "bytes": sum(file["bytes"] for file in files),
        },
        "holes": holes,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "files": listed,
        "plan": plan.as_json(),
    }


def data_settings(settings: Preparation, out: str) -> dict[str, Any]:
    """Return the `data` section of a job that trains on what was prepared; `sequence_length` is the user's choice."""
    found: dict[str, Any] = {"kind": "parquet", "path": out}
    if settings.tokenizer is not None:
        found |= {"text_column": "tokens", "tokenizer": f"{out.rstrip('/')}/_tokenizer.json", "sequence_length": 2048}
    elif settings.text_column is not None:
        found |= {"text_column": settings.text_column, "sequence_length": 2048}
    return found


def advice(index: Mapping[str, Any], settings: Preparation) -> list[str]:
    """What to change for the next time, a sentence each."""
    said: list[str] = []
    files = index["files"]
    groups = sum(file["row_groups"] for file in files)
    decoded = sum(file["decoded_bytes"] for file in files)
    if groups > 1 and decoded / groups < 1 << 20:
        said.append(
            f"row groups take {decoded // groups} bytes: each costs a request; raise row_group_bytes (8 to 64 MiB)"
        )
    if settings.row_group_bytes > 256 << 20:
        said.append("a lane holds two row groups while it trains; lower row_group_bytes (8 to 64 MiB)")
    if len(files) > 10_000:
        said.append(f"{len(files)} files: listing them takes long; raise file_bytes")
    largest = max(file["decoded_bytes"] for file in files)
    if largest > 2 * settings.file_bytes:
        said.append(
            f"the largest file takes {largest} bytes decoded, file_bytes is {settings.file_bytes}: a document, or "
            "what map returned, is far larger than what was read"
        )
    if index["holes"]:
        said.append(
            f"{len(index['holes'])} block(s) or file(s) could not be read and are left out (holes in _index.json)"
        )
    return said
