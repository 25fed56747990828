"""The store hands its options to the file system behind the URL, and nothing else does."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from elastictrain_checkpoint import Store, newest, verify
from tests.unit.checkpoint.build import make_state, save


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """An object store that opens only with the right key, and remembers what it was opened with."""

    protocol = "bucketstub"
    cachable = False
    opened: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, *, endpoint: str = "", key: str = "", **rest: Any) -> None:
        super().__init__(**rest)
        self.opened.append({"endpoint": endpoint, "key": key, **rest})
        if key != "right":
            raise PermissionError(f"key {key!r} does not open {endpoint}")


@pytest.fixture
def bucket() -> str:
    fsspec.register_implementation("bucketstub", Bucket, clobber=True)
    Bucket.opened.clear()
    return f"bucketstub://{uuid.uuid4().hex}/run"


def test_storage_options_reach_the_file_system(bucket: str) -> None:
    options = {"endpoint": "https://objects.example", "key": "right"}
    store = Store(bucket, storage_options=options)
    assert Bucket.opened == [options]
    manifest = save(store, make_state(), (0.3,), step=4)
    again = Store(bucket, storage_options=options)
    found = newest(again)
    assert found is not None
    assert found.raw == manifest.raw
    assert verify(again, found) == []
    assert options == {"endpoint": "https://objects.example", "key": "right"}, "the caller's options stay as they are"


def test_without_the_options_the_file_system_refuses(bucket: str) -> None:
    with pytest.raises(PermissionError, match=r"^key '' does not open $"):
        Store(bucket)
    with pytest.raises(PermissionError, match=r"^key 'wrong' does not open e$"):
        Store(bucket, storage_options={"endpoint": "e", "key": "wrong"})


def test_the_options_are_not_shown(bucket: str, tmp_path: Path) -> None:
    assert repr(Store(bucket, storage_options={"key": "right"})) == f"Store({bucket!r})"
    assert repr(Store(tmp_path, storage_options={"auto_mkdir": True})) == f"Store({str(tmp_path)!r})"
