"""What a short hash of a fingerprint stands for, kept in the cache folder of this machine, to say what has changed.

A `Stream`'s state has room for hashes only. Nothing depends on what lies here: without it a change is told without its
details.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastictrain.data.index import cache_path

_log = logging.getLogger(__name__)


def short_hash(fingerprint: Mapping[str, Any]) -> str:
    """The first half of a fingerprint's hash."""
    return str(fingerprint["hash"])[:16]


def remember(fingerprint: Mapping[str, Any]) -> None:
    """Keep a fingerprint, with the list of its files however long. A folder that takes no files is only logged."""
    place = _place(short_hash(fingerprint))
    try:
        if place.exists():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=place.parent, prefix=".fingerprint-")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(fingerprint, file)
            Path(temporary).replace(place)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.info(
            "The fingerprint of the data cannot be kept in %s (%s); a change is told without details", place, error
        )


def recall(short: str) -> dict[str, Any] | None:
    """Return the fingerprint that was kept under a short hash; None if there is none here."""
    try:
        found = json.loads(_place(short).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and short_hash({"hash": "", **found}) == short else None


def _place(short: str) -> Path:
    return cache_path({}).parent / f"fingerprint-{short}.json"
