"""What data may be once they are open."""

from __future__ import annotations

from elastictrain.data.live import LiveSource
from elastictrain.data.mixed import MixedSource
from elastictrain.data.source import Source

AnySource = Source | MixedSource | LiveSource
"""What a `LaneReader` reads and an `Auditor` audits."""
