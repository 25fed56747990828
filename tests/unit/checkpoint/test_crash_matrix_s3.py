"""The crash matrix against a server that speaks S3: every call of a protocol goes over HTTP, and is harmed in turn.

What is left in the bucket is judged as everywhere, in a copy of it in memory: that is the same bytes, and much faster.
What a kill before a call leaves is what is there before that call: one run that nobody kills shows it for all calls.
(In memory, on disk and through fsspec each call is really the last one: `test_crash_matrix`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from elastictrain_checkpoint import Store
from tests.unit.checkpoint.test_crash_matrix import CASES as EVERY_CASE
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

pytestmark = pytest.mark.timeout(600)
CASES = [(protocol, way) for protocol, way in EVERY_CASE if protocol != "pin" and (protocol, way) != ("prune", "fails")]
"""The others differ in nothing that is S3's."""
CHANGES = ("create", "replace", "publish", "put", "remove")


class Watching(CountingBackend):
    """Says it when a call that may change something is over."""

    def __init__(self, backend: Any, changed: Callable[[], None]) -> None:
        super().__init__(backend)
        self.changed = changed

    def __getattr__(self, name: str) -> Any:
        real = super().__getattr__(name)

        def call(*args: Any) -> Any:
            found = real(*args)
            if name in CHANGES:
                self.changed()
            return found

        return call


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

    def verbs_of(self, protocol: str) -> list[str]:
        """The calls of a protocol that nothing harms."""
        world = self.world(prepared(protocol))
        counting = CountingBackend(world.store._backend)
        PROTOCOLS[protocol][1](world, Store("counting", backend=counting))  # type: ignore[arg-type]
        return counting.verbs

    def judged(self, world: World, folder: Path) -> World:
        held = []
        for store in world.both:
            backend: Any = store._backend
            backend.system.invalidate_cache()
            paths = backend.system.find(backend.root)
            found = backend.system.cat(paths) if paths else {}
            held.append({path.removeprefix(f"{backend.root}/"): data for path, data in found.items()})
        return World.again("memory", folder, Kept((held[0], held[1]), dict(world.states)))


@pytest.fixture
def place(bucket: str, options: dict[str, Any]) -> Bucket:
    return Bucket(bucket, options)


def test_the_matrix_has_at_least_200_points_on_s3(
    place: Bucket, record_property: Callable[[str, object], None]
) -> None:
    points = {case: len(points_of(place.verbs_of(case[0]), case[1])) for case in CASES}
    record_property("points", sum(points.values()))
    print(f"S3: {sum(points.values())} points: {points}")
    assert all(points.values())
    assert sum(points.values()) >= 200


def killed(place: Bucket, folder: Path, protocol: str) -> Iterator[tuple[World, bool]]:
    """What there is before every call and at the end; whether that is the end."""
    world = place.world(prepared(protocol))
    found: list[World] = [place.judged(world, folder)]
    watched = [Watching(store._backend, lambda: found.append(place.judged(world, folder))) for store in world.both]
    store, other = (Store("watched", backend=backend) for backend in watched)  # type: ignore[arg-type]
    PROTOCOLS[protocol][1](World(store, other, world.states), store)
    assert len(watched[0].verbs) > PROTOCOLS[protocol][-1]
    yield from ((left, False) for left in found)
    yield place.judged(world, folder), True


def failing(place: Bucket, folder: Path, protocol: str, way: str) -> Iterator[tuple[World, bool]]:
    """What is left after harm at every call and at none; whether the protocol came to its end."""
    kept = prepared(protocol)
    points = points_of(place.verbs_of(protocol), way)
    assert way == "torn" or len(points) > PROTOCOLS[protocol][-1]
    for at in [*points, NEVER]:
        world = place.world(kept)
        returned = harm(world, PROTOCOLS[protocol][1], at, way)
        yield place.judged(world, folder), returned


@pytest.mark.parametrize(("protocol", "way"), CASES)
def test_harm_at_every_call(place: Bucket, tmp_path: Path, protocol: str, way: str) -> None:
    _, run, must, finally_, _ = PROTOCOLS[protocol]
    returned = False
    left = killed(place, tmp_path, protocol) if way == "before" else failing(place, tmp_path, protocol, way)
    for world, returned in left:
        world.check(*(finally_ if returned else must))
        run(world, world.store)  # whoever comes next does it again
        world.tidy(world.store, len(finally_))
        world.check(*finally_)
    assert returned
