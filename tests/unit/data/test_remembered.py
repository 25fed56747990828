"""A stream whose data have changed says what has changed, where this machine has seen what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import elastictrain as et
from elastictrain.data import fingerprint
from elastictrain.data.streaming import Stream
from elastictrain.errors import DataError


def write(folder: Path, number: int, rows: int = 20) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"x": np.arange(rows)}), folder / f"{number:04d}.parquet", row_group_size=7)


def opened(folder: Path) -> Stream:
    return et.data.stream(et.data.parquet(str(folder)), batch_size=4, lanes=4, seed=3)


@pytest.mark.parametrize("listed", [1000, 2])
def test_the_files_that_changed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: int) -> None:
    """Also of more files than a checkpoint lists."""
    monkeypatch.setattr(fingerprint, "_MAX_LISTED_FILES", listed)
    for number in range(5):
        write(tmp_path / "data", number)
    state = opened(tmp_path / "data").state()
    assert len(state) <= 256
    write(tmp_path / "data", 3, rows=21)
    write(tmp_path / "data", 7)
    with pytest.raises(DataError, match=r"another stream: the data changed: .*0007\.parquet is new.*") as caught:
        opened(tmp_path / "data").resume(state)
    assert "0003.parquet has changed" in str(caught.value)
    assert "20 rows, now 21)" in str(caught.value)


def test_a_source_of_a_mixture_that_changed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 0)

    def mixed() -> Stream:
        sources = {name: et.data.parquet(str(tmp_path / name)) for name in ("a", "b")}
        return et.data.stream(et.data.mixture(sources, weights={"a": 1, "b": 1}), batch_size=4, lanes=2)

    state = mixed().state()
    write(tmp_path / "b", 0, rows=30)
    with pytest.raises(DataError, match=r"the data of source 'b' changed: 0000\.parquet has changed"):
        mixed().resume(state)


@pytest.mark.parametrize("how", ["gone", "broken", "of another", "nowhere"])
def test_without_what_is_kept_a_change_is_told_without_details(
    tmp_path: Path, index_cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    write(tmp_path / "data", 0)
    if how == "nowhere":
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    state = opened(tmp_path / "data").state()
    if how != "nowhere":
        (kept,) = index_cache.glob("fingerprint-*.json")
        if how == "gone":
            kept.unlink()
        else:
            kept.write_text("{" if how == "broken" else '{"hash": "0123456789abcdef"}')
    write(tmp_path / "data", 0, rows=21)
    with pytest.raises(DataError, match=r"another stream: the data changed\. Open the stream"):
        opened(tmp_path / "data").resume(state)
