"""The thin Ray shell around the pure controller and the engine: the only code of the project that imports Ray."""

from __future__ import annotations

import os

# At every death of a process Ray prints a paragraph on the driver's standard output, where `--json` promises one
# object, and where our own sentence says it better. Ray reads this variable once, when it is imported: here, not later.
_SAID_BETTER = "A worker died or was killed while executing a task"
_skipped = os.environ.get("RAY_DEDUP_LOGS_SKIP_REGEX")
if _SAID_BETTER not in (_skipped or ""):
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = f"{_skipped}|{_SAID_BETTER}" if _skipped else _SAID_BETTER
