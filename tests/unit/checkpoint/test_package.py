"""The library stands alone: what it shows, and what it does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import elastictrain_checkpoint


def test_public_names() -> None:
    expected = """
        AlreadyCommitted Backend CheckpointError CorruptData DIGEST_BLOCK_ELEMENTS ITEM_BYTES IncompleteCheckpoint
        InvalidManifest InvalidPiece Manifest NoCheckpoint PackWriter Part Piece Problem Pruned Reader Request
        Skipped StaleGeneration Store block_hashes box_runs combine_digest commit digest discard
        flat_range_to_boxes list_steps load newest parse_manifest prune verify
        AnyOf Base Best Cadence Copier EverySteps Found Healed Healing Measured Newest Point Policy Spaced Stopped
        Younger copy_step heal newest_good newest_in pin pinned unpin
        Entry Follower Standing catalogue find happened reachable withdraw
    """
    assert sorted(elastictrain_checkpoint.__all__) == sorted(expected.split())
    assert all(hasattr(elastictrain_checkpoint, name) for name in elastictrain_checkpoint.__all__)


def test_neither_torch_nor_ray_nor_the_trainer_is_imported() -> None:
    code = (
        "import sys, elastictrain_checkpoint, elastictrain_checkpoint.cli;"
        "print([m for m in ('torch', 'ray', 'elastictrain', 'safetensors', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(elastictrain_checkpoint.__file__).parent.parent)},
    )
    assert out.stdout.strip() == "[]"
