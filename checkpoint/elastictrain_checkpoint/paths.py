"""Where things lie in a store, and how the names are read back.

```
step-00001000/<attempt>/<writer>-00.safetensors   data: written once, under names that are never used again
step-00001000/<attempt>/cells-<hash>.bin          beside the packs (see `elastictrain_checkpoint.sidecar`)
step-00001000/MANIFEST.json                       the commit: created once, last
step-00001000/PIN                                 keep this step whatever the policies say
LATEST                                            a hint
```
"""

from __future__ import annotations

import re

from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.part import NAME

MANIFEST = "MANIFEST.json"
LATEST = "LATEST"
PIN = "PIN"
_STEP = re.compile(r"step-(\d{8,18})")
_FILE = re.compile(rf"(?:\.\./step-(\d{{8,18}})/)?({NAME})/({NAME})\.safetensors")


def step_folder(step: int) -> str:
    """Folder of a step.

    Raises:
        InvalidPiece: the step is not an integer from 0 on.

    """
    if type(step) is not int or not 0 <= step < 10**18:
        raise InvalidPiece(f"step {step!r} is not an integer in [0, 10^18)")
    return f"step-{step:08d}"


def manifest_path(step: int) -> str:
    """Path of a step's manifest."""
    return f"{step_folder(step)}/{MANIFEST}"


def parse_step_folder(name: str) -> int | None:
    """Step of a folder, or None if the name is not one that `step_folder` gives."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_folder(int(match[1])) == name else None


def resolve_pack(step: int, path: str) -> tuple[int, str] | None:
    """(step that holds the pack, its path in the store), or None for any path that is not exactly a pack's.

    ``path`` is relative to the folder of ``step``; ``../step-…/`` may lead to another step and nowhere else.
    """
    match = _FILE.fullmatch(path)
    if match is None:
        return None
    if match[1] is None:
        return step, f"{step_folder(step)}/{path}"
    other = parse_step_folder(f"step-{match[1]}")
    return None if other is None else (other, path.removeprefix("../"))
