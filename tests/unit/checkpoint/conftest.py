"""An S3 server for the tests of this folder; started when the first one needs it."""

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


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("s3_server.py"))],
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
