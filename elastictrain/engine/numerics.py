"""What belongs to the mathematics besides the job's text: set before the first tensor, and recorded."""

from __future__ import annotations

import os

import torch

from elastictrain.engine.eager import set_deterministic
from elastictrain.job import Numerics


def apply_numerics(numerics: Numerics) -> torch.device:
    """Set the process up and return its device. Call it before the first tensor."""
    cuda = torch.cuda.is_available()
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.set_num_threads(numerics.threads)
    torch.set_float32_matmul_precision(numerics.matmul_precision)
    set_deterministic(numerics.deterministic)
    # Filling every new tensor finds reads of unset memory; it changes no result and costs a pass over each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not cuda:
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = numerics.deterministic
    if numerics.deterministic:
        # One named backend: the flash kernel's backward is not deterministic by default.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_math_sdp(True)
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def capture(numerics: Numerics, device: torch.device) -> dict[str, str]:
    """The facts that two processes must share to compute the same bits."""
    on_cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if on_cuda else "CPU",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(numerics.threads),
        "compute_dtype": numerics.compute_dtype,
        "matmul_precision": numerics.matmul_precision,
        "deterministic": str(numerics.deterministic),
        "attention": "math" if on_cuda and numerics.deterministic else "default",
    }
