"""What a node and its links are really capable of: matrix products by shape, memory, disk, transfers.

Runs where it is called and takes about the seconds that it is given. On CUDA the device's events are the clock
(tests/gpu); on a CPU the process's own. Nothing is changed on the node but one file, which is removed again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from elastictrain.errors import ClusterError
from elastictrain.planner.measured import NodeReading, Product, Times
from elastictrain.planner.profiles import Dtype

SIDES = (64, 128, 256, 512, 1024)
CUDA_SIDES = (*SIDES, 2048, 4096)
WIDE = 1024
CUDA_WIDE = 8192
SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24)
DISK_BYTES = 1 << 26
PATIENCE_S = 60.0
"""How long one end of a link waits for the other."""
PARTS = ("products", "memory", "disk", "within")
"""What `measure_part` measures, in order."""


def timed(work: Callable[[], object], seconds: float, *, cuda: bool = False) -> float:
    """Seconds of one call: the median of as many as fit into `seconds`, three at least, after one to warm up."""
    work()
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 3 or (time.perf_counter() - begun < seconds and len(taken) < 1000):
        if cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            work()
            last.record()
            last.synchronize()
            taken.append(first.elapsed_time(last) / 1e3)
        else:
            at = time.perf_counter()
            work()
            taken.append(time.perf_counter() - at)
    return median(taken)


def measure_products(seconds: float) -> tuple[Product, ...]:
    """Products of a wide matrix by ever deeper ones, in bf16 (where the device has units for it) and f32."""
    cuda = torch.cuda.is_available()
    place = torch.device("cuda") if cuda else torch.device("cpu")
    dtypes: list[tuple[Dtype, torch.dtype]] = [("f32", torch.float32)]
    if cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes.append(("bf16", torch.bfloat16))
    sides, wide = (CUDA_SIDES, CUDA_WIDE) if cuda else (SIDES, WIDE)
    found = []
    with torch.no_grad():
        for name, dtype in dtypes:
            for side in sides:
                left = torch.randn(wide, side, device=place).to(dtype)
                right = torch.randn(side, wide, device=place).to(dtype)
                taken = timed(lambda a=left, b=right: a @ b, seconds / len(sides) / len(dtypes), cuda=cuda)  # type: ignore[misc]
                found.append(Product(wide, wide, side, name, taken))
    return tuple(found)


def measure_bandwidth(seconds: float, *, host: bool) -> float:
    """Bytes/s of memory that a copy reads and writes: of the device, or of the host."""
    cuda = torch.cuda.is_available() and not host
    place = torch.device("cuda") if cuda else torch.device("cpu")
    source = torch.ones((1 << 28) if cuda else (1 << 24), dtype=torch.float32, device=place)
    target = torch.empty_like(source)
    taken = timed(lambda: target.copy_(source), seconds, cuda=cuda)
    return 2 * source.numel() * source.element_size() / taken


def measure_disk(folder: Path, size_bytes: int = DISK_BYTES) -> float:
    """Bytes/s of writing a file there, until it is durable. Raises ClusterError when that is not possible."""
    data = os.urandom(1 << 20) * (size_bytes >> 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            begun = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return len(data) / (time.perf_counter() - begun)
    except OSError as error:
        raise ClusterError(
            f"{folder}: cannot be written to measure the disk: {error.strerror or error}; name another folder"
        ) from error


def host_memory_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def measure_within(seconds: float) -> Times:
    """Transfers inside the node: between its first two devices, or between two processes over gloo."""
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        found = []
        for size in SIZES:
            source = torch.ones(size // 4, device="cuda:0")
            target = torch.empty_like(source, device="cuda:1")
            found.append((float(size), timed(lambda a=source, b=target: b.copy_(a), seconds / len(SIZES), cuda=True)))  # type: ignore[misc]
        return tuple(found)
    port = free_port()
    other = multiprocessing.get_context("spawn").Process(
        target=measure_pair, args=("127.0.0.1", port, 1, "127.0.0.1", seconds), daemon=True
    )
    other.start()
    try:
        return measure_pair("127.0.0.1", port, 0, "127.0.0.1", seconds)
    finally:
        other.join(PATIENCE_S)
        if other.is_alive():
            other.kill()


def measure_pair(host: str, port: int, end: int, own: str, seconds: float, sizes: tuple[int, ...] = SIZES) -> Times:
    """One end (0 or 1) of a link: tensors there and back between the two, by size. `host`, `port`: where they meet, at
    end 0; `own`: the address of this end.

    Both ends do the same number of rounds. Raises ClusterError when the other end does not come or goes away.
    """
    found = []
    with _pair(host, port, end, own) as group:
        for size in sizes:
            tensor = torch.zeros(size // 4)
            taken: list[float] = []
            for _ in range(_rounds(group, tensor, end, seconds / len(sizes))):
                begun = time.perf_counter()
                _there_and_back(group, tensor, end)
                taken.append((time.perf_counter() - begun) / 2)
            found.append((float(size), min(taken)))  # whatever else runs can only make it longer
    return tuple(found)


def _rounds(group: dist.ProcessGroup, tensor: torch.Tensor, end: int, seconds: float) -> int:
    """How often both ends exchange this tensor: end 0 tries, and tells the other one."""
    _there_and_back(group, tensor, end)
    begun = time.perf_counter()
    _there_and_back(group, tensor, end)
    count = torch.tensor([min(200, max(5, int(seconds / (time.perf_counter() - begun))))])
    group.broadcast([count], dist.BroadcastOptions()).wait()
    return int(count.item())


def _there_and_back(group: dist.ProcessGroup, tensor: torch.Tensor, end: int) -> None:
    if end == 0:
        group.send([tensor], 1, 0).wait()
        group.recv([tensor], 1, 1).wait()
    else:
        group.recv([tensor], 0, 0).wait()
        group.send([tensor], 0, 1).wait()


@contextlib.contextmanager
def _pair(host: str, port: int, end: int, own: str) -> Iterator[dist.ProcessGroup]:
    patience = timedelta(seconds=PATIENCE_S)
    try:
        store = TCPStore(host, port, 2, is_master=end == 0, timeout=patience)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = patience
        # Not by the name of the host, which may lead to the loopback.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own)]
        group: dist.ProcessGroup = dist.ProcessGroupGloo(PrefixStore("measure", store), end, 2, options)  # type: ignore[assignment]
        yield group
    except RuntimeError as error:
        raise ClusterError(
            f"the link between this node and {host}:{port} could not be measured: {str(error).splitlines()[0]}; "
            "nodes must reach each other on all ports"
        ) from error


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def measure_part(part: str, seconds: float, folder: Path, *, cpus: int | None = None) -> dict[str, object]:
    """The fields of a `NodeReading` that one of `PARTS` is about.

    Without CUDA a device is a core (a worker computes with one thread unless its job says otherwise), with its share of
    the memory. `cpus`: how many; default: those that this process may use.
    """
    cuda = torch.cuda.is_available()
    cores = cpus or len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    if part == "products":
        return {"products": measure_products(seconds)}
    if part == "memory":
        host = measure_bandwidth(seconds / 2, host=True)
        return {
            "host_bandwidth_bytes_s": host,
            "bandwidth_bytes_s": measure_bandwidth(seconds / 2, host=False) if cuda else host,
            "memory_bytes": float(torch.cuda.get_device_properties(0).total_memory)
            if cuda
            else host_memory_bytes() / cores,
            "host_memory_bytes": host_memory_bytes(),
            "device": torch.cuda.get_device_name(0) if cuda else "cpu",
            "devices": torch.cuda.device_count() if cuda else cores,
            "host": socket.gethostname(),
        }
    if part == "disk":
        return {"disk_bytes_s": measure_disk(folder)}
    return {"within": measure_within(seconds)}


def measure_node(seconds: float, folder: Path, *, part_done: Callable[[str], object]) -> NodeReading:
    """All of this machine; `part_done` is called after each of `PARTS`."""
    fields: dict[str, object] = {}
    threads = torch.get_num_threads()
    try:
        for part in PARTS:
            fields |= measure_part(part, seconds / len(PARTS), folder)
            part_done(part)
    finally:
        torch.set_num_threads(threads)
    return NodeReading(**fields)  # type: ignore[arg-type]
