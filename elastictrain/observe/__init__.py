"""What people see of a run: its directory, its events in words, the live view, the plot and the summary."""

from __future__ import annotations

from elastictrain.observe.events import Event
from elastictrain.observe.metrics import MetricsRow
from elastictrain.observe.observer import Blind, Observer
from elastictrain.observe.rundir import RunDirectory, find_run
from elastictrain.observe.sentences import describe
from elastictrain.observe.status import Status
from elastictrain.observe.summary import Recovery, Summary, summarise

__all__ = [
    "Blind",
    "Event",
    "MetricsRow",
    "Observer",
    "Recovery",
    "RunDirectory",
    "Status",
    "Summary",
    "describe",
    "find_run",
    "summarise",
]
