"""What a save of a state dict holds on to when its call returns is all that it needs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from elastictrain_checkpoint.torch import AsyncSaver, load, saving
from elastictrain_checkpoint.torch.taking import Changing
from elastictrain_checkpoint.torch.tree import flatten


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set it to let the background begin: until then it has done nothing at all."""
    event, inner = threading.Event(), saving._all_pieces

    def wait(*args: Any) -> Any:
        assert event.wait(30)
        return inner(*args)

    monkeypatch.setattr(saving, "_all_pieces", wait)
    return event


def test_what_happens_to_containers_and_parameters_after_the_call_is_not_saved(
    tmp_path: Path, held: threading.Event
) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    norm = torch.nn.BatchNorm1d(3)
    groups = [{"lr": 0.1, "params": [0, 1]}]
    state = {"model": {"w": weight, "tied": weight, **norm.state_dict()}, "groups": groups, 7: (1, None)}
    saver = AsyncSaver(tmp_path)
    handle = saver.save(state, step=1)
    groups[0]["lr"] = 9.0
    groups[0]["params"].append(2)  # type: ignore[attr-defined]
    state["model"]["more"] = torch.ones(3)  # type: ignore[index]
    del state["groups"]
    weight.data = torch.zeros(4, dtype=torch.float16)
    norm(torch.randn(8, 3))
    held.set()
    handle.result(30)
    saver.close()
    found: dict[str, Any] = {}
    load(found, tmp_path)
    assert found["groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert found[7] == (1, None)
    assert set(found["model"]) == {"w", "tied", *norm.state_dict()}
    for name in ("w", "tied"):
        assert torch.equal(found["model"][name], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["model"]["running_mean"], torch.zeros(3))
    assert found["model"]["num_batches_tracked"] == 0


def test_a_change_that_was_announced_waits_for_the_plan_and_is_not_saved(tmp_path: Path, held: threading.Event) -> None:
    weight = torch.zeros(1000)
    saver = AsyncSaver(tmp_path)
    handle = saver.save({"w": weight}, step=1)
    threading.Timer(0.05, held.set).start()
    saver.before_mutation()
    assert held.is_set()
    weight += 1
    handle.result(30)
    saver.close()
    found = {"w": torch.ones(1000)}
    load(found, tmp_path)
    assert torch.equal(found["w"], torch.zeros(1000))


def test_a_save_that_is_done_lets_go_of_the_state(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path)
    handle = saver.save({"w": torch.ones(10)}, step=1)
    handle.result(30)
    assert saver._lazy._thread.wait(30)
    (job,) = saver._lazy._jobs
    assert job.finish is None
    assert job.intact() == ""
    saver.close()


def test_names_are_compared_again_when_they_or_the_patterns_change() -> None:
    changing = Changing(["*.mean", "b*"])
    assert changing.among(["a.mean", "b", "c"]) == {"a.mean", "b"}
    assert changing.among(["c", "a.mean"]) == {"a.mean"}
    assert changing.among(["d.mean", "c"]) == {"d.mean"}
    assert Changing([]).among(["a"]) == set()


def test_tensors_at_one_address_that_are_not_the_same_are_stored_each() -> None:
    base = torch.arange(12.0)
    state = {
        "none": base[:0],
        "whole": base,
        "rows": base.view(3, 4),
        "again": base.view(3, 4),
        "part": base[:4],
        "part again": base[:4],
        "whole again": base.detach(),
    }
    flat = flatten(state)
    assert flat.aliases == {"again": "rows", "part again": "part", "whole again": "whole"}
    assert set(flat.tensors) == {"none", "whole", "rows", "part"}
    assert [name for _, name in flat.places] == list(state)
