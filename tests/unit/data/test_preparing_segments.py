"""Files of a preparation as segments: in their order, each once, whatever happens to the preparation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

import elastictrain as et
from elastictrain.data.preparing import driver
from elastictrain.data.preparing.driver import prepare_data
from elastictrain.data.segments import Closed, SegmentLog
from tests.support.preparing import DOCUMENTS, Interrupted, StopsAfter, backwards, settings_for, write_input


def names(out: Path) -> list[str]:
    return [segment.name for segment in SegmentLog(out).segments()]


def test_files_become_segments_in_their_order_and_the_manifest_is_closed(tmp_path: Path) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out", segments=True, tokenizer="bytes")
    index = prepare_data(settings, backwards)
    assert names(tmp_path / "out") == [file["name"] for file in index["files"]]
    log = SegmentLog(tmp_path / "out")
    assert log.get(len(index["files"])) == Closed(len(index["files"]))
    for segment, file in zip(log.segments(), index["files"], strict=True):
        assert segment.size_bytes == file["bytes"]
        assert segment.about == {"rows": file["rows"], "tokens": file["tokens"], "xxh3_128": file["xxh3"]}


def test_segments_are_there_while_the_rest_is_being_prepared_and_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    settings = settings_for(write_input(tmp_path / "in"), out, segments=True)
    plain = prepare_data(settings_for(tmp_path / "in", tmp_path / "plain"))
    parts, files = len(plain["plan"]["parts"]), [file["name"] for file in plain["files"]]
    seen: list[int] = []
    for more in range(len(files)):
        with pytest.raises(Interrupted):
            prepare_data(settings, StopsAfter(parts if more == 0 else 1), resume=True)
        there = names(out)
        assert there == files[: len(there)]
        assert not isinstance(SegmentLog(out).get(len(there)), Closed)
        seen.append(len(there))
    assert seen == list(range(len(files)))
    with monkeypatch.context() as killed:  # between the manifest's end and its own
        killed.setattr(driver, "index_of", interrupted)
        with pytest.raises(Interrupted):
            prepare_data(settings, resume=True)
    assert names(out) == files
    assert isinstance(SegmentLog(out).get(len(files)), Closed)
    assert prepare_data(settings, resume=True)["digest"] == plain["digest"]
    assert names(out) == files


def test_a_finished_preparation_is_announced_when_it_is_taken_up_with_segments(tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = prepare_data(settings_for(write_input(tmp_path / "in"), out))
    for _ in range(2):
        prepare_data(settings_for(tmp_path / "in", out, segments=True), resume=True)
        assert names(out) == [file["name"] for file in index["files"]]
        assert isinstance(SegmentLog(out).get(len(index["files"])), Closed)


def interrupted(*_: object) -> None:
    raise Interrupted


def test_a_file_of_the_same_name_in_the_working_directory_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out", segments=True)
    (tmp_path / "part-000000.parquet").write_bytes(b"another one")
    monkeypatch.chdir(tmp_path)
    index = prepare_data(settings)
    assert names(tmp_path / "out") == [file["name"] for file in index["files"]]
    assert not (tmp_path / "out" / "data").exists()


def test_training_begins_before_the_preparation_ends_and_uses_every_token_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = settings_for(write_input(tmp_path / "in"), out, segments=True, tokenizer="bytes")
    parts = len(prepare_data(settings_for(tmp_path / "in", tmp_path / "plain", tokenizer="bytes"))["plan"]["parts"])
    with pytest.raises(Interrupted):
        prepare_data(settings, StopsAfter(parts + 2))
    assert len(names(out)) == 2
    data = et.data.parquet(
        str(out), text_column="tokens", tokenizer=str(out / "_tokenizer.json"), sequence_length=7,
        live={"poll_s": 0.01, "deadline_s": 30.0, "record": str(tmp_path / "order")},
    )  # fmt: skip
    stream = et.data.stream(data, batch_size=4, lanes=2, seed=5)
    begun = [batch["tokens"].flatten() for batch in islice(stream, 3)]
    assert len(names(out)) == 2
    state = stream.state()
    index = prepare_data(settings, resume=True)
    stream.resume(state)
    tokens = torch.cat([*begun, *(batch["tokens"].flatten() for batch in stream)])
    left_out = index["counts"]["tokens"] - len(tokens)
    # What fills no step of all lanes at the very end, less the filler of each segment's last row.
    assert -8 * len(index["files"]) < left_out < 4 * 8
    documents = int((tokens == 256).sum())
    assert DOCUMENTS - 32 <= documents <= DOCUMENTS + 8 * len(index["files"])
