"""Where there is no Ray there is no feeder of a node: every worker reads for itself, and the bits are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastictrain.faults import kill
from tests.support.process_cluster import byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def test_without_ray_every_worker_reads_for_itself(tmp_path: Path) -> None:
    plain = byte_job(tmp_path, workers=2)
    node = plain.model_copy(update={"data": plain.data.model_copy(update={"feeder": "node"})})
    expected = run_job(plain)
    found = run_job(node, [kill(worker=1, step=3)])
    assert found.digest == expected.digest
