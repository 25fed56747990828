"""Folders and globs are listed wholly or not at all, on every kind of store."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem

from elastictrain.data.files import find_files
from elastictrain.data.listing import patient
from elastictrain.data.retry import Retry
from elastictrain.errors import DataError, StoreFailed

FILES = (
    "a.jsonl", "b.txt", "0/a.jsonl", "0/b.jsonl", "0/deep/c.jsonl", "1/d.jsonl", "1/deep/er/e.jsonl", "1/x[1].jsonl",
    "10/f.jsonl", "_hidden/g.jsonl",
)  # fmt: skip


class Store(AsyncFileSystem):  # type: ignore[misc]
    """A store as fsspec's asynchronous ones are: `find` and `glob` are fsspec's. Some requests fail."""

    protocol = "halving"
    cachable = False
    root: ClassVar[Path] = Path()
    asked: ClassVar[list[str]] = []
    failing: ClassVar[dict[int, Exception]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("halving://").strip("/")

    def _request(self, path: str) -> Path:
        Store.asked.append(path)
        if (error := Store.failing.get(len(Store.asked) - 1)) is not None:
            raise error
        return Store.root / path.strip("/")

    def _entry(self, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        return {"name": f"/{path.relative_to(Store.root)}", "type": kind, "size": path.stat().st_size}

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return self._entry(self._request(path))

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        found = self._request(path)
        entries = [self._entry(one) for one in sorted(found.iterdir())]
        return entries if detail else [entry["name"] for entry in entries]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    fsspec.register_implementation("halving", Store, clobber=True)
    monkeypatch.setattr("elastictrain.data.retry._pause", lambda _: None)
    Store.root, Store.asked, Store.failing = tmp_path, [], {}
    for name in FILES:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text('{"x": 1}\n')
    return tmp_path / "data"


def names(path: str, **settings: Any) -> list[str]:
    return [file.path for file in find_files(path, "jsonl", **settings).files]


ALL = sorted(f"/data/{name}" for name in FILES if name.endswith(".jsonl") and not name.startswith("_"))


@pytest.mark.parametrize("path", ["halving://data", "halving://data/**/*.jsonl"])
def test_whichever_request_fails_the_listing_is_whole(path: str) -> None:
    whole = names(path)
    assert set(whole) >= set(ALL) - {"/data/a.jsonl"}
    requests = len(Store.asked)
    assert requests > 10
    for number in range(requests):
        Store.asked, Store.failing = [], {number: ConnectionError("reset")}
        assert names(path) == whole
        assert len(Store.asked) == requests + 1


@pytest.mark.parametrize("path", ["halving://data", "halving://data/*/*.jsonl", "halving://data/**/*.jsonl"])
@pytest.mark.parametrize("error", [ConnectionError("reset"), PermissionError("no")])
def test_or_it_fails(path: str, error: Exception) -> None:
    names(path)
    requests = len(Store.asked)
    for number in range(requests):
        Store.asked, Store.failing = [], {number: error}
        with pytest.raises(StoreFailed, match=r"^data\.path: 'halving://data.*' cannot be listed"):
            names(path, retry_s=0)


def test_fsspec_alone_would_have_listed_half() -> None:
    """What this guards against: it stands here so that nobody takes the guard away."""
    Store.failing = {3: ConnectionError("reset")}
    assert 0 < len(Store().find("/data")) < len(FILES)


@pytest.mark.parametrize(
    "pattern",
    [
        "*.jsonl", "*", "*/*.jsonl", "*/deep/*.jsonl", "*/*/*", "**", "**/*.jsonl", "**/deep/**/*.jsonl",
        "[01]/?.jsonl", "1*/*.jsonl", "0/*", "0/deep/c.*", "nothing/*.jsonl", "*/nothing/*", "?/**",
        "1/**/e.jsonl", "*/**/e.jsonl",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["Store", "Flat"])
def test_a_glob_is_what_it_is_on_a_disk(store: Path, pattern: str, kind: str) -> None:
    local = fsspec.filesystem("file")
    expected = sorted(posixpath.relpath(hit, store) for hit in local.glob(f"{store}/{pattern}") if not local.isdir(hit))
    found = patient({"Store": Store, "Flat": Flat}[kind](), Retry()).glob(f"/data/{pattern}")
    assert sorted(posixpath.relpath(hit, "/data") for hit in found) == expected
    assert len(set(found)) == len(found)


def test_a_glob_lists_only_folders_that_can_hold_a_hit() -> None:
    patient(Store(), Retry()).glob("/data/1*/deep/*.jsonl")
    assert sorted(Store.asked) == ["/data", "/data/1", "/data/1/deep", "/data/10"]


def test_what_is_not_there_is_no_failure_of_the_store() -> None:
    for path, said in (("halving://data/nothing/*.jsonl", "no file matches"), ("halving://nothing", "does not exist")):
        with pytest.raises(DataError, match=said) as caught:
            names(path)
        assert not isinstance(caught.value, StoreFailed)
    with pytest.raises(DataError, match=r"is no pattern \(.*\*\*"):
        names("halving://data/a**b/*.jsonl")


def test_a_folder_that_goes_while_it_is_listed_is_no_empty_one() -> None:
    Store.failing = {3: FileNotFoundError("gone meanwhile")}
    with pytest.raises(DataError, match=r"cannot be listed \(gone meanwhile\)") as caught:
        names("halving://data")
    assert not isinstance(caught.value, StoreFailed)


class Flat(Store):
    """Lists all below a prefix in one go, as the packages for S3 and Google Cloud Storage do."""

    __module__ = "s3fs.core"

    async def _find(self, path: str, maxdepth: Any = None, withdirs: bool = False, **_: Any) -> list[str]:
        folder = self._request(path)
        return sorted(f"/{one.relative_to(Store.root)}" for one in folder.rglob("*") if one.is_file())


def test_a_store_that_lists_all_in_one_go_is_asked_to() -> None:
    Store.failing = {0: ConnectionError("reset")}
    found = patient(Flat(), Retry()).find("/data")
    assert found == sorted(f"/data/{name}" for name in FILES)
    assert Store.asked == ["/data", "/data"]
    assert sorted(patient(Flat(), Retry()).glob("/data/**/c.jsonl")) == ["/data/0/deep/c.jsonl"]
    assert len(Store.asked) == 3


@pytest.mark.parametrize("pattern", ["*/deep/*.jsonl", "1*/**/*.jsonl", "[01]*/?.jsonl"])
def test_it_is_asked_once_for_a_glob_over_folders(pattern: str) -> None:
    Store.failing = {0: ConnectionError("reset")}
    found = patient(Flat(), Retry()).glob(f"/data/{pattern}")
    assert Store.asked == ["/data", "/data"]
    assert sorted(found) == sorted(patient(Store(), Retry()).glob(f"/data/{pattern}"))


def test_a_glob_in_one_folder_lists_that_folder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flat, "_find", None)  # it would list what lies below, too
    assert patient(Flat(), Retry()).glob("/data/0/*.jsonl") == ["/data/0/a.jsonl", "/data/0/b.jsonl"]
    assert Store.asked == ["/data/0"]


def test_a_store_that_lists_a_folder_in_itself_is_listed_once() -> None:
    entries = {"": ["", "a"], "a": ["a", "a/f"]}

    class Selfish:
        def ls(self, folder: str, detail: bool) -> list[dict[str, str]]:
            assert detail
            return [{"name": name, "type": "directory" if name in entries else "file"} for name in entries[folder]]

    assert patient(Selfish(), Retry()).find("") == ["a/f"]
