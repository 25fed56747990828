"""The live view of a run in a terminal; plain lines where there is none. It never disturbs the run."""

from __future__ import annotations

import contextlib
import functools
import shlex
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from elastictrain.observe.copy_words import copies_words
from elastictrain.observe.events import Event, recovery_seconds
from elastictrain.observe.metrics import (
    RATE_STEPS,
    MetricsRow,
    TakenOver,
    data_wait,
    lanes_dropped,
    taken_over,
    tokens_per_s,
)
from elastictrain.observe.sentences import count, describe, given_up_words
from elastictrain.observe.status import Status

P = ParamSpec("P")

BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_COLUMNS = 40
STATE_STYLES = {
    "running": "green", "finished": "bold green", "failed": "bold red", "stopped": "yellow",
    "forming": "yellow", "parking": "yellow", "finishing": "green",
}  # fmt: skip
EVENT_STYLES = {
    "failed": "red", "worker_lost": "red", "unresponsive": "red", "start_failed": "red", "fault": "red",
    "frozen": "red", "node_lost": "red", "hung": "red", "storage_stalled": "red", "node_set_aside": "yellow",
    "preemption": "yellow", "controller_back": "yellow", "agent_unheard": "yellow", "incident": "green",
    "recovery": "yellow", "gathering": "yellow", "refused": "yellow", "skipped": "yellow", "numerics_differ": "yellow",
    "slow_start": "yellow",
    "went_back": "magenta", "checkpoint_dropped": "magenta", "checkpoint_given_up": "yellow", "finished": "green",
    "resized": "green", "copy_failed": "yellow", "place_silent": "yellow",
}  # fmt: skip
DETAILS = frozenset({"forming", "parking", "doomed", "worker_started", "worker_prepared", "worker_retired"})
"""Kinds that stand in events.jsonl but would push what matters off the screen."""
EVENTS_SHOWN = 6


def _guarded(method: Callable[Concatenate[LiveView, P], None]) -> Callable[Concatenate[LiveView, P], None]:
    """An error in the view turns the view off; the run goes on."""

    @functools.wraps(method)
    def call(self: LiveView, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._blind:
            return
        try:
            method(self, *args, **kwargs)
        except (Exception, SystemExit) as error:  # rich leaves with SystemExit when its reader is gone
            self._go_blind(error)

    return call


class ViewConsole(Console):
    """A console whose reader may leave: rich would close standard output with it, and the summary goes there."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("nobody reads the view any more")


class LiveView:
    """An `Observer` that draws to `console`: a panel that is redrawn on a terminal, plain lines elsewhere.

    `every_s`: shortest time between two plain lines of progress; `redraw_s`: between two pictures. `clock`: seconds.
    `come_back`: say in the beginning how the run can be watched from elsewhere.
    Draws in the caller's thread and has none of its own.
    """

    def __init__(
        self,
        console: Console,
        *,
        every_s: float = 5.0,
        redraw_s: float = 0.2,
        come_back: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._every_s = every_s
        self._redraw_s = redraw_s
        self._come_back = come_back
        self._clock = clock
        self._status = Status()
        self._rows: deque[MetricsRow] = deque(maxlen=4 * SPARKLINE_COLUMNS)
        self._events: deque[Event] = deque(maxlen=EVENTS_SHOWN)
        self._drawn_s: float | None = None
        self._live: Live | None = None
        self._blind = False
        self._closed = False

    @_guarded
    def update(self, status: Mapping[str, Any]) -> None:
        self._status = Status.model_validate({**self._status.model_dump(), **status})
        if self._come_back and self._status.run_dir:
            self._come_back = False  # before the picture: it stays on the screen when the picture has gone
            self._print(f"from elsewhere: elastictrain attach {shlex.quote(self._status.run_dir)}", "dim")
        self._draw()

    @_guarded
    def catch_up(self, status: Mapping[str, Any], rows: Sequence[MetricsRow], events: Sequence[Event]) -> None:
        """See `follow.Viewer`."""
        self._status = Status.model_validate({**self._status.model_dump(), **status})
        self._rows.extend(rows)
        self._events.extend(telling(events))
        if self._console.is_terminal:
            self._draw()
            return
        for event in self._events:
            self._say(event)
        if rows:
            self._print(progress_line(self._status, list(self._rows)))

    @_guarded
    def row(self, metrics: Mapping[str, Any]) -> None:
        row = MetricsRow.model_validate(metrics)
        while self._rows and self._rows[-1].step >= row.step:
            self._rows.pop()  # the run went back
        self._rows.append(row)
        if self._console.is_terminal:
            self._draw()
        elif self._due(self._every_s) or row.step == self._status.steps or row.evaluation:
            self._print(progress_line(self._status, list(self._rows)))

    @_guarded
    def event(self, event: Event) -> None:
        if event.kind in DETAILS:
            return
        self._events.append(event)
        if self._console.is_terminal:
            self._draw()
        else:
            self._say(event)

    def _say(self, event: Event) -> None:
        self._print(f"{event.time:%H:%M:%S} {describe(event)}", EVENT_STYLES.get(event.kind, ""))

    def close(self) -> None:
        """Leave the last picture on the screen and give the terminal back. Idempotent."""
        if self._closed:
            return
        self._draw_last()
        self._closed = True
        self._stop()

    @_guarded
    def _draw_last(self) -> None:
        self._draw(now=True)

    def _draw(self, *, now: bool = False) -> None:
        if not self._console.is_terminal or self._closed or not (now or self._due(self._redraw_s)):
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        self._live.update(picture(self._status, list(self._rows), list(self._events)), refresh=True)

    def _due(self, every_s: float) -> bool:
        now_s = self._clock()
        if self._drawn_s is not None and now_s - self._drawn_s < every_s:
            return False
        self._drawn_s = now_s
        return True

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(Exception, SystemExit):
                live.stop()

    def _go_blind(self, error: BaseException) -> None:
        self._blind = True
        self._stop()
        with contextlib.suppress(Exception, SystemExit):
            self._print(f"the live view is off ({type(error).__name__}: {error}); the run goes on", "yellow")


def telling(events: Sequence[Event]) -> list[Event]:
    """The last of the events that are worth a place on the screen."""
    return [event for event in events if event.kind not in DETAILS][-EVENTS_SHOWN:]


def progress_line(status: Status, rows: Sequence[MetricsRow]) -> str:
    """Step, loss, tokens/s and world in one line of text. `rows` must not be empty."""
    row = rows[-1]
    total = f"/{status.steps}" if status.steps else ""
    parts = [f"step {row.step}{total}", f"loss {number(row.loss)}"]
    rate = tokens_per_s(rows[-RATE_STEPS:]) or status.tokens_per_s
    if rate:
        parts.append(f"{rate:,.0f} tokens/s")
    parts.append(f"world {row.world or status.world}")
    parts += [f"{name} {number(value)}" for name, value in (row.evaluation or {}).items()]
    if row.skipped is not None:
        parts.append("skipped")
    return "  ".join(parts)


def picture(status: Status, rows: Sequence[MetricsRow], events: Sequence[Event]) -> RenderableType:
    """The panel: progress, figures, workers, last recovery, last events."""
    state = Text(status.state, style=STATE_STYLES.get(status.state, "cyan"))
    step = max(status.step, rows[-1].step if rows else 0)
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True)
    head.add_row(
        state, ProgressBar(total=max(status.steps, 1), completed=min(step, status.steps)), f"{step}/{status.steps}"
    )
    parts: list[RenderableType] = [head, Text(), _figures(status, rows)]
    if events:
        parts.append(Text())
        for event in events:
            line = Text(f"{event.time:%H:%M:%S}  ", style="dim")
            parts.append(line.append(Text(describe(event), style=EVENT_STYLES.get(event.kind, "default"))))
    title = Text(f" {status.name or 'elastictrain'} ", style="bold")
    return Panel(Group(*parts), title=title, subtitle=Text(status.run_dir, style="dim"), padding=(1, 2))


def _figures(status: Status, rows: Sequence[MetricsRow]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    losses = [row.loss for row in rows if row.loss is not None]
    loss = losses[-1] if losses else status.loss
    table.add_row("loss", Text.assemble((f"{number(loss):<10}", "bold"), (sparkline(losses), "blue")))
    rate = tokens_per_s(rows[-RATE_STEPS:]) or status.tokens_per_s
    table.add_row("tokens/s", f"{rate:,.0f}" if rate else "–")
    waited = data_wait(rows[-RATE_STEPS:])
    if waited is not None:
        table.add_row("data wait", data_wait_words(*waited))
    table.add_row(
        "world", f"{count(status.world, 'worker')}, generation {status.generation}, {count(status.spares, 'spare')}"
    )
    if status.lanes:
        lanes = sorted(status.lanes.items())
        shown = ", ".join(f"{worker}: {count}" for worker, count in lanes[:16])
        table.add_row("lanes", shown + (f" … ({len(lanes)} workers)" if len(lanes) > 16 else ""))
    once = status.held_once
    table.add_row(
        "held once", Text(count(once, "block"), style="yellow") if once else "none, every block has its mirror"
    )
    evaluation = next((row.evaluation for row in reversed(rows) if row.evaluation), None)
    if evaluation:
        table.add_row("evaluation", Text(", ".join(f"{name} {number(value)}" for name, value in evaluation.items())))
    if status.exposure_s is not None:
        table.add_row("exposure", exposure_words(status))
    if status.checkpoint_given_up:
        table.add_row("checkpoints", Text(given_up_words(status.checkpoint_given_up), style="yellow"))
    if status.speeds:
        known = sorted(status.speeds.items())
        shown = ", ".join(f"{worker}: {speed:.2f}" for worker, speed in known[:16])
        table.add_row("speeds", shown + (f" … ({len(known)} workers)" if len(known) > 16 else ""))
    taken = taken_over(rows[-RATE_STEPS:])
    if taken is not None:
        table.add_row("taken over", taken_over_words(taken, len(rows[-RATE_STEPS:])))
    dropped = lanes_dropped(rows[-RATE_STEPS:])
    if dropped is not None:
        table.add_row("dropped", f"{count(dropped, 'lane')} in {count(len(rows[-RATE_STEPS:]), 'step')}")
    for words, standing in zip(copies_words(status.copies), status.copies.values(), strict=True):
        table.add_row("copies", Text(words, style="yellow" if standing.get("error") else ""))
    if status.last_recovery:
        table.add_row("last recovery", Text(recovery_words(status.last_recovery)))
    if status.waiting:
        table.add_row("waiting", Text(status.waiting, style="yellow"))
    if status.error:
        table.add_row("error", Text(status.error, style="red"))
    return table


def data_wait_words(share: float, causes: Mapping[str, float]) -> str:
    """How much of the steps goes by waiting for data, and for which part of feeding them."""
    total = sum(causes.values())
    words = f"{share:.1%} of the step"
    if share < 0.01 or not total:
        return words
    return words + ": " + ", ".join(f"{cause} {part / total:.0%}" for cause, part in list(causes.items())[:3])


def taken_over_words(taken: TakenOver, steps: int) -> str:
    """How many lanes others have computed than those whom they were dealt out to, and for nothing."""
    most = sorted(taken.losers.items(), key=lambda item: -item[1])[:4]
    whose = ", of " + ", ".join(f"worker {worker}: {lanes}" for worker, lanes in most) if most else ""
    vain = f"; {count(taken.in_vain, 'lane')} begun in vain" if taken.in_vain else ""
    return f"{count(taken.lanes, 'lane')} in {count(steps, 'step')}{whose}{vain}"


def exposure_words(status: Status) -> str:
    """What would be lost if everything died now."""
    since = "nothing is stored yet" if status.stored_step is None else f"stored: step {status.stored_step}"
    return f"{status.exposure_s or 0.0:.1f} s of training would be lost if everything died now ({since})"


def recovery_words(recovery: Mapping[str, Any]) -> str:
    """A `recovery` event's data in a few words."""
    seconds, redone = recovery_seconds(recovery), recovery.get("steps_redone")
    parts = [
        str(recovery.get("cause") or "unknown cause"),
        f"{seconds:.2f} s" if seconds is not None else "",
        count(redone, "step") + " redone" if redone is not None else "",
        f"restored from {recovery['restored_from']}" if recovery.get("restored_from") else "",
    ]
    return ", ".join(part for part in parts if part)


def sparkline(values: Sequence[float], columns: int = SPARKLINE_COLUMNS) -> str:
    """The last values as bars, `columns` of them, each the mean of a few values; empty for fewer than two values."""
    if len(values) < 2:
        return ""
    per = -(-len(values) // columns)
    groups = [values[max(0, end - per) : end] for end in range(len(values), 0, -per)][::-1]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), max(means)
    if high == low:
        return BARS[0] * len(means)
    return "".join(BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] for mean in means)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
