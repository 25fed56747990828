"""Sources on s3://, against a server process that speaks S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from elastictrain.data import LaneReader, open_source
from elastictrain.data.files import find_files
from elastictrain.errors import DataError
from elastictrain.job import Data
from tests.unit.data.test_formats import column_of, write


def upload(folder: Path, bucket: str, options: dict[str, Any]) -> str:
    import s3fs

    store = s3fs.S3FileSystem(**options)
    for file in sorted(folder.iterdir()):
        store.pipe(f"{bucket}/data/{file.name}", file.read_bytes())
    return f"s3://{bucket}/data"


def reader(path: str, kind: str, **settings: Any) -> LaneReader:
    spec = Data(kind=kind, path=path, rows_per_block=5, sequence_length=16, **settings)  # type: ignore[arg-type]
    return LaneReader(open_source(spec, seed=3, lanes=2, lane_batch_size=2))


@pytest.mark.parametrize("name", ["parquet", "arrow stream", "jsonl", "jsonl.gz", "csv", "tar", "text.zst"])
def test_a_store_gives_what_a_disk_gives(tmp_path: Path, name: str, bucket: str, options: dict[str, Any]) -> None:
    (tmp_path / "data").mkdir()
    kind = write(tmp_path / "data", name)
    place = upload(tmp_path / "data", bucket, options)
    text = column_of(kind, "text")
    local = reader(str(tmp_path / "data"), kind, text_column=text)
    for _ in range(2):  # the second time from the index
        remote = reader(place, kind, text_column=text, storage_options=options)
        assert remote.source.fingerprint == local.source.fingerprint
        for step in (0, 3, 11):
            assert remote.batch(step, 1)["tokens"].tolist() == local.batch(step, 1)["tokens"].tolist()
        remote.close()


def test_a_glob_over_folders_finds_the_files_of_a_disk_in_their_order(
    tmp_path: Path, bucket: str, options: dict[str, Any]
) -> None:
    import s3fs

    store = s3fs.S3FileSystem(**options)
    for name in ("b/10/x.jsonl", "b/9/x.jsonl", "a/1/y.jsonl", "a/1/deep/x.jsonl", "a/x.jsonl", "c/_x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"x": 1}\n')
        store.pipe(f"{bucket}/glob/{name}", b'{"x": 1}\n')
    for pattern in ("*/*/*.jsonl", "?/1*/x.jsonl", "*/x.jsonl", "a/**/*.jsonl", "*/[19]/**"):
        local = find_files(f"{tmp_path}/{pattern}", "jsonl").files
        remote = find_files(f"s3://{bucket}/glob/{pattern}", "jsonl", options).files
        assert [file.name for file in remote] == [file.name for file in local]


def test_an_object_that_is_written_again_is_noticed(tmp_path: Path, bucket: str, options: dict[str, Any]) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "jsonl")
    place = upload(tmp_path / "data", bucket, options)
    running = reader(place, "jsonl", text_column="text", storage_options=options)
    file = tmp_path / "data" / "0.jsonl"
    file.write_bytes(file.read_bytes().replace(b"Dokument", b"dokument"))
    upload(tmp_path / "data", bucket, options)
    with pytest.raises(DataError, match=r"0\.jsonl, bytes \d+ to \d+: changed since the run opened it"):
        running.source.read_block(0)


def test_a_bucket_that_is_not_there(bucket: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data.path: 's3://b0-nowhere/data' (does not exist|cannot be listed)"):
        reader("s3://b0-nowhere/data", "parquet", text_column="text", storage_options=options)
