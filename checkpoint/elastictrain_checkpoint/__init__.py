"""Checkpoints that any world saves and any other loads: safetensors packs and one manifest, verified by hash.

```python
store = Store("/runs/a/checkpoints")
part = PackWriter(store, step=1000, attempt="a7f3c2", writer="w0003").write([Piece(...), ...])
manifest = commit(store, step=1000, attempt="a7f3c2", generation=7, parts=[part, ...], tree={...})
reader = Reader(store, newest(store))
weights = reader.read_flat("model/layers.0.weight", 0, 4096)
```

Stands alone: needs neither Ray nor torch nor elastictrain, and never pickles.
"""

from __future__ import annotations

from elastictrain_checkpoint.boxes import box_runs, flat_range_to_boxes
from elastictrain_checkpoint.cadence import Cadence, Measured
from elastictrain_checkpoint.catalogue import Entry, catalogue, happened
from elastictrain_checkpoint.check import Problem, digest, verify
from elastictrain_checkpoint.commit import Skipped, commit, list_steps, load, newest
from elastictrain_checkpoint.copying import Copier, Stopped, copy_step
from elastictrain_checkpoint.dtypes import ITEM_BYTES
from elastictrain_checkpoint.errors import (
    AlreadyCommitted,
    CheckpointError,
    CorruptData,
    IncompleteCheckpoint,
    InvalidManifest,
    InvalidPiece,
    NoCheckpoint,
    StaleGeneration,
)
from elastictrain_checkpoint.follower import Follower, Standing
from elastictrain_checkpoint.hashing import DIGEST_BLOCK_ELEMENTS, block_hashes, combine_digest
from elastictrain_checkpoint.healing import Healed
from elastictrain_checkpoint.incremental import Base
from elastictrain_checkpoint.manifest import Manifest, parse_manifest
from elastictrain_checkpoint.pack import PackWriter, Piece
from elastictrain_checkpoint.part import Part
from elastictrain_checkpoint.policies import AnyOf, Best, EverySteps, Newest, Point, Policy, Spaced, Younger
from elastictrain_checkpoint.reader import Reader, Request
from elastictrain_checkpoint.retain import Pruned, discard, pin, pinned, prune, unpin, withdraw
from elastictrain_checkpoint.store import Backend, Store
from elastictrain_checkpoint.tiers import Found, Healing, find, heal, newest_good, newest_in, reachable

__all__ = [
    "DIGEST_BLOCK_ELEMENTS",
    "ITEM_BYTES",
    "AlreadyCommitted",
    "AnyOf",
    "Backend",
    "Base",
    "Best",
    "Cadence",
    "CheckpointError",
    "Copier",
    "CorruptData",
    "Entry",
    "EverySteps",
    "Follower",
    "Found",
    "Healed",
    "Healing",
    "IncompleteCheckpoint",
    "InvalidManifest",
    "InvalidPiece",
    "Manifest",
    "Measured",
    "Newest",
    "NoCheckpoint",
    "PackWriter",
    "Part",
    "Piece",
    "Point",
    "Policy",
    "Problem",
    "Pruned",
    "Reader",
    "Request",
    "Skipped",
    "Spaced",
    "StaleGeneration",
    "Standing",
    "Stopped",
    "Store",
    "Younger",
    "block_hashes",
    "box_runs",
    "catalogue",
    "combine_digest",
    "commit",
    "copy_step",
    "digest",
    "discard",
    "find",
    "flat_range_to_boxes",
    "happened",
    "heal",
    "list_steps",
    "load",
    "newest",
    "newest_good",
    "newest_in",
    "parse_manifest",
    "pin",
    "pinned",
    "prune",
    "reachable",
    "unpin",
    "verify",
    "withdraw",
]
