"""Feeding a CUDA device: the same bits as on the CPU, on the device, by copies that the host does not wait for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from elastictrain.data import LaneReader, open_source
from elastictrain.data.feeder import Feeder
from elastictrain.job import Data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_batches_on_the_device_are_those_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    columns = {"x": pa.array(list(rng.normal(size=(600, 64)))), "n": np.arange(600)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=50)
    spec = Data(kind="parquet", path=str(tmp_path / "a.parquet"))

    def reader() -> LaneReader:
        return LaneReader(open_source(spec, seed=1, lanes=4, lane_batch_size=8))

    places = [(step, lane) for step in range(3 * reader().source.steps_per_epoch) for lane in range(4)]
    plain = reader()
    expected = [plain.batch(*place) for place in places]
    with Feeder(reader(), "cuda", budget_bytes=1 << 16) as feeder:
        for at, place in enumerate(places):
            if at % 4 == 0:
                feeder.expect(places[at : at + 40])
            batch = feeder.batch(*place)
            # Work on the current stream right away: it must see the whole copy, also after the memory was used before.
            doubled = {name: tensor * 2 for name, tensor in batch.items()}
            assert all(tensor.is_cuda for tensor in batch.values())
            del batch
            for name, tensor in doubled.items():
                np.testing.assert_array_equal(tensor.cpu().numpy(), expected[at][name] * 2)
        assert feeder.meter.read()["copy"] > 0


def test_narrow_batches_travel_narrow_and_are_widened_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [f"Dokument {n}, ähnlich wie {n * n} " * (1 + n % 7) for n in range(300)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=40)
    places = [(step, lane) for step in range(20) for lane in range(4)]

    def batches(device: str, batch_dtype: str, *, widen: bool) -> list[dict[str, torch.Tensor]]:
        spec = Data(
            kind="parquet", path=str(tmp_path / "a.parquet"), text_column="text", sequence_length=32,
            document_ids=True, batch_dtype=batch_dtype,
        )  # fmt: skip
        found = []
        with Feeder.of(open_source(spec, seed=1, lanes=4, lane_batch_size=3), device, widen=widen) as feeder:
            for at, place in enumerate(places):
                if at % 4 == 0:
                    feeder.expect(places[at : at + 40])
                batch = feeder.batch(*place)
                assert all(tensor.device.type == device for tensor in batch.values())
                found.append({name: tensor.cpu() for name, tensor in batch.items()})
        return found

    expected = batches("cpu", "int64", widen=False)
    widened = batches("cuda", "narrow", widen=True)
    thin = batches("cuda", "narrow", widen=False)
    assert str(thin[0]["tokens"].dtype) == "torch.int16"
    for one, wide, narrow in zip(expected, widened, thin, strict=True):
        assert {name: tensor.dtype for name, tensor in wide.items()} == {
            name: tensor.dtype for name, tensor in one.items()
        }
        assert all(torch.equal(wide[name], tensor) for name, tensor in one.items())
        assert all(torch.equal(narrow[name].to(tensor.dtype), tensor) for name, tensor in one.items())
