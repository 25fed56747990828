"""`ckpt diff | cp | import | export | prune` and the values of one tensor: what a person and a script see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from elastictrain_checkpoint import Store, convert, list_steps, load
from elastictrain_checkpoint.cli import app
from elastictrain_checkpoint.cli_common import parse_options
from elastictrain_checkpoint.convert import import_checkpoint
from elastictrain_checkpoint.errors import InvalidMapping
from elastictrain_checkpoint.source import Arrays
from tests.unit.checkpoint.build import flip

W = np.arange(12, dtype="<f4").reshape(3, 4)
LONG = "model/model.layers.0.self_attn.rotary_embedding.inverse_frequencies.weight"


def put(store: Store, step: int, *, aliases: dict[str, str] | None = None, **held: Any) -> None:
    named = {n.replace("__", "/"): ("F32", np.shape(a), np.asarray(a, "<f4")) for n, a in held.items()}
    import_checkpoint(Arrays(named), store, step=step, aliases=aliases, attempt=f"a{step}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    place = Store(tmp_path / "ckpt")
    put(place, 10, model__w=W, model__b=[1, 2], optim__x=[0], aliases={"model/tied": "model/w"})
    other = W.copy()
    other[1, 1] += 0.5
    put(place, 20, model__w=other, model__b=[[1, 2]], model__new=[3], aliases={"model/tied": "model/w"})
    return place


def run(*args: str, code: int = 0, columns: int = 200) -> str:
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": str(columns)})
    assert result.exit_code == code, result.output
    return result.output if code == 2 else result.stdout


def run_json(*args: str, code: int = 0) -> Any:
    return json.loads(run(*args, "--json", code=code))


# --- diff ---


def test_diff(store: Store) -> None:
    told = run_json("diff", f"{store.url}@10", f"{store.url}@20", code=1)
    assert (told["equal"], told["compared"]) == (False, 5)
    found = {entry["name"]: entry for entry in told["tensors"]}
    assert {name: entry["kind"] for name, entry in found.items()} == {
        "model/w": "values", "model/tied": "values", "model/b": "shape", "model/new": "extra", "optim/x": "missing",
    }  # fmt: skip
    assert (found["model/w"]["l2"], found["model/w"]["max_abs"], found["model/w"]["elements"]) == (0.5, 0.5, 1)
    assert found["model/w"]["relative"] == pytest.approx(0.5 / np.linalg.norm(W.astype(float)))
    text = run("diff", f"{store.url}@10", store.url, code=1)  # the newest is 20
    for part in ("missing in B", "only in B (F32 [1])", "F32 [2] → F32 [1, 2]", "5 of 5 tensors differ"):
        assert part in text


def test_diff_of_the_same_of_some_and_within_a_tolerance(store: Store) -> None:
    assert "4 tensors, all equal" in run("diff", f"{store.url}@10", f"{store.url}@10")
    assert run_json("diff", f"{store.url}@10", f"{store.url}@10", "--all")["tensors"][0]["kind"] == "same"
    some = ("diff", f"{store.url}@10", f"{store.url}@20", "--only", "model/(w|tied)")
    assert run_json(*some, code=1)["compared"] == 2
    assert run_json(*some, "--tolerance", "0.1")["equal"] is True
    assert run_json(*some, "--tolerance", "0.001", code=1)["equal"] is False
    run("diff", f"{store.url}@10", f"{store.url}@20", "--tolerance", "9", code=1)  # shapes and names never agree by it
    assert "is not a regular expression" in run("diff", store.url, store.url, "--only", "(", code=2)
    assert "has no checkpoint of step 11" in run("diff", f"{store.url}@11", store.url, code=2)


def test_to_compare_nothing_by_mistake_is_no_equality(store: Store) -> None:
    said = run("diff", f"{store.url}@10", f"{store.url}@20", "--only", "modle/.*", code=2)
    assert "--only 'modle/.*' fits no tensor of either" in said


def test_no_tolerance_covers_nan(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, 1, t=[1, 2])
    put(store, 2, t=[1, np.nan])
    told = run_json("diff", f"{store.url}@1", f"{store.url}@2", "--tolerance", "9", code=1)
    assert told["tensors"][0]["not_finite"] == 1


def test_diff_with_another_format(store: Store, tmp_path: Path) -> None:
    run("export", store.url, str(tmp_path / "hf"), "--step", "10", "--tied")
    assert run_json("diff", f"{store.url}@10", str(tmp_path / "hf"), "--only", "model/.*")["equal"] is True
    file = str(tmp_path / "hf" / "model.safetensors")
    assert run_json("diff", file, f"{store.url}@10", code=1)["tensors"][0]["kind"] == "extra"


def test_damage_ends_a_comparison_with_1(store: Store) -> None:
    flip(store, "step-00000010/a10/import-00.safetensors", 4097)
    result = CliRunner().invoke(app, ["diff", f"{store.url}@10", f"{store.url}@20"])
    assert result.exit_code == 1
    assert "its hash differs" in result.stderr


# --- cp ---


def test_cp(store: Store, tmp_path: Path) -> None:
    there = str(tmp_path / "there")
    assert run("cp", store.url, there) == "step 20: copied, 1 pack written (4.2 kB), 0 there before\n"
    assert list_steps(Store(there)) == [20]
    told = run_json("cp", store.url, there, "--all", "--check")
    assert [(one["step"], one["committed"], len(one["present"])) for one in told] == [(10, True, 0), (20, False, 1)]
    assert "step 20: was there already, 0 packs written (0 bytes), 1 there before" in run("cp", store.url, there)
    assert run_json("diff", store.url, there)["equal"] is True


def test_cp_refuses(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    put(other, 20, model__w=[1])
    assert "another checkpoint of step 20; it is not overwritten" in run("cp", store.url, other.url, code=2)
    assert "is not there" in run("cp", str(tmp_path / "no"), other.url, code=2)
    flip(store, "step-00000020/a20/import-00.safetensors", 4097)
    run("cp", store.url, str(tmp_path / "new"), code=1)
    assert list_steps(Store(tmp_path / "new")) == []
    (tmp_path / "file").write_text("x")
    assert "NotADirectoryError" in run("cp", store.url, str(tmp_path / "file"), "--step", "10", code=2)


def test_cp_of_all_leaves_out_what_is_damaged_and_copies_the_rest(store: Store, tmp_path: Path) -> None:
    put(store, 15, model__w=[1])
    put(store, 17, model__w=[2])
    flip(store, "step-00000015/a15/import-00.safetensors", 4097)
    store.remove("step-00000017/a17/import-00.safetensors")
    result = CliRunner().invoke(app, ["cp", store.url, str(tmp_path / "there"), "--all"])
    assert result.exit_code == 1
    assert list_steps(Store(tmp_path / "there")) == [10, 20]
    assert "step-00000015/a15/import-00.safetensors, block 0" in result.stderr
    assert "step-00000017/a17/import-00.safetensors" in result.stderr
    assert result.stderr.splitlines()[-1] == f"2 steps of 4 not copied: damaged in {store.url}"
    told = run_json("cp", store.url, str(tmp_path / "there"), "--all", code=1)
    assert [one["step"] for one in told] == [10, 20]


# --- import and export ---


def test_import_and_export(store: Store, tmp_path: Path) -> None:
    told = run_json("export", store.url, str(tmp_path / "hf"), "--step", "10", "--cast", "BF16")
    assert (told["tensors"], told["files"], told["bytes"]) == (2, ["model.safetensors"], 28)
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")["w"], torch.tensor(W).bfloat16())
    back = str(tmp_path / "in")
    names = run_json("import", str(tmp_path / "hf"), back, "--dry-run")["names"]
    assert names["model/w"] == {"from": ["w"], "dtype": "BF16", "shape": [3, 4]}
    assert not (tmp_path / "in").exists()
    given = ("import", str(tmp_path / "hf"), back, "--cast", "F32", "--alias", "model/tied=model/w", "--step", "3")
    assert run_json(*given)["step"] == 3
    manifest = load(Store(back), 3)
    assert manifest.tensors == {"model/w": ("F32", (3, 4)), "model/b": ("F32", (2,))}
    assert manifest.alias == {"model/tied": "model/w"}
    assert manifest.info["imported"]["format"] == "safetensors"
    assert "has a checkpoint of step 3; choose another step" in run(*given, code=2)
    assert "step 10: 4 tensors" in run("export", store.url, str(tmp_path / "d"), "--step", "10", "--format", "dcp")
    assert run_json("import", str(tmp_path / "d"), back, "--step", "4")["format"] == "dcp"
    assert run_json("diff", f"{store.url}@10", f"{back}@4", "--only", "model/.*")["equal"] is True


def test_import_with_rules_and_a_tree(tmp_path: Path) -> None:
    save_file({"qkv": torch.arange(6.0), "junk": torch.zeros(1)}, tmp_path / "x.safetensors")
    rules = [
        {"op": "drop", "match": "model/junk"},
        {"op": "split", "match": "model/qkv", "into": ["model/q", "model/k", "model/v"]},
    ]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    (tmp_path / "tree.json").write_text('{"seed": 7}')
    given = ["import", str(tmp_path / "x.safetensors"), str(tmp_path / "out"), "--map", str(tmp_path / "rules.json")]
    text = run(*given, "--tree", str(tmp_path / "tree.json"))
    assert "step 0: 3 tensors, 4.1 kB, from safetensors" in text
    assert "not taken: junk" in text
    manifest = load(Store(tmp_path / "out"), 0)
    assert (sorted(manifest.tensors), manifest.tree) == (["model/k", "model/q", "model/v"], {"seed": 7})
    (tmp_path / "rules.json").write_text('[{"op": "only", "match": "nothing"}]')
    assert "fits none of 2 tensors" in run(*given, "--step", "1", code=2)
    (tmp_path / "rules.json").write_text("{")
    assert "these are not rules of a mapping" in run(*given, "--step", "1", code=2)
    (tmp_path / "tree.json").write_text("{")
    assert "is not JSON" in run(*given[:3], "--step", "1", "--tree", str(tmp_path / "tree.json"), code=2)
    assert "FileNotFoundError" in run(*given[:3], "--map", str(tmp_path / "none.json"), code=2)
    as_named = run_json(*given[:3], "--step", "1", "--as-named")
    assert (as_named["tensors"], sorted(load(Store(tmp_path / "out"), 1).tensors)) == (2, ["junk", "qkv"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--format", "zip"], "--format 'zip' is not one of safetensors, dcp"),
        (["--format", "dcp", "--tied"], "--tied is for safetensors"),
        (["--shard-size", "5 parsecs"], "is not a size such as 5GB"),
        (["--shard-size", "0"], "is not a size such as 5GB"),
        (["--cast", "I8"], "cast='I8' is not one of F64, F32, F16, BF16"),
        (["--step", "11"], "has no checkpoint of step 11"),
        (["-o", "novalue"], "--storage-option 'novalue' is not KEY=VALUE"),
    ],
)
def test_wrong_use_of_export(store: Store, tmp_path: Path, args: list[str], said: str) -> None:
    assert said in run("export", store.url, str(tmp_path / "out"), *args, code=2)
    assert not list((tmp_path / "out").rglob("*"))


def test_export_into_shards_and_not_over_another(store: Store, tmp_path: Path) -> None:
    told = run_json("export", store.url, str(tmp_path), "--step", "10", "--shard-size", "10")
    assert told["files"] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert "export into an empty folder" in run("export", store.url, str(tmp_path), code=2)


@pytest.mark.parametrize("kind", ["safetensors", "dcp"])
def test_an_export_of_what_is_damaged_leaves_nothing_behind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the older step that is offered can go to the same place."""
    place, out = Store(tmp_path / "ckpt"), tmp_path / "out"
    monkeypatch.setattr(
        convert.export_dcp, "__kwdefaults__", convert.export_dcp.__kwdefaults__ | {"file_bytes": 1 << 20}
    )
    for step in (1, 2):
        put(place, step, model__a=np.full(600_000, step), model__b=np.full(600_000, step))
    flip(place, "step-00000002/a2/import-00.safetensors", 4_500_000)
    options = ["--format", kind, *(["--shard-size", "3MB"] if kind == "safetensors" else [])]
    run("export", place.url, str(out), *options, code=1)
    assert not list(out.rglob("*.*"))
    told = run_json("export", place.url, str(out), *options, "--step", "1")
    assert len(told["files"]) > 2


def test_import_of_nothing_and_of_damage(tmp_path: Path) -> None:
    assert "holds nothing: none of" in run("import", str(tmp_path / "no"), str(tmp_path / "out"), code=2)
    assert "is not NEW=EXISTING" in run("import", str(tmp_path), str(tmp_path / "out"), "--alias", "x", code=2)
    (tmp_path / "x.safetensors").write_bytes(b"short")
    run("import", str(tmp_path / "x.safetensors"), str(tmp_path / "out"), code=1)


# --- prune ---


def test_prune(store: Store) -> None:
    assert run_json("prune", store.url, "--keep", "1", "--dry-run")["removed"] == [10]
    assert list_steps(store) == [10, 20]
    assert "would be removed: 10" in run("prune", store.url, "--keep", "1", "--dry-run")
    assert run_json("prune", store.url, "--keep", "1") == {
        "kept": [20], "removed": [10], "garbage": [], "unsound": [], "dry_run": False,
    }  # fmt: skip
    assert list_steps(store) == [20]
    run("prune", store.url, "--keep", "0", code=2)
    run("prune", store.url, code=2)


def test_prune_leaves_what_it_cannot_judge(store: Store) -> None:
    flip(store, "step-00000020/MANIFEST.json", 60)
    text = run("prune", store.url, "--keep", "1", code=1)
    assert "left alone, unsound: step 20" in text
    assert list_steps(store) == [10, 20]


# --- one tensor ---


def test_show_one_tensor(store: Store) -> None:
    told = run_json("show", store.url, "--step", "10", "--tensor", "model/tied")
    assert (told["dtype"], told["shape"], told["range"]) == ("F32", [3, 4], [0, 10])
    assert told["values"] == [float(value) for value in range(10)]
    facts = told["statistics"]
    assert (facts["elements"], facts["minimum"], facts["maximum"], facts["mean"]) == (12, 0.0, 11.0, 5.5)
    text = run("show", store.url, "--step", "10", "--tensor", "model/tied", "--range", "3:6")
    assert "model/tied → model/w" in text
    assert "elements 3 to 6: 3 4 5 …" in text
    assert "mean" not in text, "only the elements named are read"
    some = ("show", store.url, "--step", "10", "--tensor", "model/w", "--range")
    assert run_json(*some, "10:")["values"] == [10.0, 11.0]
    assert run_json(*some, ":")["range"] == [0, 12]
    assert run_json(*some, "4:4")["values"] == []
    for span in ("5:4", "0:13", "x:y", "3", "-1:2"):
        assert "is not START:STOP with 0 <= START <= STOP <= 12" in run(*some, span, code=2)
    assert "has no tensor 'nothing'" in run("show", store.url, "--tensor", "nothing", code=2)
    assert "--range is for one tensor" in run("show", store.url, "--range", "0:1", code=2)


def test_values_that_json_has_not_are_text(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, 1, t=[np.nan, np.inf, 1])
    told = run_json("show", str(tmp_path), "--tensor", "t")
    assert told["values"] == ["nan", "inf", 1.0]
    assert (told["statistics"]["nan"], told["statistics"]["infinite"]) == (1, 1)


# --- how it looks, and what all share ---


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_is_wider_than_the_terminal_and_no_name_is_cut(tmp_path: Path, columns: int) -> None:
    store = Store(tmp_path / "runs")
    for step in (1, 20_000_000):
        put(store, step, **{LONG.replace("/", "__"): np.full((300, 7), step)}, model__b=[step])
    for args in (
        ("ls", store.url),
        ("show", store.url),
        ("diff", f"{store.url}@1", f"{store.url}@20000000"),
        ("show", store.url, "--tensor", LONG),
    ):
        text = run(*args, columns=columns, code=1 if args[0] == "diff" else 0)
        assert max(map(len, text.splitlines())) <= columns, text
        if args[0] != "ls":
            column = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
            assert LONG in ("".join(column) or text)


def test_every_command_says_its_exit_codes_and_takes_storage_options(tmp_path: Path) -> None:
    for command in ("ls", "show", "verify", "digest", "diff", "cp", "import", "export", "prune"):
        text = " ".join(run(command, "--help").split())
        assert "0 all well; 1 damaged, or different; 2 wrong use" in text, command
        assert "--storage-option" in text, command
        assert "--json" in text, command


def test_storage_options() -> None:
    given = ["key=k", "client_kwargs.endpoint_url=http://x:1/a=b", "client_kwargs.verify=false", "n=3", "empty="]
    assert parse_options(given) == {
        "key": "k",
        "client_kwargs": {"endpoint_url": "http://x:1/a=b", "verify": False},
        "n": 3,
        "empty": "",
    }
    assert parse_options(None) == {}
    for wrong in (["x"], ["=1"], ["a..b=1"], ["a=1", "a.b=2"], ["a.b=1", "a=2"], ["a=1", "a=1"]):
        with pytest.raises(InvalidMapping, match="--storage-option"):
            parse_options(wrong)
