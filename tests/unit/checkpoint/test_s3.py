"""The whole library over s3://, against a server process that speaks S3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from elastictrain_checkpoint import (
    AlreadyCommitted,
    CorruptData,
    Manifest,
    Reader,
    StaleGeneration,
    Store,
    commit,
    digest,
    discard,
    list_steps,
    load,
    newest,
    prune,
    verify,
)
from elastictrain_checkpoint.cli import app
from elastictrain_checkpoint.transfer import copy_checkpoint
from tests.unit.checkpoint.build import flip, live_digest, make_state, save, write_parts

STATE = make_state()
LARGE = make_state({"big": ("F32", (3_000_000,)), "small": ("BF16", (50,))})
"""More than one part of a multipart upload."""


@pytest.fixture
def store(bucket: str, options: dict[str, Any]) -> Store:
    return Store(f"s3://{bucket}/runs/a", storage_options=options)


def test_save_load_verify(store: Store) -> None:
    assert newest(store) is None
    save(store, make_state(seed=1), step=10)
    manifest = save(store, LARGE, (0.4,), step=20, aliases={"tied": "small"})
    assert list_steps(store) == [10, 20]
    found = newest(store)
    assert found is not None
    assert found.raw == manifest.raw
    assert verify(store, found) == []
    assert digest(store, found) == found.digest == live_digest(LARGE, {"tied": "small"})
    reader = Reader(store, found)
    assert reader.read_flat("big", 1_000_000, 1_000_010).tobytes() == LARGE["big"][2][4_000_000:4_000_040]
    assert reader.read_bytes <= 2 << 20, "ranged reads, not the object"
    assert reader.read("tied").tobytes() == LARGE["small"][2]


def test_damage_is_found(store: Store) -> None:
    manifest = save(store, STATE, (), step=1)
    flip(store, manifest.paths[0], 5000)
    assert [problem.block for problem in verify(store, manifest)] == [0]
    with pytest.raises(CorruptData, match="its hash differs"):
        Reader(store, manifest).read("model/embed.weight")
    store.remove(manifest.paths[0])
    assert newest(store) is None


def test_the_server_lets_one_manifest_through(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if two look before either has put: `If-None-Match: *` decides, not the look."""
    store.publish("x/MANIFEST.json", b"first")
    with pytest.raises(FileExistsError):
        store.publish("x/MANIFEST.json", b"second")
    monkeypatch.setattr(store._backend.system, "exists", lambda *_, **__: False)  # type: ignore[attr-defined]
    with pytest.raises(FileExistsError):
        store.publish("x/MANIFEST.json", b"second")
    assert store.read_all("x/MANIFEST.json") == b"first"


def test_two_coordinators_race(store: Store) -> None:
    def parts(attempt: str) -> list[Any]:
        return write_parts(store, STATE, step=5, attempt=attempt)

    one, two, three = parts("one"), parts("two"), parts("three")
    first = commit(store, step=5, attempt="one", generation=2, parts=one)
    with pytest.raises(AlreadyCommitted, match="was committed by attempt one of generation 2"):
        commit(store, step=5, attempt="two", generation=3, parts=two)
    with pytest.raises(StaleGeneration, match="generation 1 is out of date"):
        commit(store, step=5, attempt="three", generation=1, parts=three)
    assert commit(store, step=5, attempt="one", generation=2, parts=one).raw == first.raw
    assert load(store, 5).raw == first.raw


def test_an_upload_that_fails_leaves_no_object_and_no_parts(store: Store, bucket: str, options: dict[str, Any]) -> None:
    def blocks() -> Iterator[memoryview]:
        for _ in range(60):
            yield memoryview(bytes(1 << 20))
        raise OSError("the disk it came from is gone")

    with pytest.raises(OSError, match="is gone"):
        store.create("step-00000001/a/w-00.safetensors", blocks())
    assert store.size("step-00000001/a/w-00.safetensors") is None
    import s3fs

    assert s3fs.S3FileSystem(**options).list_multipart_uploads(bucket) == []


def test_packs_are_created_once(store: Store) -> None:
    store.create("step-00000001/a/w-00.safetensors", [memoryview(b"x")])
    with pytest.raises(FileExistsError, match="pack names are used once"):
        store.create("step-00000001/a/w-00.safetensors", [memoryview(b"y")])
    assert store.read_all("step-00000001/a/w-00.safetensors") == b"x"


def test_copies_there_and_back(store: Store, tmp_path: Path) -> None:
    local = Store(tmp_path)
    manifest = save(local, LARGE, (0.3,), step=3)
    assert copy_checkpoint(local, manifest, store, check=True).copied == manifest.paths
    there = load(store, 3)
    assert there.raw == manifest.raw
    assert verify(store, there) == []
    again = copy_checkpoint(local, manifest, store)
    assert (again.copied, again.committed) == ((), False)
    back = Store(tmp_path / "back")
    copy_checkpoint(store, there, back)
    assert verify(back, load(back, 3)) == []


def test_prune_and_discard(store: Store) -> None:
    for step in (1, 2, 3):
        save(store, make_state(seed=step), step=step)
    write_parts(store, STATE, step=4, attempt="lost")
    done = prune(store, keep=1, lease_s=0, now_s=4e9)
    assert (done.kept, done.removed) == ([3], [1, 2])
    assert any(path.startswith("step-00000004/lost") for path in done.garbage)
    assert list_steps(store) == [3]
    assert [name for name in store.list() if name.startswith("step-")] == ["step-00000003"]
    discard(store, 3)
    assert newest(store) is None


def test_the_command_line(store: Store, bucket: str, options: dict[str, Any], tmp_path: Path) -> None:
    manifest: Manifest = save(store, STATE, step=7)
    client = options["client_kwargs"]
    given = ["-o", "key=k", "-o", "secret=s", "-o", f"client_kwargs.endpoint_url={client['endpoint_url']}"]

    def run(*args: str) -> Any:
        result = CliRunner().invoke(app, [*args, *given, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    url = store.url
    assert [row["digest"] for row in run("ls", url)] == [manifest.digest]
    assert run("verify", url)[0]["sound"] is True
    assert run("digest", url)["equal"] is True
    assert run("cp", url, str(tmp_path / "here"))[0]["committed"] is True
    assert run("cp", url, f"s3://{bucket}/other")[0]["committed"] is True
    assert run("cp", str(tmp_path / "here"), f"s3://{bucket}/back")[0]["committed"] is True, "-o is for the one on S3"
    assert run("diff", url, f"s3://{bucket}/other@7")["equal"] is True
    assert run("export", url, f"s3://{bucket}/hf")["files"] == ["model.safetensors"]
    assert run("import", f"s3://{bucket}/hf", f"s3://{bucket}/in", "--step", "1")["tensors"] == 5
    assert run("export", url, f"s3://{bucket}/dcp", "--format", "dcp")["files"] == [".metadata", "__0_0.distcp"]
    assert run("import", f"s3://{bucket}/dcp", f"s3://{bucket}/in", "--step", "2")["format"] == "dcp"
    assert run("prune", url, "--keep", "1", "--dry-run")["kept"] == [7]


NOWHERE = {"client_kwargs": {"endpoint_url": "http://127.0.0.1:1"}, "key": "k", "secret": "s"}


@pytest.fixture
def nowhere() -> Store:
    """S3 at an address where nobody listens."""
    config = {"retries": {"total_max_attempts": 1}, "connect_timeout": 5}
    return Store("s3://bucket/a", storage_options={**NOWHERE, "config_kwargs": config})


def test_a_server_that_is_not_there_is_an_error_of_the_system(nowhere: Store, tmp_path: Path) -> None:
    asked = (
        lambda: nowhere.size("x"),
        lambda: nowhere.read_all("x"),
        lambda: nowhere.list("x"),
        lambda: nowhere.put("x", b""),
        lambda: nowhere.publish("x", b""),
        lambda: nowhere.create("x", [memoryview(b"x")]),
        lambda: nowhere.read_into("x", 0, memoryview(bytearray(1))),
        lambda: nowhere.remove("x"),
    )
    for ask in asked:
        with pytest.raises(OSError, match="EndpointConnectionError: Could not connect to the endpoint URL"):
            ask()
    here = Store(tmp_path)
    manifest = save(here, STATE, step=1)
    reader = Reader(nowhere, manifest, others=[here])
    assert reader.read("model/embed.weight").tobytes() == STATE["model/embed.weight"][2], "the copy is whole"


@pytest.mark.parametrize("command", ["ls", "verify", "digest", "show"])
def test_a_server_that_is_not_there_ends_the_command_with_a_sentence(command: str) -> None:
    given = ["-o", "key=k", "-o", "secret=s", "-o", "client_kwargs.endpoint_url=http://127.0.0.1:1"]
    given += ["-o", 'config_kwargs.retries={"total_max_attempts": 1}']
    result = CliRunner().invoke(app, [command, "s3://bucket/a", *given])
    assert (result.exit_code, result.stdout) == (2, "")
    [sentence] = result.stderr.splitlines()
    assert sentence.startswith("cannot open s3://bucket/a: EndpointConnectionError: Could not connect to the endpoint")


def test_a_hint_that_cannot_be_written_fails_no_commit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import EndpointConnectionError

    def cut(*_: Any, **__: Any) -> None:
        raise EndpointConnectionError(endpoint_url="http://gone")

    monkeypatch.setattr(store._backend, "put", cut)
    assert save(store, STATE, step=3).step == 3
    assert list_steps(store) == [3]
