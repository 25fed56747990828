"""Run one job file on plain processes, with the real controller and engine but without Ray, until it ends or SIGTERM.

Prints one JSON line: outcome, step, digest, events.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import common  # noqa: F401 - sets the path up


def main(job_file: str) -> None:
    from elastictrain.controller import events as ev
    from elastictrain.controller.machine import Machine
    from elastictrain.engine.worker_model import inspect
    from elastictrain.job import load_job
    from elastictrain.protocol import Restore
    from elastictrain_actors.driver import Driver
    from elastictrain_actors.spec import machine_spec
    from tests.support.process_cluster import MemoryJournal, MemoryRecord, ProcessEffects

    job = load_job(Path(job_file))
    effects, record = ProcessEffects(job), MemoryRecord()
    driver = Driver(Machine(machine_spec(job, inspect(job))), effects, record, MemoryJournal())

    def stop(*_: Any) -> None:
        driver.request(ev.StopRequested(0.0, "the benchmark is over"))

    signal.signal(signal.SIGTERM, stop)
    try:
        outcome = driver.run(ev.Begun(0.0, Restore(0, None)))
    finally:
        effects.close()
    events = [(kind, data) for kind, data, _ in record.events]
    print(json.dumps({"outcome": outcome.outcome, "step": outcome.step, "digest": outcome.digest,
                      "error": outcome.error, "events": events}, default=str))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
