from __future__ import annotations

import os
import select
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

START_S = 60.0
S3_SERVER = Path(__file__).parents[1] / "support" / "s3_server.py"


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


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Of an S3 server for the tests of a module; started when the first one needs it."""
    server = subprocess.Popen(
        [sys.executable, str(S3_SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
    )
    try:
        assert server.stdout is not None
        ready, _, _ = select.select([server.stdout], [], [], START_S)
        line = server.stdout.readline() if ready else b""
        assert line.strip().isdigit(), f"the server did not start within {START_S} s"
        yield f"http://127.0.0.1:{int(line)}"
    finally:
        server.kill()
        server.wait(timeout=10)
        for pipe in (server.stdin, server.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def options(endpoint: str) -> dict[str, Any]:
    return {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": endpoint}}


@pytest.fixture
def bucket(options: dict[str, Any]) -> str:
    import s3fs

    name = f"b{uuid.uuid4().hex}"
    s3fs.S3FileSystem(**options).mkdir(name)
    return name
