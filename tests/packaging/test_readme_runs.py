"""The README's quickstart, run as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 240
pytestmark = [pytest.mark.ray, pytest.mark.timeout(2 * DEADLINE_S)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples and their data, as a clone has after the quickstart's first commands."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("data", "__pycache__"))
    run(folder, sys.executable, "examples/gpt/prepare.py")
    return folder


def run(folder: Path, *command: str, code: int = 0) -> str:
    paths = [str(ROOT), str(ROOT / "actors"), str(ROOT / "checkpoint"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == code, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def elastictrain(folder: Path, line: str, *more: str, code: int = 0) -> str:
    """A command as the README has it, comments and all."""
    words = line.partition("#")[0].split()
    assert words[0] == "elastictrain"
    return run(folder, sys.executable, "-m", "elastictrain.cli", *words[1:], *more, code=code)


def block(language: str, start: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    (wanted,) = [block for found, block in fenced if found == language and block.startswith(start)]
    return wanted


def test_the_python_quickstart(clone: Path) -> None:
    (clone / "quickstart.py").write_text(block("python", "import torch"))
    out = run(clone, sys.executable, "quickstart.py")
    assert "the same bits: True" in out
    assert "[2, 1" in out


def test_the_yaml_quickstart_and_the_checkpoint_commands(clone: Path) -> None:
    (clone / "job.yaml").write_text(block("yaml", "# job.yaml"))
    validate, train, resume = block("", "elastictrain validate").splitlines()
    assert "samples" in elastictrain(clone, validate)
    first = json.loads(elastictrain(clone, train, "--json", "--quiet").splitlines()[-1])
    assert (first["outcome"], first["steps"], first["world_sizes"]) == ("finished", 40, [2])
    ls, show, verify, digest = block("", "elastictrain ckpt ls").splitlines()
    assert "whole" in elastictrain(clone, ls)
    assert first["digest"] in elastictrain(clone, show)
    assert "sound" in elastictrain(clone, verify)
    assert elastictrain(clone, digest).split() == [first["digest"]]
    diff, cp, export, again, pin, prune = block("", "elastictrain ckpt diff").splitlines()
    assert "differ" in elastictrain(clone, diff, code=1)
    assert "step 40: copied" in elastictrain(clone, cp.replace("s3://bucket/quickstart", "copied"))
    elastictrain(clone, export)
    elastictrain(clone, again)
    assert "sound" in elastictrain(clone, "elastictrain ckpt verify runs/imported-checkpoints")
    assert "pinned: 20" in elastictrain(clone, pin)
    assert "kept: 20, 40" in elastictrain(clone, prune)
    second = json.loads(elastictrain(clone, resume, "--json", "--quiet").splitlines()[-1])
    assert (second["outcome"], second["steps"]) == ("finished", 60)
    assert second["run_dir"] == first["run_dir"]
    assert second["last_loss"] < first["first_loss"]
