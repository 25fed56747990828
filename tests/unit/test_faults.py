from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from elastictrain import faults
from elastictrain.errors import ConfigError
from elastictrain.faults import (
    Fault,
    add,
    drain,
    fail,
    flip,
    freeze,
    kill,
    kill_controller,
    kills_for,
    load_faults,
    miscompute,
    parse_faults,
    terminate,
)

PHASES = "'compute', 'exchange', 'mirror', 'vote', 'apply', 'gather', 'form' or 'seal'"
WRONG: list[tuple[Any, str]] = [
    (
        {"do": "kill", "worker": 1, "step": 2, "phase": "dance"},
        f"phase: Input should be {PHASES} (got 'dance')",
    ),
    (
        {"do": "kil", "worker": 1, "step": 2},
        "do: expected one of kill, fail, freeze, terminate, flip, miscompute, add, drain, kill_controller (got 'kil')",
    ),
    (
        {"worker": 1},
        "do: expected one of kill, fail, freeze, terminate, flip, miscompute, add, drain, kill_controller (got None)",
    ),
    ({"do": "kill", "worker": 1}, "key 'step' is missing"),
    ({"do": "kill", "worker": -1, "step": 1}, "worker: Input should be greater than or equal to 0 (got -1)"),
    ({"do": "add", "step": 0}, "step: Input should be greater than or equal to 1 (got 0)"),
    ({"do": "add", "step": True}, "step: expected a whole number (got the switch True)"),
    ({"do": "add", "step": 1, "worker": 3}, "unknown key 'worker'; known keys: do, step"),
    ({"do": "drain", "wrker": 0, "step": 1}, "key 'worker' is missing; unknown key 'wrker'; did you mean 'worker'?"),
    (
        {"do": "flip", "worker": 1, "step": 2, "what": "weight"},
        "what: Input should be 'master', 'optimizer', 'parameter' or 'gradient' (got 'weight')",
    ),
    (
        {"do": "flip", "worker": 1, "step": 2, "what": "optimizer", "of": "other"},
        "entry: a worker keeps the optimizer only of blocks that it owns or mirrors; set of to one",
    ),
    (
        {"do": "flip", "worker": 1, "step": 2, "what": "gradient", "when": "apply"},
        "entry: what=gradient and when=apply: a gradient is there only at when=reduced",
    ),
    ({"do": "flip", "worker": 1, "step": 2, "what": "master", "bit": 32}, "bit: Input should be less than 32 (got 32)"),
    ("kill", "expected a mapping such as {do: kill, worker: 1, step: 17}"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG, ids=[str(entry) for entry, _ in WRONG])
def test_wrong_entry_is_named(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_faults([{"do": "add", "step": 1}, entry], where="f.yaml")
    assert str(caught.value) == f"f.yaml: entry 2 {entry!r}: {message}"


def test_all_wrong_entries_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_faults([{"do": "x"}, {"do": "add", "step": 1}, 3])
    assert [line.split(" ", 3)[:3] for line in str(caught.value).splitlines()] == [
        ["faults:", "entry", "1"],
        ["faults:", "entry", "3"],
    ]


@pytest.mark.parametrize("raw", [{"do": "add", "step": 1}, "kill", 4])
def test_not_a_list(raw: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_faults(raw)
    assert str(caught.value) == (
        f"faults: expected a list of entries such as {{do: kill, worker: 1, step: 17}}, got {raw!r}"
    )


def test_python_helpers_check_too() -> None:
    with pytest.raises(ConfigError) as caught:
        kill(1, 0, "dance")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "fault kill(worker=1, step=0, phase='dance'): step: Input should be greater than or equal to 1 (got 0); "
        f"phase: Input should be {PHASES} (got 'dance')"
    )
    with pytest.raises(ConfigError, match=r"^fault drain\(worker=-1, step=1\): worker"):
        drain(-1, 1)


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "faults.yaml"
    with pytest.raises(ConfigError) as caught:
        load_faults(file)
    assert str(caught.value) == f"--faults {file}: no such file; expected YAML with a list of faults"
    file.write_text("- {do: kill, worker: 1, step: 17, phase: exchange}\n- {do: add, step: 30}\n")
    assert load_faults(file) == (kill(1, 17, "exchange"), add(30))
    file.write_text("")
    assert load_faults(file) == ()
    file.write_text("0")
    with pytest.raises(ConfigError, match="expected a list"):
        load_faults(file)
    file.write_text("- {do: kill")
    with pytest.raises(ConfigError, match=r"faults.yaml: not valid YAML"):
        load_faults(file)


workers, steps = st.integers(0, 99), st.integers(1, 10**6)
phases = st.sampled_from([*faults.PHASES, "form"])
scripts = st.lists(
    st.builds(kill, workers, steps, phases)
    | st.builds(fail, workers, steps, phases)
    | st.builds(freeze, workers, steps, phases)
    | st.builds(terminate, workers, steps, phases)
    | st.builds(kill_controller, steps)
    | st.builds(flip, workers, steps, st.sampled_from(["master", "optimizer", "gradient"]))
    | st.builds(miscompute, workers, steps, one_in=steps)
    | st.builds(add, steps)
    | st.builds(drain, workers, steps),
    max_size=8,
).map(tuple)


@given(script=scripts)
def test_yaml_round_trip(script: tuple[Fault, ...]) -> None:
    raw = yaml.safe_load(yaml.safe_dump([fault.model_dump() for fault in script]))
    assert parse_faults(raw) == script
    assert parse_faults(script) == script


@given(script=scripts, worker=workers)
def test_kills_for_are_those_of_the_worker_in_order(script: tuple[Fault, ...], worker: int) -> None:
    assert kills_for(script, worker) == tuple(
        fault for fault in script if fault.do not in ("add", "drain") and getattr(fault, "worker", None) == worker
    )


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        kill(1, 2).step = 3  # type: ignore[misc]
