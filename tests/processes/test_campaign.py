"""A fixed slice of the fault campaign, and every seed of it that has ever failed (`make campaign` runs all)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.campaign import play, regressions, undisturbed
from tests.support.process_cluster import Run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
SLICE = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return undisturbed(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("seed", sorted({*SLICE, *regressions()}))
def test_the_bits_stay(seed: int, reference: Run, tmp_path: Path) -> None:
    result = play(tmp_path, seed, reference)
    assert not result.problem, result
    assert result.deaths or result.resizes, "something has happened"
