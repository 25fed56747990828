"""Every protocol × every kind of storage × every call × every way to go wrong there.

The process is killed before a call or in the middle of a file; or the call fails and the process lives on. (To be
killed after a call is to be killed before the next one.) After each: no torn checkpoint loads, none that was committed
is lost, what was asked for can be done again, and garbage goes.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from elastictrain_checkpoint import (
    Newest,
    Reader,
    Store,
    copy_step,
    discard,
    heal,
    list_steps,
    load,
    newest,
    pin,
    prune,
    verify,
)
from elastictrain_checkpoint.remote import RemoteBackend
from tests.unit.checkpoint.build import State, changed, flip, live_digest, make_state, memory_store, save, write_parts
from tests.unit.checkpoint.test_crash import Killed, KilledBackend, dying

SPECS = {"cold": ("U8", (9000,)), "hot": ("U8", (9000,)), "flags": ("BOOL", (5,))}
SMALL_PACKS = 6_000
KINDS = ("file", "memory", "fsspec")


def open_store(kind: str, folder: Path) -> Store:
    if kind == "file":
        return Store(folder / "store")
    if kind == "memory":
        return memory_store()
    folder.mkdir(parents=True, exist_ok=True)
    system = DirFileSystem(str(folder), LocalFileSystem(auto_mkdir=True))
    return Store(f"dir of {folder}", backend=RemoteBackend(system, "store"))


def contents(store: Store, folder: str = "") -> dict[str, bytes]:
    """Path → bytes of everything in a store."""
    found = {}
    for name in store.list(folder):
        path = f"{folder}/{name}" if folder else name
        found |= contents(store, path) if store.size(path) is None else {path: store.read_all(path)}
    return found


class CountingBackend(KilledBackend):
    """Nothing happens, but which verbs were called is known."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend, None, "")
        self.verbs: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.verbs.append(name)
        return super().__getattr__(name)


class FailingBackend(KilledBackend):
    """One call fails, as on a full disk or a lost connection; those before and after it work."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.backend, name)

        def call(*args: Any) -> Any:
            self.counter.calls += 1
            if self.counter.calls == self.counter.at:
                raise OSError(errno.EIO, f"{name} failed")
            return real(*args)

        return call


def harmed(store: Store, at: int, way: str) -> tuple[Store, KilledBackend]:
    if way != "fails":
        return dying(store, at, way)
    backend = FailingBackend(store._backend, at, way)
    return Store("failing", backend=backend), backend  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kept:
    """What two stores held, as path → bytes, and the states in them."""

    stores: tuple[dict[str, bytes], dict[str, bytes]]
    states: dict[int, State]


@dataclass
class World:
    """A store, a second one, and what every step in them holds."""

    store: Store
    other: Store
    states: dict[int, State] = field(default_factory=dict)

    @property
    def both(self) -> tuple[Store, Store]:
        return self.store, self.other

    def kept(self) -> Kept:
        """All that it holds, to be held by others."""
        return Kept((contents(self.store), contents(self.other)), dict(self.states))

    @classmethod
    def again(cls, kind: str, folder: Path, kept: Kept) -> World:
        """A new world that holds what another one held: that was made once, and is copied for every point."""
        other = open_store(kind, folder.with_name(f"{folder.name}-other"))
        made = cls(open_store(kind, folder), other, dict(kept.states))
        for store, before in zip(made.both, kept.stores, strict=True):
            for path, data in before.items():
                store.put(path, data)
        return made

    def save(self, step: int, state: State, base: int | None = None, **rest: Any) -> None:
        self.states[step] = state
        found = None if base is None else load(self.store, base)
        save(self.store, state, (0.5,), step=step, base=found, cells=True, pack_bytes=SMALL_PACKS, **rest)

    def chain(self, steps: int) -> None:
        state = make_state(SPECS)
        for step in range(1, steps + 1):
            state = changed(state, step, ("hot", 0, 1))
            self.save(step, state, step - 1 or None)

    def check(self, *must: int) -> None:
        """Whatever is there is whole, and so is what must be there."""
        for store in self.both:
            for step in list_steps(store):
                manifest = load(store, step)
                assert verify(store, manifest) == []
                assert manifest.digest == live_digest(self.states[step])
                reader = Reader(store, manifest)
                assert all(reader.read(name).tobytes() == raw for name, (_, _, raw) in self.states[step].items())
        assert set(must) <= set(list_steps(self.store))

    def tidy(self, store: Store, keep: int) -> list[str]:
        """Folders of steps after everything that can go has gone."""
        prune(store, keep, lease_s=0, now_s=1e12)
        again = prune(store, keep, lease_s=0, now_s=1e12)
        assert (again.garbage, again.removed) == ([], [])
        return [name for name in store.list() if name != "LATEST"]


# Each protocol: what there is before, the call that is harmed, what must hold after, and after it was done again.


def incremental(world: World, store: Store) -> None:
    state = changed(world.states[1], 9, ("hot", 0, 1))
    world.states[2] = state
    attempt = f"try-{len(world.store.list('step-00000002'))}"
    if 2 not in list_steps(store):
        base = load(store, 1)
        save(store, state, (0.5,), step=2, attempt=attempt, base=base, cells=True, pack_bytes=SMALL_PACKS)


def pruning(world: World, store: Store) -> None:
    prune(store, Newest(1), lease_s=0, now_s=1e12)


def discarding(world: World, store: Store) -> None:
    discard(store, 1)


def pinning(world: World, store: Store) -> None:
    pin(store, 1, "why")
    prune(store, 1)


def copying(world: World, store: Store) -> None:
    copy_step(store, world.other, 2)


def receiving(world: World, store: Store) -> None:
    copy_step(world.other, store, 2)


def healing(world: World, store: Store) -> None:
    heal(store, 1, [world.other])


def one_step(world: World) -> None:
    world.chain(1)


def three_steps(world: World) -> None:
    world.chain(3)
    write_parts(world.store, world.states[1], step=4, attempt="given-up")


def two_there(world: World) -> None:
    world.store, world.other = world.other, world.store
    world.chain(2)
    world.store, world.other = world.other, world.store


def damaged(world: World) -> None:
    world.chain(1)
    copy_step(world.store, world.other, 1)
    manifest = load(world.store, 1)
    flip(world.store, manifest.paths[0], 5000)
    flip(world.store, manifest.sidecars[0][0], 5)
    world.store.remove(manifest.paths[-1])


Harmed = Callable[[World, Store], None]
PROTOCOLS: dict[str, tuple[Callable[[World], None], Harmed, tuple[int, ...], tuple[int, ...], int]] = {
    "incremental": (one_step, incremental, (1,), (1, 2), 12),
    "prune": (three_steps, pruning, (3,), (3,), 20),
    "discard": (three_steps, discarding, (2, 3), (2, 3), 6),
    "pin": (three_steps, pinning, (1, 3), (1, 3), 10),
    "copy from": (lambda world: world.chain(2), copying, (1, 2), (1, 2), 8),
    "copy to": (two_there, receiving, (), (2,), 8),
}


CASES = [
    (protocol, way)
    for protocol in PROTOCOLS
    for way in ("before", "torn", "fails")
    if way != "torn" or protocol in ("incremental", "copy to")  # the others write no file that could be torn
]


def prepared(protocol: str) -> Kept:
    """What there is before."""
    world = World(memory_store(), memory_store())
    PROTOCOLS[protocol][0](world)
    if protocol == "pin":
        pin(world.store, 1)
    return world.kept()


def verbs_of(protocol: str, kind: str, folder: Path) -> list[str]:
    """The calls of a protocol that nothing harms."""
    world = World.again(kind, folder, prepared(protocol))
    counting = CountingBackend(world.store._backend)
    PROTOCOLS[protocol][1](world, Store("counting", backend=counting))  # type: ignore[arg-type]
    return counting.verbs


def points_of(verbs: list[str], way: str) -> list[int]:
    """Numbers of the calls at which this harm is something else than harm before the call."""
    all_of_them = range(1, len(verbs) + 1)
    return [at for at in all_of_them if way != "torn" or verbs[at - 1] in ("create", "replace")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_has_at_least_200_points_on_every_kind_of_storage(
    tmp_path: Path, kind: str, record_property: Callable[[str, object], None]
) -> None:
    points = {
        (protocol, way): len(points_of(verbs_of(protocol, kind, tmp_path / f"{protocol}-{way}"), way))
        for protocol, way in CASES
    }
    record_property("points", sum(points.values()))
    print(f"{kind}: {sum(points.values())} points: {points}")
    assert all(points.values())
    assert sum(points.values()) >= 200


NEVER = 1000


def harm(world: World, run: Harmed, at: int, way: str) -> bool:
    """Whether the protocol came to its end although it was harmed at its call number ``at``."""
    store, backend = harmed(world.store, at, way)
    returned = False
    with contextlib.suppress(Killed, OSError):
        run(world, store)
        returned = True
    assert backend.counter.calls >= at or at == NEVER
    return returned


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("protocol", "way"), CASES)
def test_harm_at_every_call(tmp_path: Path, protocol: str, way: str, kind: str) -> None:
    _, run, must, finally_, least = PROTOCOLS[protocol]
    kept = prepared(protocol)
    points = points_of(verbs_of(protocol, kind, tmp_path / "counted"), way)
    assert way == "torn" or len(points) > least, "the harm must go through the whole protocol"
    returned = False
    for at in [*points, NEVER]:
        world = World.again(kind, tmp_path / f"{at}", kept)
        returned = harm(world, run, at, way)
        world.check(*(finally_ if returned else must))
        run(world, world.store)  # whoever comes next does it again
        left = world.tidy(world.store, len(finally_))
        needed = {load(world.store, step).paths for step in list_steps(world.store)}
        assert set(left) == {path.split("/")[0] for paths in needed for path in paths} | {
            f"step-{step:08d}" for step in finally_
        }
        world.check(*finally_)
    assert returned


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["before", "fails"])
def test_harm_at_every_call_of_healing(tmp_path: Path, way: str, kind: str) -> None:
    before = World(memory_store(), memory_store())
    damaged(before)
    kept = before.kept()
    for at in range(1, 1000):
        world = World.again(kind, tmp_path / f"{at}", kept)
        store, backend = harmed(world.store, at, way)
        with contextlib.suppress(Killed, OSError):
            healing(world, store)
        manifest = load(world.other, 1)
        reader = Reader(world.store, manifest, others=[world.other])
        assert all(reader.read(name).tobytes() == raw for name, (_, _, raw) in world.states[1].items())
        assert heal(world.store, 1, [world.other]).left == []
        world.check(1)
        assert world.tidy(world.store, 1) == ["step-00000001"]
        if backend.counter.calls < at:
            break
    assert at > 12


# --- real death, on a local disk ---

DRIVER = """
import os, signal, sys
from pathlib import Path
from elastictrain_checkpoint import Store
from tests.unit.checkpoint.test_crash import KilledBackend
from tests.unit.checkpoint.test_crash_matrix import PROTOCOLS, World, prepared

class Dying(KilledBackend):
    def __getattr__(self, name):
        real = getattr(self.backend, name)
        def call(*args):
            self.counter.calls += 1
            if self.counter.calls != self.counter.at:
                return real(*args)
            if name in ("create", "replace"):
                def cut(blocks):
                    yield memoryview(b"".join(blocks))[:3000]
                    os.kill(os.getpid(), signal.SIGKILL)
                real(args[0], cut(args[1]))
            os.kill(os.getpid(), signal.SIGKILL)
        return call

folder, (_, run, *_), kept = Path(sys.argv[1]), PROTOCOLS[sys.argv[2]], prepared(sys.argv[2])
for at in range(1, 200):
    world = World.again("file", folder / f"{at}", kept)
    child = os.fork()
    if not child:
        run(world, Store("dying", backend=Dying(world.store._backend, at, "real")))
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(at, died, flush=True)
    if died == 0:
        break
"""


@pytest.mark.parametrize("protocol", ["incremental", "prune", "copy to"])
def test_killed_for_good_at_every_call(tmp_path: Path, protocol: str) -> None:
    prepare, run, must, finally_, least = PROTOCOLS[protocol]
    out = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), protocol], capture_output=True, text=True, check=True
    )
    ends = [int(line.split()[1]) for line in out.stdout.splitlines()]
    assert ends == [-signal.SIGKILL] * (len(ends) - 1) + [0]
    assert len(ends) > least
    states = World(memory_store(), memory_store())
    prepare(states)
    incremental_state = changed(states.states[1], 9, ("hot", 0, 1))
    for at, end in enumerate(ends, 1):
        world = World(Store(tmp_path / f"{at}" / "store"), Store(tmp_path / f"{at}-other" / "store"), states.states)
        if protocol == "incremental":
            world.states = {**states.states, 2: incremental_state}
        world.check(*(finally_ if end == 0 else must))
        run(world, world.store)
        world.check(*finally_)
        found = newest(world.store)
        assert found is not None
        assert found.step == max(finally_)
