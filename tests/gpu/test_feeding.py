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
