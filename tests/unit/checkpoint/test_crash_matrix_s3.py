"""The crash matrix against a server that speaks S3: every call of a protocol goes over HTTP, and is harmed in turn.

What is left in the bucket is judged as everywhere, in a copy of it in memory: that is the same bytes, and much faster.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from elastictrain_checkpoint import Store
from tests.unit.checkpoint.test_crash_matrix import (
    NEVER,
    PROTOCOLS,
    CountingBackend,
    Kept,
    World,
    harm,
    points_of,
    prepared,
)

CASES = {
    "incremental": ("before", "torn", "fails"),
    "discard": ("before", "fails"),
    "copy from": ("before", "fails"),
    "copy to": ("before", "torn", "fails"),
    "prune": ("before",),
}


class Bucket:
    """Worlds in one bucket, each below a prefix of its own, whose objects come and go all at once."""

    def __init__(self, bucket: str, options: dict[str, Any]) -> None:
        self.url, self.options, self.made = f"s3://{bucket}", options, 0

    def world(self, kept: Kept) -> World:
        self.made += 1
        stores = [Store(f"{self.url}/{self.made}-{n}", storage_options=self.options) for n in range(2)]
        for store, contents in zip(stores, kept.stores, strict=True):
            backend: Any = store._backend
            if contents:
                backend.system.pipe({f"{backend.root}/{path}": data for path, data in contents.items()})
        return World(stores[0], stores[1], dict(kept.states))

    def judged(self, world: World, folder: Path) -> World:
        held = []
        for store in (world.store, world.other):
            backend: Any = store._backend
            backend.system.invalidate_cache()
            paths = backend.system.find(backend.root)
            found = backend.system.cat(paths) if paths else {}
            held.append({path.removeprefix(f"{backend.root}/"): data for path, data in found.items()})
        return World.again("memory", folder, Kept((held[0], held[1]), dict(world.states)))


def test_harm_at_200_points_and_more(
    bucket: str, options: dict[str, Any], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    place = Bucket(bucket, options)
    count = 0
    for protocol, ways in CASES.items():
        _, run, must, finally_, least = PROTOCOLS[protocol]
        kept = prepared(protocol)
        world = place.world(kept)
        counting = CountingBackend(world.store._backend)
        run(world, Store("counting", backend=counting))  # type: ignore[arg-type]
        assert len(counting.verbs) > least
        for way in ways:
            points = points_of(counting.verbs, way)
            assert points
            count += len(points)
            for at in [*points, NEVER]:
                world = place.world(kept)
                returned = harm(world, run, at, way)
                assert returned or at != NEVER
                judged = place.judged(world, tmp_path)
                judged.check(*(finally_ if returned else must))
                run(judged, judged.store)  # whoever comes next does it again
                judged.tidy(judged.store, len(finally_))
                judged.check(*finally_)
    record_property("points", count)
    print(f"S3: {count} points")
    assert count >= 200
