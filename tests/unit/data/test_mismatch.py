"""Data that can be read and are not what the settings say: an error with any policy, never a hole."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from elastictrain.errors import DataMismatch
from tests.unit.data.test_formats import opened


def lines(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shard(path: Path, **columns: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(12):
            for column, body in columns.items():
                member = tarfile.TarInfo(f"{number:04d}.{column}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


def numpy_bytes(*shape: int) -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(shape, dtype=np.float32))
    return out.getvalue()


def text_that_is_a_number(folder: Path) -> None:
    for number in range(3):
        lines(folder / f"{number}.jsonl", *[{"text": 7 if number == 1 else "words"}] * 12)


def a_line_of_numbers(folder: Path) -> None:
    lines(folder / "0.jsonl", *[{"x": 1}] * 7, {"x": "one"}, *[{"x": 1}] * 7)


def samples_without_a_file(folder: Path) -> None:
    for number in range(3):
        shard(folder / f"{number}.tar", txt=b"words", **({"cls": b"1"} if number != 1 else {}))


def arrays_of_two_shapes(folder: Path) -> None:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(12):
            body = numpy_bytes(3 if number == 2 else 2)
            member = tarfile.TarInfo(f"{number:04d}.npy")
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))


def a_long_file(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.txt").write_text("word " * (1000 if number == 1 else 10))


TEXT = {"text_column": "text", "sequence_length": 4}
CASES = [
    (text_that_is_a_number, "jsonl", TEXT, r"1\.jsonl, line 1: 'text' is a int, expected a string"),
    (a_line_of_numbers, "jsonl", {}, r"0\.jsonl, lines 6 to 11: the lines cannot be read as one table"),
    (samples_without_a_file, "webdataset", {"columns": ("cls",)}, r"1\.tar: sample '0000' has no file 0000\.cls"),
    (arrays_of_two_shapes, "webdataset", {}, r"0\.tar: the arrays \.npy .* have different shapes \(\(2,\), \(3,\)\)"),
    (
        a_long_file,
        "text",
        {**TEXT, "document": "file", "max_document_bytes": 999},
        r"1\.txt: has 5000 bytes, more than",
    ),
]


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize(("write", "kind", "settings", "expected"), CASES)
def test_what_is_no_damage_is_never_left_out(
    tmp_path: Path,
    write: Callable[[Path], None],
    kind: str,
    settings: dict[str, object],
    expected: str,
    policy: str,
) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    with pytest.raises(DataMismatch, match=expected):
        opened(tmp_path / "data", kind, on_corrupt=policy, **settings)  # type: ignore[arg-type]
