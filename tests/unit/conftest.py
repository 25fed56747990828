from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder_with_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Ray job around, and a working directory with a recipe in it."""
    from elastictrain_actors.runtime_env import JOB_CONFIG_VARIABLE, OVERRIDE_VARIABLE  # Ray takes a second to import

    for name in (JOB_CONFIG_VARIABLE, OVERRIDE_VARIABLE, "RAY_ADDRESS", "ELASTICTRAIN_SHIP_DEPENDENCIES"):
        monkeypatch.setenv(name, "")  # so that what a test lets the code set is taken back
        monkeypatch.delenv(name)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "recipe.py").write_text("class Mine: ...\n")
    (tmp_path / "code" / "neighbour.py").write_text("")
    (tmp_path / "code" / "__pycache__").mkdir()
    (tmp_path / "code" / "__pycache__" / "recipe.pyc").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
