"""Where a run stands, for those who look from outside: how it is, whether anybody still writes to it, and what its end
still lacks.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from elastictrain.errors import ElasticTrainError
from elastictrain.observe.exposure import exposure_s, stored_step
from elastictrain.observe.lock import holder_of
from elastictrain.observe.metrics import RATE_STEPS, lanes_dropped, taken_over, tokens_per_s
from elastictrain.observe.rundir import RunDirectory
from elastictrain.observe.status import Status
from elastictrain.observe.summary import Summary, summarise

AWAY_S = 60.0
"""A controller that has died is back within seconds; with no sign of it for so long, its cluster is gone too."""


def status_of(run: RunDirectory) -> Status:
    """status.json brought up to the newest row and event: it is replaced seldom, and not at all by a run that dies."""
    found = run.read_status() or Status(run_dir=str(run.path), name=run.path.name)
    rows, summary, events = run.metrics(), summarise(run), run.events()
    facts: dict[str, Any] = {"run_dir": str(run.path)}
    began = [event.data for event in events if event.kind in ("run_started", "run_resumed")]
    if began and not found.steps:  # the controller has not written one yet
        facts |= {"steps": began[-1].get("steps") or 0, "name": began[-1].get("name") or found.name}
    if rows:
        facts |= {"step": rows[-1].step, "loss": rows[-1].loss, "generation": rows[-1].generation}
        facts |= {"world": rows[-1].world or found.world, "tokens_per_s": tokens_per_s(rows[-RATE_STEPS:])}
        taken = taken_over(rows[-RATE_STEPS:])
        facts |= {} if taken is None else {"taken_over": taken.model_dump(by_alias=True)}
        facts["lanes_dropped"] = lanes_dropped(rows[-RATE_STEPS:])
    if rows and summary.outcome == "running":
        stored = stored_step(events)
        facts |= {"exposure_s": exposure_s(stored, rows), "stored_step": stored}
    about = [event for event in events if event.kind in ("checkpoint", "checkpoint_given_up")]
    if about:
        facts["checkpoint_given_up"] = about[-1].data if about[-1].kind == "checkpoint_given_up" else None
    recoveries = [event.data for event in events if event.kind == "recovery"]
    if recoveries:
        facts["last_recovery"] = recoveries[-1]
    if summary.outcome != "running":
        facts |= {"state": summary.outcome, "error": summary.error, "step": summary.steps}
    return found.model_copy(update=facts)


def silent_for_s(run: RunDirectory) -> float:
    """Seconds since anything was written to the run directory: a live controller replaces its status twice a second."""
    written_s = 0.0
    for name in ("status.json", "events.jsonl", "metrics.jsonl", "lock"):
        with suppress(OSError):
            written_s = max(written_s, (run.path / name).stat().st_mtime)
    return max(0.0, time.time() - written_s)


def is_gone(run: RunDirectory) -> bool:
    """Whether nobody writes to it, nor will: no live process holds it, and none has come for a while."""
    return holder_of(run.path) is None and silent_for_s(run) > AWAY_S


def complete(run: RunDirectory) -> Summary:
    """What became of the run. When it is over and its summary.json is missing or not of this end, write it, and the
    plot too: the process that started the run may have been killed. Anybody may do so at any time: files are replaced
    whole, and what is written depends on nothing but events and metrics.
    """
    whole = RunDirectory.open(run.path.absolute())
    summary = summarise(whole)
    if summary.outcome == "running" or whole.read_summary() == summary.model_dump(mode="json"):
        return summary
    with suppress(ElasticTrainError):  # a folder that may only be read is as good to look at
        whole.write_summary(summary.line())
    # A plot is a convenience: without matplotlib (or rows) the run is as good.
    with suppress(ElasticTrainError, ImportError):
        from elastictrain.observe.plot import plot_run

        plot_run(whole)
    return summary
