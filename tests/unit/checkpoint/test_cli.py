"""`ckpt`: what a person and a script see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from elastictrain_checkpoint import Store
from elastictrain_checkpoint.cli import app
from tests.unit.checkpoint.build import flip, live_digest, make_state, save

STATE = make_state()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    place = Store(tmp_path / "ckpt")
    for step in (10, 20):
        save(
            place,
            make_state(seed=step),
            step=step,
            tree={"lr": 0.1, "betas": (0.9, 0.99)},
            aliases={"model/head": "model/embed.weight"},
            info={"world": 4},
        )
    return place


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output if code == 2 else result.stdout


def run_json(*args: str, code: int = 0) -> Any:
    return json.loads(run(*args, "--json", code=code))


def test_ls(store: Store) -> None:
    text = run("ls", store.url)
    digests = [live_digest(make_state(seed=step), {"model/head": "model/embed.weight"}) for step in (10, 20)]
    for step, digest in zip((10, 20), digests, strict=True):
        [line] = [line for line in text.splitlines() if f"│ {step} " in line]
        assert "a1" in line
        assert "whole" in line
        assert digest[:16] in line
    rows = run_json("ls", store.url)
    assert [(row["step"], row["whole"], row["digest"], row["tensors"]) for row in rows] == [
        (10, True, digests[0], 6),
        (20, True, digests[1], 6),
    ]
    flip(store, "step-00000010/MANIFEST.json", 60)
    text = run("ls", store.url, code=1)
    assert "step-00000010/MANIFEST.json: " in text
    assert (text.count("whole"), text.count("damaged")) == (1, 1)
    assert [row["whole"] for row in run_json("ls", store.url, code=1)] == [False, True]


def test_ls_of_what_holds_no_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"another format")
    assert run("ls", str(tmp_path)) == f"{Store(tmp_path).url} holds no checkpoint of this format\n"
    assert run_json("ls", str(tmp_path)) == []


def test_show(store: Store) -> None:
    text = run("show", store.url, "--step", "10")
    for part in ("step 10", "attempt a1", "model/embed.weight", "[300, 100]", "BF16", "model/head", "betas", "world"):
        assert part in text
    save(store, make_state({"layer[bold].w[0]": ("U8", (3,))}), step=5, tree="[red]text")
    odd = run("show", store.url, "--step", "5")
    assert "layer[bold].w[0]" in odd
    assert "[red]text" in odd
    shown = run_json("show", store.url)
    assert shown["step"] == 20
    assert shown["tensors"]["model/half"] == {"dtype": "BF16", "shape": [3, 50, 70]}
    assert shown["tree"] == {"lr": 0.1, "betas": {"$tuple": [0.9, 0.99]}}
    assert shown["alias"] == {"model/head": "model/embed.weight"}


def test_a_tensor_that_is_not_there_is_answered_with_the_names_that_are_near(store: Store) -> None:
    said = run("show", store.url, "--tensor", "model/embed.weigt", code=2)
    assert "step 20 has no tensor 'model/embed.weigt'; there are model/embed.weight" in said
    assert run("show", store.url, "--tensor", "zzz", code=2) == "step 20 has no tensor 'zzz'\n"


def test_a_reason_does_not_say_its_step_twice(store: Store) -> None:
    store.remove("step-00000020/a1/w0000-00.safetensors")
    told = run("ls", store.url, code=1).splitlines()[-1] + run("verify", store.url, "--step", "10")
    for command in (("show", store.url), ("prune", store.url, "--keep", "1")):
        result = CliRunner().invoke(app, list(command), env={"COLUMNS": "400"})
        told += result.output
    assert told.count("step 20: step-00000020/a1/") == 3
    assert "step 20: step 20" not in told


def test_verify(store: Store) -> None:
    assert "step 20: sound" in run("verify", store.url)
    assert run_json("verify", store.url, "--all") == [
        {"step": step, "sound": True, "problems": []} for step in (10, 20)
    ]
    flip(store, "step-00000010/a1/w0000-00.safetensors", 4100)
    text = run("verify", store.url, "--all", code=1)
    assert "step 10: damaged" in text
    assert "step 20: sound" in text
    assert "step-00000010/a1/w0000-00.safetensors, block 0" in text
    [found] = run_json("verify", store.url, "--step", "10", code=1)
    [problem] = found["problems"]
    assert (problem["file"], problem["block"]) == ("step-00000010/a1/w0000-00.safetensors", 0)
    assert "model/embed.weight" in problem["tensors"]
    run("verify", store.url)  # the newest is sound
    store.remove("step-00000010/a1/w0000-00.safetensors")
    assert "is missing" in run("verify", store.url, "--all", code=1)
    flip(store, "step-00000020/MANIFEST.json", 60)
    assert [entry["sound"] for entry in run_json("verify", store.url, "--all", code=1)] == [False, False]


def test_digest(store: Store) -> None:
    want = live_digest(make_state(seed=20), {"model/head": "model/embed.weight"})
    assert run("digest", store.url).strip() == want
    assert run_json("digest", store.url, "--step", "20") == {
        "step": 20,
        "digest": want,
        "recorded": want,
        "equal": True,
    }
    flip(store, "step-00000010/a1/w0000-00.safetensors", 4100)
    assert run("digest", store.url, "--step", "10", code=1) == ""


def test_a_digest_that_differs_from_the_manifest_is_a_problem(store: Store) -> None:
    from tests.unit.checkpoint.build import sign

    told = json.loads(store.read_all("step-00000020/MANIFEST.json"))
    told["digest"]["hex"] = "0" * 64
    store.put("step-00000020/MANIFEST.json", sign(told))
    assert run_json("digest", store.url, code=1)["equal"] is False


@pytest.mark.parametrize("command", ["show", "verify", "digest"])
def test_wrong_use_ends_with_2_and_a_reason(store: Store, tmp_path: Path, command: str) -> None:
    assert "has no checkpoint of step 15; steps there: 10, 20" in run(command, store.url, "--step", "15", code=2)
    assert "is not there" in run(command, str(tmp_path / "nowhere"), code=2)
    assert "cannot open" in run(command, "nosuchprotocol://x", code=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "has no sound checkpoint" in run(command, str(tmp_path / "other"), code=2)
    run(command, store.url, "--step", "-1", code=2)


@pytest.mark.parametrize("command", ["show", "digest", "verify"])
def test_a_damaged_newest_is_passed_over_aloud(store: Store, command: str) -> None:
    flip(store, "step-00000020/MANIFEST.json", 60)
    result = CliRunner().invoke(app, [command, store.url])
    assert result.exit_code == (1 if command == "verify" else 0)
    assert "passed over step 20: " in result.stderr
    assert run(command, store.url, "--step", "20", code=1) is not None


@pytest.mark.parametrize("command", ["verify", "digest", "cp", "export", "show"])
def test_damage_names_the_newest_older_step_that_is_whole(store: Store, tmp_path: Path, command: str) -> None:
    save(store, make_state(seed=30), step=30)
    flip(store, "step-00000030/a1/w0000-00.safetensors", 4100)
    store.remove("step-00000020/a1/w0000-00.safetensors")
    further = [str(tmp_path / "to")] if command in ("cp", "export") else []
    further += ["--tensor", "model/embed.weight"] if command == "show" else []
    result = CliRunner().invoke(app, [command, store.url, *further])
    assert result.exit_code == 1, result.output
    told = result.stdout if command == "verify" else result.stderr
    assert "step-00000030/a1/w0000-00.safetensors, block 0" in told
    assert told.splitlines()[-1] == (
        "the newest older step that is whole is 10: give --step 10 (ckpt verify reads every byte of it)"
    )
    store.remove("step-00000010/a1/w0000-00.safetensors")
    result = CliRunner().invoke(app, [command, store.url, "--step", "30", *further])
    assert result.exit_code == 1, result.output
    assert "older" not in result.output


@pytest.mark.parametrize("command", ["verify", "digest"])
def test_a_step_that_refers_to_what_is_damaged_is_not_offered(tmp_path: Path, command: str) -> None:
    state = make_state({"frozen": ("F32", (400_000,)), "hot": ("F32", (100,))})
    place = Store(tmp_path / "ckpt")
    save(place, make_state(seed=5), step=5)
    full = save(place, state, (), step=10, cells=True)
    changed = {**state, "hot": make_state({"hot": ("F32", (100,))}, seed=1)["hot"]}
    for step in (20, 30):
        assert save(place, changed, (), step=step, base=full).base == (10,)
    flip(place, "step-00000010/a1/w0000-00.safetensors", 500_000)
    result = CliRunner().invoke(app, [command, place.url])
    assert result.exit_code == 1, result.output
    assert "the newest older step that is whole is 5: give --step 5" in result.output
