"""`elastictrain simulate` as a user sees it."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from elastictrain.cli import app

SMALL = ["simulate", "--workers", "6", "--hours", "2", "--seed", "5", "--worse", "500"]


def test_json_for_programs_is_the_same_every_time() -> None:
    first, second = (json.loads(CliRunner().invoke(app, [*SMALL, "--json"]).stdout) for _ in range(2))
    assert first.pop("wall_s") > 0 < second.pop("wall_s")
    assert first == second
    assert first["workers"] == 6
    assert first["steps_lost"] == first["steps_twice"] == 0


def test_a_table_for_people() -> None:
    done = CliRunner().invoke(app, SMALL)
    assert done.exit_code == 0
    for words in ("goodput", "0 lost, 0 committed twice", "From the fault to the next seal", "p95 s"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0"], "workers: .*greater than or equal to 1.*got 0"),
        (["--hours", "0"], "hours: .*greater than 0"),
        (["--check", "some"], "check: .*'sampled'"),
        (["--worse", "-1"], "worse: expected a number above 0"),
        (["--spares", "-1"], "spares: "),
        (["--scenario", "/does/not/exist.yaml"], "--scenario /does/not/exist.yaml"),
    ],
)
def test_bad_input_names_the_option(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["simulate", *options])
    assert done.exit_code == 2
    assert re.search(words, done.output)
