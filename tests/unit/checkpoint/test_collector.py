"""The pause of the garbage collector ends however its body ends, and leaves a collector that was off alone."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from elastictrain_checkpoint.collector import no_collections
from elastictrain_checkpoint.torch import saving


def test_nested_pauses_end_with_the_outermost() -> None:
    assert gc.isenabled()
    with no_collections():
        with no_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), no_collections():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with no_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_state_dict_is_taken_apart_without_collections_and_waits_are_not_in_the_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, bool] = {}

    def noting(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def noted(*args: Any, **more: Any) -> Any:
            seen[name] = gc.isenabled()
            return inner(*args, **more)

        monkeypatch.setattr(owner, name, noted)

    noting(saving, "flatten")
    for name in ("_take", "_agree", "_choose"):
        noting(saving.AsyncSaver, name)
    saver = saving.AsyncSaver(tmp_path)
    saver.save({"w": torch.zeros(9)}).result(30)
    saver.close()
    assert seen == {"flatten": False, "_take": False, "_agree": True, "_choose": True}
