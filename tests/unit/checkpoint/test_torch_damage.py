"""Loading a state dict from what is damaged: said, healed from a copy, or an older step is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import CorruptData, NoCheckpoint, Store, load
from elastictrain_checkpoint.tiers import newest_older


def pack(folder: Path, step: int) -> Path:
    return folder / load(Store(folder), step).paths[0]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in range(4):
        checkpoint.save({"a": torch.full((100,), float(step))}, tmp_path / "c", step=step)
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    return tmp_path / "c"


def test_newer_steps_that_are_none_are_said(folder: Path) -> None:
    cut(pack(folder, 3))
    manifest = folder / load(Store(folder), 2).path
    manifest.write_bytes(manifest.read_bytes().replace(b"F32", b"I32"))
    state = {"a": torch.zeros(100)}
    report = checkpoint.load(state, folder)
    assert (report.step, list(report.passed_over)) == (1, [3, 2])
    assert "bytes, not " in report.passed_over[3]
    assert state["a"][0] == 1
    assert checkpoint.load(state, folder, step=0).passed_over == {}


def test_none_that_is_whole_says_why(folder: Path) -> None:
    for step in range(4):
        cut(pack(folder, step))
    with pytest.raises(NoCheckpoint, match=r"has no checkpoint; step 3 is not whole: .*; step 2 is not whole: "):
        checkpoint.load({"a": torch.zeros(100)}, folder)


def test_a_flipped_bit_names_the_newest_older_step_that_is_whole(folder: Path) -> None:
    flip(pack(folder, 3))
    cut(pack(folder, 2))
    with pytest.raises(CorruptData, match=r"partly filled; the newest older step that is whole is 1 \(pass") as found:
        checkpoint.load({"a": torch.zeros(100)}, folder)
    assert (found.value.tensors, found.value.block) == (("a",), 0)
    for step in (0, 1):
        cut(pack(folder, step))
    with pytest.raises(CorruptData, match=r"; no older step is whole$"):
        checkpoint.load({"a": torch.zeros(100)}, folder)


def test_an_older_step_that_refers_to_the_damaged_file_is_not_named(folder: Path) -> None:
    flip(pack(folder, 3))
    manifests = {step: load(Store(folder), step) for step in (2, 3)}
    assert newest_older([Store(folder)], manifests[3].step, [manifests[2].paths[0]]) == 1


def test_what_is_damaged_comes_from_a_copy(folder: Path) -> None:
    copy = folder.parent / "copy"
    flip(pack(folder, 3))
    state = {"a": torch.zeros(100)}
    report = checkpoint.load(state, folder, others=[copy])
    assert (report.step, [one.source for one in report.healed]) == (3, [str(copy)])
    assert state["a"][0] == 3
    cut(pack(folder, 3))
    assert checkpoint.load(state, folder, others=[copy]).step == 3
    shutil.rmtree(folder)
    assert checkpoint.load(state, folder, others=[copy], step=2).step == 2
    assert state["a"][0] == 2
