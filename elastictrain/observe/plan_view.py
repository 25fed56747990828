"""Plans for people: a table, why the first one wins, and a timeline."""

from __future__ import annotations

import io
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.planner.plan import Found, Plan
from elastictrain.planner.schedule import replay, sends

if TYPE_CHECKING:
    from rich.table import Table

FORWARD, BACKWARD, WEIGHTS, EXCHANGE = "#56b4e9", "#0072b2", "#009e73", "#e69f00"
SENT, SENT_BACK = "#666666", "#d55e00"
_EDGE = 0.4
"""Half of a bar's height."""
SHOWN_MICRO_BATCHES = 12


def plan_table(found: Found, *, narrow: bool = False) -> Table:
    """The best plans, a line each. `narrow`: without what the sentences below it say of the first ones."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="Plans, best first", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in ("", "step s", *(() if narrow else ("devices",)), "t x p x w"):
        table.add_column(name, no_wrap=True)
    for name in ("batches", "layers"):
        table.add_column(name, min_width=10, overflow="fold")
    for name in ("today",) if narrow else ("fits", "limit", "today"):
        table.add_column(name, no_wrap=True)
    for rank, plan in enumerate(found.plans, 1):
        cut = plan.cut
        size = f"1 x 1 x {plan.devices}" if cut is None else f"{cut.tensor} x {cut.pipeline} x {cut.workers}"
        ways = "; ".join(dict.fromkeys(plan.ways))
        micro = ways if cut is None else f"{cut.micro_batches} of {cut.micro_batch}{again(plan)}"
        fits = "> 99.9%" if plan.fits > 0.999 else f"{plan.fits:.1%}"
        limit = plan.limit.removeprefix("the slowest stage's ")
        now = "yes" if plan.usable_now else "no"
        if cut is not None:
            zero = "" if cut.workers == 1 else f"ZeRO {cut.zero_stage}"
            micro = ", ".join(filter(None, [micro, schedule(plan), zero]))
        more, last = ((), ()) if narrow else ((str(plan.devices),), (fits, limit))
        table.add_row(str(rank), f"{plan.seconds:.3g}", *more, size, micro, layers(plan), *last, now)
    table.caption = "t x p x w: tensor x pipeline x workers; batches: micro-batches of a worker"
    return table


def how(plan: Plan) -> str:
    """A plan in a few words."""
    if plan.cut is None:
        return f"lanes x {plan.devices} workers, blocks by memory; " + "; ".join(dict.fromkeys(plan.ways))
    cut = plan.cut
    parts = [f"tensor {cut.tensor} x pipeline {cut.pipeline} x {cut.workers} workers"]
    parts.append(f"{cut.micro_batches} micro-batches of {cut.micro_batch}{again(plan)}")
    if cut.pipeline > 1:
        parts.append(schedule(plan))
    if cut.workers > 1:
        parts.append(f"ZeRO {cut.zero_stage}")
    return ", ".join(parts)


def schedule(plan: Plan) -> str:
    """The pipeline's schedule by its usual name; nothing without a pipeline."""
    cut = plan.cut
    if cut is None or cut.pipeline == 1:
        return ""
    name = {"1f1b": "1F1B", "gpipe": "GPipe", "zb-h1": "ZB-H1"}[cut.schedule]
    return name if cut.chunks == 1 else f"{name} in {cut.chunks} chunks"


def again(plan: Plan) -> str:
    """What a pipeline computes again in the backward, as the end of a phrase."""
    cut = plan.cut
    if cut is None:
        return ""
    scores = ", scores computed again" if cut.checkpointing == "selective" else ""
    if not any(plan.again):
        return scores
    if plan.again == plan.layers:
        return ", activations computed again"
    return f"{scores}, activations of {sum(plan.again)} of {sum(plan.layers)} layers computed again"


def layers(plan: Plan) -> str:
    """Layers of the stages, with the group of each where there is more than one."""
    if not plan.layers:
        return ""
    if len(set(plan.stage_groups)) == 1:
        return " ".join(map(str, plan.layers))
    runs = groupby(zip(plan.stage_groups, plan.layers, strict=True), key=lambda stage: stage[0])
    return "; ".join(f"group {group}: {' '.join(str(count) for _, count in run)}" for group, run in runs)


def reasons(found: Found) -> list[str]:
    """Why the first plan wins and what limits it, as sentences."""
    first = found.plans[0]
    said = [f"{how(first)}: {first.seconds:.3g} s a step, limited by {first.limit}."]
    if len(found.plans) > 1:
        other = found.plans[1]
        slower = other.seconds / first.seconds - 1
        said.append(f"The next best ({how(other)}; limited by {other.limit}) takes {slower:.1%} longer.")
    else:
        said.append("No other plan comes close.")
    said.append(_bound(found))
    if not first.usable_now:
        said.append("It cannot be run yet: the engine has neither pipeline nor tensor parallelism.")
    return said


def _bound(found: Found) -> str:
    """What no plan beats. A replayed schedule may take less than the closed form says, so the two are not compared."""
    searched = f"({found.examined:,} of {found.candidates:,} candidates worked out, the others " + (
        "not: the search ended at its limit)." if found.ended_early else "ruled out by their bounds)."
    )
    if all(plan.replayed_s is None for plan in found.plans):
        return (
            f"No plan of the kinds searched takes less than {found.bound_s:.3g} s: the first is within "
            f"{max(found.gap, 0.0):.1%} of the best under the cost model {searched}"
        )
    counted = min(plan.step_s for plan in found.plans)
    return (
        f"No plan of the kinds searched takes less than {found.bound_s:.3g} s counted in closed form, and the best of "
        f"these takes {counted:.3g} s: within {max(found.gap, 0.0):.1%} {searched} The seconds above, and the order, "
        f"are those of schedules replayed operation by operation, for which there is no such bound; the first takes "
        f"{found.plans[0].step_s:.3g} s in closed form."
    )


def settings_of(plan: Plan) -> dict[str, Any]:
    """The settings of `workers:` that make a job use a plan of lanes and blocks today. Worker numbers go with the
    groups of the cluster, in their order; devices without lanes are left out.
    """
    if plan.lane_plan is None:
        raise ConfigError("only plans of lanes and blocks can be written as settings of a job")
    used = [n for n, lanes in enumerate(plan.lane_plan.lanes) if lanes]
    most = max(plan.lane_plan.blocks_share)
    return {
        "max": len(used),
        "lane_shares": {rank: plan.lane_plan.lanes[n] for rank, n in enumerate(used)},
        "block_shares": {rank: round(plan.lane_plan.blocks_share[n] / most, 4) for rank, n in enumerate(used)},
    }


def dealt(plan: Plan) -> list[str]:
    """Lanes and share of the blocks for every kind of device, a line each."""
    if plan.lane_plan is None:
        return []
    lines, at = [], 0
    for team, way in zip(plan.lane_plan.teams, plan.lane_plan.ways, strict=True):
        lanes = Counter(plan.lane_plan.lanes[at : at + team.count])
        share = sum(plan.lane_plan.blocks_share[at : at + team.count])
        at += team.count
        each = ", ".join(
            f"{count} with {n} lane{'' if n == 1 else 's'}" for n, count in sorted(lanes.items(), reverse=True)
        )
        lines.append(f"{team.name}: {each}; {share:.1%} of the blocks; {way.name}")
    return lines


def draw_plan(plan: Plan, out: Path) -> Path:
    """Write the plan's timeline as PNG: a pipeline's schedule replayed, or what each kind of worker does in a step.

    Raises ConfigError when matplotlib is missing, ClusterError when the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"the timeline needs matplotlib ({error}); install it with: pip install 'elastictrain[plot]'"
        ) from error
    figure = Figure(figsize=(11, 2.4 + 0.3 * max(len(plan.layers), 4)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    about = "" if plan.cut is None else f": {draw_pipeline(panel, plan)}"
    if plan.cut is None:
        _draw_lanes(panel, plan)
    panel.set_xlabel(f"seconds{about}")
    panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()
    figure.suptitle(how(plan), fontsize=10, x=0.01, ha="left")
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    try:
        out.write_bytes(buffer.getvalue())
    except OSError as error:
        raise ClusterError(f"{out}: cannot be written: {error.strerror or error}") from error
    return out


def draw_pipeline(panel: Any, plan: Plan) -> str:
    """Draw what the plan was replayed with, and return what of it is shown. A send is a line from the end of what is
    sent to when it is there.
    """
    from matplotlib.collections import LineCollection

    cut, work = plan.cut, plan.work
    assert cut is not None
    assert work is not None
    count = min(cut.micro_batches, max(SHOWN_MICRO_BATCHES // cut.pipeline, 1) * cut.pipeline)
    operations = replay(
        work.forward_s, work.backward_s, count, send_s=work.send_s, wrap_s=work.wrap_s, schedule=cut.schedule,
        chunks=cut.chunks,
    )  # fmt: skip
    sent = sends(operations, send_s=work.send_s, wrap_s=work.wrap_s, chunks=cut.chunks)
    for kind, colour, said in (("forward", SENT, "sent on"), ("backward", SENT_BACK, "sent back")):
        lines = [
            [(one.begin_s, one.sender + _EDGE * down), (one.end_s, one.receiver - _EDGE * down)]
            for one in sent if one.kind == kind
            for down in (1 if one.receiver > one.sender else -1,)
        ]  # fmt: skip
        if lines:
            panel.add_collection(LineCollection(lines, colors=colour, linewidths=0.9, label=said, zorder=3))
    colours = {"forward": FORWARD, "backward": BACKWARD, "weight": WEIGHTS}
    names_of = {"forward": "forward", "backward": "backward", "weight": "backward of the weights"}
    named = set()
    for op in operations:
        label = None if op.kind in named else names_of[op.kind]
        named.add(op.kind)
        panel.barh(op.stage, op.end_s - op.begin_s, left=op.begin_s, height=2 * _EDGE, color=colours[op.kind],
                   edgecolor="white", linewidth=0.6, label=label)  # fmt: skip
    names = [
        f"stage {j} · {n} layers · group {g}"
        for j, (n, g) in enumerate(zip(plan.layers, plan.stage_groups, strict=True))
    ]
    panel.set_yticks(range(len(names)), names, fontsize=8)
    some = f"the first {count} of {cut.micro_batches} micro-batches; " if count < cut.micro_batches else ""
    return f"{some}the exchange of gradients after them is not drawn"


def _draw_lanes(panel: Any, plan: Plan) -> None:
    assert plan.lane_plan is not None
    names: list[str] = []
    at = 0
    for team, way in zip(plan.lane_plan.teams, plan.lane_plan.ways, strict=True):
        for lanes, count in sorted(Counter(plan.lane_plan.lanes[at : at + team.count]).items(), reverse=True):
            row = len(names)
            for lane in range(lanes):
                panel.barh(row, way.lane_s, left=lane * way.lane_s, height=0.7, color=BACKWARD, edgecolor="white",
                           linewidth=0.6, label="a lane" if row == lane == 0 else None)  # fmt: skip
            if lanes:
                panel.barh(row, way.fixed_s, left=lanes * way.lane_s, height=0.7, color=EXCHANGE,
                           label="exchange, apply, gather" if row == 0 else None)  # fmt: skip
            names.append(f"{count} x {team.name}: {lanes} lanes")
        at += team.count
    panel.set_yticks(range(len(names)), names, fontsize=8)
