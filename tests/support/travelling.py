"""What travels to a cluster's nodes: a job with a recipe of its own, and a look into what was packed."""

from __future__ import annotations

import json
import zipfile
from typing import Any

import pytest

from elastictrain.job import Job, parse_job
from elastictrain_actors.runtime_env import JOB_CONFIG_VARIABLE

PACKAGES = ["elastictrain", "elastictrain_actors", "elastictrain_checkpoint"]


def a_job(**settings: Any) -> Job:
    return parse_job(
        {"recipe": "code/recipe.py:Mine", "data": {"kind": "jsonl", "path": "data"}, "steps": 1} | settings
    )


def inside(monkeypatch: pytest.MonkeyPatch, environment: dict[str, Any]) -> None:
    config = {"runtime_env": environment, "metadata": {"job_submission_id": "sub-1"}}
    monkeypatch.setenv(JOB_CONFIG_VARIABLE, json.dumps(config))


def names_in(archive: str) -> list[str]:
    with zipfile.ZipFile(archive) as opened:
        return sorted(opened.namelist())
