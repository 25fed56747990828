"""Where one step is to be read, over stores that hold it, hold another commit of it, lack it, or do not answer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from elastictrain_checkpoint import (
    CorruptData,
    InvalidManifest,
    NoCheckpoint,
    Reader,
    Store,
    copy_step,
    find,
    load,
    reachable,
    sidecar,
    tiers,
)
from elastictrain_checkpoint.asking import Asked
from elastictrain_checkpoint.documents import pack_documents, unpack_documents
from elastictrain_checkpoint.posix import PosixBackend
from tests.unit.checkpoint.build import flip, make_state, save

STATE = make_state({"model/a": ("F32", (300, 1024)), "model/b": ("U8", (1_500_000,))})
HEADER = 4096


class Broken(PosixBackend):
    """A disk of which nothing can be read."""

    def read_all(self, path: str) -> bytes:
        raise OSError(5, "Input/output error", path)

    def read_parts(self, path: str, start: int, outs: Any, arrived: Any = None) -> int:
        raise OSError(5, "Input/output error", path)

    def list(self, path: str) -> list[str]:
        raise RuntimeError("the token has expired")


class Hanging(PosixBackend):
    """A disk that never answers."""

    def read_all(self, path: str) -> bytes:
        threading.Event().wait()
        return b""

    def list(self, path: str) -> list[str]:
        threading.Event().wait()
        return []


@pytest.fixture
def near(tmp_path: Path) -> Store:
    return Store(tmp_path / "near")


@pytest.fixture
def far(tmp_path: Path) -> Store:
    return Store(tmp_path / "far")


@pytest.fixture
def broken(tmp_path: Path) -> Store:
    return Store(tmp_path / "broken", backend=Broken(tmp_path / "broken"))


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(tiers, "ANSWER_S", 0.05)
    monkeypatch.setattr(tiers, "LAST_ANSWER_S", 0.05)
    return Store(tmp_path / "hanging", backend=Hanging(tmp_path / "hanging"))


def test_the_nearest_that_is_whole_comes_first(near: Store, far: Store) -> None:
    save(near, STATE, step=2)
    copy_step(near, far, 2)
    assert [store.url for store in find((near, far), 2).stores] == [near.url, far.url]
    assert [store.url for store in find((far, near), 2).stores] == [far.url, near.url]
    near.remove(load(near, 2).paths[0])
    found = find((near, far), 2)
    assert [store.url for store in found.stores] == [far.url, near.url]
    assert found.reader().read("model/a").tobytes() == STATE["model/a"][2]


def test_packs_may_lie_in_several(near: Store, far: Store) -> None:
    manifest = save(near, STATE, step=2)
    copy_step(near, far, 2)
    near.remove(manifest.paths[0])
    far.remove(manifest.paths[1])
    reader = find((near, far), 2).reader()
    for name, tensor in STATE.items():
        assert reader.read(name).tobytes() == tensor[2]
    assert reader.healed
    raw = near.read_all(manifest.paths[1])
    near.remove(manifest.paths[1])
    near.create(manifest.paths[1], [memoryview(raw[:-1])])
    with pytest.raises(CorruptData, match=r"step 2: .*w0001-00\.safetensors is \d+ bytes, not"):
        find((near, far), 2)  # cut short in one, missing in the other


def test_of_different_commits_the_later_one_counts(near: Store, far: Store) -> None:
    save(near, STATE, step=2, attempt="old", generation=1)
    save(far, STATE, step=2, attempt="new", generation=2)
    assert find((near, far), 2).manifest.attempt == "new"
    far.remove(load(far, 2).paths[0])
    assert find((near, far), 2).manifest.attempt == "old", "if it is whole"


def test_a_manifest_that_cannot_be_believed_is_none(near: Store, far: Store) -> None:
    save(near, STATE, step=2)
    copy_step(near, far, 2)
    flip(near, "step-00000002/MANIFEST.json", 40)
    assert find((near, far), 2).manifest.raw == load(far, 2).raw
    flip(far, "step-00000002/MANIFEST.json", 40)
    with pytest.raises(InvalidManifest, match=rf"^{near.url}: .*; {far.url}: "):
        find((near, far), 2)
    with pytest.raises(NoCheckpoint, match=rf"^none of {near.url}, {far.url} has a checkpoint of step 7$"):
        find((near, far), 7)


def test_others_stand_in_for_a_store_that_does_not_answer(near, far, broken, hanging) -> None:
    save(near, STATE, step=2)
    for silent in (broken, hanging):
        assert [store.url for store in find((near, silent), 2).stores] == [near.url]
        assert [store.url for store in find((silent, near), 2).stores] == [near.url]
    with pytest.raises(OSError, match=r"^step 3 is whole in no store that answers; .*broken does not answer: OSError"):
        find((near, broken), 3)
    near.remove(load(near, 2).paths[0])
    with pytest.raises(OSError, match=r"hanging does not answer: no answer within 0\.05 s"):
        find((near, hanging), 2)
    there, why = reachable((broken, near, hanging), 0.05)
    assert there == [near]
    assert why == {broken.url: "RuntimeError: the token has expired", hanging.url: "no answer within 0.05 s"}


def test_nobody_waits_for_the_last_store_while_another_has_the_step(near, hanging, monkeypatch) -> None:
    monkeypatch.setattr(tiers, "LAST_ANSWER_S", 0.2)
    waited_s: list[float] = []
    answer = Asked.answer

    def timed(self: Any, timeout_s: float) -> Any:
        waited_s.append(timeout_s)
        return answer(self, timeout_s)

    monkeypatch.setattr(Asked, "answer", timed)
    save(near, STATE, step=2)
    assert [store.url for store in find((hanging, near), 2).stores] == [near.url]
    assert max(waited_s) <= 0.05, "also for the nearest one"
    with pytest.raises(OSError, match=r"hanging does not answer: no answer within 0\.2 s"):
        find((hanging, near), 3)
    assert max(waited_s) > 0.05


class Unseen(PosixBackend):
    """A disk that does not say which packs it has."""

    def size(self, path: str) -> int | None:
        raise OSError(5, "Input/output error", path)


def test_a_store_that_fails_when_its_packs_are_looked_at_is_passed_over(near: Store, tmp_path: Path) -> None:
    save(near, STATE, step=2)
    unseen = Store("unseen", backend=Unseen(tmp_path / "near"))
    assert [store.url for store in find((unseen, near), 2).stores] == [near.url]
    with pytest.raises(OSError, match=r"unseen does not answer: OSError: .*Input/output error"):
        find((unseen,), 2)


def test_a_damaged_table_of_chunks_hides_no_whole_copy(near: Store, far: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(sidecar, "TABLE_CHUNKS", 1)
    manifest = save(near, STATE, step=2)
    assert manifest.chunks is not None
    copy_step(near, far, 2)
    path = f"step-00000002/{manifest.chunks.path}"
    flip(near, path, 100)
    assert find((near, far), 2).manifest.raw == manifest.raw
    with pytest.raises(InvalidManifest, match=r"is not as it was written"):
        pack_documents(near, manifest)
    assert unpack_documents(pack_documents(far, manifest), 2).raw == manifest.raw
    far.remove("step-00000002/MANIFEST.json")
    with pytest.raises(InvalidManifest, match=rf"^{near.url}: .* is not as it was written"):
        find((near, far), 2)


def test_what_cannot_be_read_near_by_is_read_elsewhere(near: Store, far: Store, broken: Store) -> None:
    manifest = save(near, STATE, step=2)
    copy_step(near, far, 2)
    reader = Reader(broken, manifest, others=[far])
    assert reader.read("model/b").tobytes() == STATE["model/b"][2]
    assert "Input/output error" in reader.healed[0].message
    for others in ([], [broken]):  # then it is the storage that fails, not what is stored
        with pytest.raises(OSError, match="Input/output error"):
            Reader(broken, manifest, others=others).read("model/b")


def test_a_question_that_fails_says_so_each_time() -> None:
    def fail() -> None:
        raise RuntimeError("no")

    asked = Asked(fail)
    for _ in range(2):
        with pytest.raises(OSError, match=r"^RuntimeError: no$"):
            asked.answer(60)
    assert Asked(lambda: 7).answer(60) == 7
