"""Small inputs for `elastictrain data prepare`, functions for it, and what came out of it."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elastictrain.data.preparing.driver import Maker
from elastictrain.prepare_settings import Preparation, parse_preparation

DOCUMENTS = 240
DIFFERENT = 150


def text_of(number: int) -> str:
    """Documents repeat after `DIFFERENT` of them."""
    return f"Document {number % DIFFERENT} " + "word " * (number % DIFFERENT % 11)


def write_input(folder: Path, *, files: int = 3, row_group_size: int = 20) -> Path:
    """Write Parquet with `text` and its number as `n`."""
    folder.mkdir(parents=True, exist_ok=True)
    each = DOCUMENTS // files
    for file in range(files):
        numbers = list(range(file * each, (file + 1) * each))
        table = pa.table({"text": [text_of(n) for n in numbers], "n": numbers})
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=row_group_size)
    return folder


def settings_for(path: Path, out: Path, **more: Any) -> Preparation:
    """Settings that make several parts, slots and files of a small input."""
    small = {"file_bytes": 3000, "part_bytes": 1500, "row_group_bytes": 1000, "batch_rows": 8, "seed": 5}
    return parse_preparation(
        {
            "kind": "parquet",
            "path": str(path),
            "out": str(out),
            "text_column": "text",
            "columns": ["n"],
            **small,
            **more,
        }
    )


def rows_in(out: Path) -> list[dict[str, Any]]:
    """All rows that were written, in order."""
    found: list[dict[str, Any]] = []
    for path in sorted(out.glob("*.parquet")):
        found += pq.read_table(path).to_pylist()
    return found


def bytes_in(out: Path) -> dict[str, str]:
    """A hash of every file of a folder; of the index without the settings' own path."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


class Interrupted(Exception):
    """Stands for a process that is killed."""


def backwards(new_maker: Callable[[], Maker], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Carries out units in the opposite order, each by a maker of its own."""
    for number in reversed(numbers):
        maker = new_maker()
        yield maker.make(number)
        maker.close()


class StopsAfter:
    """Carries out a number of units in all, and is then interrupted: before their records are heard of."""

    def __init__(self, units: int) -> None:
        self.left = units

    def __call__(self, new_maker: Callable[[], Maker], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        maker = new_maker()
        for number in numbers:
            if self.left == 0:
                raise Interrupted
            self.left -= 1
            yield maker.make(number)


def even(rows: pa.Table) -> pa.Array:
    """A filter: rows with an even number."""
    return pc.equal(pc.bit_wise_and(rows.column("n"), 1), 0)


def lower(rows: pa.Table) -> pa.Table:
    """A map: small letters."""
    return rows.set_column(rows.column_names.index("text"), "text", pc.utf8_lower(rows.column("text")))


def twice(rows: pa.Table) -> pa.Table:
    """A map that makes two rows of each."""
    return pa.concat_tables([rows, rows])


def fails_at_77(rows: pa.Table) -> pa.Table:
    """A map that cannot deal with one document."""
    if 77 in rows.column("n").to_pylist():
        raise ValueError("seventy-seven")
    return rows


class DropsThrees:
    """A filter that is a class."""

    def __call__(self, rows: pa.Table) -> list[bool]:
        return [n % 3 != 0 for n in rows.column("n").to_pylist()]


def dies_always(rows: pa.Table) -> pa.Table:
    """A map that kills its process at document 100."""
    if 100 in rows.column("n").to_pylist():
        os.kill(os.getpid(), signal.SIGKILL)
    return rows
