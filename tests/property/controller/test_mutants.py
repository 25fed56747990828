"""Every planted bug of `mutants` is found, and there are enough of them."""

from __future__ import annotations

import pytest

from tests.property.controller.mutants import MUTANTS, Plant, found_by


def test_there_are_enough_and_each_has_a_name() -> None:
    assert len({plant.__name__ for plant in MUTANTS}) == len(MUTANTS) >= 24


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_by(plant, monkeypatch) is not None
