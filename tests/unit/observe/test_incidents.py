from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from elastictrain.controller.incidents import Incident as Record
from elastictrain.observe import Event
from elastictrain.observe.events import make_event
from elastictrain.observe.incidents import PARTS, Incident, Span, bar, incidents, once, spans
from elastictrain.observe.report import full, seconds, table
from elastictrain.observe.summary import summarise

NOW = datetime(2026, 11, 22, 10, 0, 1, tzinfo=UTC)
NODE = "0a1b2c3d" + "e" * 48


def record(number: int = 1, outcome: str = "recovered", **changes: Any) -> dict[str, Any]:
    """As the controller makes it: a frozen worker, killed 0.05 s after it was named; 1 s to the first commit."""
    incident = Record("worker 1 is frozen: silent", 100.0, 3, planned=False)
    incident.last_seen_s, incident.parked_s, incident.forming_s, incident.sealed_s = 98.0, 100.2, 100.25, 100.5
    incident.saw(100.0, "watch", "worker 1 is frozen: silent")
    incident.saw(100.01, "worker 0", "lost a peer: [/gloo/pair.cc:1] closed")
    incident.blame(1, NODE, "frozen: silent", ("process state T", "beat 12 for 2.0 s"))
    incident.gone(1, 100.05)
    incident.decided("drop")
    incident.workers, incident.generations, incident.world_after = [1], [2], 2
    incident.blocks_moved, incident.elements_moved, incident.step, incident.steps_redone = 3, 1000, 17, 1
    return incident.record(number, outcome, 101.0, 8, 12.0) | changes


def event(data: dict[str, Any], kind: str = "incident", after_s: float = 0.0) -> Event:
    return make_event(kind, data, time=NOW + timedelta(seconds=after_s))


def text(shown: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def tight(words: str) -> str:
    """Without the spaces that columns make."""
    return " ".join(words.split())


def test_the_record_of_the_controller_is_read_whole() -> None:
    (incident,) = incidents([event(record())])
    assert incident.detected == NOW - timedelta(seconds=1)
    assert (incident.total_s, incident.who, incident.number) == (1.0, [1], 1)
    assert set(incident.seconds) == {*PARTS, "total"}
    assert incident.model_extra == {}, "a field of the record that nobody shows"
    assert incident.blamed[0].evidence == ["process state T", "beat 12 for 2.0 s"]


def test_numbers_go_on_where_the_run_was_taken_up_again() -> None:
    lives = [event(record(1)), event(record(2, detected_s=150.0)), event({}, "run_resumed"), event(record(1))]
    assert [incident.number for incident in incidents(lives)] == [1, 2, 3]


def test_a_record_written_again_by_a_controller_that_came_back_counts_once() -> None:
    again = [event(record()), event({"gone_s": 1.0, "phase": "running"}, "controller_back"), event(record(), after_s=3)]
    assert len(incidents(again)) == 1
    recovery = {"detected_s": 1.0, "cause": "x", "workers": [1], "steps_redone": 0}
    both = [event(recovery, "recovery"), event(recovery, "recovery"), event(recovery | {"detected_s": 2.0}, "recovery")]
    assert [e.data["detected_s"] for e in once(both)] == [1.0, 2.0]
    assert len(once([event({"worker": 1}, "worker_lost")] * 2)) == 2, "others have no time of their own to go by"


def test_a_record_of_another_version_is_passed_over() -> None:
    assert incidents([event({"cause": "x"}), event(record())])[0].number == 1


def test_spans_lie_where_they_happened() -> None:
    (incident,) = incidents([event(record())])
    found = {span.name: (round(span.start_s, 6), round(span.end_s, 6)) for span in spans(incident.seconds)}
    assert found == {
        "detect": (-2.0, 0.0), "fence": (0.0, 0.05), "park": (0.0, 0.2), "wait": (0.2, 0.25), "form": (0.25, 0.5),
        "first_commit": (0.5, 1.0),
    }  # fmt: skip
    assert [span.name for span in spans(incident.seconds | {"detect": None, "fence": None})] == list(PARTS[2:])
    assert spans({}) == []


@given(
    seconds=st.fixed_dictionaries({name: st.none() | st.floats(0, 1e4) for name in PARTS}), columns=st.integers(1, 60)
)
def test_bars_fit_their_columns_and_keep_their_order(seconds: dict[str, float | None], columns: int) -> None:
    found = spans(seconds)
    assert [span.name for span in found] == [name for name in PARTS if seconds[name] is not None]
    bars = [bar(span, found, columns) for span in found]
    for cells in bars:
        assert 1 <= len(cells) <= columns
        assert set(cells.lstrip(" ")) == {"█"}
    starts = [
        len(cells) - len(cells.lstrip(" ")) for span, cells in zip(found, bars, strict=True) if span.name != "fence"
    ]
    assert starts == sorted(starts)
    longest = max(found, key=lambda span: span.seconds, default=None)
    if longest is not None and longest.seconds > 0:
        assert bars[found.index(longest)].count("█") >= max(cells.count("█") for cells in bars) - 1


def test_bars_are_to_scale() -> None:
    half = [Span("park", 0.0, 1.0), Span("form", 1.0, 2.0)]
    assert [bar(span, half, 10) for span in half] == ["█████", "     █████"]


def test_one_in_full_says_everything_within_80_columns() -> None:
    shown = text(full(incidents([event(record())])[0]))
    assert max(map(len, shown.splitlines())) <= 80
    for words in (
        "incident 1  recovered  2026-11-22T10:00:00.000Z  step 17  generation 2",
        "what     worker 1 is frozen: silent",
        "seen     +0.000 s  watch     worker 1 is frozen: silent",
        "+0.010 s  worker 0  lost a peer: [/gloo/pair.cc:1] closed",
        "blamed   worker 1 on node 0a1b2c3d: frozen: silent; gone +0.050 s",
        "process state T",
        "decided  go on with fewer workers",
        "detect       ████████████████ ",
        "2.00 s last sign → noticed",
        "0.050 s until it was gone",
        "total 1.00 s from the detection",
        "1 step computed again (8 lane batches), 3 blocks (12.0 kB) copied, world 3 → 2",
    ):
        assert tight(words) in tight(shown), f"{words!r} in\n{shown}"


def test_what_is_not_known_is_left_out() -> None:
    bare = {"outcome": "overtaken", "cause": "x", "detected_s": 1.0}
    shown = text(full(incidents([event(bare)])[0]))
    assert "seen     –" in shown
    assert "blamed   nobody" in shown
    assert "no step computed again, world 0 → 0" in shown
    blamed = record(blamed=[{"worker": 1, "node": "", "why": "silent", "evidence": [], "gone_s": None}], seen_more=7)
    shown = text(full(incidents([event(blamed)])[0]))
    assert "worker 1: silent; not known to be gone" in shown
    assert "and 7 more" in shown


def test_table_of_all_in_80_columns() -> None:
    found = incidents([event(record()), event(record(2, "failed", detected_s=150.0, cause="it [X] died\ntrace"))])
    shown = text(table(found)).splitlines()
    assert max(map(len, shown)) <= 80
    assert tight(shown[1]) == "1 11-22 10:00:00 worker 1 is frozen: silent 1.00 s 1 3 → 2 recovered"
    assert tight(shown[2]) == "2 11-22 10:00:00 worker 1: it [X] died 1.00 s 1 3 → 2 failed"


@pytest.mark.parametrize(
    ("value", "words"), [(None, "–"), (0.0, "0.000 s"), (0.0352, "0.035 s"), (0.5, "0.500 s"), (12.345, "12.35 s")]
)
def test_seconds(value: float | None, words: str) -> None:
    assert seconds(value) == words


def test_json_round_trip() -> None:
    (incident,) = incidents([event(record())])
    assert Incident.model_validate_json(incident.model_dump_json()) == incident


def test_a_recovery_written_twice_is_one_in_the_summary(tmp_path: Any) -> None:
    from tests.unit.observe.story import change, tell

    run = tell(tmp_path / "run", end=None)
    before = summarise(run)
    from elastictrain.observe import RunDirectory
    from tests.unit.observe.story import job

    with RunDirectory.resume(run.path, job()) as more:
        change(more, "recovery", 2, 10, (3, 2), workers=[1], steps_redone=1)
    assert summarise(run).recoveries == before.recoveries
