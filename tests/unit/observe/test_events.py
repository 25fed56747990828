from __future__ import annotations

import ast
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.errors import InternalError
from elastictrain.observe.events import Event, iso, make_event, parse_events, step_back
from elastictrain.observe.sentences import SENTENCES, describe
from tests.unit.observe.said import SAID

NOW = datetime(2026, 11, 22, 10, 0, 0, 123456, tzinfo=UTC)


@pytest.mark.parametrize(("kind", "data", "words"), SAID, ids=[kind for kind, _, _ in SAID])
def test_sentence(kind: str, data: dict[str, Any], words: str) -> None:
    assert describe(make_event(kind, data, time=NOW)) == words


def test_every_kind_that_is_announced_has_a_sentence_with_words_of_its_own() -> None:
    """Read from the source of whoever announces, so that a new kind cannot be forgotten here."""
    root = Path(__file__).parents[3]
    announced = set()
    for folder in ("elastictrain/controller", "actors/elastictrain_actors"):
        for file in (root / folder).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and "Announce" in ast.unparse(node.func) and node.args:
                    kind = node.args[0]
                    announced |= {kind.value} if isinstance(kind, ast.Constant) else set()
    assert {"frozen", "incident", "slow_start", "agent_unheard"} <= announced, "this test sees no announcements"
    assert announced <= set(SENTENCES)
    assert announced <= {kind for kind, _, _ in SAID}, "a sentence that no test has read"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
KEYS = sorted({key for _, data, _ in SAID for key in data})


@given(kind=st.sampled_from([*SENTENCES, "other"]), data=st.dictionaries(st.sampled_from(KEYS), anything, max_size=8))
def test_describe_never_raises(kind: str, data: dict[str, Any]) -> None:
    event = Event(time=NOW, kind=kind, data=data)
    assert describe(event)
    step_back(event)


def test_round_trip_and_time() -> None:
    event = make_event("running", {"generation": 4}, time=NOW)
    assert event.generation == 4
    assert event.model_dump()["time"] == iso(NOW) == "2026-11-22T10:00:00.123Z"
    read = parse_events([event.model_dump(), {"kind": "no time"}, {"time": "2026-11-22T10:00:00Z", "kind": "x"}])
    assert [e.kind for e in read] == ["running", "x"]
    assert read[0].time == NOW.replace(microsecond=123000)


def test_an_event_needs_a_kind() -> None:
    with pytest.raises(InternalError, match="needs a kind"):
        make_event("", {"a": 1}, time=NOW)
