"""torch DCP in and out, in one process, trusting nothing."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from elastictrain_checkpoint import CorruptData, Reader, Store, digest, load, verify
from elastictrain_checkpoint.convert import default_rules, export_dcp, import_checkpoint, open_source
from elastictrain_checkpoint.convert.in_dcp import read_metadata
from elastictrain_checkpoint.errors import ForeignFormat
from elastictrain_checkpoint.mapping import Mapped
from elastictrain_checkpoint.source import Arrays
from tests.unit.checkpoint.build import flip, make_state, memory_store, save

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)


def same(data: Any, tensor: torch.Tensor) -> bool:
    return bool(data.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def model() -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 3).bfloat16())


def trained() -> dict[str, Any]:
    weights = get_model_state_dict(model())
    moments = {n: {"exp_avg": torch.randn_like(t), "step": torch.tensor(5.0)} for n, t in weights.items()}
    return {
        "model": weights,
        "optim": {"state": moments, "param_groups": [{"lr": 0.25, "params": list(weights)}]},
        "train": {"tokens": 123},
    }


@pytest.fixture
def dcp_folder(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    state = trained()
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp", state


# --- DCP in ---


def test_dcp_in(dcp_folder: tuple[Path, dict[str, Any]]) -> None:
    folder, state = dcp_folder
    source = open_source(str(folder))
    assert (source.format, source.skipped) == ("dcp", [])
    assert source.tree["train.tokens"] == 123
    assert source.tree["optim.param_groups.0.lr"] == 0.25
    store = memory_store()
    manifest = import_checkpoint(Mapped(source, default_rules(source)), store, step=5)
    assert verify(store, manifest) == []
    reader = Reader(store, manifest)
    wanted = {f"model/{n}": t for n, t in state["model"].items()}
    for name, moments in state["optim"]["state"].items():
        wanted |= {f"optim/{name}/{key}": value for key, value in moments.items()}
    assert sorted(reader.tensors) == sorted(wanted)
    assert all(same(reader.read(name), tensor) for name, tensor in wanted.items())
    assert reader.tree["foreign"]["train.tokens"] == 123


def check_shards(folder: Path) -> None:
    source = open_source(str(folder))
    whole = torch.arange(35, dtype=torch.float32)
    for name in ("model.rows", "model.columns"):
        assert source.tensors[name] == ("F32", (7, 5))
        for start, stop in ((0, 35), (3, 4), (8, 33), (12, 12)):
            assert same(source.read_flat(name, start, stop), whole[start:stop])


def test_column_chunks_are_put_together(tmp_path: Path) -> None:
    """As two ranks write them, in one process: the chunks of `Shard(0)` and `Shard(1)`, with an empty one."""
    from torch.distributed.checkpoint import filesystem

    whole = torch.arange(35, dtype=torch.float32).reshape(7, 5)
    cuts = {
        "model.rows": [((0, 0), whole[:4]), ((4, 0), whole[4:]), ((7, 0), whole[7:])],
        "model.columns": [((0, 0), whole[:, :3]), ((0, 3), whole[:, 3:])],
    }
    records, stored, raw = {}, {}, b""
    for name, chunks in cuts.items():
        boxes = []
        for offsets, piece in chunks:
            out = io.BytesIO()
            torch.save(piece.clone(), out)
            stored[parts.MetadataIndex(name, offsets)] = filesystem._StorageInfo("f", len(raw), len(out.getvalue()))
            raw += out.getvalue()
            boxes.append(parts.ChunkStorageMetadata(torch.Size(offsets), piece.size()))
        records[name] = parts.TensorStorageMetadata(parts.TensorProperties(torch.float32), whole.size(), boxes)
    (tmp_path / "f").write_bytes(raw)
    told = parts.Metadata(records, storage_data=stored)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(told))
    check_shards(tmp_path)
    for wrong, complaint in (
        (records["model.rows"].chunks[:1], "hold 20 elements of 35"),
        ([*records["model.columns"].chunks, records["model.columns"].chunks[0]], "hold 56 elements of 35"),
        ([parts.ChunkStorageMetadata(torch.Size([0, 3]), torch.Size([7, 5]))], "lies outside of"),
    ):
        records["model.columns"].chunks = wrong
        (tmp_path / ".metadata").write_bytes(pickle.dumps(told))
        with pytest.raises(CorruptData, match=complaint):
            open_source(str(tmp_path))


def test_a_flipped_bit_in_a_chunk_is_found(dcp_folder: tuple[Path, dict[str, Any]]) -> None:
    """Stock DCP hands the altered tensor out; the sums that torch writes are there, and are checked here."""
    folder, state = dcp_folder
    raw = (folder / "__0_0.distcp").read_bytes()
    at = raw.index(state["model"]["0.weight"].numpy().tobytes()) + 9
    flip(Store(folder), "__0_0.distcp", at)
    source = open_source(str(folder))
    with pytest.raises(CorruptData, match=r"__0_0\.distcp \(model\.0\.weight at \[0, 0\]\): the CRC-32 of .* differs"):
        source.read_flat("model.0.weight", 0, 128)
    assert same(source.read_flat("model.0.bias", 0, 16), state["model"]["0.bias"])
    trusting = open_source(str(folder), check_crc=False)
    assert not same(trusting.read_flat("model.0.weight", 0, 128), state["model"]["0.weight"])
    (folder / "__0_0.distcp").write_bytes(raw[:-3000])
    with pytest.raises(CorruptData, match="is cut short"):
        import_checkpoint(open_source(str(folder)), memory_store())
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CorruptData, match="is missing"):
        open_source(str(folder))


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path | str = "/nonexistent/evil") -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_metadata_cannot_run_code(tmp_path: Path) -> None:
    for value in (Evil(tmp_path / "mark"), {"a": Evil()}, [1], None, argparse.Namespace(a=1)):
        with pytest.raises(ForeignFormat, match=r"is not the metadata of torch\.distributed\.checkpoint"):
            read_metadata(pickle.dumps(value), "x/.metadata")
    assert not (tmp_path / "mark").exists()
    for raw in (b"", b"\x80\x05", b"garbage", b"cbuiltins\neval\n(S'1'\ntR."):
        with pytest.raises(ForeignFormat):
            read_metadata(raw, "x/.metadata")


class Attribute:
    """Asks for an attribute, as early Python 3.11 pickles the members of enums."""

    def __init__(self, owner: Any, name: str) -> None:
        self.asked = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.asked


def test_members_of_enums_may_be_asked_for_and_nothing_else(dcp_folder: tuple[Path, dict[str, Any]]) -> None:
    told = read_metadata((dcp_folder[0] / ".metadata").read_bytes(), "x/.metadata")
    encoding = parts._MEM_FORMAT_ENCODING
    told.planner_data = Attribute(encoding, "TORCH_PRESERVE_FORMAT")
    assert read_metadata(pickle.dumps(told), "x/.metadata").planner_data is encoding.TORCH_PRESERVE_FORMAT
    for owner, name in ((parts.Metadata, "__init__"), (encoding, "__class__"), (torch.Size, "mro"), ("x", "join")):
        told.planner_data = Attribute(owner, name)
        with pytest.raises(ForeignFormat, match=r"is not the metadata of torch\.distributed\.checkpoint"):
            read_metadata(pickle.dumps(told), "x/.metadata")


def test_an_object_among_the_values_is_skipped_and_named(tmp_path: Path) -> None:
    values = {"model": {"w": torch.ones(3)}, "who": Evil(tmp_path / "mark"), "what": {1, 2}}
    dcp.save(values, checkpoint_id=tmp_path / "dcp", no_dist=True)
    source = open_source(str(tmp_path / "dcp"))
    assert not (tmp_path / "mark").exists(), "no code of the file ran"
    assert sorted(said.partition(":")[0] for said in source.skipped) == ["what", "who"]
    assert list(source.tensors) == ["model.w"]


def test_what_is_no_dcp(tmp_path: Path) -> None:
    with pytest.raises(ForeignFormat, match=r"\.metadata is not there: the save did not end"):
        open_source(str(tmp_path), "dcp")
    dcp.save({"w": torch.zeros(2, dtype=torch.complex128)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ForeignFormat, match=r"w is torch\.complex128; types that can be stored are BF16"):
        open_source(str(tmp_path))


def test_names_of_a_flat_state_are_the_models(tmp_path: Path) -> None:
    state = {"layers.0.w": torch.ones(2), "optimizer.state.layers.0.w.exp_avg": torch.ones(2)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    source = open_source(str(tmp_path))
    assert sorted(Mapped(source, default_rules(source)).tensors) == ["model/layers.0.w", "optim/layers.0.w/exp_avg"]


# --- DCP out ---


@pytest.mark.parametrize("file_bytes", [1 << 30, 1500])
def test_dcp_out_is_what_stock_dcp_loads(tmp_path: Path, file_bytes: int) -> None:
    state = trained()
    held: dict[str, Any] = {f"model/{n}": t for n, t in state["model"].items()}
    for name, moments in state["optim"]["state"].items():
        held |= {f"optim/{name}/{key}": value for key, value in moments.items()}
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    source = Arrays(
        {
            n: (names[t.dtype], tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy())
            for n, t in held.items()
        }
    )
    store = memory_store()
    manifest = import_checkpoint(source, store, step=5)
    seen: list[tuple[int, int]] = []
    size = export_dcp(
        Reader(store, manifest),
        Store(tmp_path / "out"),
        extras={("optim", "param_groups"): state["optim"]["param_groups"], ("step",): 5},
        file_bytes=file_bytes,
        progress=lambda *told: seen.append(told),
    )
    assert seen[-1] == (size, size)
    assert (len(list((tmp_path / "out").glob("*.distcp"))) > 1) == (file_bytes == 1500)
    fresh = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 3).bfloat16())
    empty = {n: {k: torch.zeros_like(v) for k, v in m.items()} for n, m in state["optim"]["state"].items()}
    into = {"model": get_model_state_dict(fresh), "optim": {"state": empty, "param_groups": None}, "step": 0}
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    set_model_state_dict(fresh, into["model"])
    assert all(torch.equal(t, state["model"][n]) for n, t in fresh.state_dict().items())
    for name, moments in state["optim"]["state"].items():
        assert all(torch.equal(empty[name][key], value) for key, value in moments.items())
    assert into["optim"]["param_groups"] == state["optim"]["param_groups"]
    assert into["step"] == 5
    # and back, through our own reader
    again = open_source(str(tmp_path / "out"))
    back = Mapped(again, default_rules(again))
    other = memory_store()
    assert digest(other, import_checkpoint(back, other, step=5)) == manifest.digest
    with pytest.raises(FileExistsError, match=r"already holds .*; export into an empty folder"):
        export_dcp(source, Store(tmp_path / "out"))


def test_dcp_out_becomes_one_torch_file_with_the_stock_tool(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    store = memory_store()
    manifest = save(store, make_state({"model/a.b": ("F32", (3, 4)), "optim/a.b/exp_avg": ("F32", (3, 4))}), step=1)
    export_dcp(Reader(store, manifest), Store(tmp_path / "out"), model="net", optimizer="opt")
    dcp_to_torch_save(tmp_path / "out", tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    assert found["net"]["a.b"].shape == (3, 4)
    assert found["opt"]["state"]["a.b"]["exp_avg"].shape == (3, 4)


def test_dcp_out_refuses_what_torch_has_not_before_it_writes(tmp_path: Path) -> None:
    held = {"a": ("F32", (1,), bytes(4)), "scales": ("F8_E8M0", (2,), b"ab")}
    with pytest.raises(ForeignFormat, match="scales is F8_E8M0, which torch has not"):
        export_dcp(Arrays(held), Store(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ForeignFormat, match=r"model/a\.b and buffer/a\.b would both be model\.a\.b"):
        export_dcp(Arrays({"model/a.b": ("U8", (1,), b"x"), "buffer/a.b": ("U8", (1,), b"x")}), Store(tmp_path))


def test_a_dcp_export_that_fails_is_no_checkpoint(tmp_path: Path) -> None:
    store = memory_store()
    manifest = save(store, make_state(), (), step=1)
    flip(store, manifest.paths[0], 5000)
    with pytest.raises(CorruptData):
        export_dcp(Reader(store, manifest), Store(tmp_path))
    assert not (tmp_path / ".metadata").exists()


def test_without_torch_the_error_names_it(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from elastictrain_checkpoint import Store\n"
        "from elastictrain_checkpoint.convert import export_dcp, open_source\n"
        "from elastictrain_checkpoint.errors import MissingExtra\n"
        "from elastictrain_checkpoint.source import Arrays\n"
        "for call in (lambda: open_source(sys.argv[1]), lambda: export_dcp(Arrays({}), Store('memory://x'))):\n"
        "    try:\n        call()\n    except MissingExtra as error:\n        print(error)\n"
    )
    import elastictrain_checkpoint

    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(elastictrain_checkpoint.__file__).parent.parent)},
    )
    assert out.stdout.count("needs torch: pip install torch") == 2


def test_zip_sums_are_there_to_be_checked(tmp_path: Path) -> None:
    """If a torch release stopped writing them, the check above would be empty."""
    torch.save(torch.arange(1000), tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as archive:
        sums = {info.filename: info.CRC for info in archive.infolist() if info.file_size > 1000}
    assert sums
    assert all(sums.values())


def test_the_loaded_step_is_the_one_that_was_committed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = import_checkpoint(Arrays({"model/w": ("F32", (2,), bytes(8))}), store, step=4)
    assert load(store, 4).raw == manifest.raw
    assert (manifest.generation, manifest.attempt[:7]) == (0, "import-")
