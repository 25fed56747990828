"""Reports: what became of a run; its incidents, a table of all, and one in full."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastictrain.observe.events import iso
from elastictrain.observe.incidents import Incident, bar, spans
from elastictrain.observe.live import number, recovery_words
from elastictrain.observe.sentences import count, people, place, short_nodes
from elastictrain.observe.summary import Summary

BAR_COLUMNS = 24
PART_WORDS = {
    "detect": ("detect", "magenta", "last sign → noticed"),
    "fence": ("fence", "red", "until it was gone"),
    "park": ("park", "yellow", "until all had stopped"),
    "wait": ("wait", "cyan", "for workers"),
    "form": ("form", "blue", "new generation sealed"),
    "first_commit": ("first commit", "green", "until it was published"),
}
DECISIONS = {
    "drop": "go on with fewer workers",
    "replace": "a new worker takes the place",
    "spare": "a spare that was warm takes the place",
    "wait": "wait, parked, for workers",
    "go back": "go back to what is stored",
    "form again": "form again with the same workers",
}
OUTCOMES = {
    "recovered": "green", "overtaken": "yellow", "finished": "green", "failed": "red", "stopped": "yellow",
}  # fmt: skip


def table(found: Sequence[Incident]) -> Table:
    """A line per incident."""
    drawn = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for name in ("#", "UTC"):
        drawn.add_column(name, no_wrap=True)
    drawn.add_column("what", ratio=1, overflow="fold")
    for name in ("total", "redone", "world"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("", no_wrap=True)
    for incident in found:
        drawn.add_row(
            str(incident.number),
            f"{incident.detected:%m-%d %H:%M:%S}",
            Text(headline(incident)),
            seconds(incident.total_s),
            str(incident.steps_redone),
            f"{incident.world_before} → {incident.world_after}",
            Text(incident.outcome, style=OUTCOMES.get(incident.outcome, "default")),
        )
    return drawn


def headline(incident: Incident) -> str:
    """Who and what in one line: worker 1: its process died."""
    cause, who = short_nodes(incident.cause.splitlines()[0]), people(incident.who)
    return cause if not who or cause.startswith(who) else f"{who}: {cause}"


def full(incident: Incident) -> RenderableType:
    """Everything that is known of one incident."""
    head = Text.assemble(
        (f"incident {incident.number}  ", "bold"),
        (incident.outcome, OUTCOMES.get(incident.outcome, "default")),
        (f"  {iso(incident.detected)}  step {incident.step}{_generations(incident)}", "dim"),
    )
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row("what", Text(headline(incident)))
    for name, lines in (
        ("seen", _seen(incident)),
        ("blamed", _blamed(incident)),
        ("decided", [Text(DECISIONS.get(what, what)) for what in incident.decided]),
        ("seconds", [_bars(incident)]),
        ("cost", [Text(cost(incident))]),
    ):
        rows.add_row(name, Group(*lines) if lines else Text("–"))
    return Group(head, Text(), rows)


def cost(incident: Incident) -> str:
    """What it cost, in words."""
    redone = "no step computed again"
    if incident.steps_redone:
        batches = incident.lane_batches_redone
        redone = f"{count(incident.steps_redone, 'step')} computed again ({batches} lane batches)"
    parts = [redone]
    if incident.blocks_moved:
        size = "" if incident.bytes_moved is None else f" ({_bytes(incident.bytes_moved)})"
        parts.append(f"{count(incident.blocks_moved, 'block')}{size} copied")
    parts.append(f"world {incident.world_before} → {incident.world_after}")
    parts += [f"{people(who)} {word}" for who, word in ((incident.joined, "joined"), (incident.left, "left")) if who]
    if incident.restored_from:
        parts.append(f"restored from {incident.restored_from}")
    return ", ".join(parts)


def _generations(incident: Incident) -> str:
    formed = incident.generations
    if not formed:
        return ""
    return f"  generation {formed[0]}" if len(formed) == 1 else f"  generations {formed[0]} to {formed[-1]}"


def _seen(incident: Incident) -> list[RenderableType]:
    sources = [place(seen.source) for seen in incident.seen]
    wide = max(map(len, sources), default=0)
    lines = Table.grid(padding=(0, 2))
    for _ in range(2):
        lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for seen, source in zip(incident.seen, sources, strict=True):
        lines.add_row(after(seen.at_s - incident.detected_s), source.ljust(wide), Text(short_nodes(seen.what)))
    more = [Text(f"and {incident.seen_more} more", style="dim")] if incident.seen_more else []
    return [lines, *more] if incident.seen else []


def _blamed(incident: Incident) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for blame in incident.blamed:
        where = f" on {place(blame.node)}" if blame.node else ""
        gone = "not known to be gone" if blame.gone_s is None else f"gone {after(blame.gone_s - incident.detected_s)}"
        lines.append(Text(f"worker {blame.worker}{where}: {short_nodes(blame.why)}; {gone}"))
        lines += [Text(f"  {short_nodes(line)}", style="dim") for line in blame.evidence]
    return lines or [Text("nobody")]


def _bars(incident: Incident) -> Table:
    parts = spans(incident.seconds)
    drawn = Table.grid(padding=(0, 1))
    drawn.add_column(no_wrap=True, min_width=12)
    drawn.add_column(no_wrap=True, width=BAR_COLUMNS)
    drawn.add_column(justify="right", no_wrap=True, min_width=7)
    drawn.add_column(style="dim")
    for part in parts:
        name, style, words = PART_WORDS[part.name]
        drawn.add_row(name, Text(bar(part, parts, BAR_COLUMNS), style=style), seconds(part.seconds), words)
    drawn.add_row("total", "", seconds(incident.total_s), "from the detection", style="bold")
    return drawn


def after(relative_s: float) -> str:
    """Seconds from the detection, with their sign."""
    return f"{relative_s:+.3f} s"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f} s" if value < 1 else f"{value:.2f} s"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def summary_table(summary: Summary) -> Table:
    """What became of a run."""
    drawn = Table.grid(padding=(0, 2))
    drawn.add_column(style="dim")
    drawn.add_column(overflow="fold")
    rows = [
        ("outcome", f"{summary.outcome}, {summary.steps} steps"),
        ("loss", f"{number(summary.first_loss)} → {number(summary.last_loss)}"),
        ("tokens/s", f"{summary.tokens_per_s:,.0f}" if summary.tokens_per_s else "–"),
        ("world", " → ".join(map(str, summary.world_sizes)) or "–"),
        *(("recovery", f"{recovery_words(r.model_dump())}, generation {r.generation}") for r in summary.recoveries),
        ("digest", summary.digest or "–"),
        ("run", summary.run_dir),
    ]
    for name, value in rows:
        drawn.add_row(name, Text(value))
    return drawn
