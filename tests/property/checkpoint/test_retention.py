"""Any sequence of saves, full and incremental, pins, prunes, discards and crashes, against a model that knows no packs.

The model is a dictionary from steps to states, and rules that a user would write down: what must be there, what may be.
Every step that is there loads with its own bytes, whatever went before.
"""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from elastictrain_checkpoint import (
    EverySteps,
    Newest,
    Policy,
    Reader,
    discard,
    list_steps,
    load,
    pin,
    prune,
    unpin,
    verify,
)
from tests.unit.checkpoint.build import State, changed, live_digest, make_state, memory_store, save
from tests.unit.checkpoint.test_crash import Killed, dying

SPECS = {"a": ("U8", (30_000,)), "b": ("U8", (9_000,)), "c": ("F32", (3, 100))}
any_step = st.integers(0, 99)
crashes = st.none() | st.integers(1, 60)


class Retention(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.store = memory_store()
        self.states: dict[int, State] = {}
        self.must: set[int] = set()
        self.pins: set[int] = set()
        self.next_step = 1
        self.state = make_state(SPECS)

    def _pick(self, seed: int) -> int | None:
        there = sorted(self.must)
        return there[seed % len(there)] if there else None

    @rule(
        name=st.sampled_from(["a", "b", "c"]),
        low=st.floats(0, 0.9),
        cuts=st.lists(st.floats(0, 0.99), max_size=2),
        base=st.none() | any_step,
        crash=crashes,
    )
    def save(self, name: str, low: float, cuts: list[float], base: int | None, crash: int | None) -> None:
        step, self.next_step = self.next_step, self.next_step + 1
        self.state = changed(self.state, step, (name, low, 1.0))
        self.states[step] = self.state
        origin = None if base is None else self._pick(base)
        manifest = None if origin is None else load(self.store, origin)
        store = self.store if crash is None else dying(self.store, crash, "torn")[0]
        returned = False
        with contextlib.suppress(Killed):
            save(store, self.state, cuts, step=step, base=manifest, cells=True, pack_bytes=8_000)
            returned = True
        there = step in list_steps(self.store)
        assert there or not returned
        if there:
            self.must.add(step)

    @rule(which=any_step)
    def pin(self, which: int) -> None:
        step = self._pick(which)
        if step is not None:
            pin(self.store, step)
            self.pins.add(step)

    @rule(which=any_step)
    def unpin(self, which: int) -> None:
        step = self._pick(which)
        if step is not None:
            unpin(self.store, step)
            self.pins.discard(step)

    @rule(keep=st.integers(1, 3), every=st.none() | st.integers(2, 4), crash=crashes)
    def prune(self, keep: int, every: int | None, crash: int | None) -> None:
        policy: Policy = Newest(keep) if every is None else Newest(keep) | EverySteps(every)
        wanted = set(sorted(self.must)[-keep:]) | (self.pins & self.must)
        wanted |= {step for step in self.must if every is not None and step % every == 0}
        store = self.store if crash is None else dying(self.store, crash, "before")[0]
        with contextlib.suppress(Killed):
            prune(store, policy, lease_s=0, now_s=1e12)
        there = set(list_steps(self.store))
        assert wanted <= there <= self.must
        self.must = there

    @rule(which=any_step, crash=crashes)
    def discard(self, which: int, crash: int | None) -> None:
        step = self._pick(which)
        if step is None:
            return
        store = self.store if crash is None else dying(self.store, crash, "before")[0]
        returned = False
        with contextlib.suppress(Killed):
            discard(store, step)
            returned = True
        there = set(list_steps(self.store))
        assert self.must - {step} <= there
        assert step not in there or not returned
        self.must = there
        self.pins &= there

    @invariant()
    def everything_that_is_there_loads(self) -> None:
        states: dict[int, State] = getattr(self, "states", {})
        for step in getattr(self, "must", ()):
            manifest = load(self.store, step)
            assert manifest.digest == live_digest(states[step])
            assert verify(self.store, manifest) == []
            reader = Reader(self.store, manifest)
            assert all(reader.read(name).tobytes() == data for name, (_, _, data) in states[step].items())

    @rule()
    def nothing_stays_that_nobody_needs(self) -> None:
        if not self.must:
            return
        prune(self.store, 1000, lease_s=0, now_s=1e12)
        used: set[str] = set()
        for step in self.must:
            manifest = load(self.store, step)
            used |= {manifest.path, *manifest.paths, *(path for path, _ in manifest.sidecars)}
        used |= {f"step-{step:08d}/PIN" for step in self.pins & self.must}
        assert set(self._files("")) - {"LATEST"} == used

    def _files(self, folder: str) -> list[str]:
        found: list[str] = []
        for name in self.store.list(folder):
            path = f"{folder}/{name}" if folder else name
            found += [path] if self.store.size(path) is not None else self._files(path)
        return found


TestRetention: Any = Retention.TestCase
TestRetention.settings = settings(deadline=None, max_examples=25, stateful_step_count=20)
