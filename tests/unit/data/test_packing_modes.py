"""Packing with document borders: what a batch holds, where it lies, and what a loss makes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastictrain.data import LaneReader, Source, fingerprint_difference, open_mixture, packing
from elastictrain.errors import ConfigError
from elastictrain.job import Data, Mixture
from tests.unit.data.test_locate import rebuilt
from tests.unit.data.test_source import TEXTS, text_source, tokens_of, write_texts

DOCUMENTS = {(*text.encode(), 256) for text in TEXTS}


def whole_pass(source: Source) -> list[dict[str, Any]]:
    reader = LaneReader(source)
    return [reader.batch(step, lane) for step in range(source.steps_per_epoch) for lane in range(source.lanes)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "data", "parquet")


def documents_in(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    return [
        tuple(token for token, mine in zip(tokens, ids, strict=True) if mine == number)
        for tokens, ids in zip(batch["tokens"].tolist(), batch["document_ids"].tolist(), strict=True)
        for number in sorted({*ids} - {0})
    ]


@pytest.mark.parametrize("small_tails", [False, True])
def test_best_fit_gives_whole_documents(folder: Path, small_tails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small_tails:
        monkeypatch.setattr(packing, "TAIL_BLOCK_ROWS", 1)
        monkeypatch.setattr("elastictrain.data.packed.TAIL_BLOCK_ROWS", 1)
    source = text_source(folder, packing="best_fit", sequence_length=70, lanes=1, lane_batch_size=1)
    batches = whole_pass(source)
    found = Counter(document for batch in batches for document in documents_in(batch))
    assert found == Counter(dict.fromkeys(DOCUMENTS, 1)), "no document is cut, lost or repeated"
    for batch in batches:
        assert {name: array.shape for name, array in batch.items()} == {
            "tokens": (1, 71),
            "document_ids": (1, 71),
            "position_ids": (1, 70),
            "loss_mask": (1, 70),
        }
        assert (batch["tokens"][batch["document_ids"] == 0] == 256).all()
    assert source.describe()["padding_tokens"] == sum(int((batch["document_ids"] == 0).sum()) for batch in batches)


def test_best_fit_cuts_only_what_is_longer_than_a_row(folder: Path) -> None:
    source = text_source(folder, packing="best_fit", sequence_length=24, lanes=1, lane_batch_size=1)
    pieces = [piece for batch in whole_pass(source) for piece in documents_in(batch)]
    whole = [document for document in DOCUMENTS if len(document) <= 25]
    assert set(whole) <= set(pieces)
    assert Counter(t for piece in pieces for t in piece) == Counter(tokens_of(list(TEXTS)))


@pytest.mark.parametrize("length", [40, 150])  # 150: a tail of several documents
@pytest.mark.parametrize("mode", [{"packing": "best_fit"}, {"document_ids": True}])
def test_rows_lie_where_locate_says(
    folder: Path, mode: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "TAIL_BLOCK_ROWS", 2)
    monkeypatch.setattr("elastictrain.data.packed.TAIL_BLOCK_ROWS", 2)
    source = text_source(folder, sequence_length=length, lanes=2, lane_batch_size=1, **mode)
    reader = LaneReader(source)
    for step in range(source.steps_per_epoch):
        for lane in range(2):
            assert rebuilt(source, folder, step, lane) == reader.batch(step, lane)["tokens"].tolist()


def test_joined_documents_with_ids_hold_the_same_tokens_and_say_where_documents_begin(folder: Path) -> None:
    plain, told = (LaneReader(text_source(folder, document_ids=ids, lanes=1)) for ids in (False, True))
    assert told.source.fingerprint == plain.source.fingerprint
    for step in range(plain.source.steps_per_epoch + 2):
        one, other = plain.batch(step, 0), told.batch(step, 0)
        assert one["tokens"].tolist() == other["tokens"].tolist()
        assert set(one) == {"tokens"}
        ends = one["tokens"] == 256
        changes = other["document_ids"][:, 1:] != other["document_ids"][:, :-1]
        filler = other["document_ids"][:, 1:] == 0
        tails = (changes != ends[:, :-1]) & ~filler
        assert (tails <= changes).all(), "in rows of tails a document may begin where another one was cut"
        assert (ends[:, :-1] <= (changes | filler)).all()


def test_masks_follow_the_documents(folder: Path) -> None:
    batch = LaneReader(text_source(folder, packing="best_fit", sequence_length=70)).batch(0, 0)
    ids, mask = batch["document_ids"], batch["loss_mask"]
    assert mask.dtype == bool
    assert mask.tolist() == ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)).tolist()
    for row, positions in zip(ids, batch["position_ids"], strict=True):
        for number in {*row[:-1].tolist()}:
            mine = positions[row[:-1] == number]
            assert mine.tolist() == list(range(len(mine)))


def test_other_packing_is_another_fingerprint(folder: Path) -> None:
    old, new = text_source(folder).fingerprint, text_source(folder, packing="best_fit").fingerprint
    changes = fingerprint_difference(old, new)
    assert any("packing was version 1, sequence_length 16 and is now" in s and "best_fit" in s for s in changes)


def test_resuming_anywhere(folder: Path) -> None:
    whole = LaneReader(text_source(folder, packing="best_fit", sequence_length=50))
    steps = 2 * whole.source.steps_per_epoch
    undisturbed = [whole.batch(step, 1)["tokens"].tobytes() for step in range(steps)]
    for start in range(0, steps, 3):
        resumed = LaneReader(text_source(folder, packing="best_fit", sequence_length=50))
        assert [resumed.batch(step, 1)["tokens"].tobytes() for step in range(start, steps)] == undisturbed[start:]


def test_lanes_with_other_numbers_of_valid_tokens_weigh_what_they_hold(folder: Path) -> None:
    """(sum of losses, number of valid tokens) per lane gives the mean over all valid tokens of the step."""
    source = text_source(folder, packing="best_fit", sequence_length=70, lanes=4, lane_batch_size=1)
    reader = LaneReader(source)
    torch.manual_seed(0)
    table = torch.randn(257, 257)

    def loss(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = torch.from_numpy(batch["tokens"]), torch.from_numpy(batch["loss_mask"])
        each = torch.nn.functional.cross_entropy(table[tokens[:, :-1]].transpose(1, 2), tokens[:, 1:], reduction="none")
        return (each * mask).sum(), mask.sum()

    batches = [reader.batch(1, lane) for lane in range(4)]
    assert len({int(batch["loss_mask"].sum()) for batch in batches}) > 1
    sums = [loss(batch) for batch in batches]
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    total, count = loss(joined)
    torch.testing.assert_close(sum(s for s, _ in sums) / sum(w for _, w in sums), total / count)


def test_a_curriculum_keeps_the_documents_apart(folder: Path) -> None:
    spec = {
        "sources": {"a": {"kind": "parquet", "path": str(folder), "text_column": "text", "packing": "best_fit"}},
        "sequence_length": 64,
        "stages": [{"from_step": 1, "sequence_length": 16}],
    }
    reader = LaneReader(open_mixture(Mixture.model_validate(spec), seed=0, lanes=1, lane_batch_size=3))
    batch = reader.batch(1, 0)
    assert batch["tokens"].shape == batch["document_ids"].shape == (12, 17)
    assert batch["position_ids"].shape == batch["loss_mask"].shape == (12, 16)
    assert batch["position_ids"].max() < 16
    assert (batch["position_ids"][:, 0] == 0).all()


def test_settings_about_text_need_text() -> None:
    with pytest.raises(ConfigError, match=r"data.packing and data.document_ids are about text; set data.text_column"):
        Data(kind="parquet", path="x", packing="best_fit")
