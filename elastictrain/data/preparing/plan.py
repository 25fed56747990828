"""The plan of a preparation: parts, slots and files. Pure.

A plan is made once, from the input and the settings, and written beside the output before anything else. Whoever takes
the preparation up makes it again and compares: so unfinished work is only ever finished as it was begun.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PLAN_VERSION = 1
SLOTS_PER_FILE = 4
"""Slots are cut before anybody knows how much the filter leaves; files are put together from whole slots."""
MAX_SLOTS = 1 << 14

Range = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """`parts`: ranges `[first, end)` of blocks. `settings`, `functions` (a hash of the file of each), `tokenizer`,
    `files` (name, bytes, version) and the version of `pyarrow` are what everything that is written follows from.
    """

    settings: Mapping[str, Any]
    functions: Mapping[str, str]
    tokenizer: str | None
    files: tuple[tuple[str, int, str], ...]
    schema: tuple[tuple[str, str], ...]
    blocks: int
    parts: tuple[Range, ...]
    slots: int
    pyarrow: str

    def as_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {"v": PLAN_VERSION, **json.loads(json.dumps(asdict(self)))}

    @property
    def identity(self) -> str:
        """A hash of all of it; 16 hexadecimal digits."""
        text = json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def cut_parts(block_bytes: Sequence[int] | npt.NDArray[np.int64], part_bytes: int) -> tuple[Range, ...]:
    """Put neighbouring blocks together into parts of at most `part_bytes`; a larger block is a part of its own."""
    parts: list[Range] = []
    first = size = 0
    for block, more in enumerate(int(one) for one in block_bytes):
        if block > first and size + more > part_bytes:
            parts.append((first, block))
            first, size = block, 0
        size += more
    if len(block_bytes):
        parts.append((first, len(block_bytes)))
    return tuple(parts)


def count_slots(input_bytes: int, file_bytes: int) -> int:
    """Return how many slots to cut: a power of two, `SLOTS_PER_FILE` or more for each file that is to be expected."""
    files = -(-max(1, input_bytes) // file_bytes)
    return min(MAX_SLOTS, 1 << (files * SLOTS_PER_FILE - 1).bit_length())


def group_slots(slot_bytes: npt.NDArray[np.int64], file_bytes: int) -> tuple[Range, ...]:
    """Put neighbouring slots together into files of at most `file_bytes`; a larger slot is a file of its own.

    `slot_bytes`: shape [slots]. Slots without anything begin no file, so no file is empty.
    """
    files: list[Range] = []
    first, size = None, 0
    for slot, more in enumerate(slot_bytes.tolist()):
        if not more:
            continue
        if first is not None and size + more > file_bytes:
            files.append((first, slot))
            first, size = None, 0
        first = slot if first is None else first
        size += more
    if first is not None:
        files.append((first, len(slot_bytes)))
    return tuple(files)


def row_group_rows(rows: int, size_bytes: int, row_group_bytes: int) -> int:
    """Return how many rows each row group of a file gets, so that all are about as large, and none too large."""
    groups = max(1, min(rows, -(-size_bytes // row_group_bytes)))
    return max(1, -(-rows // groups))


def plan_differences(old: Mapping[str, Any], new: Mapping[str, Any], *, is_done: bool = False) -> list[str]:
    """Say how the plan that was begun (as JSON gave it back) differs from the one that was asked for; [] if not.

    `is_done`: nothing is to be written any more, so it does not matter what would write it.
    """
    said: list[str] = []
    if old.get("v") != new["v"]:
        said.append(f"it was begun by another version of elastictrain (plan {old.get('v')}, now {new['v']})")
    before, after = old.get("settings") or {}, new["settings"]
    differing = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    said += [f"{name} was {before.get(name)!r} and is now {after.get(name)!r}" for name in differing]
    hashes = old.get("functions") or {}
    edited = [name for name in new["functions"] if hashes.get(name) != new["functions"][name] and name not in differing]
    said += [f"the file of {name} ({after.get(name)}) has changed" for name in edited]
    if old.get("tokenizer") != new["tokenizer"] and before.get("tokenizer") == after.get("tokenizer"):
        said.append(f"the content of the tokenizer {after.get('tokenizer')} has changed")
    said += _changed_files(old.get("files") or [], new["files"])
    if not is_done and old.get("pyarrow") != new["pyarrow"]:
        said.append(_other_pyarrow(old.get("pyarrow"), new["pyarrow"]))
    others = ("schema", "blocks", "parts", "slots")
    if not said and any(old.get(name) != new[name] for name in others):
        said.append(f"the input is cut in another way ({', '.join(n for n in others if old.get(n) != new[n])})")
    return said


def _other_pyarrow(before: str | None, now: str) -> str:
    known = f"with pyarrow {before}" if before else "when the version of pyarrow was not recorded"
    how = f"install pyarrow=={before} to go on" if before else "go on with the elastictrain that it was begun with"
    return f"it was begun {known}, and this is pyarrow {now}, whose files may have other bytes: {how}"


def _changed_files(old: Sequence[Sequence[Any]], new: Sequence[Sequence[Any]], shown: int = 5) -> list[str]:
    before, after = ({str(one[0]): list(one[1:]) for one in files} for files in (old, new))
    said = [f"{name} is missing" for name in before if name not in after]
    said += [f"{name} is new" for name in after if name not in before]
    said += [f"{name} has changed" for name in before if name in after and before[name] != after[name]]
    return [*said[:shown], *([f"… and {len(said) - shown} more files"] if len(said) > shown else [])]
