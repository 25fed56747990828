"""The handle of a save of a state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.hooks import RemovableHandle

from elastictrain_checkpoint.errors import CheckpointError
from elastictrain_checkpoint.handle import DEADLINE_S, SaveHandle, SaveState
from elastictrain_checkpoint.manifest import Manifest

if TYPE_CHECKING:
    from elastictrain_checkpoint.torch.saving import AsyncSaver


class TorchHandle:
    """What a caller holds of one save; see `SaveHandle` for the outcome. Asked like a `concurrent.futures.Future`."""

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

    def result(self, timeout_s: float = DEADLINE_S, *, timeout: float | None = None) -> Manifest:
        """Wait for the commit; see `SaveHandle.result`. ``timeout``: the same, as futures call it."""
        found: Manifest = self._handle.result(timeout_s if timeout is None else timeout)
        return found

    def exception(self, timeout_s: float = DEADLINE_S, *, timeout: float | None = None) -> CheckpointError | None:
        """Wait for the outcome: what `result` would raise, or None.

        Raises:
            SaveTimeout: it takes longer.

        """
        self._handle.wait(timeout_s if timeout is None else timeout)
        try:
            self._handle.result(0)
        except CheckpointError as error:
            return error
        return None

    def add_done_callback(self, call: Callable[[TorchHandle], object]) -> None:
        """Call it with this handle when the outcome is known: by the thread that saves, or at once."""
        self._handle.call_when_done(lambda: call(self))

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `before_mutation` before every step of the optimizer, from now on. Once is enough for all saves."""
        return self._saver.attach(optimizer)
