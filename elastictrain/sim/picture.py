"""A report as a table for people."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from elastictrain.sim.report import Outages, Report


def picture(report: Report, wall_s: float) -> Group:
    """Facts of the whole above, one line per cause of an outage below."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    speed = f"{report.events / wall_s:,.0f} a second" if wall_s > 0 else "at once"
    rows = [
        ("outcome", f"{report.phase}: {report.error}" if report.error else report.phase),
        ("simulated", f"{report.hours:g} h of {report.workers:,} workers, seed {report.seed}, in {wall_s:.1f} s"),
        ("events", f"{report.events:,} ({speed})"),
        ("steps", f"{report.steps:,} committed, {report.steps_redone:,} computed again"),
        ("", f"{report.steps_lost} lost, {report.steps_twice} committed twice"),
        ("goodput", f"{report.goodput:.2%}, stepping {report.stepping:.2%} of the time"),
        ("world", f"{report.world_least:,} at least, {report.generations:,} generations"),
        ("went back", f"{report.went_back} times to a checkpoint"),
        ("controller", f"died {report.controller_deaths} times, {report.replayed:,} events replayed"),
        ("lanes", f"moved {report.lanes_moved} times ({report.lanes_moved_back} back, {report.lanes_swung} swings)"),
        *([("", f"{report.lanes_taken_over:,} taken over within a step")] if report.lanes_taken_over else []),
        ("invariants", f"checked after {report.checks:,} events"),
        ("faults", ", ".join(f"{count} × {kind}" for kind, count in report.faults.items()) or "none"),
    ]
    for name, value in rows:
        facts.add_row(name, value)
    outages = Table(title="From the fault to the next seal", title_justify="left")
    outages.add_column("cause")
    for name in ("count", "p50 s", "p95 s", "longest s", "total s"):
        outages.add_column(name, justify="right")
    lines: list[tuple[str, Outages | None]] = [*report.outages.items(), ("all", report.recoveries)]
    for cause, outage in [*lines, ("planned pauses", report.pauses)]:
        if outage is not None:
            seconds = (outage.p50_s, outage.p95_s, outage.longest_s, outage.total_s)
            outages.add_row(cause, f"{outage.count:,}", *(f"{value:,.2f}" for value in seconds))
    return Group(facts, outages) if outages.row_count else Group(facts)
