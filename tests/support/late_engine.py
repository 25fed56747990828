"""A device on the host, for tests of what copies from devices: it works as late as it may."""

from __future__ import annotations

import threading
from typing import Any

import torch

ALL = "all that was begun"


class LateEngine:
    """A copy is done when it is waited for, and not before the gate is open."""

    def __init__(self) -> None:
        self.gate, self.fails, self.follows, self.pages = threading.Event(), 0, 0, 0
        self.gate.set()
        self.lock = threading.Lock()
        self.begun: list[tuple[Any, Any]] = []

    def make_page(self, size_bytes: int) -> Any:
        self.pages += 1
        return torch.zeros(size_bytes, dtype=torch.uint8)

    def follow(self) -> None:
        self.follows += 1

    def begin(self, source: Any, page: Any) -> Any:
        return source, page

    def copy(self, source: Any, out: Any, *, at_once: bool) -> None:
        if at_once:
            out.copy_(source)
        else:
            self.begun.append((source, out))

    def mark(self) -> Any:
        return ALL

    def hold(self, token: Any) -> None:
        """A device would let its next work wait; on the host all work is done when it is given."""
        with self.lock:
            for source, out in self.begun:
                out.copy_(source)
            self.begun = []

    def wait(self, token: Any) -> None:
        assert self.gate.wait(30)
        if token is ALL:
            self.hold(token)
            return
        if self.fails:
            self.fails -= 1
            if not self.fails:
                raise RuntimeError("the device is gone")
        source, page = token
        page[: source.numel()].copy_(source)
