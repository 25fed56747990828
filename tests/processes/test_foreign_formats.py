"""Checkpoints that went through another format and back, in runs; and ours in the hands of FSDP."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from elastictrain.data.stages import first_stage
from elastictrain.engine.resume import find_start
from elastictrain_checkpoint import Manifest, Reader, Store, load
from elastictrain_checkpoint.convert import (
    default_rules,
    export_dcp,
    export_safetensors,
    import_checkpoint,
    only_the_model,
    open_source,
)
from elastictrain_checkpoint.mapping import Drop, Mapped, Rename
from elastictrain_checkpoint.source import Arrays, Source
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

BUFFERS = [
    Rename(match=r"model/(norm\.running_.*)", to=r"buffer/\1"),
    Rename(match=r"model/(norm\.num_batches_tracked)", to=r"counter/\1"),
]
"""A state dict does not tell buffers from parameters; a run does."""


@pytest.fixture(scope="module")
def stopped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    """Half of the reference run, by three workers."""
    path = tmp_path_factory.mktemp("stopped")
    run_job(byte_job(folder, steps=4, checkpoint={"path": str(path), "every_steps": 4}))
    store = Store(path)
    return store, load(store, 4)


def go_on(job: Any) -> Run:
    start = find_start(job, resume=True)
    return run_job(job, restore=start.restore, base_generation=start.generation)


@pytest.mark.parametrize("kind", ["safetensors", "dcp"])
def test_a_run_goes_on_bit_for_bit_from_what_was_out_and_in_again(
    kind: str, folder: Path, tmp_path: Path, stopped: tuple[Store, Manifest], reference: Run
) -> None:
    store, manifest = stopped
    out = Store(tmp_path / "out")
    if kind == "dcp":
        export_dcp(Reader(store, manifest), out)
    else:
        export_safetensors(Reader(store, manifest), out, shard_bytes=30_000)
    source = open_source(out.url)
    rules = [*default_rules(source), *(BUFFERS if kind == "dcp" else [])]
    back = Store(tmp_path / "back")
    made = import_checkpoint(Mapped(source, rules), back, step=4, aliases=manifest.alias, tree=manifest.tree)
    assert made.digest == manifest.digest
    job = byte_job(folder, workers=2, checkpoint={"path": back.url, "every_steps": 100, "keep": 5})
    run = go_on(job)
    assert run.digest == reference.digest
    assert run.losses == {step: loss for step, loss in reference.losses.items() if step > 4}


def test_weights_alone_start_a_run_the_same_in_every_world(
    folder: Path, tmp_path: Path, stopped: tuple[Store, Manifest], reference: Run
) -> None:
    """As Hugging Face stores them, in bfloat16, without the tied name: step 0 of a run of its own."""
    store, manifest = stopped
    rules = [Drop(match=re.escape(name)) for name in manifest.alias]
    source: Source = Mapped(Reader(store, manifest), [*rules, *only_the_model()])
    export_safetensors(source, Store(tmp_path / "hf"), cast="BF16")
    runs = []
    for workers in (1, 2):
        source = open_source(str(tmp_path / "hf"))
        mapped = Mapped(source, [*default_rules(source), *BUFFERS])
        job = byte_job(
            folder, workers=workers, steps=3, checkpoint={"path": str(tmp_path / f"run{workers}"), "every_steps": 100}
        )
        tree = {"stages": [asdict(first_stage(job))], "seed": job.seed, "data": manifest.tree["data"]}
        import_checkpoint(mapped, Store(tmp_path / f"run{workers}"), aliases=manifest.alias, tree=tree)
        runs.append(go_on(job))
    assert runs[0].digest == runs[1].digest
    assert runs[0].losses == runs[1].losses
    assert sorted(runs[0].losses) == [1, 2, 3]
    assert runs[0].losses[1] != reference.losses[1], "it starts from the weights that were imported"


RANKS = """
import sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
rank, what, folder, meet = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
mesh = DeviceMesh("cpu", [0, 1])
whole = torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5)
if what == "save":
    state = {"rows": distribute_tensor(whole, mesh, [Shard(0)]), "columns": distribute_tensor(whole, mesh, [Shard(1)])}
    dcp.save({"model": state, "step": 3}, checkpoint_id=folder)
else:
    model = torch.nn.Linear(5, 7, bias=False)
    fully_shard(model, mesh=mesh)
    weights = get_model_state_dict(model)
    moment = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)])
    dcp.load({"model": weights, "optim": {"state": {"weight": {"exp_avg": moment}}}}, checkpoint_id=folder)
    assert isinstance(weights["weight"], DTensor)
    assert torch.equal(weights["weight"].full_tensor(), whole)
    assert torch.equal(moment.full_tensor(), -whole)
dist.barrier()  # who leaves while another is still at it makes gloo abort there
dist.destroy_process_group()
"""


def two_ranks(what: str, folder: Path, meet: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), what, str(folder), str(meet)]) for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_shards_that_two_ranks_saved_come_in(tmp_path: Path) -> None:
    two_ranks("save", tmp_path / "dcp", tmp_path / "meet")
    source = open_source(str(tmp_path / "dcp"))
    whole = torch.arange(35, dtype=torch.float32)
    for name in ("model.rows", "model.columns"):
        assert source.tensors[name] == ("F32", (7, 5))
        for start, stop in ((0, 35), (3, 4), (8, 33)):
            assert source.read_flat(name, start, stop).tobytes() == whole[start:stop].numpy().tobytes()
    assert source.tree == {"step": 3}


def test_fsdp_on_two_ranks_loads_what_goes_out(tmp_path: Path) -> None:
    whole = torch.arange(35, dtype=torch.float32).reshape(7, 5)
    held = {
        "model/weight": ("F32", (7, 5), whole.numpy()),
        "optim/weight/exp_avg": ("F32", (7, 5), (-whole).numpy()),
    }
    export_dcp(Arrays(held), Store(tmp_path / "out"))
    two_ranks("load", tmp_path / "out", tmp_path / "meet")
