"""Copies between stores: checked on the way, gone on with after a failure, nothing there before the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from elastictrain_checkpoint import AlreadyCommitted, CorruptData, Manifest, Store, list_steps, load, newest, verify
from elastictrain_checkpoint.rehearsal import Rehearsal
from elastictrain_checkpoint.transfer import copy_checkpoint
from tests.unit.checkpoint.build import flip, make_state, memory_store, save, sign

STATE = make_state({"big": ("F32", (800, 1000)), "half": ("BF16", (50_000,)), "small": ("BF16", (50,))})


class Dies(Store):
    """A store that fails at the n-th new file, or at the manifest."""

    def __init__(self, url: str | Path, at: int) -> None:
        super().__init__(url)
        self.left = at

    def replace(self, path: str, blocks: Iterable[memoryview]) -> int:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")
        return super().replace(path, blocks)

    def publish(self, path: str, data: bytes) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")
        super().publish(path, data)


@pytest.fixture
def saved() -> tuple[Store, Manifest]:
    store = memory_store()
    return store, save(store, STATE, (), step=7, pack_bytes=1)


def test_a_copy_is_the_same_and_again_does_nothing(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    source, manifest = saved
    target = Store(tmp_path)
    seen: list[tuple[int, int]] = []
    done = copy_checkpoint(source, manifest, target, progress=lambda *told: seen.append(told), check=True)
    assert (done.committed, done.copied, done.present) == (True, manifest.paths, ())
    assert done.copied_bytes == manifest.size_bytes
    assert seen[-1] == (manifest.size_bytes, manifest.size_bytes)
    assert [count for count, _ in seen] == sorted(count for count, _ in seen)
    there = newest(target)
    assert there is not None
    assert there.raw == manifest.raw
    assert verify(target, there) == []
    again = copy_checkpoint(source, manifest, target)
    assert (again.committed, again.copied, again.present, again.copied_bytes) == (False, (), manifest.paths, 0)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_it_goes_on_where_it_failed(saved: tuple[Store, Manifest], tmp_path: Path, at: int) -> None:
    source, manifest = saved
    assert len(manifest.paths) == 3
    with pytest.raises(OSError, match="No space left"):
        copy_checkpoint(source, manifest, Dies(tmp_path, at))
    target = Store(tmp_path)
    assert newest(target) is None, "nothing exists before the manifest"
    done = copy_checkpoint(source, manifest, target)
    assert len(done.present) == at - 1
    assert len(done.copied) == 3 - (at - 1)
    assert verify(target, load(target, 7)) == []


def test_a_copy_that_fails_late_leaves_what_another_has_copied_meanwhile(
    saved: tuple[Store, Manifest], tmp_path: Path
) -> None:
    source, manifest = saved
    target = Store(tmp_path)

    def overtaken(_: int) -> None:
        copy_checkpoint(source, manifest, target)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        copy_checkpoint(source, manifest, target, pace=overtaken)
    assert verify(target, load(target, 7)) == []


def test_a_pack_that_somebody_removes_before_the_manifest_is_there_makes_no_checkpoint(
    saved: tuple[Store, Manifest], tmp_path: Path
) -> None:
    class Cleaned(Store):
        def publish(self, path: str, data: bytes) -> None:
            self.remove(manifest.paths[0])
            super().publish(path, data)

    source, manifest = saved
    with pytest.raises(OSError, match=r"step 7: removed by somebody else while it was copied: .* is missing"):
        copy_checkpoint(source, manifest, Cleaned(tmp_path))
    assert list_steps(Store(tmp_path)) == []
    assert copy_checkpoint(source, manifest, Store(tmp_path)).copied == manifest.paths[:1]


def test_a_torn_or_damaged_pack_in_the_target_is_written_anew(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    source, manifest = saved
    target = Store(tmp_path)
    copy_checkpoint(source, manifest, target)
    target.remove(manifest.path)
    flip(target, manifest.paths[0], 5000)
    target.put(manifest.paths[1], target.read_all(manifest.paths[1])[:-1])
    done = copy_checkpoint(source, manifest, target)
    assert done.copied == manifest.paths[:2]
    assert verify(target, load(target, 7)) == []


def test_a_damaged_source_is_named_and_never_committed(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    source, manifest = saved
    flip(source, manifest.paths[1], 5000)
    target = Store(tmp_path)
    with pytest.raises(CorruptData, match=r"block 0 .*its hash differs") as caught:
        copy_checkpoint(source, manifest, target)
    assert caught.value.file == manifest.paths[1]
    assert newest(target) is None
    assert target.size(manifest.paths[1]) is None, "what does not fit its sum is not left there"
    source.put(manifest.paths[1], source.read_all(manifest.paths[1])[:-1])
    with pytest.raises(CorruptData, match="the file is cut short"):
        copy_checkpoint(source, manifest, target)
    source.remove(manifest.paths[1])
    with pytest.raises(CorruptData, match="the file is missing"):
        copy_checkpoint(source, manifest, target)


def test_check_finds_storage_that_loses_bytes(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    class Forgets(Store):
        def replace(self, path: str, blocks: Iterable[memoryview]) -> int:
            size = super().replace(path, blocks)
            flip(self, path, 4200)
            return size

    source, manifest = saved
    with pytest.raises(CorruptData, match="does not hold what was just written to it"):
        copy_checkpoint(source, manifest, Forgets(tmp_path), check=True)
    assert newest(Store(tmp_path)) is None


def test_another_checkpoint_of_that_step_is_never_overwritten(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    source, manifest = saved
    target = Store(tmp_path)
    other = save(target, make_state(seed=3), (), step=7, attempt="other")
    with pytest.raises(AlreadyCommitted, match="has another checkpoint of step 7; it is not overwritten"):
        copy_checkpoint(source, manifest, target)
    assert load(target, 7).raw == other.raw
    assert all(target.size(path) is None for path in manifest.paths if path not in other.paths)


def test_packs_of_an_earlier_step_go_along(saved: tuple[Store, Manifest], tmp_path: Path) -> None:
    source, first = saved
    told = json.loads(first.raw)
    for file in told["files"]:
        file["path"] = "../step-00000007/" + file["path"]
    told.update(step=8, base=[7])
    source.put("step-00000008/MANIFEST.json", sign(told))
    target = Store(tmp_path)
    copy_checkpoint(source, load(source, 8), target)
    assert verify(target, load(target, 8)) == []
    assert newest(target) is not None
    done = copy_checkpoint(source, first, target)
    assert (done.committed, done.copied) == (True, ())


def test_in_a_rehearsal_nothing_happens(saved: tuple[Store, Manifest]) -> None:
    store, manifest = saved
    trial = Rehearsal(store)
    trial.remove(manifest.path)
    assert trial.removed == [manifest.path]
    assert load(trial, 7).raw == manifest.raw
    for call in (
        lambda: trial.put("x", b""),
        lambda: trial.publish("x", b""),
        lambda: trial.create("x", []),
    ):
        with pytest.raises(PermissionError, match="x: nothing is written in a rehearsal"):
            call()
    assert store.list() == ["LATEST", "step-00000007"]
