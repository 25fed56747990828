"""A bucket as the further place: copies, its own retention, reading from it, and a server that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from elastictrain_checkpoint import Follower, Newest, Standing, Store, find, list_steps, load, verify
from elastictrain_checkpoint import follower as module
from tests.unit.checkpoint.build import flip, make_state, save

STATE = make_state({"big": ("F32", (3_000_000,)), "small": ("BF16", (50,))})
HEADER = 4096


def test_a_bucket_follows_a_disk_and_stands_in_for_it(tmp_path: Path, bucket: str, options: dict[str, Any]) -> None:
    near, far = Store(tmp_path / "near"), Store(f"s3://{bucket}/runs/a", storage_options=options)
    follower = Follower(near, far, Newest(2))
    follower.serve()
    try:
        for step in (2, 4, 6):
            save(near, STATE, (0.4,), step=step)
            follower.look()
            assert follower.wait(60)
            assert follower.standing == Standing(step, (), "")
    finally:
        follower.rest()
    assert list_steps(far) == [4, 6]
    assert verify(far, load(far, 6)) == []
    flip(near, load(near, 6).paths[0], HEADER + 10)
    reader = find((near, far), 6).reader()
    assert reader.read("big").tobytes() == STATE["big"][2]
    assert [one.source for one in reader.healed] == [far.url]
    near.remove("step-00000006/MANIFEST.json")
    assert [store.url for store in find((near, far), 6).stores] == [near.url, far.url], "its packs are still here"
    for path in load(far, 6).paths:
        near.remove(path)
    assert [store.url for store in find((near, far), 6).stores] == [far.url, near.url]


def test_a_server_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pause_s", lambda failures: 60.0 * bool(failures))
    near = Store(tmp_path / "near")
    settings = {"connect_timeout": 1, "retries": {"max_attempts": 0}}
    away = {
        "key": "k",
        "secret": "s",
        "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"},
        "config_kwargs": settings,
    }
    far = Store("s3://bucket/runs/a", storage_options=away)
    save(near, STATE, (0.4,), step=2)
    follower = Follower(near, far, Newest(2))
    follower.serve()
    assert follower.wait(60)
    follower.rest()
    assert "127.0.0.1:1" in follower.standing.error
    assert find((near, far), 2).stores == (near,)
