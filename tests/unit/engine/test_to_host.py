"""A worker whose state lies on a device (one on the host that works as late as it may) stores it beside training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from elastictrain.engine import saving
from elastictrain.engine.saver import Saver
from elastictrain.engine.saving import combine_shares, digest_share, owned_state
from elastictrain.engine.to_host import ToHost
from elastictrain.job import Checkpoint
from elastictrain.layout import Shard
from elastictrain_checkpoint import Store, digest, load
from elastictrain_checkpoint.torch.device import Bounced, Staging
from tests.support.late_engine import LateEngine
from tests.unit.engine.worlds import NetRecipe, alone, committed, make_job


def staging(engine: LateEngine) -> Staging:
    return Staging(engine)


def bounced(engine: LateEngine) -> Bounced:
    return Bounced(engine, 1 << 12, deadline_s=30)


class Scene:
    def __init__(self, settings: Checkpoint, make: Any) -> None:
        self.worker = alone(make_job(NetRecipe(), lanes=2))
        self.step = 0
        self.train()
        self.engine, self.saver, self.store = LateEngine(), Saver(settings), Store(settings.path)
        self.saver._to_host = ToHost(lambda _: make(self.engine))

    def train(self) -> None:
        self.step += 1
        self.worker.step(self.step)

    def owned(self, to_host: saving.Copier | None) -> saving.Owned:
        model = self.worker.model
        shards = [Shard(0, len(model.space.blocks), 0, None)]
        return owned_state(model.flat, model.held, shards, with_counters=True, to_host=to_host)

    def begin(self, known_step: int = 0) -> Any:
        owned = self.owned(self.saver.to_host)
        return self.saver.begin(owned, step=self.step, generation=1, worker=0, known_step=known_step)

    def digest(self) -> str:
        return combine_shares([digest_share(self.owned(None))], self.worker.model.space.aliases)

    def commit(self, writing: Any, step: int) -> str:
        committed(
            self.saver,
            [writing.share()],
            step=step,
            generation=1,
            tree={},
            aliases=self.worker.model.space.aliases,
            info={},
        )
        manifest = load(self.store, step)
        assert digest(self.store, manifest) == manifest.digest
        return manifest.digest


@pytest.fixture(autouse=True)
def all_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "is_staged", lambda _: True)


@pytest.mark.parametrize("incremental", [False, True])
def test_the_state_comes_while_training_goes_on_and_an_update_only_puts_itself_behind(
    tmp_path: Path, incremental: bool
) -> None:
    scene = Scene(Checkpoint(path=str(tmp_path / "c"), incremental=incremental), staging)
    known = 0
    for _ in range(3):
        expected, at = scene.digest(), scene.step
        scene.engine.gate.clear()
        writing = scene.begin(known)
        assert scene.engine.begun, "nothing has been waited for, nothing copied by the training thread"
        scene.saver.before_apply()
        scene.train()
        assert not writing.done, "it still waits for the device, and nobody for it"
        scene.engine.gate.set()
        assert scene.commit(writing, at) == expected
        known = at
    assert scene.engine.pages == 1, "pinned once"
    assert scene.saver._lazy.pool.size_bytes == 0, "no second copy"


def test_through_few_pages_an_update_waits_for_the_device(tmp_path: Path) -> None:
    scene = Scene(Checkpoint(path=str(tmp_path / "c")), bounced)
    expected, at = scene.digest(), scene.step
    writing = scene.begin()
    scene.saver.before_apply()
    scene.train()
    assert scene.commit(writing, at) == expected


def test_a_share_that_was_given_up_leaves_its_memory_to_the_next(tmp_path: Path) -> None:
    scene = Scene(Checkpoint(path=str(tmp_path / "c")), staging)
    scene.engine.gate.clear()
    given_up = scene.begin()
    assert scene.saver.give_up() == [scene.step]
    scene.train()
    expected, at = scene.digest(), scene.step
    writing = scene.begin()
    scene.saver.before_apply()
    scene.train()
    scene.engine.gate.set()
    assert scene.commit(writing, at) == expected
    assert given_up.done


def test_what_lies_on_the_host_is_not_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "is_staged", lambda tensor: tensor.dtype != torch.int64)
    scene = Scene(Checkpoint(path=str(tmp_path / "c")), staging)
    owned = scene.owned(scene.saver.to_host)
    assert owned.is_staged
    monkeypatch.setattr(saving, "is_staged", lambda _: False)
    assert not scene.owned(scene.saver.to_host).is_staged
    expected = scene.digest()
    assert scene.commit(scene.begin(), scene.step) == expected
