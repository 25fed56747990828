"""What a remote store is asked for: about the bytes that are used, in few requests. Counted against an S3 server."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

import s3fs

from elastictrain.data import LaneReader, open_source
from elastictrain.data.ranges import FetchedFile, coalesced
from elastictrain.job import Data

ROWS = 20_000
FILES = 2
TAIL_BYTES = 64 << 10  # of every Parquet file that is opened


@dataclass
class Traffic:
    requests: int = 0
    bytes: int = 0

    def reset(self) -> None:
        self.requests = self.bytes = 0


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    """Counts GET requests and the bytes that they ask for."""
    counted, call = Traffic(), s3fs.S3FileSystem._call_s3

    async def counting(self: Any, method: Any, *args: Any, **settings: Any) -> Any:
        answer = await call(self, method, *args, **settings)
        if method == "get_object":
            counted.requests += 1
            counted.bytes += int(answer["ContentLength"])
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counting)
    return counted


def upload(kind: str, bucket: str, options: dict[str, Any]) -> tuple[int, int]:
    """Write `FILES` files of `ROWS` rows; returns their bytes, and those of column x in Parquet."""
    store, whole, of_x = s3fs.S3FileSystem(**options), 0, 0
    random = np.random.default_rng(0)
    for number in range(FILES):
        content = _content(kind, random)
        if kind == "parquet":
            meta = pq.read_metadata(io.BytesIO(content))
            of_x += sum(meta.row_group(g).column(1).total_compressed_size for g in range(meta.num_row_groups))
        whole += len(content)
        store.pipe(f"{bucket}/{kind}/{number}.{'tar' if kind == 'webdataset' else kind}", content)
    return whole, of_x


def _content(kind: str, random: np.random.Generator) -> bytes:
    out = io.BytesIO()
    if kind == "parquet":  # 20 row groups; x lies between two wide columns
        wide = [pa.array([random.bytes(300) for _ in range(ROWS)], pa.binary()) for _ in range(2)]
        table = pa.table({"a": wide[0], "x": np.arange(ROWS), "z": wide[1]})
        pq.write_table(table, out, row_group_size=1000, use_dictionary=False, compression="none")
    elif kind == "arrow":
        table = pa.table({"x": np.arange(ROWS), "y": random.random(ROWS)})
        with pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    elif kind == "webdataset":
        with tarfile.open(fileobj=out, mode="w") as tar:
            for number in range(2000):
                member = tarfile.TarInfo(f"{number:06d}.cls")
                member.size = 4
                tar.addfile(member, io.BytesIO(b"%4d" % number))
    elif kind == "csv":
        out.write(b"x,y\n" + b"".join(b"%d,%d\n" % (n, 7 * n) for n in range(ROWS)))
    else:
        out.write("".join(json.dumps({"x": n, "y": 7 * n}) + "\n" for n in range(ROWS)).encode())
    return out.getvalue()


def opened(kind: str, bucket: str, options: dict[str, Any]) -> LaneReader:
    column = "cls" if kind == "webdataset" else "x"
    spec = Data(
        kind=kind, path=f"s3://{bucket}/{kind}", columns=(column,), rows_per_block=1000, shuffle="none",
        storage_options=options,
    )  # type: ignore[arg-type]  # fmt: skip
    return LaneReader(open_source(spec, seed=1, lanes=1, lane_batch_size=100))


def read_an_epoch(reader: LaneReader) -> int:
    steps = reader.source.steps_per_epoch
    return sum(len(next(iter(reader.batch(step, 0).values()))) for step in range(steps))


def test_a_column_of_parquet_costs_its_own_bytes(traffic: Traffic, bucket: str, options: dict[str, Any]) -> None:
    whole, of_x = upload("parquet", bucket, options)
    assert of_x < whole / 50
    traffic.reset()
    reader = opened("parquet", bucket, options)
    assert traffic.requests <= FILES, "a footer is one request"
    assert traffic.bytes <= FILES * TAIL_BYTES
    traffic.reset()
    assert read_an_epoch(reader) == FILES * ROWS
    assert traffic.bytes <= of_x + FILES * TAIL_BYTES
    assert traffic.requests <= FILES * (ROWS // 1000 + 1)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "arrow", "webdataset"])
def test_other_formats_are_read_twice_to_open_and_once_in_an_epoch(
    kind: str, traffic: Traffic, bucket: str, options: dict[str, Any]
) -> None:
    whole, _ = upload(kind, bucket, options)
    traffic.reset()
    reader = opened(kind, bucket, options)
    assert traffic.bytes <= 2.2 * whole
    assert traffic.requests <= FILES * 6
    blocks = len(reader.source.order.block_rows)
    traffic.reset()
    read_an_epoch(reader)
    assert traffic.bytes <= 1.2 * whole
    assert traffic.requests <= blocks + FILES, "a block is one request"


def test_ranges_are_joined_over_small_holes() -> None:
    assert coalesced([(50, 60), (0, 10), (12, 20)], hole_bytes=2) == [(0, 20), (50, 60)]
    assert coalesced([(0, 10), (10, 20), (20, 30)], most_bytes=20) == [(0, 20), (20, 30)]
    assert coalesced([(0, 90), (95, 99)], most_bytes=20) == [(0, 90), (95, 99)]
    assert coalesced([]) == []


def test_a_fetched_file_reads_like_the_file() -> None:
    content = bytes(range(200))
    file = FetchedFile(io.BytesIO(content))
    file.fetch([(10, 30), (100, 150)])
    for start, stop in ((10, 30), (12, 20), (25, 35), (100, 150), (149, 150), (0, 200), (190, 250)):
        assert file.seek(start) == start
        assert bytes(file.read(stop - start)) == content[start:stop]
        assert file.tell() == min(stop, 200)
    assert file.seek(-5, 2) == 195
    assert bytes(file.read()) == content[195:]
    file.forget()
    file.seek(10)
    assert (bytes(file.read(20)), file.seek(-5, 1)) == (content[10:30], 25)
    file.close()
    assert file.closed
