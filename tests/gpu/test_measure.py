"""Measuring a CUDA device: what is found must be possible for it, and near its data sheet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastictrain.engine.measure import CUDA_SIDES, measure_node
from elastictrain.planner.measured import cluster_of
from elastictrain.planner.profiles import DEVICES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_device_is_measured(tmp_path: Path) -> None:
    said: list[str] = []
    reading = measure_node(10, tmp_path, part_done=said.append)
    assert len(said) == 4
    assert reading.devices == torch.cuda.device_count()
    assert {product.dtype for product in reading.products} >= {"f32"}
    cluster = cluster_of([reading])
    device = cluster.device(cluster.groups[0])
    assert set(device.gemm_efficiency) == set(CUDA_SIDES)
    assert device.gemm_efficiency[4096] > device.gemm_efficiency[64]
    known = DEVICES.get(device.name.removeprefix("measured-"))
    if known is not None:
        assert 0.3 * known.bandwidth_bytes_s < device.bandwidth_bytes_s < 1.05 * known.bandwidth_bytes_s
        assert max(product.flops for product in reading.products) < 1.05 * max(known.peak_flops.values())
        assert device.gemm_efficiency[4096] > 0.4
