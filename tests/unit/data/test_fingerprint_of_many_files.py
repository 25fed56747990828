"""The fingerprint of a source of many files: the same bytes as the definition's, in time that goes with the blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastictrain.data import Source
from elastictrain.data.index import BlockTable, checksum_of
from tests.unit.data.test_formats import opened


def by_the_definition(source: Source) -> list[str]:
    """The hash of every file, from all blocks that say that they are of it."""
    table, tokens = source._blocks.blocks, source._token_index
    hashes = []
    for number in range(len(source._files.files)):
        mine = table.file == number
        content = [table.rows[mine], table.stop[mine] - table.start[mine], table.checksum[mine]]
        if tokens is not None:
            content += [tokens.tokens[mine], tokens.checksum[mine]]
        hashes.append(f"{checksum_of(b''.join(part.astype('<u8').tobytes() for part in content)):016x}")
    return hashes


def test_the_hash_of_every_file_is_that_of_its_blocks(tmp_path: Path) -> None:
    for number in range(7):
        rows = number * 3 % 11  # files without rows among them
        table = pa.table({"text": [f"text {number} {row}" for row in range(rows)], "x": list(range(rows))})
        pq.write_table(
            table.cast(pa.schema([("text", pa.string()), ("x", pa.int64())])), tmp_path / f"{number}.parquet",
            row_group_size=2,
        )  # fmt: skip
    (tmp_path / "3.parquet").write_bytes(b"PAR1 nothing of the kind")
    for settings in ({"columns": ("x",)}, {"text_column": "text", "sequence_length": 4}):
        source = opened(tmp_path, "parquet", on_corrupt="skip", **settings)  # type: ignore[arg-type]
        files = source.fingerprint["files"]
        table = source._blocks.blocks
        assert [file["hash"] for file in files] == by_the_definition(source)
        assert [file["blocks"] for file in files] == np.bincount(table.file, minlength=7).tolist()
        assert [file["rows"] for file in files] == np.bincount(table.file, table.rows, minlength=7).tolist()


class Counting(np.ndarray):
    """Counts comparisons of whole arrays."""

    compared = 0

    def __eq__(self, other: object) -> object:  # type: ignore[override]
        Counting.compared += 1
        return super().__eq__(other)


def test_blocks_are_not_searched_for_every_file(tmp_path: Path) -> None:
    for number in range(5):
        pq.write_table(pa.table({"x": list(range(9))}), tmp_path / f"{number}.parquet", row_group_size=2)
    source = opened(tmp_path, "parquet")
    table = vars(source._blocks.blocks)
    source._blocks.blocks = BlockTable(**{**table, "file": table["file"].view(Counting)})
    assert source._make_fingerprint() == source.fingerprint
    assert Counting.compared == 0
