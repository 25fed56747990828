from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from elastictrain.observe.events import make_event
from elastictrain.observe.live import BARS, LiveView, ViewConsole, data_wait_words, picture, recovery_words, sparkline
from elastictrain.observe.metrics import MetricsRow, data_wait
from elastictrain.observe.status import Status

NOW = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)
RECOVERY = {"cause": "signal 9", "seconds": 0.31, "steps_redone": 1}
STATUS: dict[str, Any] = {
    "state": "running", "name": "gpt", "run_dir": "runs/x", "steps": 100, "world": 3, "generation": 2, "spares": 1,
    "lanes": {0: 3, 2: 5}, "held_once": 4, "last_recovery": RECOVERY,
}  # fmt: skip


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def view(terminal: bool, **settings: Any) -> tuple[LiveView, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=100, height=40, color_system=None)
    return LiveView(console, clock=clock, **settings), out, clock


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "generation": 2, "loss": 3.5, "tokens": 100, "step_s": 0.1, "world": 3} | more


def test_plain_lines_where_there_is_no_terminal() -> None:
    live, out, clock = view(terminal=False, every_s=5)
    live.update(STATUS)
    live.row(row(1))
    live.row(row(2))
    clock.now_s = 4.9
    live.row(row(3))
    clock.now_s = 5.1
    live.row(row(4, skipped="lane 3"))
    live.row(row(5, evaluation={"accuracy": 0.5}))
    live.event(make_event("worker_lost", {"worker": 1, "cause": "signal 9"}, time=NOW))
    live.event(make_event("parking", {"generation": 2}, time=NOW))
    live.row(row(100))
    live.close()
    assert out.getvalue().splitlines() == [
        "step 1/100  loss 3.5  1,000 tokens/s  world 3",
        "step 4/100  loss 3.5  1,000 tokens/s  world 3  skipped",
        "step 5/100  loss 3.5  1,000 tokens/s  world 3  accuracy 0.5",
        "10:00:00 worker 1 is lost: signal 9",
        "step 100/100  loss 3.5  1,000 tokens/s  world 3",
    ]


def rendered(status: dict[str, Any], rows: list[MetricsRow] | None = None) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    with console.capture() as capture:
        console.print(picture(Status.model_validate(status), rows or [], []))
    return capture.get()


def test_the_picture_says_what_is_asked_of_it() -> None:
    rows = [MetricsRow(step=s, loss=10.0 - s, tokens=500, step_s=0.5) for s in range(1, 9)]
    text = rendered(STATUS, rows)
    for words in (
        " gpt ", "runs/x", "running", "8/100", "loss           2", "█▇▆▅▄▃▂▁", "1,000",
        "3 workers, generation 2, 1 spare", "0: 3, 2: 5", "4 blocks", "signal 9, 0.31 s, 1 step redone",
    ):  # fmt: skip
        assert words in text, words
    assert "none, every block has its mirror" in rendered(STATUS | {"held_once": 0})
    assert "waiting        workers.min=2" in rendered(STATUS | {"waiting": "workers.min=2"})
    many = rendered(STATUS | {"lanes": dict.fromkeys(range(40), 1)})
    assert "(40 workers)" in many


def test_the_picture_says_whose_lanes_others_have_computed() -> None:
    """Of the last twenty steps; where lanes are not shared there is no such line."""
    one = {"lanes": 3, "from": {2: 2, 0: 1}, "by": {1: 3}, "in_vain": 1}
    rows = [MetricsRow.model_validate(row(step, taken_over=one)) for step in range(1, 31)]
    assert "taken over     60 lanes in 20 steps, of worker 2: 40, worker 0: 20; 20 lanes begun in vain" in rendered(
        STATUS, rows
    )
    none = MetricsRow.model_validate(row(1, taken_over={"lanes": 0, "from": {}, "by": {}, "in_vain": 0}))
    assert "taken over     0 lanes in 1 step" in rendered(STATUS, [none])
    assert "taken over" not in rendered(STATUS, [MetricsRow.model_validate(row(1))])


def test_the_picture_says_how_many_lanes_were_dropped() -> None:
    rows = [MetricsRow.model_validate(row(step, lanes_dropped=[3, 5] if step % 10 == 0 else [])) for step in range(31)]
    assert "dropped        4 lanes in 20 steps" in rendered(STATUS, rows)
    assert "dropped" not in rendered(STATUS, [MetricsRow.model_validate(row(1))])


def test_terminal_draws_seldom_and_gives_the_screen_back() -> None:
    live, out, clock = view(terminal=True, redraw_s=0.2)
    live.update(STATUS)
    drawn = out.tell()
    assert drawn > 0
    live.row(row(1))
    assert out.tell() == drawn, "drawn again too soon"
    clock.now_s = 0.3
    live.row(row(2))
    assert out.tell() > drawn
    live.update({"state": "finished"})
    live.close()
    live.close()
    assert "finished" in out.getvalue(), "the last picture stays"
    assert out.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"
    end = out.tell()
    live.update(STATUS)
    live.close()
    assert out.tell() == end


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_in_the_view_turns_it_off_and_nothing_else(terminal: bool) -> None:
    live, out, clock = view(terminal)
    live.update(STATUS)
    live.row({"step": "not a number"})
    assert "the live view is off (ValidationError" in out.getvalue()
    assert "the run goes on" in out.getvalue()
    end = out.tell()
    clock.now_s = 99.0
    live.row(row(1))
    live.update(STATUS)
    live.event(make_event("finished", time=NOW))
    live.close()
    assert out.tell() == end


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("terminal", [True, False])
def test_a_closed_pipe_does_not_end_the_run(terminal: bool) -> None:
    live = LiveView(ViewConsole(file=Broken(), force_terminal=terminal))
    live.row(row(1))
    live.event(make_event("finished", time=NOW))
    live.close()


def test_rows_that_were_taken_back_do_not_count() -> None:
    live, out, clock = view(terminal=False, every_s=0)
    for step, tokens in ((1, 100), (2, 900_000), (2, 100)):
        clock.now_s += 1
        live.row(row(step, tokens=tokens))
    assert out.getvalue().splitlines()[-1].startswith("step 2  loss 3.5  1,000 tokens/s")


CAUSE = "rank 2: [/w/pair.cc:553] Connection closed [/red]"


@pytest.mark.parametrize("key", ["last_recovery", "waiting", "error", "name", "run_dir"])
def test_words_of_others_are_no_markup(key: str) -> None:
    """gloo's errors begin with [/path/of/a/file.cc:553], which rich takes for a closing tag."""
    said = CAUSE if key != "last_recovery" else {"cause": CAUSE, "seconds": 0.1, "steps_redone": 0}
    assert "[/w/pair.cc:553]" in rendered(STATUS | {key: said})


def test_names_of_metrics_are_no_markup() -> None:
    assert "top[/1] 0.5" in rendered(STATUS, [MetricsRow(step=1, evaluation={"top[/1]": 0.5})])


@pytest.mark.parametrize("terminal", [True, False])
def test_it_says_once_how_to_come_back(terminal: bool) -> None:
    live, out, clock = view(terminal, come_back=True)
    live.update({"name": "gpt"})
    assert "attach" not in out.getvalue(), "the folder is not known yet"
    for _ in range(3):
        clock.now_s += 1
        live.update(STATUS | {"run_dir": "/my runs/x"})
    live.close()
    assert out.getvalue().count("from elsewhere: elastictrain attach '/my runs/x'") == 1


def test_one_that_comes_late_sees_the_last_events_and_the_newest_step() -> None:
    rows = [MetricsRow(step=step, loss=float(step), tokens=100, step_s=0.1, world=3) for step in (1, 2, 3)]
    events = [make_event("checkpoint", {"step": step}, time=NOW) for step in range(9)]
    events += [make_event("parking", {"generation": 2}, time=NOW)]
    live, out, _ = view(terminal=False)
    live.catch_up(STATUS, rows, events)
    assert out.getvalue().splitlines() == [
        *(f"10:00:00 checkpoint of step {step} committed" for step in range(3, 9)),
        "step 3/100  loss 3  1,000 tokens/s  world 3",
    ]
    live, out, _ = view(terminal=True)
    live.catch_up(STATUS, rows, events)
    live.close()
    assert "3/100" in out.getvalue()
    assert "checkpoint of step 8 committed" in out.getvalue()
    assert "checkpoint of step 2 committed" not in out.getvalue()


@given(values=st.lists(st.floats(-1e6, 1e6), max_size=300), columns=st.integers(1, 50))
def test_sparkline(values: list[float], columns: int) -> None:
    line = sparkline(values, columns)
    assert len(line) <= columns
    assert set(line) <= set(BARS)
    assert bool(line) == (len(values) >= 2)


def test_sparkline_shape() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BARS
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([5, 5, 5], 8) == "▁▁▁"


def test_recovery_words_leave_out_what_is_not_known() -> None:
    assert recovery_words({}) == "unknown cause"
    assert recovery_words(RECOVERY | {"restored_from": "/c"}) == "signal 9, 0.31 s, 1 step redone, restored from /c"


def test_waiting_for_data_is_shown_with_its_causes() -> None:
    rows = [
        MetricsRow(step=step, step_s=1.0, data_wait={"decode": 0.15, "store": 0.05, "other": 0.0}) for step in (1, 2)
    ]
    share, causes = data_wait(rows) or (0.0, {})
    assert (share, list(causes)) == (pytest.approx(0.2), ["decode", "store", "other"])
    assert data_wait_words(share, causes) == "20.0% of the step: decode 75%, store 25%, other 0%"
    assert data_wait_words(0.004, {"pack": 0.004}) == "0.4% of the step"
    assert data_wait_words(0.0, {}) == "0.0% of the step"
    assert data_wait([MetricsRow(step=1, step_s=1.0)]) is None, "a run of before, whose rows do not say it"
