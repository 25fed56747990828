"""Whether a store creates a file only where there is none: tried out, because some take the condition and ignore it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from elastictrain_checkpoint import Store
from elastictrain_checkpoint.posix import PosixBackend
from elastictrain_checkpoint.remote import RemoteBackend


class Own(MemoryFileSystem):
    """Memory of a test's own."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False


class Looking(Own):
    """As most file systems of fsspec: looks, and then writes."""

    pipe_file = AbstractFileSystem.pipe_file


class Older(Own):
    """Of a time before conditional creates."""

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        super().pipe_file(path, value, **kwargs)


class Ignoring(Own):
    """Takes the condition, and writes over."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        del mode
        super().pipe_file(path, value, **kwargs)


class Refusing(Own):
    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create":
            raise NotImplementedError("mode")
        super().pipe_file(path, value, **kwargs)


class Failing(Own):
    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        raise ConnectionError("reset")


class Asynchronous(AsyncFileSystem):  # type: ignore[misc]
    """What fsspec gives to one that has no create of its own."""

    cachable = False


class Stuttering(Own):
    """A client that asks again when the answer to its first create is lost."""

    asked: ClassVar[int] = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode, **kwargs)
        Stuttering.asked += 1
        if Stuttering.asked == 1:
            super().pipe_file(path, value, mode, **kwargs)


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    Own.store.clear()
    Stuttering.asked = 0
    yield
    Own.store.clear()


def on(system: Any) -> Store:
    return Store("test://place", backend=RemoteBackend(system, "/place"))


@pytest.mark.parametrize("url", ["{tmp}", "memory://exclusive-{tmp}"])
def test_a_disk_and_memory_create_once(tmp_path: Path, url: str) -> None:
    store = Store(url.format(tmp=tmp_path))
    assert store.probe_exclusive("eras/.probe") == ""
    assert store.list("eras") == []


@pytest.mark.parametrize(
    ("system", "why"),
    [
        (Looking, r"^Looking offers no conditional create, it looks first and then writes$"),
        (Older, r"^Older offers no conditional create"),
        (Asynchronous, r"^Asynchronous offers no conditional create"),
        (Ignoring, r"^the store behind Ignoring takes a conditional create and writes over what is there$"),
        (Refusing, r"^Refusing refuses a conditional create \(NotImplementedError\('mode'\)\)$"),
    ],
)
def test_a_store_that_may_write_over_says_so(system: Any, why: str) -> None:
    assert re.search(why, on(system()).probe_exclusive("eras/.probe"))
    assert Own.store == {}


def test_a_lost_answer_is_no_refusal() -> None:
    assert on(Stuttering()).probe_exclusive("eras/.probe") == ""
    assert Stuttering.asked == 1  # the second create is refused
    Own().pipe_file("/place/eras/.taken", b"of another")
    with pytest.raises(FileExistsError):
        on(Own()).probe_exclusive("eras/.taken")


def test_a_failure_of_the_store_is_one_and_not_a_verdict(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        on(Failing()).probe_exclusive("eras/.probe")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file"):
        Store(file / "below").probe_exclusive("eras/.probe")


def test_a_mount_that_makes_what_is_there_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PosixBackend, "publish", PosixBackend.put)
    assert (
        Store(tmp_path).probe_exclusive("eras/.probe")
        == f"the file system of {tmp_path} makes a file that is there already"
    )
    assert list((tmp_path / "eras").iterdir()) == []


def test_storage_of_another_kind_has_to_say_it(tmp_path: Path) -> None:
    class Plain:
        pass

    assert Store("x", backend=Plain()).probe_exclusive("a") == (  # type: ignore[arg-type]
        "Plain does not say whether it creates a file only where there is none"
    )
