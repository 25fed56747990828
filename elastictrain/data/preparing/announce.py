"""Finished files as segments of a manifest, so that training begins on them while the rest is being prepared."""

from __future__ import annotations

from typing import Any

from elastictrain.data.segments import SegmentWriter
from elastictrain.prepare_settings import Preparation


class Announcer:
    """Appends files to the manifest in `out`, each once, however often the preparation is taken up.

    They are appended in the order of their numbers, whichever is finished first: so the manifest of a preparation that
    was disturbed has the same files in the same order as that of one that was not. One preparation at a time: two that
    go on with the same work at once could both append a file.
    """

    def __init__(self, settings: Preparation) -> None:
        """Raises DataError when the manifest cannot be made."""
        self._out = settings.out.rstrip("/")
        self._writer = SegmentWriter(self._out, storage_options=settings.out_options)
        self._there = {segment.name for segment in self._writer.log.segments()}

    def file(self, record: dict[str, Any]) -> None:
        """Append a file that is complete. Raises DataError."""
        if record["name"] not in self._there:
            about = {"rows": record["rows"], "tokens": record["tokens"], "xxh3_128": record["xxh3"]}
            self._writer.append(f"{self._out}/{record['name']}", about=about)

    def close(self) -> None:
        """Say that no file follows; may be called again."""
        self._writer.close()
