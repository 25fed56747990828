"""Workers that read each other's memory, and what happens to a run when the kernel will not have it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from elastictrain.engine import direct
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def reading_is_refused(worker: int) -> None:
    """As by a rule that shows itself only when another process is to be read."""
    del worker
    real = direct.read

    def refuse(pid: int, address: int, into: torch.Tensor) -> None:
        if pid == os.getpid():
            return real(pid, address, into)
        direct._refused.append("Operation not permitted")
        raise RuntimeError("cannot be read: Operation not permitted")

    direct.read = refuse


def test_a_run_that_may_not_read_goes_on_over_sockets(folder: Path, reference: Run) -> None:
    run = run_job(byte_job(folder, workers=3), patch=reading_is_refused)
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    assert run.machine.generation > 1, "it was tried, and the generation given up: else these tests show nothing"
    assert not run.record.of("worker_died"), "and nobody had to die for it"
