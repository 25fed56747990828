"""Parts of a checkpoint, and under other keys: `only` and `renamed` of a load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint import Store
from elastictrain_checkpoint.errors import InvalidMapping, StateMismatch
from tests.unit.checkpoint.build import make_state, save


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}])
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Any]:
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 7, "history": [1.0, 2.0]}
    checkpoint.save(state, tmp_path, step=3)
    return state


def zeros(state: Any) -> Any:
    """The same keys, with nothing in them."""
    if isinstance(state, dict):
        return {key: zeros(value) for key, value in state.items()}
    if isinstance(state, list):
        return [zeros(value) for value in state]
    return torch.zeros_like(state) if isinstance(state, torch.Tensor) else type(state)()


def filled(state: Any, path: str = "") -> set[str]:
    """Keys of what is not as `zeros` has made it."""
    if isinstance(state, dict) or (isinstance(state, list) and not all(isinstance(x, float) for x in state)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return set().union(*(filled(value, f"{path}/{key}" if path else f"{key}") for key, value in items))
    return (
        {path}
        if (bool(state.any()) if isinstance(state, torch.Tensor) else state not in (type(state)(), [0.0, 0.0]))
        else set()
    )


ONLY: dict[str, tuple[list[str], set[str]]] = {
    "a part": (["model"], {"model/0.weight", "model/0.bias", "model/2.weight", "model/2.bias"}),
    "below a dot": (["model/0"], {"model/0.weight", "model/0.bias"}),
    "one tensor": (["model/2.bias"], {"model/2.bias"}),
    "a pattern": (["*.bias", "epoch"], {"model/0.bias", "model/2.bias", "epoch"}),
    "in a list": (["optim/param_groups/0/lr"], {"optim/param_groups/0/lr"}),
    "below a pattern": (["optim/state/*/step"], {f"optim/state/{n}/step" for n in range(4)}),
    "a list of numbers": (["history"], {"history"}),
    "nothing": ([], set()),
}


@pytest.mark.parametrize("what", ONLY)
def test_only_what_is_named_is_loaded_and_strictly_so(what: str, stored: dict[str, Any], tmp_path: Path) -> None:
    only, expected = ONLY[what]
    state = zeros(stored)
    report = checkpoint.load(state, tmp_path, only=only)
    assert (report.missing, report.unexpected, report.different) == ([], [], {})
    assert filled(state) == expected


def test_what_is_not_wanted_need_not_be_in_the_state_dict(stored: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = trained()
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    checkpoint.load({"model": model, "more": 5}, tmp_path, only=["model"])
    assert torch.equal(model.state_dict()["0.weight"], stored["model"]["0.weight"])
    fresh: dict[str, Any] = {"optim": {}}
    checkpoint.load(fresh, tmp_path, only=["optim"])
    assert fresh["optim"]["param_groups"] == stored["optim"]["param_groups"]
    optimizer.load_state_dict(fresh["optim"])


def test_a_part_that_lacks_something_is_refused(stored: dict[str, Any], tmp_path: Path) -> None:
    state = zeros(stored)
    state["model"]["0.wieght"] = state["model"].pop("0.weight")
    del state["optim"]
    with pytest.raises(
        StateMismatch, match=r"model/0\.wieght is not in the checkpoint \(near: model/0\.weight\)"
    ) as no:
        checkpoint.load(state, tmp_path, only=["model"])
    assert (no.value.missing, no.value.extra) == (("model/0.wieght",), ("model/0.weight",))
    report = checkpoint.load(state, tmp_path, only=["model", "epoch"], strict=False)
    assert (report.missing, report.unexpected) == (["model/0.wieght"], ["model/0.weight"])


def test_a_name_that_fits_nothing_is_refused_with_those_that_are_near(stored: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StateMismatch, match=r"only='modle' fits nothing \(near: model\)"):
        checkpoint.load(zeros(stored), tmp_path, only=["modle"], strict=False)
    with pytest.raises(TypeError, match=r"only='model': give a list of names, such as \['model'\]"):
        checkpoint.load(zeros(stored), tmp_path, only="model")
    state = {"ema": torch.zeros(2), "epoch": 0}
    assert checkpoint.load(state, tmp_path, only=["ema", "epoch"], strict=False).missing == ["ema"]
    assert state["epoch"] == 7


RENAMED: dict[str, dict[str, str]] = {
    "a part": {"model": "net/inner"},
    "a dotted part": {"model/0": "model/first", "model/2": "model/last"},
    "a pattern": {"model/*.weight": "model/*.gamma"},
    "two stars": {"model/*.*": "model/*/*"},
    "each for the other": {"model/0.bias": "model/2.bias", "model/2.bias": "model/0.bias"},
    "two parts": {"epoch": "model", "model": "epoch"},
    "to the root": {"model/*": "*"},
}


@pytest.mark.parametrize("what", RENAMED)
def test_what_was_called_otherwise_is_found(what: str, stored: dict[str, Any], tmp_path: Path) -> None:
    new = {
        "a part": lambda m: {"net": {"inner": m}},
        "a dotted part": lambda m: {
            "model": {k.replace("0.", "first.").replace("2.", "last."): v for k, v in m.items()}
        },
        "a pattern": lambda m: {"model": {k.replace("weight", "gamma"): v for k, v in m.items()}},
        "two stars": lambda m: {"model": {n: {k: m[f"{n}.{k}"] for k in ("weight", "bias")} for n in "02"}},
        "each for the other": lambda m: {"model": m | {"0.bias": m["2.bias"], "2.bias": m["0.bias"]}},
        "two parts": lambda m: {"epoch": m, "model": 7},
        "to the root": lambda m: {"model": {}} | m,
    }[what](stored["model"])
    expected = {key: value for key, value in stored.items() if key not in ("model", "epoch")} | {"epoch": 7} | new
    state = zeros(expected)
    checkpoint.load(state, tmp_path, renamed=RENAMED[what])
    assert filled(state) == filled(expected)
    flat, wanted = torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(expected)
    for a, b in zip(flat, wanted, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        ({"modle": "x"}, r"the checkpoint has nothing called 'modle' \(near: model\)"),
        ({"model": "optim"}, "model cannot be called optim, as something else is"),
        ({"model": "epoch/inner"}, "model cannot be called epoch/inner: what is above it is no mapping"),
        ({"optim/param_groups/0": "x"}, "optim/param_groups/0 is an item of a list; rename the list"),
        ({"model/*": "net"}, r"both need a name, and as many '\*' as the other"),
    ],
)
def test_renaming_that_cannot_be_is_refused(
    renamed: dict[str, str], said: str, stored: dict[str, Any], tmp_path: Path
) -> None:
    state = zeros(stored)
    with pytest.raises(InvalidMapping, match=said):
        checkpoint.load(state, tmp_path, renamed=renamed)
    assert filled(state) == set()


def test_both_together_are_of_the_new_keys(stored: dict[str, Any], tmp_path: Path) -> None:
    state = {"net": {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(4)}}
    checkpoint.load(state, tmp_path, only=["net/0"], renamed={"model": "net"})
    assert torch.equal(state["net"]["0.bias"], stored["model"]["0.bias"])


def test_a_checkpoint_of_names_alone(tmp_path: Path) -> None:
    """A run's, an import: nothing but names of tensors."""
    made = make_state(
        {"model/a.weight": ("F32", (3, 4)), "model/b.weight": ("F32", (5,)), "optim/a.weight/m": ("F32", (3, 4))}
    )
    save(Store(tmp_path), made, (), step=1)

    def of(name: str) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(made[name][2], dtype="f4").reshape(made[name][1]).copy())

    state = {"model": {"new.weight": torch.zeros(3, 4), "b.weight": torch.zeros(5)}, "optim": torch.zeros(1)}
    report = checkpoint.load(state, tmp_path, only=["model"], renamed={"model/a": "model/new"})
    assert (report.missing, report.unexpected) == ([], [])
    assert torch.equal(state["model"]["new.weight"], of("model/a.weight"))
    assert torch.equal(state["model"]["b.weight"], of("model/b.weight"))
    assert not state["optim"].any()
    one = {"model": {"b.weight": torch.zeros(5)}}
    checkpoint.load(one, tmp_path, only=["model/b.weight"])
    assert torch.equal(one["model"]["b.weight"], of("model/b.weight"))
    fresh: dict[str, Any] = {"model": {}}
    checkpoint.load(fresh, tmp_path, only=["model/b.weight"])
    assert list(fresh["model"]) == ["b.weight"]
    with pytest.raises(InvalidMapping, match=r"two tensors would be called 'model/b\.weight'"):
        checkpoint.load(one, tmp_path, renamed={"model/a.weight": "model/b.weight"})
    with pytest.raises(InvalidMapping, match=r"nothing called 'model/c' \(near: "):
        checkpoint.load(one, tmp_path, renamed={"model/c": "model/d"})
