"""From a device to the host: pinned memory that is made once, a stream of its own, and an event that says when.

The device copies while it computes. The host waits for nothing; what changes the state waits on the device itself, and
only for the copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Staging:
    """Copies of device tensors on the host. Pinned memory of each tensor's size is used again by every save."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: dict[str, torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    @property
    def size_bytes(self) -> int:
        """Pinned memory."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def begin(self, tensors: Mapping[str, torch.Tensor], *, fresh: bool) -> dict[str, torch.Tensor]:
        """Begin to copy; the result may be read after `wait`.

        Args:
            tensors: all on the device; what the current stream has enqueued for them comes first.
            fresh: an earlier save may still read the buffers of the last call: use others.

        """
        if fresh:
            self._buffers = {}
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        found = {}
        with torch.cuda.stream(self._stream), torch.no_grad():
            for name, tensor in tensors.items():
                buffer = self._buffers.get(name)
                if buffer is None or buffer.dtype != tensor.dtype or buffer.shape != tensor.shape:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    self._buffers[name] = buffer
                buffer.copy_(tensor.detach(), non_blocking=True)
                tensor.record_stream(self._stream)  # the allocator must not give its memory away before the copy
                found[name] = buffer
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)
        return found

    def order(self) -> None:
        """What the current stream does from here on comes after the copy; the host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def copied(self) -> torch.cuda.Event:
        """The event of the last `begin`: `synchronize` it before the copies are read."""
        assert self._copied is not None, "nothing was begun"
        return self._copied
