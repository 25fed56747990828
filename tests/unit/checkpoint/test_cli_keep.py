"""`ckpt prune` with policies, `pin`, `unpin`, `heal`: what a person and a script see."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from elastictrain_checkpoint import Store, copy_step, list_steps, load, verify
from elastictrain_checkpoint.cli_keep import parse_age, parse_best
from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.policies import Best
from tests.unit.checkpoint.build import flip, make_state, save
from tests.unit.checkpoint.test_cli_move import run, run_json


@pytest.fixture
def store(tmp_path: Path) -> Store:
    place = Store(tmp_path / "ckpt")
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5)):
        save(place, make_state(seed=step), step=step, info={"loss": loss})
    return place


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((), [40]),
        (("--every-steps", "20"), [20, 40]),
        (("--best", "loss"), [20, 40]),
        (("--best", "loss:max"), [10, 40]),
        (("--best", "loss:min:2"), [20, 30, 40]),
        (("--younger", "1h"), [10, 20, 30, 40]),
        (("--spaced", "30d"), [10, 40]),
        (("--every-steps", "30", "--best", "loss:max"), [10, 30, 40]),
    ],
)
def test_prune_keeps_what_any_policy_keeps(store: Store, options: tuple[str, ...], kept: list[int]) -> None:
    assert run_json("prune", store.url, "--keep", "1", *options, "--dry-run")["kept"] == kept
    assert list_steps(store) == [10, 20, 30, 40]
    assert run_json("prune", store.url, "--keep", "1", *options)["kept"] == kept
    assert list_steps(store) == kept


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--younger", "soon", "expected a time above 0 such as 90s"),
        ("--spaced", "0h", "expected a time above 0"),
        ("--best", "loss:least", "expected METRIC"),
        ("--best", ":min", "expected METRIC"),
        ("--best", "loss:min:0", "n=0"),
    ],
)
def test_wrong_policies_are_named_and_nothing_goes(store: Store, option: str, value: str, says: str) -> None:
    assert says in run("prune", store.url, "--keep", "1", option, value, code=2)
    assert list_steps(store) == [10, 20, 30, 40]


def test_words_for_policies() -> None:
    assert parse_age("1.5h", "--younger") == timedelta(minutes=90)
    assert parse_age("2d", "--younger") == timedelta(days=2)
    assert parse_best("evaluation.accuracy:max:3") == Best("evaluation.accuracy", 3, "max")
    assert parse_best("loss:2") == Best("loss", 2)
    with pytest.raises(InvalidPiece, match="perhaps :N"):
        parse_best("loss:min:2:more")


def test_pinned_steps_stay_until_they_are_unpinned(store: Store) -> None:
    assert run("pin", store.url, "--step", "20", "--why", "published") == "pinned: 20\n"
    assert run_json("pin", store.url, "--step", "10") == {"pinned": [10, 20]}
    rows = {row["step"]: row["pinned"] for row in run_json("ls", store.url)}
    assert rows == {10: True, 20: True, 30: False, 40: False}
    assert "whole, pinned" in run("ls", store.url)
    run("prune", store.url, "--keep", "1")
    assert list_steps(store) == [10, 20, 40]
    assert run_json("unpin", store.url, "--step", "10") == {"pinned": [20]}
    assert run("unpin", store.url, "--step", "20") == "pinned: none\n"
    run("prune", store.url, "--keep", "1")
    assert list_steps(store) == [40]
    assert "no checkpoint of step 7 to pin" in run("pin", store.url, "--step", "7", code=2)


def test_heal_takes_from_elsewhere_what_is_damaged_here(store: Store, tmp_path: Path) -> None:
    far = Store(tmp_path / "far")
    copy_step(store, far, 40)
    assert run("heal", store.url, "--from", far.url) == "step 40 is whole\n"
    path = load(store, 40).paths[0]
    flip(store, path, 4100)
    told = run("heal", store.url, "--from", far.url, "--step", "40")
    assert f"healed: {path}, block 0, from {far.url}" in told
    assert f"written anew: {path}" in told
    assert verify(store, load(store, 40)) == []
    flip(store, path, 4100)
    flip(far, path, 4200)
    found = run_json("heal", store.url, "--from", far.url, code=1)
    assert found["rewritten"] == []
    assert found["left"]
    assert "damaged everywhere" in run("heal", store.url, "--from", far.url, code=1)


def test_heal_is_for_the_newest_step_however_damaged(store: Store, tmp_path: Path) -> None:
    """The newest that is sound needs nothing: to say that it is whole would be no answer."""
    far = Store(tmp_path / "far")
    copy_step(store, far, 40)
    path = load(store, 40).paths[0]
    store.remove(path)
    assert f"written anew: {path}" in run("heal", store.url, "--from", far.url)
    assert verify(store, load(store, 40)) == []
    flip(store, "step-00000040/MANIFEST.json", 60)
    assert "written anew: step-00000040/MANIFEST.json" in run("heal", store.url, "--from", far.url)
    assert verify(store, load(store, 40)) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "has no checkpoint" in run("heal", str(tmp_path / "other"), "--from", far.url, code=2)
