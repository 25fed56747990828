"""Beginning with the weights of a run that has its checkpoints in several places."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastictrain.engine.origins import open_origin, pin
from elastictrain.engine.resume import _recorded_origin
from elastictrain.engine.saving import open_stores
from elastictrain.engine.worker_model import WorkerModel
from elastictrain.errors import ClusterError, ConfigError, CorruptCheckpoint
from elastictrain.job import Checkpoint, Copy, dump_job
from elastictrain.origin import Place, StartFrom
from elastictrain_checkpoint import Store, copy_step, discard, list_steps, load
from tests.unit.engine.test_saving import Averaged, save, trained
from tests.unit.engine.test_starting import ALONE, THREE, begun, new_job, parameters
from tests.unit.engine.worlds import differing, make_job


@pytest.fixture
def places(tmp_path: Path) -> tuple[WorkerModel, Checkpoint]:
    """Step 2 in the first place, and step 4, with other weights, in both."""
    model = trained(make_job(Averaged(), lanes=2, block_elements=4096))
    near = save(model, tmp_path).path
    model.held.masters[0].add_(1)
    save(model, tmp_path, step=4)
    copy_step(Store(near), Store(tmp_path / "far"), 4)
    return model, Checkpoint(
        path=near, copy_to=(Copy(path=str(tmp_path / "far"), storage_options={"auto_mkdir": True}),)
    )


def run_directory(path: Path, checkpoint: Checkpoint | None) -> str:
    """Of a run with these checkpoints."""
    path.mkdir()
    job = make_job(Averaged(), lanes=2).model_copy(update={"checkpoint": checkpoint})
    (path / "job.yaml").write_text(dump_job(job))
    return str(path)


def packs_of(place: str, step: int) -> list[Path]:
    return sorted(Path(place).glob(f"step-{step:08d}/*/*.safetensors"))


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_run_directory_knows_its_places(places: Any, tmp_path: Path) -> None:
    """Its first place is lost; the places are pinned, so that workers need not see the directory."""
    model, settings = places
    run = run_directory(tmp_path / "run", settings)
    shutil.rmtree(settings.path)
    pinned = pin(new_job(checkpoint=run)).settings
    assert pinned.copies == tuple(Place(path=one.path, storage_options=one.storage_options)
                                  for one in (settings, *settings.copy_to))  # fmt: skip
    assert (pinned.step, pinned.fingerprint) == (4, load(Store(settings.copy_to[0].path), 4).digest)
    shutil.rmtree(run)
    for began in begun(new_job(**pinned.model_dump()), THREE):
        blocks = began.held.masters
        assert differing(parameters(began, blocks), parameters(model, blocks)) == []


def test_the_newest_that_is_whole_anywhere_is_taken(places: Any) -> None:
    _, settings = places
    near, far = open_stores(settings)
    further = [{"path": far.url}]
    discard(near, 4)
    assert list_steps(near) == [2]
    assert pin(new_job(checkpoint=settings.path)).settings.step == 2, "whoever names one place means that one"
    assert pin(new_job(checkpoint=settings.path, copies=further)).settings.step == 4
    shutil.rmtree(Path(far.url) / "step-00000004")
    assert pin(new_job(checkpoint=settings.path, copies=further)).settings.step == 2


def test_what_is_damaged_in_one_place_comes_from_the_other(places: Any) -> None:
    model, settings = places
    further = [{"path": settings.copy_to[0].path}]
    for pack in packs_of(settings.path, 4):
        flip(pack, -5)
    flipped = [pack.read_bytes() for pack in packs_of(settings.path, 4)]
    pinned = pin(new_job(checkpoint=settings.path, copies=further)).settings
    assert pinned.step == 4
    for layout in (THREE, ALONE):
        for began in begun(new_job(**pinned.model_dump()), layout):
            blocks = began.held.masters
            assert differing(parameters(began, blocks), parameters(model, blocks)) == []
    assert [pack.read_bytes() for pack in packs_of(settings.path, 4)] == flipped, "nothing is written there"
    with pytest.raises(ClusterError, match="its hash differs"):
        begun(new_job(checkpoint=settings.path))


def test_a_step_that_lies_in_the_other_place_only(places: Any) -> None:
    _, settings = places
    near, far = open_stores(settings)
    discard(near, 4)
    assert open_origin(StartFrom(checkpoint=near.url, step=4, copies=(Place(path=far.url),))).step == 4
    with pytest.raises(ConfigError, match=r"none of .* has a checkpoint of step 3"):
        open_origin(StartFrom(checkpoint=near.url, step=3, copies=(Place(path=far.url),)))
    for pack in packs_of(far.url, 4):
        pack.unlink()
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        open_origin(StartFrom(checkpoint=near.url, step=4, copies=(Place(path=far.url),)))


def test_a_place_that_does_not_answer_is_passed_over_and_said(places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, settings = places
    near, far = open_stores(settings)
    inner, answering = Store.list, {far.url}

    def asked(store: Store, *args: Any) -> Any:
        if store.url not in answering:
            raise OSError(5, "Input/output error")
        return inner(store, *args)

    monkeypatch.setattr(Store, "list", asked)
    pinned = pin(new_job(checkpoint=near.url, copies=[{"path": far.url}]))
    assert pinned.settings.step == 4
    [(kind, data)] = pinned.notes
    assert (kind, data["path"]) == ("place_silent", near.url)
    answering.clear()
    with pytest.raises(ClusterError, match=r"cannot be read: .*does not answer: .*does not answer: "):
        pin(new_job(checkpoint=near.url, copies=[{"path": far.url}]))


def test_what_holds_nothing_is_refused(tmp_path: Path, places: Any) -> None:
    nothing = {"checkpoint": str(tmp_path / "none"), "copies": [{"path": str(tmp_path / "neither")}]}
    with pytest.raises(ConfigError, match=r"holds no whole checkpoint of a run, nor does '.*neither'"):
        pin(new_job(**nothing))
    with pytest.raises(ConfigError, match="is a run that has stored no checkpoints"):
        pin(new_job(checkpoint=run_directory(tmp_path / "run", None)))


def test_what_opens_a_place_is_not_recorded_and_is_given_again(places: Any, tmp_path: Path) -> None:
    """A run that goes back to its start begins with the same again: its checkpoints know the places, not the keys."""
    _, settings = places
    run = run_directory(tmp_path / "run", settings)
    pinned = pin(new_job(checkpoint=run)).settings
    recorded = pinned.provenance()
    assert recorded["copies"] == [{"path": settings.path}, {"path": settings.copy_to[0].path}]
    assert "copies" not in StartFrom(checkpoint="a").provenance(), "as it was recorded before"
    manifest = replace(load(Store(settings.path), 2), tree={"start_from": recorded})
    assert _recorded_origin(new_job(checkpoint=run), manifest) == pinned
    shutil.rmtree(run)
    again = _recorded_origin(new_job(checkpoint=run), manifest)
    assert again is not None
    assert [one.path for one in again.copies] == [one["path"] for one in recorded["copies"]]
