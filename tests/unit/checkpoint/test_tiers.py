"""Two stores and one truth: copies are checked, the newest whole step wins, what is damaged here is read there."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from elastictrain_checkpoint import (
    AlreadyCommitted,
    Copier,
    CorruptData,
    Manifest,
    NoCheckpoint,
    Reader,
    Skipped,
    Stopped,
    Store,
    copy_step,
    digest,
    heal,
    list_steps,
    load,
    newest_good,
    newest_in,
    prune,
    verify,
)
from elastictrain_checkpoint.copying import Bucket
from tests.unit.checkpoint.build import changed, flip, make_state, memory_store, save

STATE = make_state({"model/a": ("F32", (700, 1024)), "model/b": ("U8", (3_000_000,))})
HEADER = 4096


@pytest.fixture
def near(tmp_path: Path) -> Store:
    return Store(tmp_path / "near")


@pytest.fixture(params=["file", "memory"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / "far") if request.param == "file" else memory_store()


def both(near: Store, far: Store, step: int = 1, **rest: Any) -> Manifest:
    manifest = save(near, STATE, step=step, **rest)
    assert copy_step(near, far, step).raw == manifest.raw
    return manifest


# --- copying ---


def test_a_copy_is_the_same_checkpoint(near: Store, far: Store) -> None:
    first = save(near, STATE, step=1, cells=True)
    state = changed(STATE, 1, ("model/b", 0, 1))
    second = save(near, state, step=2, base=first)
    copy_step(near, far, 2)
    assert list_steps(far) == [2]  # the packs of step 1 are there, its manifest is not
    found = load(far, 2)
    assert (found.raw, verify(far, found), digest(far, found)) == (second.raw, [], second.digest)
    assert copy_step(near, far, 1).raw == first.raw
    assert prune(far, 9, lease_s=0, now_s=1e12).garbage == []


def test_damage_is_not_copied(near: Store, far: Store) -> None:
    manifest = save(near, STATE, step=1)
    flip(near, manifest.paths[1], HEADER + 10)
    with pytest.raises(CorruptData, match=r"w0001-00\.safetensors, block 0 .*damaged in .*near; it is not copied"):
        copy_step(near, far, 1)
    assert list_steps(far) == []
    with pytest.raises(NoCheckpoint):
        copy_step(near, far, 7)


def test_what_an_unfinished_copy_left_is_checked_and_used(near: Store, far: Store) -> None:
    manifest = save(near, STATE, step=1)
    packs = [near.read_all(path) for path in manifest.paths]
    far.create(manifest.paths[0], [memoryview(packs[0])])
    far.create(manifest.paths[1], [memoryview(bytes(len(packs[1])))])  # the right size, and lost by a power cut
    sent = []
    copy_step(near, far, 1, sent.append)
    assert sum(sent) == len(packs[1])
    assert verify(far, load(far, 1)) == []


def test_a_torn_pack_is_replaced(near: Store, far: Store) -> None:
    manifest = save(near, STATE, step=1)
    far.create(manifest.paths[0], [memoryview(near.read_all(manifest.paths[0])[:100])])
    copy_step(near, far, 1)
    assert verify(far, load(far, 1)) == []


def test_a_step_of_a_lower_generation_is_replaced_and_a_higher_one_never(near: Store, far: Store) -> None:
    save(far, STATE, step=1, attempt="old", generation=1)
    new = save(near, STATE, step=1, attempt="new", generation=2)
    copy_step(near, far, 1)
    assert load(far, 1).raw == new.raw
    assert far.list("step-00000001") == ["MANIFEST.json", "new"]
    other = memory_store()
    save(other, STATE, step=1, attempt="late", generation=1)
    with pytest.raises(
        AlreadyCommitted, match="has step 1 of attempt new, generation 2; the one to copy is of attempt"
    ):
        copy_step(other, far, 1)
    flip(far, "step-00000001/MANIFEST.json", 40)
    copy_step(near, far, 1)  # a damaged manifest is none
    assert load(far, 1).raw == new.raw


def test_the_rate_is_bounded() -> None:
    bucket = Bucket(bytes_per_s=100.0)
    assert [bucket.wait_s(50, now_s) for now_s in (10.0, 10.0, 10.0, 20.0, 20.25)] == [0.0, 0.5, 1.0, 0.0, 0.25]


def test_the_copier_copies_in_the_background_newest_first(near: Store, far: Store) -> None:
    for step in (1, 2, 3):
        save(near, STATE, step=step)
    order: list[int] = []
    with Copier(near, far, copied=lambda manifest: order.append(manifest.step)) as copier:
        assert copier.catch_up() == [1, 2, 3]
        assert copier.wait(60)
        assert (copier.durable_step, copier.waiting, copier.error) == (3, set(), None)
    assert sorted(order) == [1, 2, 3]
    assert list_steps(far) == [1, 2, 3]
    with pytest.raises(Stopped, match="step 4 was submitted to a copier that is closed"):
        copier.submit(4)


def test_a_copy_that_fails_is_kept_and_tried_again(near: Store, far: Store) -> None:
    manifest = save(near, STATE, step=1)
    save(near, STATE, step=2)
    flip(near, manifest.paths[0], HEADER)
    with Copier(near, far) as copier:
        copier.submit(1)
        assert copier.wait(60)
        assert isinstance(copier.error, CorruptData)
        assert copier.waiting == {1}
        assert prune(near, 1, protect=copier.waiting).kept == [1, 2]
        flip(near, manifest.paths[0], HEADER)
        copier.submit(2)
        assert copier.wait(60)
        assert (copier.error, copier.waiting) == (None, set())
    assert list_steps(far) == [1, 2]


def test_a_step_that_retention_took_is_dropped(near: Store, far: Store) -> None:
    save(near, STATE, step=2)
    with Copier(near, far) as copier:
        copier.submit(1)
        assert copier.wait(60)
        assert (copier.waiting, copier.error) == (set(), None)


def test_a_copier_that_is_closed_in_the_middle_goes_on_next_time(near: Store, far: Store) -> None:
    save(near, STATE, step=1)
    copier = Copier(near, far, bytes_per_s=1.0)  # the second block would wait for days
    copier.submit(1)
    entered = threading.Event()
    pace = copier._pace

    def noted(size_bytes: int) -> None:
        entered.set()
        pace(size_bytes)

    copier._pace = noted  # type: ignore[method-assign]
    copier.retry()
    assert copier.close(60)
    assert list_steps(far) == []
    with Copier(near, far) as again:
        assert again.catch_up() == [1]
        assert again.wait(60)
    assert verify(far, load(far, 1)) == []


# --- the newest that is whole ---


def test_the_newest_whole_step_of_all_tiers_wins(near: Store, far: Store) -> None:
    both(near, far, 1)
    both(near, far, 2)
    three = save(near, STATE, step=3)
    found = newest_in([near, far])
    assert found is not None
    assert (found.manifest.step, found.stores) == (3, (near, far))
    near.remove(three.paths[0])  # not copied yet, and lost
    skipped: list[Skipped] = []
    found = newest_in([near, far], skipped)
    assert found is not None
    assert (found.manifest.step, [one.step for one in skipped]) == (2, [3])
    assert skipped[0].why.startswith(f"step 3: {three.paths[0]} is missing")
    near.remove("step-00000002/MANIFEST.json")
    found = newest_in([near, far])
    assert found is not None
    assert (found.manifest.step, found.stores) == (2, (near, far))
    near.remove(found.manifest.paths[0])
    found = newest_in([near, far], before=3)
    assert found is not None
    assert found.stores == (far, near)  # who has all of it comes first
    assert newest_in([near, far], before=1) is None


def test_a_step_that_no_tier_has_whole_but_all_of_them_together(near: Store, far: Store) -> None:
    manifest = both(near, far)
    near.remove(manifest.paths[0])
    far.remove(manifest.paths[1])
    found = newest_in([near, far])
    assert found is not None
    reader = found.reader()
    assert all(reader.read(name).tobytes() == data for name, (_, _, data) in STATE.items())


def test_of_two_commits_of_a_step_the_later_one_is_the_one_that_happened(near: Store, far: Store) -> None:
    save(near, STATE, step=1, attempt="old", generation=1)
    new = save(far, STATE, step=1, attempt="new", generation=2)
    found = newest_in([near, far])
    assert found is not None
    assert found.manifest.raw == new.raw
    assert found.stores[0] is far


# --- healing ---


def test_a_flipped_bit_is_named_and_read_from_the_other_tier(near: Store, far: Store) -> None:
    manifest = both(near, far)
    flip(near, manifest.paths[0], HEADER + (1 << 20) + 7)
    with pytest.raises(CorruptData, match=r"w0000-00\.safetensors, block 1 .*tensors in it: model/a"):
        Reader(near, manifest).read("model/a")
    reader = Reader(near, manifest, others=[memory_store(), far])
    assert all(reader.read(name).tobytes() == data for name, (_, _, data) in STATE.items())
    assert [(one.file, one.block, one.tensors, one.source) for one in reader.healed] == [
        (manifest.paths[0], 1, ("model/a", "model/b"), far.url)
    ]


@pytest.mark.parametrize("harm", ["missing", "short", "empty"])
def test_a_lost_or_short_file_is_read_from_the_other_tier(near: Store, far: Store, harm: str) -> None:
    manifest = both(near, far)
    data = near.read_all(manifest.paths[1])
    near.remove(manifest.paths[1])
    if harm != "missing":
        near.create(manifest.paths[1], [memoryview(data[: 5000 if harm == "short" else 0])])
    reader = Reader(near, manifest, others=[far])
    assert all(reader.read(name).tobytes() == value for name, (_, _, value) in STATE.items())
    assert {one.file for one in reader.healed} == {manifest.paths[1]}
    with pytest.raises(CorruptData):
        Reader(near, manifest).read("model/a")


def test_damage_in_the_same_block_everywhere_is_an_error(near: Store, far: Store) -> None:
    manifest = both(near, far)
    for store in (near, far):
        flip(store, manifest.paths[0], HEADER + 7)
    with pytest.raises(CorruptData, match=r"block 0 .*its hash differs") as caught:
        Reader(near, manifest, others=[far]).read("model/a")
    assert caught.value.tensors == ("model/a",)


def test_the_newest_older_step_that_is_good(near: Store, far: Store) -> None:
    for step in (1, 2, 3, 4):
        both(near, far, step)
    for store in (near, far):
        flip(store, "step-00000004/a1/w0000-00.safetensors", HEADER + 7)
    flip(near, "step-00000003/a1/w0001-00.safetensors", HEADER + 7)
    skipped: list[Skipped] = []
    found = newest_good([near, far], skipped)
    assert found is not None
    assert (found.manifest.step, [one.step for one in skipped]) == (3, [4])
    assert "step-00000004/a1/w0000-00.safetensors, block 0" in skipped[0].why
    found = newest_good([near])
    assert found is not None
    assert found.manifest.step == 2
    found = newest_good([near, far], before=2)
    assert found is not None
    assert found.manifest.step == 1
    assert newest_good([near, far], before=1) is None


def test_heal_writes_anew_what_is_damaged(near: Store, far: Store) -> None:
    manifest = both(near, far, cells=True)
    flip(near, manifest.paths[0], HEADER + (1 << 20) + 7)
    near.remove(manifest.paths[1])
    cells = manifest.sidecars[0][0]
    flip(near, cells, 3)
    flip(near, manifest.path, 40)
    result = heal(near, 1, [far])
    assert result.rewritten == [*manifest.paths, cells, manifest.path]
    assert result.left == []
    assert (manifest.paths[0], 1, ("model/a", "model/b"), far.url) in [
        (h.file, h.block, h.tensors, h.source) for h in result.healed
    ]
    assert verify(near, load(near, 1)) == []
    again = heal(near, 1, [far])
    assert (again.healed, again.rewritten, again.left) == ([], [], [])


def test_heal_leaves_what_is_whole_nowhere_as_it_is(near: Store, far: Store) -> None:
    manifest = both(near, far)
    for store in (near, far):
        flip(store, manifest.paths[0], HEADER + 7)
    flip(near, manifest.paths[1], HEADER + 7)
    before = near.read_all(manifest.paths[0])
    result = heal(near, 1, [far])
    assert result.rewritten == [manifest.paths[1]]
    assert result.left == [f"{manifest.paths[0]}, block 0: damaged, and whole in no other store"]
    assert near.read_all(manifest.paths[0]) == before
    assert near.list("step-00000001/a1") == ["w0000-00.safetensors", "w0001-00.safetensors"]


def test_a_longer_file_is_healed_too(near: Store, far: Store) -> None:
    manifest = both(near, far)
    near.put(manifest.paths[0], near.read_all(manifest.paths[0]) + b"more")
    assert heal(near, 1, [far]).rewritten == [manifest.paths[0]]
    assert verify(near, load(near, 1)) == []


def test_without_a_manifest_there_is_nothing_to_heal(near: Store, far: Store) -> None:
    with pytest.raises(NoCheckpoint, match="has a sound manifest of step 1"):
        heal(near, 1, [far])
