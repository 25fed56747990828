"""WebDataset shards that are damaged where `tarfile` sees an end: never read in part."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from elastictrain.errors import DataError
from tests.unit.data.test_formats import opened

SAMPLES = 30
MEMBER_BYTES = 1024  # a header and a block of content


def shard(samples: int = SAMPLES) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(samples):
            member = tarfile.TarInfo(f"{number:06d}.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"%d" % (number % 10)))
    return out.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


MIDDLE = 15 * MEMBER_BYTES
DAMAGE: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda it: flipped(it, MIDDLE + 10), f"the header at byte {MIDDLE} cannot be read"),
    (lambda it: it[:MIDDLE], f"it has no end .* at byte {MIDDLE}"),
    (lambda it: it[: MIDDLE + 100], f"the header at byte {MIDDLE} cannot be read"),
    (lambda it: it[: MIDDLE + 512], "unexpected end of data|ends at"),
    (lambda it: it[:MIDDLE] + bytes(1024) + it[MIDDLE + 1024 :], f"zeros from byte {MIDDLE} on, .* joined with cat"),
    (lambda it: it + it, rf"zeros from byte {SAMPLES * MEMBER_BYTES} on, .* \(tar --concatenate"),
    (lambda it: it[: SAMPLES * MEMBER_BYTES] + b"x" * 512, "header at byte"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE)
def test_a_shard_that_is_damaged_in_the_middle(tmp_path: Path, damage: Callable[[bytes], bytes], expected: str) -> None:
    (tmp_path / "0.tar").write_bytes(shard())
    (tmp_path / "1.tar").write_bytes(damage(shard()))
    with pytest.raises(DataError, match=rf"1\.tar: corrupt or truncated tar file: .*({expected})"):
        opened(tmp_path, "webdataset", columns=("cls",))
    source = opened(tmp_path, "webdataset", columns=("cls",), on_corrupt="skip")
    (hole,) = source.describe()["holes"]
    assert (hole["file"], hole["block"]) == ("1.tar", -1)
    assert source.describe()["rows"] == SAMPLES


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_any_number_of_zero_blocks_is_an_end(tmp_path: Path, kept: int) -> None:
    (tmp_path / "0.tar").write_bytes(shard()[: SAMPLES * MEMBER_BYTES] + bytes(512 * kept))
    assert opened(tmp_path, "webdataset", columns=("cls",)).describe()["rows"] == SAMPLES


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_folders_and_links_in_between(tmp_path: Path, kind: int) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=kind) as tar:
        for number in range(25):
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            member = tarfile.TarInfo(f"{'long' * 60}{number:06d}.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"7"))
    assert opened(tmp_path, "webdataset", columns=("cls",)).describe()["rows"] == 25
