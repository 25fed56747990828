"""The command `elastictrain data prepare`; what runs on Ray runs in this process here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import elastictrain_actors.preparation
from elastictrain.cli import app
from elastictrain.data.preparing.driver import prepare_data
from elastictrain.prepare_settings import Preparation
from tests.support.preparing import DIFFERENT, DOCUMENTS, rows_in, settings_for, write_input


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without_ray(settings: Preparation, *, resume: bool, address: str | None, progress: Any) -> dict[str, Any]:
        assert address is None
        return prepare_data(settings, resume=resume, progress=progress)

    monkeypatch.setattr(elastictrain_actors.preparation, "prepare", without_ray)
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", "prepare", *arguments])


def test_by_options(tmp_path: Path) -> None:
    write_input(tmp_path / "in")
    result = call("in", "--out", "out", "--text-column", "text", "--column", "n", "--deduplicate", "--seed", "3",
                  "--filter", "tests.support.preparing:even")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{DOCUMENTS:,} rows read, {DOCUMENTS // 2} filtered," in result.output
    assert "\n    kind: parquet\n    path: out\n    text_column: text\n    sequence_length: 2048\n" in result.output
    assert len({row["text"] for row in rows_in(tmp_path / "out")}) == len(rows_in(tmp_path / "out")) < DIFFERENT
    again = call("in", "--out", "out", "--text-column", "text")
    assert again.exit_code == 2
    assert "there is a finished preparation in it; choose another folder" in again.output


def test_by_a_file_whose_settings_options_replace(tmp_path: Path) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out", tokenizer="bytes")
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    result = call("prepare.yaml", "--out", str(tmp_path / "other"), "--resume", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    index = json.loads((tmp_path / "other" / "_index.json").read_text())
    assert told["digest"] == index["digest"]
    assert told["counts"]["rows"] == DOCUMENTS
    assert told["data"]["tokenizer"] == f"{tmp_path}/other/_tokenizer.json"
    assert any("row groups take" in sentence for sentence in told["advice"])
    assert not (tmp_path / "out").exists()
    assert call("prepare.yaml", "--out", str(tmp_path / "other"), "--resume", "--json").output == result.output


def test_near_duplicates_by_an_option_and_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = [" ".join(f"w{family}-{n}" for n in range(60)) + f" {member}" for member in range(3) for family in range(4)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "a.parquet")
    result = call("in", "--out", "out", "--text-column", "text", "--near-duplicates", "0.6")
    assert result.exit_code == 0, result.output
    assert "12 rows read, 0 filtered, 0 duplicates, 8 near-duplicates, 4 written" in result.output
    settings = settings_for(tmp_path / "in", tmp_path / "by file", columns=None, near_duplicates={"ngram": 61})
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    told = json.loads(call("prepare.yaml", "--near-duplicates", "0.6", "--json").output)
    assert told["counts"]["near_duplicates"] == 0  # all sixty-one words in a row are never the same
    wrong = call("in", "--out", "other", "--text-column", "text", "--near-duplicates", "1.5")
    assert wrong.exit_code == 2
    assert "near_duplicates.threshold" in wrong.output


def test_what_the_settings_say_can_be_trained_on(tmp_path: Path) -> None:
    from elastictrain.data import open_data
    from elastictrain.data_settings import Data

    write_input(tmp_path / "in")
    told = json.loads(call("in", "--out", "out", "--text-column", "text", "--tokenizer", "bytes", "--json").output)
    source = open_data(Data(**told["data"] | {"sequence_length": 32}), seed=1, lanes=2, lane_batch_size=2)
    assert source.describe()["tokens"] == told["counts"]["tokens"]
    shown = CliRunner().invoke(app, ["data", "inspect", "out", "--text-column", "tokens",
                                     "--tokenizer", "out/_tokenizer.json"])  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert f"{told['counts']['tokens']:,} of 'tokens'" in shown.output


def test_wrong_use_ends_with_code_2(tmp_path: Path) -> None:
    write_input(tmp_path / "in")
    assert "--out is missing: name the folder or URL to write" in call("in").output
    (tmp_path / "a.yaml").write_text("- 1\n")
    result = call("a.yaml")
    assert result.exit_code == 2
    assert "a.yaml: expected a mapping of settings, got list" in result.output
    (tmp_path / "a.yaml").write_text("{")
    assert "a.yaml: not valid YAML" in call("a.yaml").output
    (tmp_path / "a.yaml").write_text("path: in\nkind: parquet\nout: out\nsequence_length: 7\n")
    assert "a.yaml: unknown setting 'sequence_length'" in call("a.yaml").output
    assert not list(tmp_path.glob("out/*"))


def test_a_text_folder_needs_no_column(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one\ntwo\n")
    assert call("in", "--out", "out").exit_code == 0
    assert sorted(pq.read_table(tmp_path / "out" / "part-000000.parquet").column("text").to_pylist()) == ["one", "two"]
