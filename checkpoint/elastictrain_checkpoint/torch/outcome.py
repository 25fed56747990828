"""The handle of a save of a state dict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.hooks import RemovableHandle

from elastictrain_checkpoint.handle import DEADLINE_S, SaveHandle, SaveState
from elastictrain_checkpoint.manifest import Manifest

if TYPE_CHECKING:
    from elastictrain_checkpoint.torch.saving import AsyncSaver


class TorchHandle:
    """What a caller holds of one save; see `SaveHandle` for the outcome."""

    def __init__(self, handle: SaveHandle, saver: AsyncSaver) -> None:
        self._handle, self._saver = handle, saver

    def __repr__(self) -> str:
        return f"TorchHandle(step={self.step}, state={self.state.value})"

    @property
    def step(self) -> int:
        """The step."""
        return self._handle.step

    @property
    def state(self) -> SaveState:
        """What has become of it."""
        return self._handle.state

    @property
    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._handle.done

    @property
    def copied_bytes(self) -> int:
        """What had to be copied before the state changed."""
        return self._handle.copied_bytes

    @property
    def stall_s(self) -> float:
        """How long `before_mutation` has taken for this save."""
        return self._handle.stall_s

    def wait(self, timeout_s: float = DEADLINE_S) -> SaveState:
        """Wait for the outcome; see `SaveHandle.wait`."""
        return self._handle.wait(timeout_s)

    def result(self, timeout_s: float = DEADLINE_S) -> Manifest:
        """Wait for the commit; see `SaveHandle.result`."""
        found: Manifest = self._handle.result(timeout_s)
        return found

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `before_mutation` before every step of the optimizer, from now on. Once is enough for all saves."""
        return self._saver.attach(optimizer)
