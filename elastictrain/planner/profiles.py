"""Profiles of devices and links, and a cluster made of them; YAML in and out.

Data-sheet values are in `BUILT_IN`, each with its source; measured ones are written in the cluster file under
`devices:` and `links:` and take precedence. Units: FLOP/s, bytes, bytes/s in one direction, seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from elastictrain.errors import ConfigError
from elastictrain.settings import PositiveInt, explain, nearest, not_a_switch

Dtype = Literal["f32", "bf16"]
Positive = Annotated[float, BeforeValidator(not_a_switch), Field(gt=0)]
NotNegative = Annotated[float, BeforeValidator(not_a_switch), Field(ge=0)]
GIB = 2.0**30


class _Profile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Device(_Profile):
    """An accelerator. `gemm_efficiency`: measured share of the peak by the smallest side of a matrix product, as
    {side: share}; between two sides it is interpolated. Without it the fitted share holds.
    """

    name: str
    peak_flops: dict[Dtype, Positive]
    memory_bytes: Positive
    bandwidth_bytes_s: Positive
    gemm_efficiency: dict[PositiveInt, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    source: str = "measured"

    def peak(self, dtype: Dtype) -> float:
        """FLOP/s of matrix products; bf16 on a device without it runs at its f32 speed."""
        if dtype in self.peak_flops:
            return self.peak_flops[dtype]
        return min(self.peak_flops.values())

    @model_validator(mode="after")
    def _has_a_peak(self) -> Self:
        if not self.peak_flops:
            raise ValueError("peak_flops is empty; expected {bf16: FLOP/s} or {f32: FLOP/s}")
        return self


class Link(_Profile):
    """A class of links. A transfer of n bytes takes `alpha_s + n / beta_bytes_s`.

    `per`: every device of a node has such a port of its own, or the node has one for all its devices. `crowd`: the
    bandwidth of a ring over n nodes goes with n to the power of minus this. 0: a fabric that blocks nobody (a full fat
    tree); the default is what published runs on 4 to 32 nodes of a shared cluster show.
    """

    name: str
    alpha_s: NotNegative
    beta_bytes_s: Positive
    per: Literal["device", "node"] = "device"
    crowd: NotNegative = 0.75
    source: str = "measured"


class Group(_Profile):
    """Nodes that are alike. `island`: nodes of one island reach each other by `inter`; other islands by the cluster's
    `between`.
    """

    device: str
    nodes: PositiveInt = 1
    per_node: PositiveInt = 1
    intra: str = "nvlink3"
    inter: str = "ib-hdr"
    island: str = "main"
    host_memory_bytes: Positive | None = None
    host_bandwidth_bytes_s: Positive | None = None
    """Measured: of the host's memory, and of writing to its disk. For people; no plan depends on them."""
    disk_bytes_s: Positive | None = None
    memory_limit_bytes: Positive | None = None
    """Use no more of each device than this."""
    slowdown: Annotated[float, BeforeValidator(not_a_switch), Field(ge=1)] = 1.0
    """Measured: how many times as long as its profile says a device of this group takes."""

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node


def _device(name: str, tflops: float, f32: float, gib: float, gb_s: float, source: str, *, bf16: bool = True) -> Device:
    peaks: dict[Dtype, float] = {"bf16": tflops * 1e12} if bf16 else {}
    return Device(
        name=name, peak_flops={**peaks, "f32": f32 * 1e12}, memory_bytes=gib * GIB, bandwidth_bytes_s=gb_s * 1e9,
        source=source,
    )  # fmt: skip


_SHEET = "NVIDIA data sheet:"
DEVICES = {
    device.name: device
    for device in (
        _device("h200", 989, 67, 131.3, 4800, f"{_SHEET} H200 SXM, 989 TFLOP/s dense bf16, 141 GB, 4.8 TB/s"),
        _device("h100", 989, 67, 79.1, 3350, f"{_SHEET} H100 SXM5: 989 TFLOP/s dense bf16, 80 GB, 3.35 TB/s"),
        _device("h100-pcie", 756, 51, 79.1, 2000, f"{_SHEET} H100 PCIe: 756 TFLOP/s dense bf16, 80 GB, 2 TB/s"),
        _device("a100-80", 312, 19.5, 79.1, 2039, f"{_SHEET} A100 SXM4 80 GB: 312 TFLOP/s bf16, 2,039 GB/s"),
        _device("a100-40", 312, 19.5, 39.4, 1555, f"{_SHEET} A100 SXM4 40 GB: 312 TFLOP/s bf16, 1,555 GB/s"),
        _device("a10g", 70, 35, 22.2, 600, "AWS G5 and NVIDIA A10G data sheet: 70 TFLOP/s dense bf16, 24 GB, 600 GB/s"),
        _device("l4", 121, 30.3, 22.2, 300, f"{_SHEET} L4: 121 TFLOP/s dense bf16, 24 GB, 300 GB/s"),
        _device("l40s", 362, 91.6, 44.4, 864, f"{_SHEET} L40S: 362 TFLOP/s dense bf16, 48 GB, 864 GB/s"),
        _device("a6000", 155, 38.7, 47.4, 768, f"{_SHEET} RTX A6000, 155 TFLOP/s dense bf16, 48 GB, 768 GB/s"),
        _device("rtx3090", 71, 35.6, 23.6, 936, f"{_SHEET} RTX 3090: 71 TFLOP/s dense bf16, 24 GB, 936 GB/s"),
        _device("rtx4090", 165, 82.6, 23.6, 1008, f"{_SHEET} RTX 4090: 165 TFLOP/s dense bf16, 24 GB, 1,008 GB/s"),
        # No bf16 units: the planner takes bf16 on them for f32.
        _device("v100-32", 0, 15.7, 31.7, 900, f"{_SHEET} V100 SXM2 32 GB: 15.7 TFLOP/s f32, 900 GB/s", bf16=False),
        _device("v100-16", 0, 15.7, 15.8, 900, f"{_SHEET} V100 SXM2 16 GB: 15.7 TFLOP/s f32, 900 GB/s", bf16=False),
        _device("t4", 0, 8.1, 14.6, 320, f"{_SHEET} T4: 8.1 TFLOP/s f32, 16 GB, 320 GB/s", bf16=False),
        _device("p40", 0, 11.8, 22.4, 346, f"{_SHEET} P40: 11.8 TFLOP/s f32, 24 GB, 346 GB/s", bf16=False),
        _device("p100", 0, 10.6, 15.9, 732, f"{_SHEET} P100 SXM2: 10.6 TFLOP/s f32, 16 GB, 732 GB/s", bf16=False),
    )
}  # fmt: skip


def _link(name: str, alpha_us: float, gb_s: float, source: str, per: Literal["device", "node"] = "device") -> Link:
    return Link(name=name, alpha_s=alpha_us * 1e-6, beta_bytes_s=gb_s * 1e9, per=per, source=source)


LINKS = {
    link.name: link
    for link in (
        _link("nvlink4", 5, 450, "NVIDIA H100: NVLink 4, 900 GB/s both ways"),
        _link("nvlink3", 5, 300, "NVIDIA A100: NVLink 3, 600 GB/s both ways"),
        _link("nvlink2", 6, 150, "NVIDIA V100: NVLink 2, 300 GB/s both ways"),
        _link("pcie5", 8, 64, "PCI Express 5.0 x16"),
        _link("pcie4", 8, 32, "PCI Express 4.0 x16"),
        _link("pcie3", 8, 16, "PCI Express 3.0 x16"),
        _link("ib-ndr", 10, 50, "InfiniBand NDR, 400 Gb/s a port, one port per device"),
        _link("ib-hdr", 10, 25, "InfiniBand HDR, 200 Gb/s a port, one port per device"),
        _link("roce-100", 15, 12.5, "RoCE, 100 Gb/s a port"),
        _link("eth-100", 30, 12.5, "Ethernet 100 Gb/s per node", "node"),
        _link("eth-50", 30, 6.25, "Ethernet 50 Gb/s per node", "node"),
        _link("eth-25", 30, 3.125, "Ethernet 25 Gb/s per node", "node"),
        _link("eth-10", 50, 1.25, "Ethernet 10 Gb/s per node", "node"),
        _link("loopback", 20, 4, "processes of one host over gloo: a guess, measure it"),
    )
}


class Cluster(_Profile):
    """Groups of nodes, the links between islands, and measured profiles."""

    groups: tuple[Group, ...]
    between: str = "eth-25"
    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()

    def device(self, group: Group) -> Device:
        return {**DEVICES, **{device.name: device for device in self.devices}}[group.device]

    def link(self, name: str) -> Link:
        return {**LINKS, **{link.name: link for link in self.links}}[name]

    @property
    def size(self) -> int:
        return sum(group.devices for group in self.groups)

    @model_validator(mode="after")
    def _all_known(self) -> Self:
        if not self.groups:
            raise ValueError("groups is empty; expected at least one group of nodes")
        for setting, names in (("devices", [d.name for d in self.devices]), ("links", [n.name for n in self.links])):
            if (name := _twice(names)) is not None:
                raise ValueError(f"{setting} has {name!r} twice; remove one of them, or give it another name")
        devices = {**DEVICES, **{device.name: device for device in self.devices}}
        links = {**LINKS, **{link.name: link for link in self.links}}
        for number, group in enumerate(self.groups):
            if group.device not in devices:
                raise ValueError(
                    f"groups.{number}.device={group.device!r} has no profile"
                    f"{_like(group.device, list(devices))}"
                    " For another device measure the nodes (`elastictrain profile`, or with --local on one of them), or"
                    " write its name, peak_flops, memory_bytes and bandwidth_bytes_s from the data sheet under devices:"
                )
            for setting, link in (("intra", group.intra), ("inter", group.inter)):
                if link not in links:
                    raise ValueError(
                        f"groups.{number}.{setting}={link!r} is no known link{nearest(link, list(links), 'links')}"
                    )
            memory = devices[group.device].memory_bytes
            if group.memory_limit_bytes is not None and group.memory_limit_bytes > memory:
                raise ValueError(
                    f"groups.{number}.memory_limit_bytes={group.memory_limit_bytes:.4g} is more than the"
                    f" {memory:.4g} bytes that a {group.device} has; lower it"
                )
        if self.between not in links:
            raise ValueError(f"between={self.between!r} is no known link{nearest(self.between, list(links), 'links')}")
        return self


def _like(name: str, known: list[str]) -> str:
    """Devices whose names begin so, or a name that is nearly this one: 'rtx3090' is no slip of 'b300'."""
    near = [other for other in known if other.startswith(name)] or get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known devices: {', '.join(sorted(known))}."


def _twice(names: Sequence[str]) -> str | None:
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


def parse_cluster(raw: Mapping[str, Any], *, where: str = "cluster") -> Cluster:
    """Build a cluster from plain data. Raises ConfigError naming every wrong setting."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a mapping with `groups`, got {type(raw).__name__}")
    try:
        return Cluster.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(explain(error, Cluster, where)) from None


def load_cluster(path: str | Path) -> Cluster:
    """Read `cluster.yaml`. Raises ConfigError."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"cluster file {file}: no such file; expected YAML with `groups` of nodes")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    return parse_cluster(raw, where=str(file))


def dump_cluster(cluster: Cluster) -> str:
    """The cluster as YAML; `load_cluster` reads it back."""
    return yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
