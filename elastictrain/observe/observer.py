"""Whoever wants to see a run while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from elastictrain.observe.events import Event


class Observer(Protocol):
    """Is told what happens, in order, from one thread. None of the calls may raise or take long."""

    def update(self, status: Mapping[str, Any]) -> None:
        """Some fields of `Status` have changed; those that are missing are as before."""

    def row(self, metrics: Mapping[str, Any]) -> None:
        """A step has been published: the fields of `MetricsRow`."""

    def event(self, event: Event) -> None:
        """A line of events.jsonl has been written."""

    def close(self) -> None:
        """The run is over, whatever its outcome. Idempotent."""


class Blind:
    """Sees nothing."""

    def update(self, status: Mapping[str, Any]) -> None:
        del status

    def row(self, metrics: Mapping[str, Any]) -> None:
        del metrics

    def event(self, event: Event) -> None:
        del event

    def close(self) -> None:
        pass
