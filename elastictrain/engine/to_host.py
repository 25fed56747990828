"""From a worker's CUDA device to the host, beside training: what a checkpoint of a run is written from.

The copies go to pinned memory, as large as the worker's share, that is made by its first checkpoint and used again. A
stream of their own makes them, so the next forward and backward run meanwhile; the next update waits for them on the
device, and the training thread for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from elastictrain_checkpoint.torch.device import Bounced, Staging


def is_staged(tensor: torch.Tensor) -> bool:
    """Whether it is copied beside training; what is on another kind of device is copied at the call."""
    return tensor.is_cuda


def pinned(device: torch.device) -> Staging | Bounced:
    """What copies from this device."""
    from elastictrain_checkpoint.torch.device import CudaEngine, Staging  # seconds, which runs on hosts do not pay

    return Staging(CudaEngine(device))


class ToHost:
    """The copies of one worker. `make`: what copies from a device."""

    def __init__(self, make: Callable[[torch.device], Staging | Bounced] = pinned) -> None:
        self._make = make
        self._staging: Staging | Bounced | None = None

    def begin(self, tensors: Mapping[str, torch.Tensor], *, fresh: bool) -> Mapping[str, torch.Tensor]:
        """Begin to copy tensors of one device; gives, by the same names, what will hold them when `copied` returns.
        `fresh`: what the last call gave may still be read.
        """
        if self._staging is None:
            self._staging = self._make(next(iter(tensors.values())).device)
        return self._staging.begin(tensors, fresh=fresh)

    def copied(self) -> Callable[[], None]:
        """Waits until all that was begun by the last call is on the host."""
        assert self._staging is not None, "nothing was begun"
        return self._staging.copied().synchronize

    def before_apply(self) -> None:
        """The state is about to change: on the device, after it has been copied."""
        if self._staging is not None:
            self._staging.order()
