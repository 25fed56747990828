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
    lose_node,
    miscompute,
    parse_faults,
    slow,
    terminate,
)
from elastictrain.job import Job, parse_job
from elastictrain.run import _check_faults

KINDS = "kill, fail, freeze, terminate, lose_node, flip, miscompute, slow, add, drain, kill_controller"
PHASES = (
    "'compute', 'claim', 'drop', 'agree', 'exchange', 'mirror', 'vote', 'apply', 'gather', 'form', 'restore', 'seal', "
    "'store', 'stored', 'manifest' or 'committed'"
)
WRONG: list[tuple[Any, str]] = [
    (
        {"do": "kill", "worker": 1, "step": 2, "phase": "dance"},
        f"phase: Input should be {PHASES} (got 'dance')",
    ),
    (
        {"do": "kil", "worker": 1, "step": 2},
        f"do: expected one of {KINDS} (got 'kil')",
    ),
    (
        {"worker": 1},
        f"do: expected one of {KINDS} (got None)",
    ),
    ({"do": "kill", "worker": 1}, "key 'step' is missing"),
    ({"do": "kill", "worker": -1, "step": 1}, "worker: Input should be greater than or equal to 0 (got -1)"),
    (
        {"do": "lose_node", "worker": 1, "step": 2, "how": "burn"},
        "how: Input should be 'stop' or 'kill' (got 'burn')",
    ),
    (
        {"do": "lose_node", "node": "ab", "step": 2},
        "key 'worker' is missing; unknown key 'node'; known keys: do, how, phase, silent_s, step, worker",
    ),
    (
        {"do": "lose_node", "worker": 1, "step": 2, "silent_s": 0},
        "silent_s: Input should be greater than 0 (got 0)",
    ),
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
    (
        {"do": "slow", "worker": 1, "what": "net"},
        "what: Input should be 'compute', 'data' or 'link' (got 'net')",
    ),
    (
        {"do": "slow", "worker": 1, "delay_s": 0.5},
        "entry: delay_s=0.5 and what=compute: only a link has a delay; use factor",
    ),
    (
        {"do": "slow", "worker": 1, "what": "link", "delay_s": 0.5, "factor": 3.0},
        "entry: delay_s=0.5 and factor=3.0: a link has one of them; remove one",
    ),
    ({"do": "slow", "worker": 1, "what": "link", "delay_s": 0}, "delay_s: Input should be greater than 0 (got 0)"),
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
    | st.builds(lose_node, workers, steps, phases, how=st.sampled_from(["stop", "kill"]), silent_s=st.floats(0.1, 99.0))
    | st.builds(flip, workers, steps, st.sampled_from(["master", "optimizer", "gradient"]))
    | st.builds(miscompute, workers, steps, one_in=steps)
    | st.builds(slow, workers, steps, factor=st.floats(1.5, 9.0), what=st.sampled_from(["compute", "data", "link"]))
    | st.builds(slow, workers, steps, what=st.just("link"), delay_s=st.floats(0.01, 9.0))
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


def job(workers: dict[str, Any]) -> Job:
    raw = {"recipe": "mod:Class", "data": {"kind": "jsonl", "path": "x.jsonl"}, "steps": 10, "workers": workers}
    return parse_job(raw)


def test_a_worker_that_the_run_cannot_have_is_refused() -> None:
    """A lost node may have had all workers: so many numbers more a run may come to."""
    spare = job({"min": 1, "max": 3, "spares": 1})
    for script, most in (([], 3), ([kill(0, 1)], 4), ([lose_node(0, 1)], 7), ([lose_node(0, 1), add(2)], 9)):
        _check_faults(spare, (*script, drain(most, 1)))
        with pytest.raises(ConfigError) as caught:
            _check_faults(spare, (*script, drain(most + 1, 1)))
        assert str(caught.value) == (
            f"faults: drain worker {most + 1} at step 1: the run has workers 0..{most}; name one of them"
        )


def test_without_replacement_a_lost_node_brings_no_new_numbers() -> None:
    with pytest.raises(ConfigError, match=r"^faults: lose_node worker 3 at step 1: the run has workers 0\.\.2; name"):
        _check_faults(job({"min": 1, "max": 3, "replace": False}), (lose_node(3, 1),))


@pytest.mark.parametrize("phase", ["claim", "agree"])
def test_a_phase_that_steps_have_only_where_lanes_are_shared(phase: Any) -> None:
    plain = job({"max": 2})
    with pytest.raises(ConfigError) as caught:
        _check_faults(plain, (kill(1, 2, phase),))
    assert str(caught.value) == (
        f"faults: kill in phase {phase}: a step has that phase only where lanes are shared; set redundancy.lanes, or "
        "name another phase"
    )
    shared = parse_job(plain.model_dump() | {"redundancy": {"lanes": "coded"}})
    _check_faults(shared, (kill(1, 2, phase),))


def test_a_phase_that_steps_have_only_where_lanes_are_dropped() -> None:
    shared = parse_job(job({"max": 2}).model_dump() | {"redundancy": {"lanes": "coded"}})
    with pytest.raises(ConfigError) as caught:
        _check_faults(shared, (kill(1, 2, "drop"),))
    words = "faults: kill in phase drop: a step has that phase only with redundancy.lanes: drop_slowest"
    assert str(caught.value) == words
    _check_faults(parse_job(shared.model_dump() | {"redundancy": {"lanes": "drop_slowest"}}), (kill(1, 2, "drop"),))
