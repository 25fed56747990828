"""Copying a committed checkpoint to a further place (`checkpoint.copy_to`) against copying its bytes plainly.

Both end with every file synced; ours compares every block with its hash, and creates the manifest last.
Every round does both, one after the other, and computes steps (a matrix product, as long as a copy takes) with and
without a copy beside them: how much longer a step takes while a copy is under way, at the share of a processor that
runs give it, and without a limit. Ratios are medians over rounds.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import common
from elastictrain_checkpoint import Follower, Manifest, Newest, PackWriter, Piece, Store, commit
from elastictrain_checkpoint.follower import SHARE

MIB = 1 << 20
COUNT, SHAPE = 64, (1024, 1024)
DEADLINE_S = 300.0


def stored(store: Store) -> Manifest:
    """A checkpoint of 256 MiB."""
    values = np.random.default_rng(0).standard_normal((COUNT, *SHAPE), dtype=np.float32)
    pieces = [Piece(f"model/layers.{i}.weight", "F32", SHAPE, 0, value) for i, value in enumerate(values)]
    part = PackWriter(store, step=1, attempt="a", writer="w0", pack_bytes=64 * MIB).write(pieces)
    return commit(store, step=1, attempt="a", generation=1, parts=[part])


def plain(near: Path, far: Path) -> float:
    """Seconds for a copy of all files, each synced."""
    began = time.perf_counter()
    shutil.copytree(near, far)
    for path in far.rglob("*"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
    return time.perf_counter() - began


def followed(near: Path, far: Path, share: float) -> tuple[float, list[float]]:
    """Seconds for a copy by a follower, and those of the steps that were computed meanwhile."""
    follower, taken = Follower(Store(near), Store(far), Newest(1), share=share), []
    began = time.perf_counter()
    follower.serve()
    while not follower.wait(0.0) and time.perf_counter() - began < DEADLINE_S:
        taken.append(step())
    if follower.standing.copied != 1:
        raise AssertionError(f"nothing was copied: {follower.standing}")
    spent_s = time.perf_counter() - began
    follower.rest()
    return spent_s, taken


_LEFT = np.random.default_rng(1).standard_normal((384, 384), dtype=np.float32)


def step() -> float:
    """Seconds of a few milliseconds' work that no storage is needed for."""
    began = time.perf_counter()
    for _ in range(4):
        _LEFT @ _LEFT
    return time.perf_counter() - began


def main() -> None:
    options = common.arguments(__doc__, lambda parser: parser.add_argument("--rounds", type=int, default=None))
    results = common.Results("checkpoint_copies", "Checkpoints: copies beside training", options)
    names = ("plain", "follower", "follower, no limit", "step", "step beside a copy", "step beside a copy, no limit")
    found: dict[str, list[float]] = {name: [] for name in names}
    with common.scratch("copies") as folder:
        size = stored(Store(folder / "near")).size_bytes
        for number in range((options.rounds or (5 if options.quick else 15)) + 1):
            alone = [step() for _ in range(50)]
            plain_s = plain(folder / "near", folder / "plain")
            spent_s, beside = followed(folder / "near", folder / "far", SHARE)
            fast_s, beside_fast = followed(folder / "near", folder / "fast", 1.0)
            for name in ("plain", "far", "fast"):
                shutil.rmtree(folder / name)
            os.sync()
            if number:  # the first one warms
                steps = [common.median(taken) for taken in (alone, beside, beside_fast)]
                for name, value in zip(names, (plain_s, spent_s, fast_s, *steps), strict=True):
                    found[name].append(value)
    results.raw["seconds"] = found
    for name, taken in found.items():
        milliseconds = [1000 * one for one in taken]
        rate = size / MIB / common.median(taken) if "step" not in name else None
        shown = {"ms": common.median(milliseconds), "ms over rounds": common.spread(milliseconds)}
        results.row(**{"case": name, **shown, **({} if rate is None else {"MiB/s": rate})})
    for more in ("", ", no limit"):
        pairs = zip(found[f"follower{more}"], found["plain"], strict=True)
        against = common.median(b / a for a, b in pairs)
        results.figure(f"copy, verified{more}: throughput / plain copy, synced", against, "none", "beside it")
        steps = zip(found["step"], found[f"step beside a copy{more}"], strict=True)
        longer = 100 * common.median(b / a - 1 for a, b in steps)
        results.figure(f"a step beside a copy{more} takes longer by, %", longer, "none", "beside it")
    results.write()


if __name__ == "__main__":
    main()
