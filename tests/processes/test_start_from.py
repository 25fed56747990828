"""Runs that begin with the weights of another checkpoint, on processes: of another run, of other formats."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from elastictrain.engine.one_lane import seed_everything
from elastictrain.engine.resume import find_start
from elastictrain.errors import CheckpointMismatch
from elastictrain.faults import kill
from elastictrain.job import Job
from elastictrain_checkpoint import Reader, Store, convert, load
from elastictrain_checkpoint.mapping import Mapped, apply_rules
from elastictrain_checkpoint.source import read_whole
from tests.support.plants_storing import storage_is_fast
from tests.support.process_cluster import Run, byte_job, run_job, write_text

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt"


def begin(job: Job, *faults: Any, **more: Any) -> Run:
    """What `elastictrain run` does, on processes."""
    start = find_start(job, resume=False)
    return run_job(job.model_copy(update={"start_from": start.start_from}), faults, restore=start.restore, **more)


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What a run of three workers has stored after four steps."""
    path = tmp_path_factory.mktemp("other") / "ckpt"
    run_job(byte_job(folder, steps=4, checkpoint={"path": str(path), "every_steps": 4}), patch=storage_is_fast)
    return Store(str(path))


@pytest.fixture(scope="module")
def places(other: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same weights in several formats."""
    out = tmp_path_factory.mktemp("exported")
    reader = Reader(other, load(other, 4))
    views = {n: v for n, v in apply_rules(reader.tensors, []).items() if n not in reader.manifest.alias}
    model = Mapped(Mapped.of(reader, views), convert.only_the_model())
    convert.export_safetensors(model, Store(str(out / "hf")))
    convert.export_dcp(reader, Store(str(out / "dcp")))
    return {"another run": other.url, "safetensors": str(out / "hf"), "dcp": str(out / "dcp")}


def job_from(folder: Path, place: str, workers: int = 3, **settings: Any) -> Job:
    return byte_job(folder, workers=workers, seed=3, steps=3, start_from={"checkpoint": place}, **settings)


@pytest.fixture(scope="module")
def begun(folder: Path, places: dict[str, str]) -> Run:
    """One worker that begins with the other run's weights."""
    return begin(job_from(folder, places["another run"], workers=1))


@pytest.mark.parametrize(("place", "workers"), [("another run", 3), ("another run", 5), ("safetensors", 2), ("dcp", 3)])
def test_any_format_in_any_world_gives_the_same_bits(folder, places, begun, place, workers):
    run = begin(job_from(folder, places[place], workers))
    assert run.digest == begun.digest
    assert run.losses == begun.losses
    assert [row["step"] for row in run.record.rows] == [1, 2, 3], "step 0, data from the beginning"


def test_it_is_not_what_the_recipe_begins_with(folder, begun):
    run = run_job(byte_job(folder, workers=1, seed=3, steps=3))
    assert run.digest != begun.digest
    assert run.losses[1] != begun.losses[1]


def test_with_the_optimizer_it_is_another_run_again(folder, places, begun):
    settings = {"checkpoint": places["another run"], "optimizer": True}
    runs = [begin(byte_job(folder, workers=w, seed=3, steps=3, start_from=settings)) for w in (1, 4)]
    assert runs[0].digest == runs[1].digest
    assert runs[0].digest != begun.digest
    assert runs[0].losses[1] == begun.losses[1], "the same weights"


def test_when_all_is_lost_before_the_first_checkpoint_it_begins_with_the_same_again(folder, places, begun, tmp_path):
    ckpt = {"path": str(tmp_path / "ckpt"), "every_steps": 100}
    job = job_from(folder, places["safetensors"], 4, checkpoint=ckpt)
    run = begin(job, kill(0, 3, "exchange"), die_together=(0, 1))
    assert run.record.of("went_back")[0]["to_step"] == 0
    assert run.digest == begun.digest
    assert run.losses == begun.losses


@pytest.mark.parametrize("worker", [0, 2])
def test_one_dies_while_all_take_it_up(folder, places, begun, worker):
    run = begin(job_from(folder, places["another run"]), kill(worker, 1, "restore"))
    assert [event["worker"] for event in run.record.of("worker_lost")] == [worker]
    assert run.digest == begun.digest


def test_checkpoints_say_what_the_run_has_begun_with_and_it_goes_on(folder, places, other, begun, tmp_path):
    ckpt = {"path": str(tmp_path / "ckpt"), "every_steps": 2, "at_end": False}
    job = job_from(folder, places["another run"], checkpoint=ckpt)
    assert begin(job, patch=storage_is_fast).digest == begun.digest
    recorded = load(Store(ckpt["path"]), 2).tree["start_from"]
    assert (recorded["checkpoint"], recorded["step"]) == (other.url, 4)
    assert recorded["fingerprint"] == load(other, 4).digest

    bare = job.model_copy(update={"start_from": None})
    for resumed in (job, bare):
        start = find_start(resumed, resume=True)
        assert start.start_from is not None
        assert start.start_from.provenance() == recorded
    run = run_job(bare, restore=start.restore, base_generation=start.generation)
    assert run.digest == begun.digest

    elsewhere = job_from(folder, places["dcp"], checkpoint=ckpt)
    with pytest.raises(CheckpointMismatch, match=r"start_from.checkpoint='.*dcp', the run was started with '"):
        find_start(elsewhere, resume=True)


def test_a_run_that_has_begun_by_itself_goes_on_so(folder, other):
    job = byte_job(folder, steps=4, checkpoint={"path": other.url}, start_from={"checkpoint": other.url})
    with pytest.raises(CheckpointMismatch, match="was started with the recipe's initial values"):
        find_start(job, resume=True)


# --- the example ---


def test_the_example_begins_with_weights_of_hugging_face(tmp_path):
    """Its state dict as a model zoo would have it, under other names. The learning rate is 0: it ends as it began."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        model = importlib.import_module("model")
        sizes = {"layers": 2, "width": 48, "heads": 4, "sequence_length": 32}
        seed_everything(11)
        net = model.GPT(model.GPTConfig(**sizes))
    finally:
        sys.path.remove(str(EXAMPLE))
    weights = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    save_file({f"transformer.{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"op": "rename", "match": r"model/transformer\.(.*)", "to": r"model/\1"}]))
    text = write_text(tmp_path)

    def job(workers: int, **start_from: Any) -> Job:
        return Job(
            recipe=f"{EXAMPLE / 'recipe.py'}:GPTRecipe",
            recipe_args={"model": sizes, "learning_rate": 0.0},
            data={"kind": "parquet", "path": text, "text_column": "text", "sequence_length": 32},
            lanes=4,
            steps=2,
            workers={"max": workers, "replace": False},
            checkpoint={"path": str(tmp_path / f"ckpt-{workers}"), "every_steps": 2},
            start_from={"checkpoint": str(tmp_path)} | start_from,
        )

    with pytest.raises(CheckpointMismatch, match=r"model/transformer\.\S+ \[.*\] is in the checkpoint but not in"):
        find_start(job(1), resume=False)
    runs = {workers: begin(job(workers, mapping=str(rules))) for workers in (1, 3)}
    assert runs[1].digest == runs[3].digest
    for workers in runs:
        store = Store(str(tmp_path / f"ckpt-{workers}"))
        reader = Reader(store, load(store, 2))
        for name, value in weights.items():
            stored = torch.frombuffer(bytearray(read_whole(reader, f"model/{name}").tobytes()), dtype=torch.float32)
            assert torch.equal(stored.view(value.shape), value), name
