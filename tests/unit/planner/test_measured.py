"""From readings to a cluster file: made of devices and links whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.errors import ConfigError
from elastictrain.planner.collectives import share_across
from elastictrain.planner.compute import DEFAULTS, gemm_share
from elastictrain.planner.measured import (
    NodeReading,
    PairReading,
    Pattern,
    Product,
    Times,
    cluster_of,
    crowding,
    device_name,
    fit_link,
    islands_of,
    pairs_to_measure,
)
from elastictrain.planner.profiles import dump_cluster, load_cluster

SIZES = (1024.0, 65536.0, 4194304.0)


def times(alpha: float, beta: float) -> Times:
    return tuple((size, alpha + size / beta) for size in SIZES)


def product(side: int, flops: float, dtype: str = "f32") -> Product:
    return Product(1024, 1024, side, dtype, 2 * 1024 * 1024 * side / flops)  # type: ignore[arg-type]


NODE = NodeReading(
    host="a", device="Some Card X1", devices=2, memory_bytes=8e9, bandwidth_bytes_s=2e11,
    products=(product(64, 2e12), product(256, 6e12), product(1024, 1e13)), within=times(1e-5, 1e10),
    host_memory_bytes=6e10, host_bandwidth_bytes_s=2e10, disk_bytes_s=5e8,
)  # fmt: skip


def slower(factor: float) -> NodeReading:
    products = tuple(replace(p, seconds=p.seconds * factor) for p in NODE.products)
    return replace(NODE, products=products)


def pair(a: int, b: int, beta: float, pattern: Pattern = "alone") -> PairReading:
    return PairReading(a, b, pattern, times(3e-5, beta))


@settings(deadline=None)
@given(alpha=st.floats(1e-6, 1e-2), beta=st.floats(1e6, 1e12))
def test_a_link_is_found_from_its_transfers(alpha: float, beta: float) -> None:
    found_alpha, found_beta = fit_link(times(alpha, beta))
    assert found_alpha == pytest.approx(alpha, rel=1e-3, abs=1e-9)
    assert found_beta == pytest.approx(beta, rel=0.2 if alpha > 100 * SIZES[-1] / beta else 1e-3)


def test_small_transfers_say_the_latency_and_large_ones_the_bandwidth() -> None:
    alpha, beta = fit_link([(1024.0, 1e-5), (65536.0, 1.1e-5), (2.0**24, 2e-2), (2.0**26, 9e-2)])
    assert 6e-6 < alpha < 1.2e-5
    assert beta == pytest.approx(2**26 / 9e-2, rel=0.01)


def test_a_transfer_that_was_disturbed_does_not_count() -> None:
    disturbed = ((1024.0, 8e-3), (65536.0, 2e-3), (2.0**24, 7e-3))
    alpha, beta = fit_link(disturbed)
    assert beta == pytest.approx((2**24 - 1024) / 5e-3)
    assert alpha == pytest.approx(2e-3, rel=0.01)


def test_what_cannot_be_a_link() -> None:
    with pytest.raises(ConfigError, match=r"^a link needs transfers of two sizes or more"):
        fit_link([(1024.0, 1e-5), (1024.0, 2e-5)])
    with pytest.raises(ConfigError, match=r"^a link whose larger transfers take no longer cannot be"):
        fit_link([(1024.0, 1e-3), (1e9, 1e-6)])
    alpha, beta = fit_link([(1000.0, 1e-7), (2e6, 1e-3)])  # the line would begin below zero
    assert alpha == 0.0
    assert beta > 1e9


def test_one_node_becomes_a_cluster_that_plan_reads(tmp_path: object) -> None:
    cluster = cluster_of([NODE])
    (group,) = cluster.groups
    device = cluster.device(group)
    assert (group.nodes, group.per_node, group.slowdown) == (1, 2, 1.0)
    assert device.name == "measured-some-card-x1"
    assert device.peak("f32") == pytest.approx(1e13)
    assert device.gemm_efficiency == pytest.approx({64: 0.2, 256: 0.6, 1024: 1.0})
    assert gemm_share(device, 4096, 4096, 64, DEFAULTS) == pytest.approx(0.2)
    assert cluster.link(group.intra).beta_bytes_s == pytest.approx(1e10, rel=1e-3)
    assert cluster.link(group.intra).alpha_s == pytest.approx(1e-5, rel=1e-3)
    assert group.disk_bytes_s == 5e8
    path = tmp_path / "cluster.yaml"  # type: ignore[operator]
    path.write_text(dump_cluster(cluster))
    assert load_cluster(path) == cluster


def test_a_slow_node_is_a_group_of_its_own() -> None:
    cluster = cluster_of(
        [NODE, slower(1.05), slower(2.0), NODE], [pair(a, b, 1e9) for a, b, _ in pairs_to_measure(4)[:5]]
    )
    assert [(group.nodes, group.slowdown) for group in cluster.groups] == [(3, 1.0), (1, 2.0)]
    assert len(cluster.devices) == 1
    assert {group.device for group in cluster.groups} == {"measured-some-card-x1"}
    assert cluster.device(cluster.groups[0]).peak("f32") == pytest.approx(1e13)


def test_islands_are_joined_by_quick_links() -> None:
    pairs = [pair(0, 1, 1e10), pair(1, 2, 1e9), pair(2, 3, 9e9), pair(0, 2, 1e9), pair(0, 3, 1.2e9)]
    assert islands_of(4, pairs) == ["island-0", "island-0", "island-1", "island-1"]
    cluster = cluster_of([NODE] * 4, pairs)
    assert [(group.island, group.nodes) for group in cluster.groups] == [("island-0", 2), ("island-1", 2)]
    assert cluster.between == "between-islands"
    assert cluster.link("between-islands").beta_bytes_s == pytest.approx(1e9, rel=1e-3)
    assert [cluster.link(group.inter).beta_bytes_s for group in cluster.groups] == pytest.approx([1e10, 9e9], rel=1e-3)
    assert cluster.link("between-islands").per == "node"


def test_crowding_is_what_all_lose_who_send_at_once() -> None:
    pairs = [pair(0, 1, 8e9), pair(0, 2, 8e9), pair(0, 2, 2e9, "strided"), pair(1, 3, 2e9, "strided")]
    pairs += [pair(0, 1, 7e9, "contiguous")]
    assert crowding(pairs, 4) == pytest.approx(1.0, rel=1e-3)
    assert crowding(pairs, 3) is None
    assert crowding(pairs[:2], 4) is None
    assert crowding([pair(0, 1, 8e9), pair(0, 2, 9e9, "strided")], 4) == 0.0
    cluster = cluster_of([NODE] * 4, [*pairs, pair(2, 3, 8e9)])
    link = cluster.link(cluster.groups[0].inter)
    assert link.crowd == pytest.approx(1.0, rel=1e-3)
    assert link.beta_bytes_s * share_across(link, 2, 2, 4) == pytest.approx(2e9, rel=1e-2)
    assert {"all-at-once-contiguous", "all-at-once-strided"} <= {link.name for link in cluster.links}


def test_known_devices_keep_their_data_sheet() -> None:
    a100 = replace(
        NODE, device="NVIDIA A100-SXM4-80GB", memory_bytes=85e9,
        products=(product(64, 5e13, "bf16"), product(512, 2.5e14, "bf16"), product(512, 1.8e13)),
    )  # fmt: skip
    cluster = cluster_of([a100])
    device = cluster.device(cluster.groups[0])
    assert device.name == "measured-a100-80"
    assert device.peak("bf16") == 312e12
    assert device.gemm_efficiency == pytest.approx({64: 5e13 / 312e12, 512: 2.5e14 / 312e12})


@pytest.mark.parametrize(
    ("driver", "memory", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 42e9, "a100-40"), ("NVIDIA H100 80GB HBM3", 85e9, "h100"),
        ("NVIDIA H100 PCIe", 85e9, "h100-pcie"), ("NVIDIA H200", 150e9, "h200"),
        ("Tesla V100-SXM2-16GB", 17e9, "v100-16"),
        ("Tesla T4", 16e9, "t4"), ("NVIDIA L4", 24e9, "l4"), ("NVIDIA L40S", 48e9, "l40s"),
        ("NVIDIA A10G", 24e9, "a10g"),
        ("NVIDIA GeForce RTX 4090", 25e9, "rtx4090"), ("NVIDIA RTX A6000", 51e9, "a6000"), ("cpu", 1e9, "cpu"),
        ("Other: card (3)", 1e9, "other-card-3"), ("???", 1e9, "unknown"),
    ],
)  # fmt: skip
def test_names_of_drivers(driver: str, memory: float, name: str) -> None:
    assert device_name(driver, memory) == name


@pytest.mark.parametrize("count", range(9))
def test_every_node_is_measured_with_another(count: int) -> None:
    pairs = pairs_to_measure(count)
    alone = [(a, b) for a, b, pattern in pairs if pattern == "alone"]
    assert len(alone) == len(set(alone)) == max(0, 2 * count - 3)
    assert {n for pair in alone for n in pair} == (set(range(count)) if count > 1 else set())
    for pattern in ("contiguous", "strided"):
        ends = [n for a, b, kind in pairs if kind == pattern for n in (a, b)]
        assert len(ends) == len(set(ends)) == (2 * (count // 2) if count >= 4 else 0)


def test_nothing_measured_is_refused() -> None:
    for nodes in ([], [replace(NODE, products=())]):
        with pytest.raises(ConfigError, match=r"^nothing was measured"):
            cluster_of(nodes)
