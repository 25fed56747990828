"""Data: any batch of any lane at any step, as a pure function of the seed and the source.

`open_source` lays down the order of a job's data, `LaneReader` reads batches of it as NumPy arrays, and
`elastictrain.data.feeder.Feeder` hands them out as torch tensors, read ahead in a thread. The position, a step
number, is the only state.
"""

from __future__ import annotations

from elastictrain.data.fingerprint import fingerprint_difference
from elastictrain.data.reader import LaneReader
from elastictrain.data.source import Source, open_source

__all__ = ["LaneReader", "Source", "fingerprint_difference", "open_source"]
