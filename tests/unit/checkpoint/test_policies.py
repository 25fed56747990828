"""What each policy keeps, alone and joined; pins; packs that outlive their step."""

from __future__ import annotations

import datetime
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from elastictrain_checkpoint import (
    Best,
    EverySteps,
    InvalidPiece,
    Manifest,
    Newest,
    NoCheckpoint,
    Point,
    Policy,
    Spaced,
    Store,
    Younger,
    digest,
    discard,
    list_steps,
    load,
    pin,
    pinned,
    prune,
    unpin,
    verify,
)
from elastictrain_checkpoint.policies import metric_of
from tests.unit.checkpoint.build import changed, flip, make_state, memory_store, save, write_parts

POINTS = [
    Point(10, 1000.0, {"loss": 3.0, "eval": {"acc": 0.1}}),
    Point(20, 1600.0, {"loss": 1.0, "eval": {"acc": 0.7}}),
    Point(25, 1700.0, {"loss": math.nan}),
    Point(30, 2200.0, {"loss": True}),
    Point(40, 2900.0, {"loss": 1, "eval": {"acc": 0.7}}),
    Point(50, 3000.0),
]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Newest(1), {50}),
        (Newest(2), {40, 50}),
        (Newest(99), {10, 20, 25, 30, 40, 50}),
        (EverySteps(20), {20, 40}),
        (EverySteps(7), set()),
        (Younger(timedelta(seconds=500)), {40, 50}),
        (Younger(timedelta(seconds=100)), set()),
        (Spaced(timedelta(seconds=600)), {10, 20, 30, 40}),
        (Spaced(timedelta(seconds=601)), {10, 25, 40}),
        (Best("loss"), {40}),
        (Best("loss", 2), {20, 40}),
        (Best("loss", 9), {10, 20, 40}),
        (Best("loss", mode="max"), {10}),
        (Best("eval.acc", mode="max"), {40}),
        (Best("eval.acc", 1), {10}),
        (Best("eval", 1), set()),
        (Best("nothing"), set()),
        (Newest(1) | EverySteps(20) | Best("loss", mode="max"), {10, 20, 40, 50}),
    ],
)
def test_what_is_kept(policy: Policy, kept: set[int]) -> None:
    assert policy.keep(POINTS, 3100.0) == kept


def test_nothing_to_keep() -> None:
    assert (Newest(3) | Best("x") | Spaced(timedelta(1)) | EverySteps(1) | Younger(timedelta(1))).keep([], 0.0) == set()


def test_a_key_with_dots_comes_first() -> None:
    assert metric_of({"a.b": 1, "a": {"b": 2}}, "a.b") == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Newest(0), r"Newest\(n=0\): expected a whole number from 1 on"),
        (lambda: EverySteps(-1), r"EverySteps\(k=-1\): expected a whole number"),
        (lambda: Best("loss", 0), r"Best\(n=0\): expected a whole number"),
        (lambda: Best("loss", mode="least"), r"Best\(mode='least'\): expected 'min' or 'max'"),  # type: ignore[arg-type]
        (lambda: Younger(timedelta(0)), r"Younger\(age=.*\): expected a timedelta above 0"),
        (lambda: Spaced(3600), r"Spaced\(gap=3600\): expected a timedelta above 0"),  # type: ignore[arg-type]
    ],
)
def test_senseless_policies_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidPiece, match=message):
        make()


# --- in a store ---

STATE = make_state({"t": ("F32", (100,))})


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = Store(tmp_path / "ckpt") if request.param == "file" else memory_store()
    for number, step in enumerate((10, 20, 30, 40)):
        now = datetime.datetime(2026, 1, 1 + number, tzinfo=datetime.UTC)
        save(place, STATE, (), step=step, now=now, info={"loss": abs(step - 20) / 10})
    return place


def test_policies_decide_over_time_and_info_of_the_manifests(store: Store) -> None:
    now_s = datetime.datetime(2026, 1, 4, 12, tzinfo=datetime.UTC).timestamp()
    assert prune(store, Younger(timedelta(days=1)) | Best("loss"), now_s=now_s).removed == [10, 30]
    assert list_steps(store) == [20, 40]


def test_a_policy_that_wants_nothing_leaves_the_newest(store: Store) -> None:
    assert prune(store, EverySteps(7)).kept == [40]


def test_pins_last_until_they_are_taken_away(store: Store) -> None:
    pin(store, 10, "the one in the paper")
    pin(store, 10)
    pin(store, 40)
    again = Store(store.url)  # another process
    assert pinned(again) == [10, 40]
    assert store.read_all("step-00000010/PIN") == b"the one in the paper\n"
    assert prune(again, 1, lease_s=0, now_s=1e12).kept == [10, 40]
    unpin(store, 10)
    unpin(store, 10)
    assert prune(again, 1, lease_s=0, now_s=1e12).kept == [40]
    assert store.list() == ["LATEST", "step-00000040"]
    with pytest.raises(NoCheckpoint, match="has no checkpoint of step 10 to pin"):
        pin(store, 10)
    discard(store, 40)
    assert store.list() == ["LATEST"]


def test_pins_and_protection_hold_what_a_run_has_gone_back_from(store: Store) -> None:
    save(store, STATE, (), step=15, generation=5)
    pin(store, 30)
    result = prune(store, 9, current=15, protect={40})
    assert (result.kept, result.removed) == ([10, 15, 30, 40], [20])


def test_a_damaged_pinned_step_is_not_the_one_that_allows_removal(store: Store) -> None:
    pin(store, 10)
    for step in (10, 40):
        flip(store, f"step-{step:08d}/a1/w0000-00.safetensors", 4100)
    assert prune(store, 1).removed == []


# --- packs that outlive their step ---

TWO = make_state({"hot": ("F32", (256, 1024)), "cold": ("F32", (256, 1024))})


def history(store: Store, steps: int) -> tuple[list[Manifest], list[Any]]:
    """One pack for each tensor; `hot` changes at every step, `cold` never."""
    manifests: list[Manifest] = []
    states, state = [], TWO
    for step in range(1, steps + 1):
        state = changed(state, step, ("hot", 0, 1))
        base = manifests[-1] if manifests else None
        manifests.append(save(store, state, (), step=step, base=base, cells=True, pack_bytes=1))
        states.append(state)
    return manifests, states


@pytest.fixture
def chain() -> tuple[Store, list[Manifest]]:
    place = memory_store()
    return place, history(place, 4)[0]


def test_packs_that_are_referred_to_stay_and_the_rest_goes(chain: tuple[Store, list[Manifest]]) -> None:
    store, manifests = chain
    result = prune(store, 1, lease_s=0, now_s=1e12)
    assert (result.kept, result.removed) == ([4], [1, 2, 3])
    assert store.list("step-00000001") == ["a1"]
    assert [f"step-00000001/a1/{name}" for name in store.list("step-00000001/a1")] == [
        path for path in manifests[3].paths if path.startswith("step-00000001")
    ]
    assert [name for name in store.list() if name.startswith("step")] == ["step-00000001", "step-00000004"]
    assert digest(store, load(store, 4)) == manifests[3].digest


def test_they_go_when_nobody_refers_to_them_any_more(chain: tuple[Store, list[Manifest]]) -> None:
    store, _ = chain
    prune(store, 1)
    save(store, TWO, (), step=5)
    assert prune(store, 1, lease_s=0, now_s=1e12).removed == [4]
    assert [name for name in store.list() if name.startswith("step")] == ["step-00000005"]


def test_discarding_a_step_leaves_what_others_need(chain: tuple[Store, list[Manifest]]) -> None:
    store, manifests = chain
    discard(store, 1)
    for manifest in manifests[1:]:
        assert verify(store, load(store, manifest.step)) == []
    write_parts(store, TWO, (), step=1, attempt="again")
    discard(store, 1, keep_attempt="again")
    assert store.list("step-00000001") == ["a1", "again"]
    assert verify(store, manifests[3]) == []


def test_what_an_unsound_step_refers_to_is_left_for_a_person_too(chain: tuple[Store, list[Manifest]]) -> None:
    store, manifests = chain
    own = manifests[1].own_paths[0]
    kept_bytes = store.read_all(own)
    store.remove(own)
    save(store, TWO, (), step=9)
    result = prune(store, 1, lease_s=0, now_s=1e12)
    assert ([one.step for one in result.unsound], result.kept) == ([2], [9])
    store.create(own, [memoryview(kept_bytes)])  # a person brings it back
    assert verify(store, load(store, 2)) == []


def test_what_a_dead_writer_left_in_an_attempt_in_use_is_garbage(chain: tuple[Store, list[Manifest]]) -> None:
    store, manifests = chain
    store.put("step-00000004/a1/w0099-00.safetensors", b"torn")
    assert prune(store, 9, lease_s=60).garbage == []
    assert prune(store, 9, lease_s=0, now_s=1e12).garbage == ["step-00000004/a1/w0099-00.safetensors"]
    assert all(verify(store, load(store, m.step)) == [] for m in manifests)
