"""Storage that fails is the cluster's to mend, not the recipe's: the error names the setting checkpoint.path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from elastictrain.engine.saver import Saver
from elastictrain.engine.worker_model import WorkerModel
from elastictrain.errors import ClusterError
from elastictrain.job import Checkpoint
from elastictrain_checkpoint import StaleGeneration, Store, list_steps, load
from tests.unit.engine.test_saving import pieces_of, save, store_of, trained
from tests.unit.engine.worlds import NetRecipe, committed, make_job


def share_of(model: WorkerModel, saver: Saver, step: int, generation: int) -> dict[str, Any]:
    [owned] = pieces_of(model, [[(0, len(model.space.blocks))]])
    return saver.begin(owned, step=step, generation=generation, worker=0).share()


def commit_of(saver: Saver, share: dict[str, Any], model: WorkerModel, step: int, generation: int) -> str:
    return committed(saver, [share], step=step, generation=generation, tree={}, aliases=model.space.aliases, info={})


def said(settings: Checkpoint, step: int, cause: str) -> str:
    return rf"^checkpoint step {step} cannot be stored in checkpoint\.path='{re.escape(settings.path)}': {cause}"


def test_packs_that_cannot_be_written_are_a_cluster_error_that_names_the_path(tmp_path: Path) -> None:
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    saver = Saver(settings)
    (tmp_path / "ckpt").mkdir(exist_ok=True)
    (tmp_path / "ckpt" / "step-00000002").write_text("a file where the step's folder must be")
    with pytest.raises(ClusterError, match=said(settings, 2, r"(NotADirectory|FileExists)Error: ")) as error:
        share_of(model, saver, 2, 1)
    assert isinstance(error.value.__cause__, OSError)


def test_a_commit_that_storage_refuses_is_a_cluster_error_that_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = trained(make_job(NetRecipe(), lanes=2)), store_of(tmp_path)
    saver = Saver(settings)
    share = share_of(model, saver, 2, 1)

    def full(self: Store, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", full)
        with pytest.raises(ClusterError, match=said(settings, 2, r"OSError: \[Errno 28\] No space")):
            commit_of(saver, share, model, 2, 1)
    assert commit_of(saver, share, model, 2, 1).endswith("step-00000002"), "nothing was lost by it"


def test_a_commit_of_an_older_generation_is_a_cluster_error_that_names_the_path(tmp_path: Path) -> None:
    model = trained(make_job(NetRecipe(), lanes=2))
    settings = save(model, tmp_path, generation=3)
    saver = Saver(settings)
    share = share_of(model, saver, 2, 2)
    with pytest.raises(ClusterError, match=said(settings, 2, "StaleGeneration: ")) as error:
        commit_of(saver, share, model, 2, 2)
    assert isinstance(error.value.__cause__, StaleGeneration)
    assert load(Store(settings.path), 2).generation == 3


def test_what_was_given_up_goes_with_the_first_new_checkpoint(tmp_path: Path) -> None:
    """A run that goes on from step 2 leaves 4 behind; when 3 is there, 4 has not happened."""
    model = trained(make_job(NetRecipe(), lanes=2))
    for step, generation in ((2, 1), (4, 1), (3, 2)):
        settings = save(model, tmp_path, step=step, generation=generation)
    assert list_steps(Store(settings.path)) == [2, 3]
