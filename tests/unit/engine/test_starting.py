"""Beginning with the weights of another checkpoint: what fits, what is said, and that everybody gets what it holds."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from elastictrain.engine import starting
from elastictrain.engine.origins import fit, open_origin, pin
from elastictrain.engine.restoring import Company
from elastictrain.engine.starting import begin
from elastictrain.engine.worker_model import WorkerModel
from elastictrain.errors import CheckpointMismatch, ClusterError, ConfigError, CorruptCheckpoint
from elastictrain.job import Job
from elastictrain.layout import Layout, Shard
from elastictrain.origin import StartFrom
from elastictrain_checkpoint import Reader, Store, convert, load
from elastictrain_checkpoint.mapping import Mapped, apply_rules
from elastictrain_checkpoint.source import Source
from tests.unit.engine.optimizer_table import ELEMENT_WISE
from tests.unit.engine.test_restoring import BLOCKS, together
from tests.unit.engine.test_saving import Averaged, save, trained
from tests.unit.engine.worlds import NetRecipe, differing, make_job, started, state_of

SHARDS = (Shard(0, 5, 0, 1), Shard(5, 9, 1, 2), Shard(9, 13, 2, 0))
THREE = Layout(1, (0, 1, 2), ((0,), (1,), ()), SHARDS, 2)
ALONE = Layout(1, (7,), ((0, 1),), (Shard(0, BLOCKS, 7, None),), 2)


def new_job(recipe: Any = None, **start_from: Any) -> Job:
    return make_job(recipe or Averaged(), lanes=2, block_elements=4096, seed=5, start_from=start_from)


def begun(job: Job, layout: Layout = THREE, counters_from: int = 1) -> list[WorkerModel]:
    """The members of a layout after they have begun; raises what any of them has met."""
    assert job.start_from is not None
    settings = job.start_from

    # Here and not in the threads: they share one random generator.
    models = {worker: started(job, layout.held(worker)) for worker in layout.workers}

    def work(company: Company | None, worker: int) -> WorkerModel:
        model = models[worker]
        begin(model.flat, model.held, settings, layout, counters_from, company, worker)
        return model

    if layout.world_size == 1:
        return [work(None, layout.workers[0])]
    held = [layout.held(worker) for worker in layout.workers]
    found = together(held, lambda company: work(company, company.rank))
    errors = [one for one in found if isinstance(one, Exception)]
    assert len(errors) in (0, layout.world_size), "all learn of it"
    if errors:
        assert len({type(error) for error in errors}) == 1
        raise errors[0]
    return found


@pytest.fixture
def weights(tmp_path: Path) -> tuple[WorkerModel, str]:
    """A trained model, and where another run has stored it."""
    model = trained(make_job(Averaged(), lanes=2, block_elements=4096))
    return model, save(model, tmp_path, [[(0, 4)], [(4, 13)]]).path


def parameters(model: WorkerModel, blocks: Any) -> dict[Any, Any]:
    return {key: value for key, value in state_of(model, blocks).items() if key[1] == "master"}


@pytest.mark.parametrize("layout", [THREE, ALONE], ids=["three", "alone"])
def test_weights_are_taken_and_the_optimizer_begins_anew(weights: Any, layout: Layout) -> None:
    model, path = weights
    job = new_job(checkpoint=path)
    fresh = started(job)
    counters = layout.workers[-1]
    for worker, one in zip(layout.workers, begun(job, layout, counters), strict=True):
        blocks = layout.held(worker)
        assert differing(parameters(model, blocks), parameters(one, blocks)) == []
        assert all(torch.equal(one.held.ema[n], one.held.masters[n]) for n in one.held.ema)
        expected = {k: v for k, v in state_of(fresh, blocks).items() if k[1].startswith("optim/")}
        assert differing(expected, {k: v for k, v in state_of(one).items() if k[1].startswith("optim/")}) == []
        same = differing(model.flat.counters, one.flat.counters) == []
        assert same == (worker == counters), "one reads them for all"


def test_with_the_optimizer_all_is_as_it_was(weights: Any) -> None:
    model, path = weights
    for worker, one in zip(THREE.workers, begun(new_job(checkpoint=path, optimizer=True)), strict=True):
        blocks = THREE.held(worker)
        assert differing(state_of(model, blocks), state_of(one)) == []


def test_numbers_of_the_optimizer_come_only_with_it(tmp_path: Path) -> None:
    recipe = NetRecipe(ELEMENT_WISE["lion"])
    path = save(model := trained(make_job(recipe, lanes=2)), tmp_path).path
    job = make_job(recipe, lanes=2, start_from={"checkpoint": path, "optimizer": True})
    (one,) = begun(job, ALONE, 7)
    assert differing(state_of(model), state_of(one)) == []
    job = make_job(recipe, lanes=2, start_from={"checkpoint": path})
    (one,) = begun(job, ALONE, 7)
    assert not one.held.optimizer.state


def plain(source: Reader) -> Source:
    """A model as others store it: parameters and buffers, each once."""
    views = {n: v for n, v in apply_rules(source.tensors, []).items() if n not in source.manifest.alias}
    return Mapped(Mapped.of(source, views), convert.only_the_model())


def test_weights_of_fewer_bits_become_fp32_as_they_are(weights: Any, tmp_path: Path) -> None:
    model, path = weights
    store = Store(path)
    convert.export_safetensors(plain(Reader(store, load(store, 2))), Store(str(tmp_path / "out")), cast="BF16")
    job = new_job(checkpoint=str(tmp_path / "out"))
    for worker, one in zip(THREE.workers, begun(job), strict=True):
        for number in THREE.held(worker):
            rounded = model.held.masters[number].bfloat16().float()
            assert torch.equal(one.held.masters[number], rounded)


def test_one_file_with_other_names_through_rules(weights: Any, tmp_path: Path) -> None:
    model, _ = weights
    tensors = {f"net.{n}": t.detach().clone() for n, t in model.flat.model.state_dict().items() if n != "out.weight"}
    for name, value in model.flat.counters.items():
        tensors[f"net.{name}"] = value.clone()
    for entry in (e for e in model.space.entries if e.kind == "buffer"):
        tensors[f"net.{entry.name}"] = model.flat.committed_buffer(entry.name).view(entry.shape).clone()
    save_file(tensors, tmp_path / "net.safetensors")
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"op": "rename", "match": r"model/net\.(.*)", "to": r"model/\1"}]))
    job = new_job(checkpoint=str(tmp_path / "net.safetensors"), mapping=str(rules))
    pinned = pin(job)
    assert pinned.settings.mapping == (
        {"match": r"model/net\.(.*)", "optional": False, "op": "rename", "to": r"model/\1"},
    )
    rules.unlink()  # workers have the rules, not the file
    job = job.model_copy(update={"start_from": pinned.settings})
    for worker, one in zip(THREE.workers, begun(job), strict=True):
        blocks = THREE.held(worker)
        assert differing(parameters(model, blocks), parameters(one, blocks)) == []


# --- what does not fit ---


def test_all_that_does_not_fit_is_listed_with_both_sides(tmp_path: Path) -> None:
    others = {"other": torch.zeros(2)} | {f"x{number}": torch.zeros(1) for number in range(10)}
    wrong = {"inp.weight": torch.zeros(71, 6), "gain": torch.zeros((), dtype=torch.float64)}
    save_file(others | wrong, tmp_path / "w.safetensors")
    where = str(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointMismatch) as error:
        pin(new_job(checkpoint=where))
    lines = str(error.value).splitlines()
    assert lines[0] == f"start_from.checkpoint={where!r} does not fit the model:"
    assert "  model/inp.weight has shape [70, 6] in the model and [71, 6] in the checkpoint (model/inp.weight)" in lines
    assert "  model/gain is F32 in the model and F64 in the checkpoint (model/gain)" in lines
    assert "  model/inp.bias [70] is in the model but not in the checkpoint" in lines
    assert "  and 1 more like that" in lines
    assert "  model/other [2] is in the checkpoint but not in the model" in lines
    assert "start_from.mapping" in lines[-1]
    assert "start_from.strict" in lines[-1]
    with pytest.raises(CheckpointMismatch, match="is in the model but not"):
        pin(new_job(checkpoint=where, strict=False))  # nothing of it fits


def test_what_fits_is_taken_if_not_strict(tmp_path: Path) -> None:
    save_file({"inp.bias": torch.full((70,), 3.0), "other": torch.zeros(2)}, tmp_path / "w.safetensors")
    job = new_job(checkpoint=str(tmp_path / "w.safetensors"), strict=False)
    said = pin(job).said
    assert said["tensors"] == 1
    assert said["skipped"] == ["model/other [2] is in the checkpoint but not in the model"]
    assert "model/inp.weight [70, 6] is in the model but not in the checkpoint" in said["kept"]
    fresh = started(job)
    for worker, one in zip(THREE.workers, begun(job), strict=True):
        for number in THREE.held(worker):
            if one.space.blocks[number].entry.name == "inp.bias":
                assert torch.equal(one.held.masters[number], torch.full((70,), 3.0))
            else:
                assert torch.equal(one.held.masters[number], fresh.held.masters[number])


def test_tied_weights_need_one_name_and_two_must_be_equal(weights: Any, tmp_path: Path) -> None:
    _, path = weights
    reader = Reader(Store(path), load(Store(path), 2))
    tensors = {
        name: torch.frombuffer(bytearray(plain(reader).read_flat(name, 0, torch.Size(shape).numel()).tobytes()),
                               dtype=torch.float32 if dtype == "F32" else torch.int64).view(shape)
        for name, (dtype, shape) in plain(reader).tensors.items()
    }  # fmt: skip
    file = tmp_path / "w.safetensors"
    job = new_job(checkpoint=str(file))
    save_file(tensors, file)
    assert pin(job).said["kept"] == []
    save_file(tensors | {"out.weight": tensors["mid.weight"].clone()}, file)
    assert pin(job).said["skipped"] == []
    second = {name: value for name, value in tensors.items() if name != "mid.weight"}
    save_file(second | {"out.weight": tensors["mid.weight"]}, file)
    assert pin(job).said["kept"] == []
    save_file(tensors | {"out.weight": tensors["mid.weight"] + 1}, file)
    with pytest.raises(
        CheckpointMismatch, match=r"model/out.weight and model/mid.weight are tied in the model and differ"
    ):
        pin(job)


def test_an_optimizer_that_keeps_something_else_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = save(trained(make_job(NetRecipe(ELEMENT_WISE["sgd-momentum"]), lanes=2)), tmp_path).path
    with pytest.raises(CheckpointMismatch, match=r"optim/gain/exp_avg is state of AdamW and not in the checkpoint"):
        pin(new_job(NetRecipe(), checkpoint=path, optimizer=True))
    assert pin(new_job(NetRecipe(), checkpoint=path)).said["skipped"] == []


WANTED = {"model/a": ("F32", (2,)), "buffer/b": ("F32", (3,)), "counter/c": ("I64", ())}


def test_buffers_may_be_called_like_parameters() -> None:
    there: dict[str, Any] = {"model/a": ("F16", (2,)), "model/b": ("F32", (3,)), "model/c": ("I64", ())}
    found = fit(WANTED, {}, there, {}, optimizer=False)
    assert found.names == {"model/a": "model/a", "buffer/b": "model/b", "counter/c": "model/c"}
    assert found.problems == []


def test_a_counter_of_another_type_does_not_fit() -> None:
    there: dict[str, Any] = {"model/a": ("F32", (2,)), "buffer/b": ("F32", (3,)), "counter/c": ("I32", ())}
    found = fit(WANTED, {}, there, {}, optimizer=False)
    assert found.different == ("counter/c is I64 in the model and I32 in the checkpoint (counter/c)",)


# --- what changes or breaks ---


def test_a_setting_is_pinned_to_step_and_fingerprint(weights: Any, tmp_path: Path) -> None:
    model, path = weights
    job = new_job(checkpoint=path)
    pinned = pin(job).settings
    assert (pinned.step, pinned.fingerprint) == (2, load(Store(path), 2).digest)
    model.held.masters[0].add_(1)
    save(model, tmp_path, step=9, generation=2)
    assert open_origin(pinned).step == 2, "the other run has gone on"
    save(model, tmp_path, step=2, generation=3)
    with pytest.raises(CheckpointMismatch, match=r"is not what start_from.fingerprint names"):
        begun(job.model_copy(update={"start_from": pinned}))


def test_damage_is_met_by_one_and_known_to_all(weights: Any) -> None:
    _, path = weights
    pack = max(Path(path).rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    raw = bytearray(pack.read_bytes())
    raw[-5] ^= 1
    pack.write_bytes(raw)
    with pytest.raises(ClusterError, match=r"start_from.checkpoint=.* cannot be read: .*its hash differs") as error:
        begun(new_job(checkpoint=path, optimizer=True))
    assert type(error.value) is ClusterError, "there is no older one to go back to"


def test_what_fails_in_the_first_of_many_rounds_is_not_forgotten(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "ROUND_BYTES", 1)
    once, read_flat = threading.Lock(), Reader.read_flat

    def fails_once(*args: Any) -> Any:
        if once.acquire(blocking=False):
            raise OSError("the network is down")
        return read_flat(*args)

    monkeypatch.setattr(Reader, "read_flat", fails_once)
    with pytest.raises(ClusterError, match="the network is down"):
        begun(new_job(checkpoint=weights[1]))


def test_one_that_is_gone_is_known_to_all(weights: Any) -> None:
    _, path = weights
    pack = max(Path(path).rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    pack.unlink()
    with pytest.raises(ClusterError, match="is missing") as error:
        begun(new_job(checkpoint=path, step=2))
    assert type(error.value) is ClusterError
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        pin(new_job(checkpoint=path, step=2))


def test_a_place_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^start_from.checkpoint='.*nowhere': .*holds nothing"):
        pin(new_job(checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"holds no whole checkpoint of a run"):
        pin(new_job(checkpoint=str(tmp_path / "nowhere"), format="elastictrain"))
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 3"):
        pin(new_job(checkpoint=str(tmp_path / "nowhere"), step=3))


def test_rules_that_are_none_are_refused(weights: Any, tmp_path: Path) -> None:
    _, path = weights
    rules = tmp_path / "rules.json"
    with pytest.raises(ConfigError, match=r"start_from.mapping=.* cannot be read"):
        pin(new_job(checkpoint=path, mapping=str(rules)))
    rules.write_text('[{"op": "turn"}]')
    with pytest.raises(ConfigError, match="these are not rules of a mapping"):
        pin(new_job(checkpoint=path, mapping=str(rules)))


def test_a_run_that_goes_on_must_have_begun_with_the_same() -> None:
    recorded = StartFrom(checkpoint="a", step=4, fingerprint="f", mapping=({"op": "drop", "match": "x"},)).provenance()
    assert StartFrom(checkpoint="a", mapping="rules.json").differences(recorded) == []
    assert StartFrom(checkpoint="a", step=5, mapping="rules.json").differences(recorded) == [
        "start_from.step=5, the run was started with 4"
    ]
    assert StartFrom(checkpoint="b", strict=False, mapping="m").differences(recorded) == [
        "start_from.checkpoint='b', the run was started with 'a'",
        "start_from.strict=False, the run was started with True",
    ]
    assert len(StartFrom(checkpoint="a").differences(recorded)) == 1
    assert "storage_options" not in StartFrom(checkpoint="a", storage_options={"secret": "s"}).provenance()
