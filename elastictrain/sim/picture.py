"""Reports as tables for people."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from elastictrain.sim.pipeline_report import PipelineReport
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


def pipeline_picture(report: PipelineReport, wall_s: float) -> Group:
    """The whole above, what was done below."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    spoken = (
        f"worker {one['worker']} {one['what']} at step {one['step']} ({one['slowness']:g} x)" for one in report.named
    )
    rows = [
        ("simulated", f"{report.steps:,} steps of {report.pipelines} x {report.stages} stages, seed {report.seed}"),
        ("", f"decided and simulated, in {wall_s:.1f} s; the engine runs no pipelines yet"),
        ("a step", f"{report.healthy_step_s:.3f} s when nobody is slow"),
        ("nothing done", f"{report.none_s:,.0f} s"),
        ("as decided", f"{report.ours_s:,.0f} s, {report.paused_s:,.1f} s of it in changes"),
        ("at best", f"{report.oracle_s:,.0f} s for the same price, {report.free_s:,.0f} s without one"),
        ("of that won", f"{report.oracle_share:.1%}"),
        ("slow", ", ".join(f"worker {one['worker']} {one['factor']:g} x in steps {one['begin']} to {one['end'] - 1}"
                           for one in report.slow) or "nobody"),
        ("named", ", ".join(spoken) or "nobody"),
        ("changes", f"{len(report.changes)} ({', '.join(report.outcomes) or 'none judged'})"),
        ("", f"{report.reversals} to and fro, {report.false_actions} while nobody was slow"),
    ]  # fmt: skip
    for name, value in rows:
        facts.add_row(name, value)
    done = Table(title="What was done", title_justify="left")
    done.add_column("step", justify="right")
    done.add_column("what", no_wrap=True)
    for name in ("before s", "after s", "cost s"):
        done.add_column(name, justify="right")
    done.add_column("workers and layers of every pipeline", overflow="fold")
    for one in report.changes:
        stages = "; ".join(
            " ".join(f"{worker}:{layers}" for worker, layers in zip(each["workers"], each["layers"], strict=True))
            for each in one["placements"]
        )
        done.add_row(str(one["step"]), one["action"], *(f"{one[name]:.3f}" for name in ("before_s", "after_s")),
                     f"{one['cost_s']:.1f}", stages)  # fmt: skip
    return Group(facts, done) if report.changes else Group(facts)
