"""Seconds of a transformer's layers on a device: a roofline with a few fitted shares and a term for alignment."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from elastictrain.planner.collectives import all_reduce_s
from elastictrain.planner.model import Cut, Transformer
from elastictrain.planner.profiles import Device, Dtype, Link


@dataclass(frozen=True, slots=True)
class Constants:
    """The six fitted constants of a software stack on a class of hardware.

    `gemm`: share of the peak that large aligned matrix products reach. `memory`: share of the memory bandwidth that
    element-wise operations reach. `attention`: share of the peak that FlashAttention 1 reaches (2 is twice as quick:
    Dao 2023). `overhead_s`: what the launches of a layer cost for one micro-batch, forward and backward, where it has
    `USUAL_KERNELS`. `inside`, `across`: share of a link's bandwidth that collectives reach inside a node, and across
    nodes.

    The defaults are fitted to the A100 runs of "Efficient Parallelization Layouts" (Hagemann et al. 2023);
    `benchmarks/planner.py` fits them again, leaving one group out at a time.
    """

    gemm: float = 0.782
    memory: float = 0.291
    attention: float = 0.34
    overhead_s: float = 1.42e-3
    inside: float = 0.417
    across: float = 0.798


DEFAULTS = Constants()
_ALIGNED = ((64, 1.0), (32, 0.95), (16, 0.9), (8, 0.8))
"""Tensor cores want sides that are multiples of 64 two-byte elements. BLOOM's trials: 1,800 columns per device (a
multiple of 8 only) gave 0.78 of the speed of 1,728 (a multiple of 64)."""
_SCORE_PASSES = {"plain": 5.0, "fused": 2.0}
_SCORE_BACKWARD = 1.3
_NORM_PASSES = {True: 6.0, False: 20.0}
"""Reads and writes of the hidden state by two norms and two additions, as one kernel each or operation by operation."""


_KERNELS = {"flash1": 1, "flash2": 1, "fused": 3, "plain": 7}
_NORM_KERNELS = {True: 2, False: 14}
USUAL_KERNELS = 32
"""Of a layer's forward with FlashAttention and norms made of single operations."""


def kernels(model: Transformer) -> int:
    """Kernels of a layer's forward: matrix products, rotary positions (8), attention, two norms, activation and
    additions (4).
    """
    return (5 if model.gated else 4) + 8 + _KERNELS[model.attention] + _NORM_KERNELS[model.fused_norm] + 4


def alignment(side: int) -> float:
    """Share of its speed that a matrix product keeps whose side is not a multiple of 64."""
    return next((share for multiple, share in _ALIGNED if side % multiple == 0), 0.5)


def gemm_share(device: Device, m: int, n: int, k: int, constants: Constants) -> float:
    """Share of the peak for a product of (m, k) by (k, n): the measured table if there is one, else the constant."""
    table = device.gemm_efficiency
    if not table:
        return constants.gemm * min(alignment(n), alignment(k))
    sides, smallest = sorted(table), min(m, n, k)
    at = bisect_left(sides, smallest)
    if at == 0 or at == len(sides):
        return table[sides[min(at, len(sides) - 1)]]
    low, high = sides[at - 1], sides[at]
    part = math.log(smallest / low) / math.log(high / low)
    return table[low] * (1 - part) + table[high] * part


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds for one micro-batch on one device, forward and backward together."""

    compute_s: float
    tensor_s: float
    forward_s: float
    """Of both, what the forward takes."""

    @property
    def total_s(self) -> float:
        return self.compute_s + self.tensor_s


def _gemms_s(shapes: list[tuple[int, int, int]], device: Device, dtype: Dtype, constants: Constants) -> float:
    peak = device.peak(dtype)
    return sum(2.0 * m * n * k / (peak * gemm_share(device, m, n, k, constants)) for m, n, k in shapes)


def layer_time(model: Transformer, cut: Cut, device: Device, inside: Link, constants: Constants) -> LayerTime:
    """One layer. The backward costs twice the forward's matrix products; with checkpointing the forward runs again, or
    its attention.
    """
    t, rows = cut.tensor, cut.micro_batch * model.sequence
    h, width = model.hidden, max(1, model.ffn // t)
    shapes = [
        (rows, 3 * h // t, h),
        (rows, h, h // t),
        *([(rows, width, h)] * (2 if model.gated else 1)),
        (rows, h, width),
    ]
    matrices = _gemms_s(shapes, device, cut.dtype, constants)
    attention, attention_back = _attention_s(model, cut, device, constants)
    bandwidth = device.bandwidth_bytes_s * constants.memory
    size = 2 if cut.dtype == "bf16" else 4
    hidden_bytes = size * rows * h
    norms = hidden_bytes * _NORM_PASSES[model.fused_norm] / (t if cut.sequence_parallel else 1)
    inner = 5 * size * rows * width + 8 * hidden_bytes / t
    elements = (norms + inner) / bandwidth
    exchange = 2 * all_reduce_s(hidden_bytes, t, inside, constants.inside)
    forward, backward = matrices + attention + elements, 2 * matrices + attention_back + 2 * elements
    # The backward has about two kernels for one; what is computed again is launched again.
    passes = {"none": 3.0, "selective": 3.0 + _KERNELS[model.attention] / kernels(model), "every_layer": 4.0}
    launches = constants.overhead_s * kernels(model) / USUAL_KERNELS * passes[cut.checkpointing] / 3
    again = {"none": 0.0, "selective": attention, "every_layer": forward}[cut.checkpointing]
    return LayerTime(
        compute_s=forward + again + backward + launches,
        tensor_s=exchange * (3 if cut.checkpointing == "every_layer" else 2),
        forward_s=forward + exchange + constants.overhead_s * kernels(model) / USUAL_KERNELS / 3,
    )


def _attention_s(model: Transformer, cut: Cut, device: Device, constants: Constants) -> tuple[float, float]:
    """Scores and their use, forward and backward. Flash kernels skip the masked half."""
    flops = 4.0 * cut.micro_batch * model.sequence**2 * model.hidden / cut.tensor
    peak = device.peak(cut.dtype)
    if model.attention in ("flash1", "flash2"):
        share = constants.attention * (2 if model.attention == "flash2" else 1)
        forward = 0.5 * flops / (peak * share)
        return forward, 2.9 * forward
    scores = 2.0 * cut.micro_batch * model.heads / cut.tensor * model.sequence**2
    passes = scores * _SCORE_PASSES[model.attention] / (device.bandwidth_bytes_s * constants.memory)
    matrices = flops / (peak * constants.gemm * 0.8)
    return matrices + passes, 2 * matrices + _SCORE_BACKWARD * passes


def head_time(model: Transformer, cut: Cut, device: Device, constants: Constants) -> float:
    """Logits and loss, forward and backward, of one micro-batch."""
    rows, columns = cut.micro_batch * model.sequence, max(1, model.vocab // cut.tensor)
    matrices = 3 * _gemms_s([(rows, columns, model.hidden)], device, cut.dtype, constants)
    return matrices + 20.0 * rows * columns / (device.bandwidth_bytes_s * constants.memory)
