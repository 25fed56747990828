"""The small model of the tests, whose lanes take a while by waiting: computation that needs no processor."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tests.support.recipes import Bytes


class PacedBytes(Bytes):
    """A lane takes at least `lane_s` seconds."""

    def __init__(self, width: int = 48, lane_s: float = 0.05) -> None:
        super().__init__(width)
        self.lane_s = lane_s

    def loss(self, model: Any, batch: Any) -> Any:
        begun = time.perf_counter()
        result = super().loss(model, batch)
        time.sleep(max(0.0, self.lane_s - (time.perf_counter() - begun)))
        return result
