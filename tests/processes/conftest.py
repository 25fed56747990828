"""The standard small job of these tests, undisturbed: what every disturbed run must equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process_cluster import Run, byte_job, run_job


@pytest.fixture(scope="package", autouse=True)
def small_pieces_are_read_too() -> Iterator[None]:
    """These models are tiny: without it all of their pieces would go through gloo, as they do in the tests on Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTICTRAIN_DIRECT", "1")
        yield


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data lie; `byte_job` writes the same file every time."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="package")
def reference(folder: Path) -> Run:
    """One worker, eight steps, nothing happens."""
    return run_job(byte_job(folder, workers=1))
